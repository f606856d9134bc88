"""The control loop: an operating point for every frame. Pure decisions; no I/O, `now` is an argument.

    measurement (what was seen) -> estimator (what the link will do) -> controller (what to do now)

Every point is judged in every scenario of the link's rate, the packet's size and the compute time:

    core      |wait| compute |
    link                     |backlog| transmit |
    answer                                      | RTT | server |   <= deadline?

    value(point) = accuracy x share of scenarios in time  -  what its spilling into the next frame costs

and the best value wins. The backlog is that of the frames in flight, scenario by scenario: an estimator that ignores
its own queue does worse than never adapting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..models.exceptions import OperatingPointError
from ..models.operating_point import Kind, OperatingPoint
from .choice import Choice, ControlSettings
from .estimator import RateEstimator, censored_bound
from .lookahead import Lookahead
from .measurement import ComputeTimes, Floats, HoldTime, InFlight, PacketSizes, RoundTrip
from .menu import Menu, smallest_probe
from .objective import Prices
from .steady import NOBODY, SteadyExperts

__all__ = ["Choice", "ControlLoop", "ControlSettings"]

LEAST_P = 0.02
"""A chance smaller than this is none: better to leave the core idle until the next frame."""
SLOW, FAST = 0.1, 0.75
"""Shares of the rate's distribution by which slices that leave one by one are timed."""
SURELY_FAST = 0.1
"""A link needs no look at its distribution if this share of its rate would still do."""
MOST_EXPECTED = 256
"""Answers that are waited for at once; those of more frames than that never came."""
MOST_MISSED = 4
"""More frames than that at once are a pause, not a core that is behind."""
STEADY_Z = 0.5
"""What a point would have come to is worked out with packets this many standard deviations over their median."""
USEFUL = 3.0
"""From so many times the useless rate on, a link is worth asking often."""
FREE_PROBE = 0.2  # probes that take nobody's place go out at this share of the interval


class ControlLoop:
    """Chooses operating points and learns from what comes back.

    Args:
        points: all that may be chosen; at least one.
        deadline_s: capture to answer.
        frame_interval_s: time between captured frames.
        uncut_s: seconds that the uncut model takes on this device (start value: compute = `edge_share` x `uncut_s`).
        settings: see `ControlSettings`.
        compute_s: measured seconds by `OperatingPoint.stage`, in place of that start value.

    Raises:
        OperatingPointError: `points` is empty, or a time is not positive.
    """

    def __init__(
        self,
        points: Sequence[OperatingPoint],
        *,
        deadline_s: float,
        frame_interval_s: float,
        uncut_s: float,
        settings: ControlSettings = ControlSettings(),  # noqa: B008  frozen
        compute_s: Mapping[str, float] = {},
    ) -> None:
        if not points:
            raise OperatingPointError("there is no operating point to choose from; the bundle's table is empty")
        if min(deadline_s, frame_interval_s, uncut_s) <= 0:
            raise OperatingPointError(
                f"deadline ({deadline_s} s), frame interval ({frame_interval_s} s) and uncut time ({uncut_s} s) "
                "must be greater than 0"
            )
        self.points = tuple(points)
        self.deadline_s = deadline_s
        self.frame_interval_s = frame_interval_s
        self.settings = settings
        stages = list(dict.fromkeys(point.stage for point in points))
        start = {point.stage: compute_s.get(point.stage, point.edge_share * uncut_s) for point in points}
        self._stages = stages
        self._stage_of = np.array([stages.index(point.stage) for point in points], dtype=np.intp)
        self._index = {point.id: index for index, point in enumerate(points)}
        self._accuracy = np.array([point.accuracy for point in points])
        is_local = np.array([point.kind is Kind.LOCAL for point in points])
        self._local = [index for index, point in enumerate(points) if point.kind is Kind.LOCAL]
        self._compute = ComputeTimes(start)
        self._sizes = PacketSizes(points, self._stage_of, len(stages))
        self._round_trip = RoundTrip(settings.rtt_s, settings.rtt_window_s)
        self._hold = HoldTime(settings.server_s)
        self._flight = InFlight(settings.overhead_bytes)
        sent_sizes = [point.bytes_median for point in points if point.kind is not Kind.LOCAL]
        # A rate at which the smallest packet takes a whole deadline.
        self._smallest_bytes = min(sent_sizes, default=0.0)
        self._useless_bps = 8.0 * self._smallest_bytes / deadline_s
        self._held_bits = 0.0
        self._estimator = RateEstimator(
            prior_bps=settings.prior_bps, useless_bps=self._useless_bps, scenarios=settings.scenarios
        )
        self._menu = Menu(
            points,
            self._stage_of,
            stages,
            self._sizes,
            self._compute,
            overhead_bytes=settings.overhead_bytes,
            scenarios=settings.scenarios,
        )
        self._prices = Prices(
            settings.objective,
            accuracy_floor=settings.accuracy_floor,
            bytes_per_day=settings.bytes_per_day,
            budget_window_s=settings.budget_window_s,
            bytes_scale=float(np.median(sent_sizes or [1.0])),
            seconds_scale=frame_interval_s,
        )
        self._steady = SteadyExperts(self._accuracy, is_local, deadline_s=deadline_s, frame_interval_s=frame_interval_s)
        self._rate_bps = math.inf  # as last measured
        self._shares = np.full(settings.scenarios, 1.0 / settings.scenarios)
        self._unreplayed: list[float] = []  # when the frames were captured that the experts have not had
        self._captured_at = -math.inf  # of the frame that was chosen for last
        self._chosen = self.points[0]
        self._expected: dict[int, tuple[float, float]] = {}  # frame id -> due, accuracy
        self._probe_index = smallest_probe(points, start, frame_interval_s)
        self._best_local = float(self._accuracy[is_local].max(initial=0.0))
        self._connected = True
        self._probe_at = -math.inf  # when the link was last heard of or asked
        self._probe_wait_s = settings.probe_interval_s
        self._probing: float | None = None  # captured_at of the frame that is a probe
        self.server_queue_depth = 0
        self._lookahead = Lookahead(
            self._accuracy,
            is_local,
            self._stage_of,
            deadline_s=deadline_s,
            frame_interval_s=frame_interval_s,
            discount=settings.discount,
        )
        self._lookahead.solve(*self._lookahead_inputs())
        self._menu.keep(self._lookahead.kept)

    # What the pipeline reports -------------------------------------------------------------------------------------

    def on_computed(self, point: OperatingPoint, seconds: float, now: float) -> None:
        """`seconds`: all edge compute of one frame (head, encoder and coding; or image coding; or the uncut model)."""
        self._compute.add(point.stage, seconds)
        self._lookahead.refresh(*self._lookahead_inputs())
        if self._menu.kept is not self._lookahead.kept:
            self._menu.keep(self._lookahead.kept)
        if point.kind is Kind.LOCAL and now <= self._captured_at + self.deadline_s:
            self._answered(point.accuracy)
        self._replay_steady(now)

    def on_coded(self, point: OperatingPoint, size_bytes: int) -> None:
        """The packet's real size."""
        if point.id in self._index:
            self._sizes.add(self._index[point.id], size_bytes)

    def on_written(self, frame_id: int, size_bytes: int, now: float) -> None:
        """A packet was handed to the stream."""
        self._flight.written(frame_id, size_bytes, now)
        self._prices.sent(size_bytes + self.settings.overhead_bytes)
        if len(self._expected) >= MOST_EXPECTED:
            self._expected.pop(next(iter(self._expected)))
        self._expected[frame_id] = (self._captured_at + self.deadline_s, self._chosen.accuracy)

    def on_result(self, frame_id: int, now: float, *, server_s: float, queue_depth: int) -> None:
        """A result came, whatever its status. `server_s`: how long the server held the frame."""
        ack = now - max(server_s, 0.0)
        answered = self._flight.acknowledged(frame_id, ack, self._round_trip.seconds)
        self.server_queue_depth = queue_depth
        due, accuracy = self._expected.pop(frame_id, (-math.inf, 0.0))
        if now <= due:
            self._answered(accuracy)
        if answered is None:
            return
        sent, sample = answered
        self._rate_bps = sample.rate_bps(self._estimator.resolution_s)
        self._hold.add(server_s)
        self._round_trip.add(sent.ready, ack, sent.bits, now)
        known = self._estimator.known
        could_send = not known or self._estimator.median_bps > self._useless_bps
        is_back = could_send and now - sent.ready > self._outage_after_s
        if is_back and known and sample.bits < self._useless_bps * sample.transmit_s:
            # At such a rate nothing could be sent, and a moment ago it could: the frame sat out an outage, which says
            # nothing of the rate after it. If the next one is like that too, it is the link's rate.
            self._estimator.forget()
        else:
            self._estimator.add(sample, now)
        self._probe_at = -math.inf if is_back else now
        if self._prices.free and self._estimator.median_bps > USEFUL * self._useless_bps:
            self._probe_wait_s = self.settings.probe_interval_s

    def on_round_trip(self, seconds: float, now: float) -> None:
        """A round trip of something tiny (the stream's greeting) was timed."""
        self._round_trip.add_timed(seconds, now)

    def on_connected(self, now: float) -> None:  # noqa: ARG002
        """The stream is up (again)."""
        self._connected = True
        self._flight.clear()
        self._expected.clear()
        self._estimator.forget()
        self._probe_wait_s = self.settings.probe_interval_s
        self._probe_at = -math.inf

    def on_disconnected(self, now: float) -> None:  # noqa: ARG002
        """The stream is down: only local answers until `on_connected`; what was in flight is lost."""
        self._connected = False
        self._held_bits = 0.0
        self._flight.clear()
        self._expected.clear()

    # What the pipeline asks ----------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Frames that were written and are not answered."""
        return len(self._flight)

    def rate_bps(self, now: float) -> float:
        """Median estimate of the link's rate, the censored bound applied; infinite while unknown. For display."""
        if not self._estimator.known:
            return math.inf
        return min(self._estimator.median_bps, self._bound(now))

    def in_outage(self, now: float) -> bool:
        """Whether the stream is down, or nothing came back of a frame that was written more than a deadline ago."""
        oldest = self._flight.oldest
        return not self._connected or (oldest is not None and now - oldest.ready > self._outage_after_s)

    def choose(self, now: float, captured_at: float, *, compute_free_at: float) -> Choice:
        """The operating point for the frame captured at `captured_at`; the core is free at `compute_free_at`."""
        menu, prices = self._menu, self._prices
        menu.update()
        self._count_capture(now, captured_at)
        start = max(now, compute_free_at)
        next_capture = captured_at + self.frame_interval_s
        rates = self._estimator.scenarios(now, self._bound(now))
        per_bit = 1.0 / rates
        free = self._link_free(per_bit)
        if (held := self._held(now, captured_at)) > 0:
            free = np.maximum(free, now) + held * per_bit
        finish = self._finish(start, free, per_bit)
        due = captured_at + self.deadline_s
        on_time = (finish <= due - self._there_and_back_s) @ self._shares
        for row in menu.local:
            seconds = float(menu.seconds[menu.stage_of[row]])
            p = self._compute.p_within(due - start, seconds)
            on_time[row] = p if p >= LEAST_P else 0.0
        finish -= next_capture
        value = self._lookahead.after(menu.seconds + (start - next_capture), menu.stage_of, finish, rates)
        value += menu.accuracy * on_time
        if not prices.free:
            value -= prices.per_byte * menu.expected_bytes() + prices.per_second * menu.seconds[menu.stage_of]
            dear = ~menu.is_local & (menu.expected_bytes() > prices.affordable_bytes)
            value[dear] = -math.inf
            on_time[dear] = 0.0
        if self.in_outage(now) or len(self._flight) >= self._most_in_flight:
            value[~menu.is_local] = -math.inf
            on_time[~menu.is_local] = 0.0
        row = int(value.argmax())
        if self._steady.leader != NOBODY and prices.free:
            row = self._follow(row, value, on_time)
        best, p_on_time = int(menu.kept[row]), float(on_time[row])
        probe = self._wants_probe(now, best, p_on_time)
        if probe:
            best, p_on_time = self._probe_index, 0.0
            self._probing = captured_at
        self._chosen = point = self.points[best]
        ready = start + float(menu.seconds[self._stage_of[best]])
        if point.kind is Kind.LOCAL:
            answer = ready
        elif probe or not self._connected:
            answer = math.inf
        else:
            middle = len(rates) // 2
            transmit = float(menu.middle_bits[row]) * float(per_bit[middle])
            answer = max(ready, float(free[middle])) + transmit + self._there_and_back_s
        return Choice(point, p_on_time, answer - captured_at, self.rate_bps(now), probe)

    def worth_writing(self, now: float, captured_at: float, size_bytes: int) -> bool:
        """Whether a coded frame can still be answered in time, if the link is as fast as may be hoped. Else drop it."""
        if not self._connected:
            return False
        if self._probing == captured_at:
            return True
        if size_bytes + self.settings.overhead_bytes > self._prices.affordable_bytes:
            return False
        rates = self._estimator.scenarios(now, self._bound(now))
        per_bit = 1.0 / rates[-2:-1]
        bits = 8.0 * (size_bytes + self.settings.overhead_bytes)
        finish = max(now, float(self._link_free(per_bit)[0])) + bits * float(per_bit[0])
        if finish + self._there_and_back_s <= captured_at + self.deadline_s:
            return True
        # A packet that is ready costs nothing but its bytes. If the link has not been heard of for a while, they are
        # well spent: who drops every frame for being late at an old estimate never learns a new one.
        if len(self._flight) or now < self._probe_at + FREE_PROBE * self._probe_wait_s:
            return False
        self._probe_at = now
        self._probe_wait_s = min(2 * self._probe_wait_s, self.settings.probe_interval_max_s)
        return True

    def _finish(self, start: float, free: Floats, per_bit: Floats) -> Floats:
        """When the link has sent each point's packet, float64 [points, scenarios]; of local ones, when it is free."""
        menu = self._menu
        begin = np.multiply.outer(menu.seconds, menu.spread)
        begin += start
        np.maximum(begin, free, out=begin)
        for stage in menu.local_stages:
            begin[stage] = free
        finish = menu.bits * per_bit
        finish += begin.take(menu.stage_of, axis=0)
        return np.asarray(finish, dtype=np.float64)

    def _held(self, now: float, captured_at: float) -> float:
        """Bits of the frame before, which leaves in parts, that this one has to wait for; none where nothing would be
        in time behind them, since they will be given up then."""
        if self._held_bits and not self.fits(now, captured_at, round(self._held_bits / 8 + self._smallest_bytes)):
            self._held_bits = 0.0
        return self._held_bits

    # A frame that leaves in parts, so that its rest can be given up ------------------------------------------------

    def in_parts(self, now: float, size_bytes: int) -> bool:
        """Whether a packet's slices should leave one by one: a slow scenario needs long for all of them."""
        seconds, bits = self.settings.parts_from_s, 8.0 * size_bytes
        if bits < seconds * self.rate_bps(now) * SURELY_FAST:
            return False
        return bits * self._per_bit(now, SLOW) > seconds

    def fits(self, now: float, captured_at: float, size_bytes: int) -> bool:
        """Whether so many further bytes can be answered in time, if the link is as fast as it most likely is."""
        per_bit = self._per_bit(now, 0.5)
        finish = max(now, self._free_at(per_bit)) + 8.0 * size_bytes * per_bit
        return self._connected and finish + self._there_and_back_s <= captured_at + self.deadline_s

    def next_part_at(self, now: float) -> float:
        """When the next slice may leave: when a fast link would have sent what is on its way. So the link is never
        idle for long, and the estimate can rise."""
        return max(now, self._free_at(self._per_bit(now, FAST)))

    def patience_s(self, now: float, captured_at: float, size_bytes: int) -> float:
        """How long the server may wait for the rest of a frame whose first `size_bytes` are written now."""
        arrives = now + 8.0 * size_bytes * self._per_bit(now, FAST)
        return captured_at + self.deadline_s - arrives - self._there_and_back_s

    def on_continued(self, frame_id: int, size_bytes: int, now: float) -> None:  # noqa: ARG002
        """One more slice of a frame was handed to the stream."""
        self._flight.continued(frame_id, size_bytes)

    def on_held(self, size_bytes: int) -> None:
        """So much of a frame that leaves in parts has still to leave; what comes after it waits for that too."""
        self._held_bits = 8.0 * size_bytes

    # ---------------------------------------------------------------------------------------------------------------

    def _per_bit(self, now: float, share: float) -> float:
        """Seconds a bit at the rate that the link exceeds with probability 1 - share."""
        rates = self._estimator.scenarios(now, self._bound(now))
        return 1.0 / float(rates[min(int(share * len(rates)), len(rates) - 1)])

    def _free_at(self, per_bit: float) -> float:
        return float(self._link_free(np.array([per_bit]))[0])

    @property
    def _there_and_back_s(self) -> float:
        return self._round_trip.seconds + self._hold.high_s

    @property
    def _outage_after_s(self) -> float:
        return self.deadline_s + self._round_trip.seconds

    @property
    def _most_in_flight(self) -> int:
        if self.settings.max_in_flight > 0:
            return self.settings.max_in_flight
        return math.ceil(self.deadline_s / self.frame_interval_s) + 1

    def _bound(self, now: float) -> float:
        oldest = self._flight.oldest
        if oldest is None:
            return math.inf
        round_trip = self._round_trip.seconds
        return censored_bound(oldest.bits, now - round_trip - self._hold.high_s - self._flight.begun(round_trip))

    def _link_free(self, per_bit: Floats) -> Floats:
        """When the link will have sent what is in flight, by scenario; `per_bit` in seconds."""
        free = np.full(len(per_bit), self._flight.begun(self._round_trip.seconds))
        for frame in self._flight.frames:
            np.maximum(free, frame.ready, out=free)
            free += frame.bits * per_bit
        return free

    def _answered(self, accuracy: float) -> None:
        self._prices.answered(accuracy)
        self._steady.answered(accuracy)

    def _follow(self, row: int, value: Floats, on_time: Floats) -> int:
        """The leading expert's row, if it can be used now; else `row`."""
        for at in np.flatnonzero(self._menu.kept == self._steady.leader):
            if np.isfinite(value[at]):
                on_time[at] = max(on_time[at], LEAST_P)
                return int(at)
        return row

    def _count_capture(self, now: float, captured_at: float) -> None:
        """Count the frames captured up to this one, those that the core had no time for among them."""
        frames = 1
        if math.isfinite(self._captured_at):
            frames = max(round((captured_at - self._captured_at) / self.frame_interval_s), 0)
            self._unreplayed += [self._captured_at + n * self.frame_interval_s for n in range(min(frames, MOST_MISSED))]
            del self._unreplayed[:-MOST_MISSED]
        self._prices.captured(now, frames)
        self._captured_at = captured_at

    def _replay_steady(self, now: float) -> None:
        """Let the experts have the frames before the one that was chosen for last. Done after a frame's compute: no
        decision waits for it, and more is known of the link."""
        if self._unreplayed:
            rate = min(self._rate_bps, self._bound(now))
            seconds = self._menu.seconds.take(self._stage_of)
            bits = 8.0 * (self._sizes.quantile(STEADY_Z) + self.settings.overhead_bytes)
            for captured_at in self._unreplayed:
                self._steady.frame(captured_at, seconds, bits, rate, self._there_and_back_s)
            self._unreplayed.clear()

    def _lookahead_inputs(self) -> tuple[Floats, Floats, float]:
        """Seconds and bits by point, and the way there and back: what the lookahead is solved for."""
        self._menu.update()
        bits = 8.0 * (self._sizes.quantile(self.settings.size_z) + self.settings.overhead_bytes)
        return self._menu.seconds[self._stage_of], bits, self._there_and_back_s

    def _wants_probe(self, now: float, best: int, p_on_time: float) -> bool:
        """Whether to send a probe in place of the best choice, which says nothing of the link."""
        if best not in self._local and p_on_time > 0:
            return False
        # A frame that would be dropped anyway costs nothing but its bytes.
        oldest = self._flight.oldest
        wait = self._probe_wait_s * (FREE_PROBE if p_on_time <= 0 and oldest is None else 1.0)
        if self._probe_index < 0 or not self._connected or now < self._probe_at + wait:
            return False
        longest = self.settings.probe_interval_max_s
        if oldest is not None and now - oldest.ready <= longest:
            return False  # that frame is the probe: its answer will come when the link is back
        # Where a local answer costs the next frame nothing, no link could do better: there is nothing to learn.
        seconds = float(self._menu.seconds[self._stage_of[best]])
        local_is_free = best in self._local and seconds <= self.frame_interval_s
        if local_is_free and self._best_local >= float(self._accuracy.max()):
            return False
        self._probe_at = now
        self._probe_wait_s = longest if oldest is not None else min(2 * self._probe_wait_s, longest)
        return True

"""The control loop: an operating point for every frame. Pure decisions; no I/O, `now` is an argument.

    measurement (what was seen) -> estimator (what the link will do) -> controller (what to do now)

Every point is judged in every scenario of the link's rate, the packet's size and the compute time:

    core      |wait| compute |
    link                     |backlog| transmit |
    answer                                      | RTT | server |   <= deadline?

    value(point) = accuracy x share of scenarios in time  -  what its spilling into the next frame costs

and the best value wins; it may be that of skipping the frame, where the next one is worth more. The backlog is that of
the frames in flight, scenario by scenario: an estimator that ignores its own queue does worse than never adapting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..models.exceptions import OperatingPointError
from ..models.operating_point import Kind, OperatingPoint
from .choice import Choice, ControlSettings
from .fallback import Fallback
from .hoped import Hoped
from .link_view import LinkView
from .lookahead import Lookahead
from .measurement import ComputeTimes, Floats, PacketSizes
from .menu import Menu, smallest_probe
from .objective import Prices
from .probing import Probing
from .second_look import LevelTerms, SecondLook
from .steady import NOBODY, SteadyExperts

__all__ = ["Choice", "ControlLoop", "ControlSettings"]

LEAST_P = 0.02
"""A chance smaller than this is none: better to leave the core idle until the next frame."""
ROUNDING_S = 1e-9
STEADY_Z = 0.5
"""What a point would have come to is worked out with packets this many standard deviations over their median."""


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
        self.points, self.settings = tuple(points), settings
        self.deadline_s, self.frame_interval_s = deadline_s, frame_interval_s
        fitting = math.ceil(deadline_s / frame_interval_s - ROUNDING_S)
        self.most_waiting = max(1, min(settings.most_waiting, fitting))
        """So many captured frames may wait for the device; the oldest is to be decided on first."""
        stages = self._stages = list(dict.fromkeys(point.stage for point in points))
        start = {point.stage: compute_s.get(point.stage, point.edge_share * uncut_s) for point in points}
        self._stage_of = np.array([stages.index(point.stage) for point in points], dtype=np.intp)
        self._index = {point.id: index for index, point in enumerate(points)}
        self._accuracy = np.array([point.accuracy for point in points])
        is_local = np.array([point.kind is Kind.LOCAL for point in points])
        self._local = np.flatnonzero(is_local).tolist()
        self._compute = ComputeTimes(start)
        self._sizes = PacketSizes(points, self._stage_of, len(stages))
        sent = [point for point in points if point.kind is not Kind.LOCAL]
        sent_sizes = [point.bytes_median for point in sent]
        self._least_bytes = min((point.bytes_p95 for point in sent), default=0.0) + settings.overhead_bytes
        self.link = LinkView(settings, deadline_s=deadline_s, smallest_bytes=min(sent_sizes, default=0.0))
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
            least_bytes=self._least_bytes,
            bytes_scale=float(np.median(sent_sizes or [1.0])),
            seconds_scale=frame_interval_s,
        )
        self._steady = SteadyExperts(self._accuracy, is_local, deadline_s=deadline_s, frame_interval_s=frame_interval_s)
        self._shares = np.full(settings.scenarios, 1.0 / settings.scenarios)
        self._captured_at = -math.inf  # of the frame that was chosen for last
        self._chosen = self.points[0]
        self._hoped = Hoped(self._prices.answered, self._steady.answered)
        self._most_in_flight = settings.max_in_flight or math.ceil(deadline_s / frame_interval_s) + 1
        # A probe that is computed in half of the deadline can be an answer, too.
        self._probe_limit_s = min(frame_interval_s, deadline_s / 2)
        self._probe_index = smallest_probe(points, start, self._probe_limit_s)
        self._probing = Probing(settings.probe_interval_s, settings.probe_interval_max_s)
        self.server_queue_depth = 0
        self._lookahead = Lookahead(
            self._accuracy,
            is_local,
            self._stage_of,
            deadline_s=deadline_s,
            frame_interval_s=frame_interval_s,
            discount=settings.discount,
            frames_wait=self.most_waiting > 1,
        )
        self._lookahead.solve(*self._lookahead_inputs())
        self._menu.keep(self._lookahead.kept)
        self._fallback = Fallback(points if settings.fallback else (), self._stage_of, self._lookahead)
        terms = LevelTerms(deadline_s, frame_interval_s, settings.overhead_bytes, settings.scenarios)
        self._second_look = SecondLook(self._accuracy, self._stage_of, self._sizes, self.link, self._lookahead, terms)

    # What the pipeline reports -------------------------------------------------------------------------------------

    def on_computed(self, point: OperatingPoint, seconds: float, now: float) -> None:
        """`seconds`: all edge compute of one frame (head, encoder and coding; or image coding; or the uncut model)."""
        self._compute.add(point.stage, seconds)
        self._lookahead.refresh(*self._lookahead_inputs())
        if self._menu.kept is not self._lookahead.kept:
            self._menu.keep(self._lookahead.kept)
        if point.kind is Kind.LOCAL:
            self.on_kept(point.accuracy, now)
        self._replay_steady(now)

    def on_reserve(self, reserve: OperatingPoint, seconds: float) -> None:
        """An answer in reserve was computed at a local point, in so many seconds."""
        self._compute.add(reserve.stage, seconds)

    def on_fallback(self, reserve: OperatingPoint, frame_id: int) -> None:
        """Such an answer was given to a frame: the server's, should it still come, counts for the link alone."""
        self._hoped.instead(frame_id, reserve.accuracy)

    def on_kept(self, accuracy: float, now: float) -> None:
        """A frame that is not sent: the device has answered it by itself, or has seen that nothing is in it."""
        if now <= self._captured_at + self.deadline_s:
            self._hoped.given(accuracy)

    def on_coded(self, point: OperatingPoint, size_bytes: float) -> None:
        """The packet's real size; of one that was predicted from an earlier frame, its size without that."""
        if point.id in self._index:
            self._sizes.add(self._index[point.id], size_bytes)
            self._menu.update(self.link.wait_bits)  # so that no decision has to

    def on_predicted(self, share: float) -> None:
        """The packet came out at this share of its size as a key frame; 1 where it is one."""
        self._sizes.predict(share)

    def on_written(self, frame_id: int, size_bytes: int, now: float) -> None:
        """A packet was handed to the stream."""
        self.link.written(frame_id, size_bytes, now)
        self._prices.sent(size_bytes + self.settings.overhead_bytes)
        self._hoped.add(frame_id, self._captured_at + self.deadline_s, self._chosen.accuracy)

    def on_continued(self, size_bytes: int) -> None:
        """One more slice of a packet was handed to the stream."""
        self._prices.sent(size_bytes + self.settings.overhead_bytes)

    def on_result(self, frame_id: int, now: float, *, server_s: float, queue_depth: int, answered: bool = True) -> None:
        """A result came, `answered` or not. `server_s`: how long the server held the frame."""
        heard = self.link.acknowledged(frame_id, now, server_s)
        self.server_queue_depth = queue_depth
        self._hoped.came(frame_id, now, answered=answered)
        if heard is not None:
            self._probing.heard(now, after_outage=heard.after_outage, often=self._prices.free and heard.useful)

    def on_round_trip(self, seconds: float, now: float) -> None:
        """A round trip of something tiny (the stream's greeting) was timed."""
        self.link.on_round_trip(seconds, now)

    def on_connected(self, now: float) -> None:  # noqa: ARG002
        """The stream is up (again)."""
        self.link.connect()
        self._hoped.clear()
        self._probing.restart()

    def on_disconnected(self, now: float) -> None:  # noqa: ARG002
        """The stream is down: only local answers until `on_connected`; what was in flight is lost."""
        self.link.disconnect()
        self._hoped.clear()
        self._sizes.forget_predictions()

    # What the pipeline asks ----------------------------------------------------------------------------------------

    def rate_bps(self, now: float) -> float:
        """Median estimate of the link's rate, the censored bound applied; infinite while unknown. For display."""
        return self.link.rate_bps(now)

    def in_outage(self, now: float) -> bool:
        """Whether the stream is down, or nothing came back of a frame that was written more than a deadline ago."""
        return self.link.in_outage(now)

    @property
    def spent(self) -> bool:
        """Whether the byte budget holds not even the smallest packet now."""
        return self._prices.affordable_bytes < self._least_bytes

    def choose(self, now: float, captured_at: float, *, compute_free_at: float) -> Choice:
        """The operating point for the frame captured at `captured_at`; the core is free at `compute_free_at`."""
        self._prices.captured(now, self._steady.captured(captured_at))
        self._captured_at = captured_at
        start = max(now, compute_free_at)
        if (choice := self._nothing_to_weigh(now, captured_at, start)) is not None:
            return choice
        menu, prices = self._menu, self._prices
        menu.update(self.link.wait_bits)
        next_capture = captured_at + self.frame_interval_s
        rates = self.link.scenarios(now)
        per_bit = 1.0 / rates
        free = self.link.free_for(now, captured_at, per_bit)
        finish = menu.finish(start, free, per_bit)
        due = captured_at + self.deadline_s
        on_time = (finish <= due - self.link.there_and_back_scenarios) @ self._shares
        for row in menu.local:
            seconds = float(menu.seconds[menu.stage_of[row]])
            p = self._compute.p_within(due - start, seconds)
            on_time[row] = p if p >= LEAST_P else 0.0
        on_time[menu.skip] = 1.0  # it promises nothing, and keeps that
        finish -= next_capture
        value = self._lookahead.after(menu.seconds + (start - next_capture), menu.stage_of, finish, rates)
        now_worth = menu.accuracy * on_time
        value += now_worth
        if not prices.free:
            value -= prices.per_byte * menu.expected_bytes() + prices.per_second * menu.seconds[menu.stage_of]
        is_newest = start < next_capture - ROUNDING_S
        self._rule_out(now, value, on_time, is_newest=is_newest)
        row, bet = int(value.argmax()), None
        if self._fallback and prices.free:
            left = due - start, next_capture - start
            sent = lambda: menu.finish(start - next_capture, free - next_capture, per_bit)  # noqa: E731  seldom called
            bet = self._fallback.best(menu, value, now_worth, on_time, sent, rates, float(value[row]), *left)
        self._steady.hoped(bet.expected if bet is not None else float(now_worth[row]))
        row = bet.row if bet is not None else row
        if self._steady.leader != NOBODY and prices.free:
            row = self._follow(row, value, on_time, start - captured_at)
        if skip := row == menu.skip:
            row = int(value[: menu.skip].argmax())  # for who must not drop it
        reserve = self.points[bet.reserve] if bet is not None and bet.row == row and not skip else None
        best, p_on_time = int(menu.kept[row]), 1.0 if reserve is not None else float(on_time[row])
        # A newer frame waits behind one that is as late as that: it is not nothing that a probe takes the place of.
        probe = self._wants_probe(now, best, p_on_time, is_newest=is_newest)
        if probe:
            by_stage = dict(zip(self._stages, self._menu.seconds[:-1].tolist(), strict=True))
            self._probe_index = smallest_probe(self.points, by_stage, self._probe_limit_s)
            best, p_on_time, reserve = self._probe_index, 0.0, None
            self._probing.sends(now, captured_at, oldest=self.link.oldest)
        answer = self._expected_answer(row, best, start, free, per_bit, probe)
        if skip and not probe:
            return Choice(self._chosen, 0.0, math.inf, self.link.rate_bps(now), skip=True)
        return Choice(self._chosen, p_on_time, answer - captured_at, self.link.rate_bps(now), probe, reserve)

    def _nothing_to_weigh(self, now: float, captured_at: float, start: float) -> Choice | None:
        """The most accurate point, if even the worst scenario has it in time and leaves core and link free for the next
        frame: then no other one can be worth more. None if that is not so, or if not only accuracy counts.

        On a good link every choice is of this kind. It is the answer that weighing gives, for a tenth of its time: a
        decision comes between two frames' compute, and what it touches has to be fetched into the caches anew.
        """
        demand = self._menu.most_accurate()
        if demand is None or not self._prices.free or self._steady.leader not in (NOBODY, demand.point):
            return None
        link = self.link
        next_capture, due = captured_at + self.frame_interval_s, captured_at + self.deadline_s
        sent = link.sent_if_slow(now, start + demand.most_seconds, demand.most_bits)
        if sent > min(next_capture, due - link.most_there_and_back_s) or start + demand.seconds > next_capture:
            return None
        if link.in_outage(now) or link.in_flight >= self._most_in_flight:
            return None
        self._chosen = point = self.points[demand.point]
        self._steady.hoped(point.accuracy)
        rate = link.rate_bps(now)
        answer = start + demand.seconds + (demand.bits + link.wait_bits) / rate + link.there_and_back_s
        return Choice(point, 1.0, answer - captured_at, rate)

    def look_again(
        self,
        now: float,
        captured_at: float,
        point: OperatingPoint,
        size_bytes: int,
        coder_s: float,
        reserve: OperatingPoint | None = None,
    ) -> OperatingPoint:
        """The point that a frame, coded at `point` into `size_bytes`, is to be coded at anew in `coder_s` seconds; or
        `point`, where its packet is well as it is. `reserve`: the local point that answers where it is late."""
        index = self._index.get(point.id)
        if index is None or not self._prices.free or self._steady.leader != NOBODY or self.link.in_outage(now):
            return point
        if self._probing.frame == captured_at:
            return point
        otherwise = reserve.accuracy if reserve is not None else 0.0
        better = self._second_look.better(now, captured_at, index, size_bytes, coder_s, otherwise)
        self._chosen = self.points[better]
        return self._chosen

    def worth_writing(self, now: float, captured_at: float, size_bytes: int) -> bool:
        """Whether a coded frame can still be answered in time, if the link is as fast as may be hoped. Else drop it."""
        if not self.link.connected:
            return False
        sent_bytes = size_bytes + self.settings.overhead_bytes
        if sent_bytes > self._prices.affordable_bytes:
            return False
        if self._probing.frame == captured_at or self.link.may_answer(now, sent_bytes, captured_at + self.deadline_s):
            return True
        # A packet that is ready costs nothing but its bytes. If the link has not been heard of for a while, they are
        # well spent: who drops every frame for being late at an old estimate never learns a new one.
        return self.link.oldest is None and self._probing.takes_late_packet(now)

    def _expected_answer(self, row: int, best: int, start: float, free: Floats, per_bit: Floats, probe: bool) -> float:
        """When the point's answer comes in the middle scenario; infinite where none is expected."""
        menu, self._chosen = self._menu, self.points[best]
        ready = start + float(menu.seconds[self._stage_of[best]])
        if self._chosen.kind is Kind.LOCAL:
            return ready
        if probe or not self.link.connected:
            return math.inf
        middle = len(per_bit) // 2
        transmit = (float(menu.middle_bits[row]) + self.link.wait_bits) * float(per_bit[middle])
        return max(ready, float(free[middle])) + transmit + self.link.there_and_back_s

    # ---------------------------------------------------------------------------------------------------------------

    def _rule_out(self, now: float, value: Floats, on_time: Floats, *, is_newest: bool) -> None:
        """What cannot be afforded, what cannot be sent, and to skip a frame behind which none waits: each might be
        skipped for the next one, for as long as that looks better."""
        menu, prices = self._menu, self._prices
        if not prices.free:
            dear = ~menu.is_local & (menu.expected_bytes() > prices.affordable_bytes)
            value[dear] = -math.inf
            on_time[dear] = 0.0
        if self.link.in_outage(now) or self.link.in_flight >= self._most_in_flight:
            value[~menu.is_local] = -math.inf
            on_time[~menu.is_local] = 0.0
        if is_newest:
            value[menu.skip] = -math.inf

    def _follow(self, row: int, value: Floats, on_time: Floats, late: float) -> int:
        """The leading expert's row, if it can be used now; else `row`. A fixed point takes the newest frame."""
        if late >= self.frame_interval_s - ROUNDING_S:
            return self._menu.skip
        # Of points that are as good as it, such as a coarser one of the same accuracy, only one is on the menu.
        for at in np.flatnonzero(self._menu.kept == self._lookahead.stands_in[self._steady.leader]):
            if np.isfinite(value[at]):
                on_time[at] = max(on_time[at], LEAST_P)
                return int(at)
        return row

    def _replay_steady(self, now: float) -> None:
        """Let the experts have the frames before the one that was chosen for last. Done after a frame's compute: no
        decision waits for it, and more is known of the link."""
        if self._steady.waiting:
            seconds = self._menu.seconds.take(self._stage_of)
            bits = 8.0 * (self._sizes.quantile(STEADY_Z) + self.settings.overhead_bytes) + self.link.wait_bits
            rate, there_and_back = self.link.measured_bps(now), self.link.there_and_back_s
            self._steady.replay(seconds, bits, rate, there_and_back)

    def _lookahead_inputs(self) -> tuple[Floats, Floats, float, Floats]:
        """What the lookahead is solved for; see `Lookahead.solve`."""
        self._menu.update(self.link.wait_bits)
        bits = 8.0 * (self._sizes.quantile(self.settings.size_z) + self.settings.overhead_bytes) + self.link.wait_bits
        return self._menu.seconds[self._stage_of], bits, self.link.there_and_back_s, self.link.surprises

    def _wants_probe(self, now: float, best: int, p_on_time: float, *, is_newest: bool) -> bool:
        """Whether to send a probe in place of the best choice, which says nothing of the link."""
        if (best not in self._local and p_on_time > 0) or self._probe_index < 0 or not self.link.connected:
            return False
        if self.points[self._probe_index].bytes_median > self._prices.affordable_bytes:
            return False
        if not self._probing.is_due(now, instead_of_nothing=p_on_time <= 0 and is_newest, oldest=self.link.oldest):
            return False
        # Where a local answer costs the next frame nothing, no link could do better.
        free = best in self._local and float(self._menu.seconds[self._stage_of[best]]) <= self.frame_interval_s
        return not (free and float(self._accuracy[best]) >= float(self._accuracy.max()))

"""The control loop: an operating point for every frame. Pure decisions; no I/O, `now` is an argument.

    measurement (what was seen) -> estimator (what the link will do) -> controller (what to do now)

Every point is judged in every scenario of the link's rate:

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
from dataclasses import dataclass

import numpy as np

from ..models.exceptions import OperatingPointError
from ..models.operating_point import Kind, OperatingPoint
from .estimator import RateEstimator, censored_bound
from .lookahead import Lookahead
from .measurement import ComputeTimes, Floats, HoldTime, InFlight, PacketSizes, RoundTrip

LEAST_P = 0.02
"""A chance smaller than this is none: better to leave the core idle until the next frame."""


FREE_PROBE = 0.2
"""Probes that take nobody's place go out at this share of the interval."""


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """What can be tuned. The defaults are meant to be left alone.

    Attributes:
        rtt_s: round trip before the first measurement.
        server_s: server hold time before the first measurement.
        prior_bps: median of the link's rate before anything is known.
        overhead_bytes: what the stream adds to each packet (framing), counted in rates and in predictions.
        rtt_window_s: window of the minimum round trip.
        size_z: packet sizes are counted at this many standard deviations above their median.
        discount: what the next frame's on-time accuracy counts beside this one's, 0..1 (and so on for those after it).
        max_in_flight: most frames without a result; 0: as many as fit into a deadline, and one more.
        probe_interval_s, probe_interval_max_s: while frames are answered locally because the link looks too slow, a
            small probe goes out after the first, then at doubling intervals up to the second. A frame that is in
            flight serves as the probe, until it has been out for longer than the second.
        scenarios: how many rates a choice is weighed over.
    """

    rtt_s: float = 0.03
    server_s: float = 0.02
    prior_bps: float = 1e6
    overhead_bytes: int = 40
    rtt_window_s: float = 60.0
    size_z: float = 0.8
    discount: float = 0.9
    max_in_flight: int = 0
    probe_interval_s: float = 1.0
    probe_interval_max_s: float = 5.0
    scenarios: int = 16


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do with a frame.

    Attributes:
        point: the operating point.
        p_on_time: probability that the answer is in time, 0..1. At 0 (and not a probe) computing is in vain: drop it.
        expected_latency_s: capture to answer in the middle scenario; infinite where none is expected.
        rate_bps: median estimate of the link's rate; infinite while unknown.
        probe: sent to learn whether the link is back, not for its answer: write it even if it would be late.
    """

    point: OperatingPoint
    p_on_time: float
    expected_latency_s: float
    rate_bps: float
    probe: bool = False


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
        settings: ControlSettings = ControlSettings(),
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
        self._is_local = np.array([point.kind is Kind.LOCAL for point in points])
        self._is_sent = ~self._is_local
        self._local = [index for index, point in enumerate(points) if point.kind is Kind.LOCAL]
        self._compute = ComputeTimes(start)
        self._sizes = PacketSizes(points, self._stage_of, len(stages))
        self._round_trip = RoundTrip(settings.rtt_s, settings.rtt_window_s)
        self._hold = HoldTime(settings.server_s)
        self._flight = InFlight(settings.overhead_bytes)
        self._estimator = RateEstimator(prior_bps=settings.prior_bps, scenarios=settings.scenarios)
        self._probe_index = self._find_probe(start)
        self._best_local = float(self._accuracy[self._is_local].max(initial=0.0))
        # A rate at which the smallest packet takes a whole deadline.
        sent_sizes = [point.bytes_median for point in points if point.kind is not Kind.LOCAL]
        self._useless_bps = 8.0 * min(sent_sizes, default=0.0) / deadline_s
        self._connected = True
        self._probe_at = -math.inf  # when the link was last heard of or asked
        self._probe_wait_s = settings.probe_interval_s
        self._probing: float | None = None  # captured_at of the frame that is a probe
        self._seconds = np.zeros(len(points))
        self._seconds_version = -1
        self._bits = np.zeros(len(points))
        self._bits_version = -1
        self._sbits_version = -1
        n = settings.scenarios
        from statistics import NormalDist

        step = next(k for k in (7, 5, 3) if math.gcd(k, n) == 1)
        self._z = np.array([NormalDist().inv_cdf(((step * j + n // 3) % n + 0.5) / n) for j in range(n)])
        self.server_queue_depth = 0
        self._lookahead = Lookahead(
            self._accuracy,
            self._is_local,
            self._stage_of,
            deadline_s=deadline_s,
            frame_interval_s=frame_interval_s,
            discount=settings.discount,
        )
        self._lookahead.solve(self._compute_seconds(), self._packet_bits(), self._there_and_back_s)

    # What the pipeline reports -------------------------------------------------------------------------------------

    def on_computed(self, point: OperatingPoint, seconds: float, now: float) -> None:  # noqa: ARG002
        """`seconds`: all edge compute of one frame (head, encoder and coding; or image coding; or the uncut model)."""
        self._compute.add(point.stage, seconds)
        self._lookahead.refresh(self._compute_seconds(), self._packet_bits(), self._there_and_back_s)

    def on_coded(self, point: OperatingPoint, size_bytes: int) -> None:
        """The packet's real size."""
        if point.id in self._index:
            self._sizes.add(self._index[point.id], size_bytes)

    def on_written(self, frame_id: int, size_bytes: int, now: float) -> None:
        """A packet was handed to the stream."""
        self._flight.written(frame_id, size_bytes, now)

    def on_result(self, frame_id: int, now: float, *, server_s: float, queue_depth: int) -> None:
        """A result came, whatever its status. `server_s`: how long the server held the frame."""
        ack = now - max(server_s, 0.0)
        answered = self._flight.acknowledged(frame_id, ack, self._round_trip.seconds)
        self.server_queue_depth = queue_depth
        if answered is None:
            return
        sent, sample = answered
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
        if self._estimator.median_bps > self._useless_bps:
            self._probe_wait_s = self.settings.probe_interval_s

    def on_round_trip(self, seconds: float, now: float) -> None:
        """A round trip of something tiny (the stream's greeting) was timed, if the pipeline does so."""
        self._round_trip.add_timed(seconds, now)

    def on_connected(self, now: float) -> None:  # noqa: ARG002
        """The stream is up (again)."""
        self._connected = True
        self._flight.clear()
        self._estimator.forget()
        self._probe_wait_s = self.settings.probe_interval_s
        self._probe_at = -math.inf

    def on_disconnected(self, now: float) -> None:  # noqa: ARG002
        """The stream is down: only local answers until `on_connected`; what was in flight is lost."""
        self._connected = False
        self._flight.clear()

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
        seconds = self._compute_seconds()
        ready = max(now, compute_free_at) + seconds
        due = captured_at + self.deadline_s
        rates = self._estimator.scenarios(now, self._bound(now))
        free = self._link_free(rates)
        finish = np.maximum(ready[:, None], free)
        finish += self._scenario_bits() * (1.0 / rates)
        on_time = np.add.reduce(finish <= due - self._there_and_back_s, axis=1) * (1.0 / len(rates))
        for index in self._local:
            finish[index] = free
            on_time[index] = self._p_computed(float(ready[index]), float(seconds[index]), due)
        next_capture = captured_at + self.frame_interval_s
        value = self._accuracy * on_time + self._lookahead.after(ready - next_capture, finish - next_capture, rates)
        if self.in_outage(now) or len(self._flight) >= self._most_in_flight:
            value[self._is_sent] = -math.inf
            on_time[self._is_sent] = 0.0
        best = int(value.argmax())
        probe = self._wants_probe(now, best, float(on_time[best]))
        if probe:
            best = self._probe_index
            self._probing = captured_at
        if best in self._local:
            answer = float(ready[best])
        elif self._connected:
            answer = float(finish[best, len(rates) // 2]) + self._there_and_back_s
        else:
            answer = math.inf
        return Choice(self.points[best], float(on_time[best]), answer - captured_at, self.rate_bps(now), probe)

    def worth_writing(self, now: float, captured_at: float, size_bytes: int) -> bool:
        """Whether a coded frame can still be answered in time, if the link is as fast as may be hoped. Else drop it."""
        if not self._connected:
            return False
        if self._probing == captured_at:
            return True
        rates = self._estimator.scenarios(now, self._bound(now))
        hoped = rates[-2:-1]
        bits = 8.0 * (size_bytes + self.settings.overhead_bytes)
        finish = max(now, float(self._link_free(hoped)[0])) + bits / float(hoped[0])
        if finish + self._there_and_back_s <= captured_at + self.deadline_s:
            return True
        # A packet that is ready costs nothing but its bytes. If the link has not been heard of for a while, they are
        # well spent: who drops every frame for being late at an old estimate never learns a new one.
        if len(self._flight) or now < self._probe_at + FREE_PROBE * self._probe_wait_s:
            return False
        self._probe_at = now
        self._probe_wait_s = min(2 * self._probe_wait_s, self.settings.probe_interval_max_s)
        return True

    # ---------------------------------------------------------------------------------------------------------------

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

    def _p_computed(self, ready: float, seconds: float, due: float) -> float:
        """Probability that a local answer is ready in time; compute times scatter."""
        scatter = seconds * self._compute.scatter
        p = 0.5 * (1.0 + math.erf((due - ready) / (scatter * math.sqrt(2.0))))
        return p if p >= LEAST_P else 0.0

    def _bound(self, now: float) -> float:
        oldest = self._flight.oldest
        if oldest is None:
            return math.inf
        round_trip = self._round_trip.seconds
        return censored_bound(oldest.bits, now - round_trip - self._hold.high_s - self._flight.begun(round_trip))

    def _link_free(self, rates: Floats) -> Floats:
        """When the link will have sent what is in flight, by scenario."""
        free = np.full(len(rates), self._flight.begun(self._round_trip.seconds))
        for frame in self._flight.frames:
            free = np.maximum(free, frame.ready) + frame.bits / rates
        return free

    def _compute_seconds(self) -> Floats:
        if self._seconds_version != self._compute.version:
            by_stage = np.array([self._compute.seconds(stage) for stage in self._stages])
            self._seconds = by_stage[self._stage_of]
            self._seconds_version = self._compute.version
        return self._seconds

    def _packet_bits(self) -> Floats:
        if self._bits_version != self._sizes.version:
            self._bits = 8.0 * (self._sizes.quantile(self.settings.size_z) + self.settings.overhead_bytes)
            self._bits_version = self._sizes.version
        return self._bits

    def _scenario_bits(self) -> Floats:
        if self._sbits_version != self._sizes.version:
            self._sbits = 8.0 * (self._sizes.quantile(self._z) + self.settings.overhead_bytes)
            self._sbits_version = self._sizes.version
        return self._sbits

    def _find_probe(self, seconds: Mapping[str, float]) -> int:
        """The smallest packet that is computed within a frame interval; else the smallest that is sent at all."""
        sent = [i for i, p in enumerate(self.points) if p.kind is not Kind.LOCAL]
        quick = [i for i in sent if seconds[self.points[i].stage] <= self.frame_interval_s]
        return min(quick or sent, key=lambda i: self.points[i].bytes_p95, default=-1)

    def _wants_probe(self, now: float, best: int, p_on_time: float) -> bool:
        """Whether to send a probe in place of the best choice, which says nothing of the link."""
        if best not in self._local and p_on_time > 0:
            return False
        # A frame that would be dropped anyway costs nothing but its bytes.
        wait = self._probe_wait_s * (FREE_PROBE if p_on_time <= 0 else 1.0)
        if self._probe_index < 0 or not self._connected or now < self._probe_at + wait:
            return False
        oldest = self._flight.oldest
        longest = self.settings.probe_interval_max_s
        if oldest is not None and now - oldest.ready <= longest:
            return False  # that frame is the probe: its answer will come when the link is back
        # Where a local answer costs the next frame nothing, no link could do better: there is nothing to learn.
        local_is_free = best in self._local and self._compute_seconds()[best] <= self.frame_interval_s
        if local_is_free and self._best_local >= float(self._accuracy.max()):
            return False
        self._probe_at = now
        self._probe_wait_s = longest if oldest is not None else min(2 * self._probe_wait_s, longest)
        return True

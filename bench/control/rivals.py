"""What the control loop is compared with, as policies of a simulated run.

- `CausalOracle` knows the link's rate now, its queue, and the size of every packet, but not the future.
- `Ewma` is what published systems do: an exponentially weighted mean of the throughput that frames saw, and the most
  accurate point that would be in time at that rate. Without its own queue in the latency it does worse than any fixed
  choice; with it, better.
"""

# They take part in the same events as the loop and ignore some of what these say.
# ruff: noqa: ARG002

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...edge.controller import Choice
from ...edge.lookahead import Lookahead
from ...models.operating_point import Kind, OperatingPoint
from ..links.traces import Trace
from ..links.virtual_link import VirtualLink
from .policies import FixedPoint, Unheeding

Floats = NDArray[np.float64]


class CausalOracle(Unheeding):
    """Chooses as the control loop does, with the truth in place of its estimates: accuracy if in time, and the value
    of the state that is left behind, at the rate that the link has now.

    Args:
        points, sizes, compute_s, trace, delay_s, deadline_s, fps, server_s, overhead_bytes: as in `simulate.replay`.
        memory_s: "now" is a mean over so much of the past: a recorded packet time has no rate.
    """

    def __init__(
        self,
        points: Sequence[OperatingPoint],
        sizes: Floats,
        compute_s: Floats,
        trace: Trace,
        *,
        delay_s: float,
        deadline_s: float,
        fps: float,
        server_s: float,
        overhead_bytes: int,
        memory_s: float = 0.2,
    ) -> None:
        self._points = points
        self._bits = 8.0 * (sizes + overhead_bytes)
        self._seconds = compute_s
        self._trace = trace
        self._there_and_back = 2 * delay_s + server_s
        self._deadline, self._interval, self._memory = deadline_s, 1.0 / fps, memory_s
        self._accuracy = np.array([point.accuracy for point in points])
        self._is_local = np.array([point.kind is Kind.LOCAL for point in points])
        stages = list(dict.fromkeys(point.stage for point in points))
        stage_of = np.array([stages.index(point.stage) for point in points], dtype=np.intp)
        self._lookahead = Lookahead(
            self._accuracy, self._is_local, stage_of, deadline_s=deadline_s, frame_interval_s=self._interval
        )
        self._lookahead.solve(np.median(compute_s, axis=0), np.median(self._bits, axis=0), self._there_and_back)
        self._link = VirtualLink(trace, overhead_bytes=overhead_bytes)  # its own copy of the real one

    def _rate(self, now: float) -> float:
        since = max(now - self._memory, 0.0)
        if now - since < self._memory / 2:
            return max(self._trace.rate_at(now), 1.0)
        return max(8.0 * (self._trace.carried(now) - self._trace.carried(since)) / (now - since), 1.0)

    def choose(self, now: float, captured_at: float) -> Choice:
        frame = round(captured_at / self._interval)
        rate = self._rate(now)
        # What is queued is known in bits, not in the seconds that the future will make of them.
        queued = (
            8.0 * (self._trace.carried(self._link.free_at) - self._trace.carried(now))
            if self._link.free_at > now
            else 0.0
        )
        ready = now + self._seconds[frame]
        finish = np.where(
            self._is_local, now + queued / rate, np.maximum(ready, now + queued / rate) + self._bits[frame] / rate
        )
        answer = np.where(self._is_local, ready, finish + self._there_and_back)
        in_time = answer <= captured_at + self._deadline + 1e-9
        left = captured_at + self._interval
        rows = np.arange(len(self._points))
        after = self._lookahead.after(ready - left, rows, (finish - left)[:, None], np.array([rate]))
        best = int(np.argmax(self._accuracy * in_time + after))
        return Choice(self._points[best], 1.0, float(answer[best]) - captured_at, rate)

    def worth_writing(self, now: float, captured_at: float, size: int) -> bool:
        begin = max(now, self._link.free_at)
        # It need not be told of the future to see that the queue alone is too long.
        return begin + self._there_and_back <= captured_at + self._deadline

    def written(self, frame: int, size: int, now: float) -> None:
        self._link.write(size, now)

    def result(self, frame: int, now: float, server_s: float, queue_depth: int) -> None: ...

    def connected(self, up: bool, now: float) -> None: ...


class Ewma(FixedPoint):
    """Adapts to an exponentially weighted mean of throughput.

    Args:
        points: to choose from.
        compute_s: the device's true medians, float64 [points].
        deadline_s, max_in_flight: as for a fixed point.
        round_trip_s: known: propagation both ways.
        server_s: known: service time.
        queue: whether what is in flight counts in the latency.
    """

    GAIN = 0.3
    START_BPS = 1e6
    PROBE_AFTER = 10
    """So many frames without a measurement, and the smallest packet is sent."""

    def __init__(
        self,
        points: Sequence[OperatingPoint],
        compute_s: Floats,
        *,
        deadline_s: float,
        max_in_flight: int,
        round_trip_s: float,
        server_s: float,
        queue: bool,
    ) -> None:
        super().__init__(points[0], deadline_s, max_in_flight)
        self._points = points
        self._compute = compute_s
        self._accuracy = np.array([point.accuracy for point in points])
        self._is_local = np.array([point.kind is Kind.LOCAL for point in points])
        self._bits = 8.0 * np.array([point.bytes_median for point in points])
        sent = np.flatnonzero(~self._is_local)
        self._smallest = int(sent[np.argmin(self._bits[sent])]) if len(sent) else 0
        self._round_trip, self._server = round_trip_s, server_s
        self._queue = queue
        self._rate = self.START_BPS
        self._sent: deque[tuple[int, float, float]] = deque()
        self._unmeasured = 0

    def choose(self, now: float, captured_at: float) -> Choice:
        wait = sum(bits for _, bits, _ in self._sent) / self._rate if self._queue else 0.0
        begin = np.maximum(self._compute, wait)
        latency = begin + self._bits / self._rate + self._round_trip + self._server
        answer = now + np.where(self._is_local, self._compute, latency)
        utility = np.where(answer <= captured_at + self._deadline_s, self._accuracy, 0.0)
        best = int(np.argmax(utility))
        self._unmeasured += 1
        if utility[best] <= 0 or (self._unmeasured > self.PROBE_AFTER and not self._sent):
            best, self._unmeasured = self._smallest, 0
        return Choice(self._points[best], 1.0, float(answer[best]) - captured_at, self._rate)

    def written(self, frame: int, size: int, now: float) -> None:
        super().written(frame, size, now)
        self._sent.append((frame, 8.0 * size, now))

    def result(self, frame: int, now: float, server_s: float, queue_depth: int) -> None:
        super().result(frame, now, server_s, queue_depth)
        while self._sent:
            answered, bits, ready = self._sent.popleft()
            if answered == frame:
                taken = max(now - ready - server_s - self._round_trip, 1e-3)
                self._rate += self.GAIN * (bits / taken - self._rate)
                self._unmeasured = 0
                break

    def connected(self, up: bool, now: float) -> None:
        super().connected(up, now)
        self._sent.clear()


def most_in_flight(deadline_s: float, fps: float) -> int:
    """As many frames as fit into a deadline, and one more: the cap of every policy."""
    return math.ceil(deadline_s * fps) + 1

"""What the control loop measures: delivery of frames, the round trip, compute times, packet sizes. No I/O, no clock.

Every time is in seconds on one monotonic clock of the caller's choosing.

A frame's way, and what is known of it (only `ready` and `ack` are seen; the server reports how long it held the frame):

    ready            begin         sent                                       ack' = ack - hold       ack
      |--- queue ------|-- transmit --|------ propagation, both ways (RTT) ------|------- hold ---------|

The link is a FIFO: a frame begins when the one before has been sent. One of two cases holds:

- the frame was queued (the one before it had not been sent): transmit = ack' - previous ack', free of the RTT;
- the link was idle (the sample is *limited* by the application): transmit = ack' - ready - RTT, as good as the RTT is.

Both are `transmit = ack' - max(ready + RTT, previous ack')`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..models.operating_point import Kind, OperatingPoint

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DeliverySample:
    """One acknowledged frame, seen as a measurement of the link.

    Attributes:
        bits: what was sent, overhead included.
        transmit_s: how long the link took for it; at least 0.
        limited: the link was idle when the frame became ready, so that `transmit_s` carries the error of the RTT.
    """

    bits: float
    transmit_s: float
    limited: bool

    def rate_bps(self, resolution_s: float) -> float:
        """Bits a second; times under `resolution_s` can't be told from jitter and count as that."""
        return self.bits / max(self.transmit_s, resolution_s)


class WindowedMinimum:
    """Minimum over a sliding time window, as in BBR; O(1) amortised."""

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self._entries: deque[tuple[float, float]] = deque()

    def add(self, value: float, now: float) -> None:
        """Take in one value."""
        while self._entries and self._entries[-1][1] >= value:
            self._entries.pop()
        self._entries.append((now, value))
        # The newest value stays however old it gets: an old minimum is better than none.
        while len(self._entries) > 1 and self._entries[0][0] < now - self.window_s:
            self._entries.popleft()

    @property
    def value(self) -> float:
        """The minimum, or infinity before the first value."""
        return self._entries[0][1] if self._entries else math.inf


class RoundTrip:
    """The round trip of propagation alone: windowed minimum of what frames took, corrected where they took long.

    On a link that is slow from the start every frame's delay holds much transmission, and the plain minimum would take
    it for propagation. But frames differ in size, and some queue behind others: of all round trips up to the minimum,
    one explains the last frames best by a single rate (least squares of the transmission times that it implies, each
    frame beginning when the one before it has left). Where no rate explains them well, the minimum stands.
    """

    FRAMES, FRAMES_NEEDED, EVERY = 24, 12, 4
    FITS, FITS_NEEDED = 9, 2
    WORST_FIT = 0.2
    """Root mean square error as a share of the mean transmission time, over which a fit says nothing."""
    LEAST_ERROR_S = 0.0015
    """Frames of one size tell nothing apart, and then no round trip is better than the minimum by as much as this."""

    def __init__(self, start_s: float, window_s: float) -> None:
        self.seconds = start_s
        """The round trip without transmission and without the server; the start value before the first sample."""
        self._start_s = start_s
        self._delays = WindowedMinimum(window_s)
        self._frames: deque[tuple[float, float, float]] = deque(maxlen=self.FRAMES)
        self._fits: deque[float] = deque(maxlen=self.FITS)
        self._seen = 0

    def add(self, ready: float, ack: float, bits: float, now: float) -> None:
        """One frame of `bits` bits, written at `ready` and acknowledged at `ack` (the server's hold time taken off)."""
        self._delays.add(max(ack - ready, 0.0), now)
        self._frames.append((ready, ack, bits))
        self._seen += 1
        if self._seen % self.EVERY == 0 and len(self._frames) >= self.FRAMES_NEEDED:
            self._fit()
        self._settle()

    def add_timed(self, seconds: float, now: float) -> None:
        """A round trip that was timed on its own, without a packet's transmission in it."""
        self._delays.add(max(seconds, 0.0), now)
        self._seen = max(self._seen, self.FRAMES_NEEDED)
        self._settle()

    def _settle(self) -> None:
        smallest = self._delays.value
        if len(self._fits) >= self.FITS_NEEDED:
            self.seconds = min(smallest, sorted(self._fits)[len(self._fits) // 2])
        elif self._seen >= self.FRAMES_NEEDED:
            self.seconds = smallest
        else:
            # Before that, what is over the start value is taken for transmission: a rate that is too low is corrected
            # by the next larger frame, one that is too high only by frames that are late.
            self.seconds = min(smallest, self._start_s)

    def _fit(self) -> None:
        ready, ack, bits = np.array(self._frames).T
        candidates = np.linspace(0.0, float((ack - ready).min()), 21)[:, None]
        sent = ack - candidates
        taken = sent[:, 1:] - np.maximum(ready[1:], sent[:, :-1])
        seconds_per_bit = taken @ bits[1:] / float(bits[1:] @ bits[1:])
        error = np.sqrt(np.square(taken - seconds_per_bit[:, None] * bits[1:]).mean(axis=1))
        best = int(error.argmin())
        is_better = error[-1] > max(error[best] / 0.7, self.LEAST_ERROR_S)
        if is_better and error[best] <= self.WORST_FIT * taken[best].mean():
            self._fits.append(float(candidates[best, 0]))
        elif self._fits:
            self._fits.popleft()  # the link is not what it was; the minimum comes back bit by bit


@dataclass(frozen=True, slots=True)
class Sent:
    """One frame that was written and not yet acknowledged; `in_parts`: with pauses in which the link may be idle."""

    frame_id: int
    bits: float
    ready: float
    in_parts: bool = False


class InFlight:
    """Frames that were written and not yet answered, oldest first, and the link's state that they imply."""

    def __init__(self, overhead_bytes: float) -> None:
        self._overhead_bits = 8.0 * overhead_bytes
        self._frames: deque[Sent] = deque()
        self._previous_ack = -math.inf

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def oldest(self) -> Sent | None:
        """The frame that has been out for longest."""
        return self._frames[0] if self._frames else None

    @property
    def frames(self) -> Sequence[Sent]:
        """All of them, oldest first."""
        return self._frames

    def written(self, frame_id: int, size_bytes: int, now: float) -> None:
        """A frame was handed to the stream."""
        self._frames.append(Sent(frame_id, 8.0 * size_bytes + self._overhead_bits, now))

    def continued(self, frame_id: int, size_bytes: int) -> None:
        """A further part of a frame in flight was handed to the stream."""
        for index, frame in enumerate(self._frames):
            if frame.frame_id == frame_id:
                self._frames[index] = Sent(frame_id, frame.bits + 8.0 * size_bytes, frame.ready, in_parts=True)

    def begun(self, round_trip_s: float) -> float:
        """When the link began to send the oldest frame, on the sender's clock; -infinity if nothing is in flight."""
        if not self._frames:
            return -math.inf
        return max(self._frames[0].ready, self._previous_ack - round_trip_s)

    def acknowledged(self, frame_id: int, ack: float, round_trip_s: float) -> tuple[Sent, DeliverySample] | None:
        """Take out an answered frame; `ack` is the result's time less the server's hold time.

        Frames that were written before it have been delivered too (the link is a FIFO), whether or not their results
        come: they are forgotten. Returns None for a frame that is not in flight.
        """
        if all(frame.frame_id != frame_id for frame in self._frames):
            return None
        first = frame = self._frames.popleft()
        bits = first.bits
        while frame.frame_id != frame_id:
            frame = self._frames.popleft()
            bits += frame.bits  # sent in the same stretch of time, which then holds pauses: a lower bound
        begin = max(first.ready + round_trip_s, self._previous_ack)
        limited = frame is not first or frame.in_parts or first.ready + round_trip_s > self._previous_ack
        self._previous_ack = max(self._previous_ack, ack)
        return frame, DeliverySample(bits, max(ack - begin, 0.0), limited)

    def clear(self) -> None:
        """The connection is gone, and with it what was under way."""
        self._frames.clear()
        self._previous_ack = -math.inf


class ComputeTimes:
    """Seconds of edge compute per `OperatingPoint.stage`, from noisy measurements.

    In logarithms: time of a stage = its start value x the device's common factor x the stage's own factor. The common
    factor follows the median of the last five measurements, so that one hiccup is ignored and a device that throttles
    (or a start value that was wrong) is noticed within three frames, also for the stages that have not run lately.
    """

    MEDIAN_OF = 5
    OWN_GAIN = 0.1
    MIN_SECONDS = 1e-5
    START_SCATTER, MIN_SCATTER = 0.03, 0.005

    def __init__(self, start_s: Mapping[str, float]) -> None:
        self._log_start = {stage: math.log(max(seconds, self.MIN_SECONDS)) for stage, seconds in start_s.items()}
        self._own = dict.fromkeys(self._log_start, 0.0)
        self._seen = dict.fromkeys(self._log_start, 0)
        self._recent: deque[float] = deque(maxlen=self.MEDIAN_OF)
        self._common = 0.0
        self.scatter = self.START_SCATTER
        """Standard deviation of a measurement around what was expected, as a share of it."""
        self.version = 0
        """Rises with every change, so that what depends on the times can be kept."""

    def add(self, stage: str, seconds: float) -> None:
        """One measurement. A stage that is not known is ignored."""
        if stage not in self._log_start or not math.isfinite(seconds):
            return
        relative = math.log(max(seconds, self.MIN_SECONDS)) - self._log_start[stage]
        seen = self._seen[stage]
        before = self._common + self._own[stage]
        if seen == 0 and len(self._recent) == self.MEDIAN_OF:
            # First run of this stage on a device whose common factor is known: the rest is the stage's own.
            self._own[stage] = relative - self._common
        self._seen[stage] = seen + 1
        self._recent.append(relative - self._own[stage])
        self._common = sorted(self._recent)[len(self._recent) // 2]
        # A single outlier moves a stage's own factor by a bounded step only.
        surprise = relative - self._common - self._own[stage]
        self._own[stage] += self.OWN_GAIN * min(max(surprise, -0.5), 0.5)
        if seen:
            # Mean deviation x 1.25 is the standard deviation of normal noise; a hiccup counts as a large one.
            off = 1.25 * min(abs(relative - before), 0.3)
            self.scatter = max(self.scatter + 0.1 * (off - self.scatter), self.MIN_SCATTER)
        self.version += 1

    def seconds(self, stage: str) -> float:
        """Expected compute time of a stage."""
        return math.exp(self._log_start[stage] + self._common + self._own[stage])

    def p_within(self, limit_s: float, seconds: float) -> float:
        """Probability that what is expected to take `seconds` takes at most `limit_s`; normal, by the scatter."""
        return 0.5 * (1.0 + math.erf((limit_s - seconds) / (seconds * self.scatter * math.sqrt(2.0))))


class PacketSizes:
    """Distribution of packet sizes per operating point, log-normal, corrected by the sizes that really came out.

    Starts from the bundle's median and 95th percentile. What the camera sees makes all packets larger or smaller than
    the bundle's photographs did, each point's in proportion to its own spread. So one *level*, in standard deviations,
    is followed for all points, with a gain that rises while surprises repeat themselves (a scene that stays) and falls
    while they alternate (unlike pictures); what is left over is a stage's own, and followed slowly.
    """

    START_GAIN, LEAST_GAIN, MOST_GAIN = 0.4, 0.1, 0.8
    GAIN_STEP = 0.04
    OWN_GAIN = 0.03
    Z95 = 1.6449
    PRIOR_WEIGHT = 10.0
    SAVING_GAIN = 0.25
    LEAST_SPREAD = 0.05
    """Points that hardly scattered are moved by the level as if they had scattered so much."""

    def __init__(self, points: Sequence[OperatingPoint], stage_of: NDArray[np.intp], stages: int) -> None:
        self.median = np.array([max(point.bytes_median, 0.0) for point in points])
        """Bytes by the bundle's table, float64 [points]."""
        p95 = np.array([max(point.bytes_p95, point.bytes_median, 0.0) for point in points])
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = np.where(self.median > 0, np.log(p95 / self.median) / self.Z95, 0.0)
        self.spread = spread
        """Standard deviation of the log-size by the bundle's table, float64 [points]."""
        self.scale = np.maximum(spread, self.LEAST_SPREAD)
        """What one standard deviation of the level does to a point's log-size, float64 [points]."""
        self._stage_of = stage_of
        self.own = np.zeros(stages)
        """By how many standard deviations a stage's packets differ from the others', float64 [stages]."""
        self.level = 0.0
        """By how many standard deviations all packets differ from the bundle's, now."""
        self.deviation = 1.0
        """Standard deviation of a size around what was expected, as a share of `spread`."""
        self.predicted = np.array([point.kind is Kind.FEATURE for point in points], dtype=np.float64)
        """1 of points whose packets may be predicted from an earlier frame, else 0, float64 [points]."""
        self.saving = 0.0
        """Logarithm of what they lately took, as a share of what key frames would have taken."""
        self._gain = self.START_GAIN
        self._surprise = 0.0
        self.version = 0

    def add(self, index: int, size_bytes: float) -> None:
        """The packet of the point at `index` came out at `size_bytes`."""
        if self.median[index] <= 0 or size_bytes <= 0:
            return
        stage = int(self._stage_of[index])
        surprise = (
            math.log(size_bytes / self.median[index]) / float(self.scale[index]) - self.level - float(self.own[stage])
        )
        repeated = surprise * self._surprise / self.deviation**2
        self._gain += self.GAIN_STEP * min(max(repeated, -1.0), 1.0)
        self._gain = min(max(self._gain, self.LEAST_GAIN), self.MOST_GAIN)
        self._surprise = surprise
        variance = self.deviation**2
        variance += (min(surprise**2, 9.0) - variance) / self.PRIOR_WEIGHT
        self.deviation = max(math.sqrt(variance), 0.05)
        self.level += self._gain * surprise
        self.own[stage] += self.OWN_GAIN * surprise
        self.version += 1

    def predict(self, share: float) -> None:
        """A packet came out at `share` of what it would have taken as a key frame."""
        if share > 0:
            self.saving += self.SAVING_GAIN * (math.log(share) - self.saving)
            self.version += 1

    def forget_predictions(self) -> None:
        """The next packets will be key frames."""
        if self.saving:
            self.saving = 0.0
            self.version += 1

    def middle(self, rows: NDArray[np.intp]) -> Floats:
        """Expected bytes of the points `rows`, float64 [rows]."""
        shift = self.scale[rows] * (self.level + self.own[self._stage_of[rows]]) + self.saving * self.predicted[rows]
        return np.asarray(self.median[rows] * np.exp(shift), dtype=np.float64)

    def quantile(self, z: float | Floats) -> Floats:
        """Bytes at `z` standard deviations above what is expected, float64 [points] or [points, len(z)]."""
        shift = self.scale * (self.level + self.own[self._stage_of]) + self.saving * self.predicted
        spread = self.spread * self.deviation
        if np.ndim(z) == 0:
            return np.asarray(self.median * np.exp(shift + spread * z), dtype=np.float64)
        return np.asarray(self.median[:, None] * np.exp(shift[:, None] + spread[:, None] * z), dtype=np.float64)


class HoldTime:
    """How long the server holds a frame: the distribution of what it did lately.

    A hiccup is one of a dozen values, and no more likely than that; a server that has become slower shows in three
    frames, since no scenario is under the least of the last three.
    """

    WINDOW, AT_FIRST, NOW = 12, 2, 3
    HIGH = 0.75

    def __init__(self, start_s: float, scenarios: int = 16) -> None:
        self._recent: deque[float] = deque([start_s] * self.AT_FIRST, maxlen=self.WINDOW)
        self._shares = (np.arange(scenarios) + 0.5) / scenarios
        self._read()

    def add(self, seconds: float) -> None:
        """One measured hold time."""
        self._recent.append(max(seconds, 0.0))
        self._read()

    def _read(self) -> None:
        values = sorted(self._recent)
        now = sorted(list(self._recent)[-self.NOW :])
        places = (self._shares * len(values)).astype(np.intp)
        self.scenarios: Floats = np.maximum(np.array(values)[places], now[0])
        """Equally likely values, ascending, float64 [scenarios]."""
        self.most_s = max(values[-1], now[0])
        """The largest of the scenarios, or more."""
        self.high_s = max(values[min(int(self.HIGH * len(values)), len(values) - 1)], now[len(now) // 2])
        """A value that most frames stay under."""

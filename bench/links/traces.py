"""Recorded and made-up links: how many bytes a link can carry, as a function of time.

Formats:

- `mahimahi`: one integer a line, the millisecond at which one 1500-byte packet may leave (lines may repeat);
- `seconds-mbit`: `seconds Mbit/s` a line, the rate from that time until the next line's (Pensieve, Comyco);
- `ms-kbit`: `milliseconds kbit/s` a line, the same in other units.

Every trace loops: after its end it begins anew.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...models.exceptions import DataError

Format = Literal["mahimahi", "seconds-mbit", "ms-kbit"]

MAHIMAHI_PACKET_BYTES = 1500
NO_BYTES = 1e-6
MAX_TRACE_S = 7 * 24 * 3600


class Trace:
    """A link's capacity over time: piecewise constant rates, kept as cumulative bytes, looping.

    Args:
        durations_s: length of each piece in seconds, all > 0.
        rates_bps: bits a second in each piece, all >= 0, not all 0.
        name: for people.

    Raises:
        DataError: the pieces are none, too long, negative, or carry nothing at all.
    """

    def __init__(self, durations_s: Sequence[float], rates_bps: Sequence[float], name: str = "") -> None:
        durations = np.asarray(durations_s, dtype=np.float64)
        rates = np.asarray(rates_bps, dtype=np.float64)
        if durations.ndim != 1 or durations.shape != rates.shape or not len(durations):
            raise DataError(f"trace {name!r} needs as many durations as rates, and at least one of each")
        if not np.all(np.isfinite(durations)) or durations.min() <= 0 or durations.sum() > MAX_TRACE_S:
            raise DataError(f"trace {name!r}: every piece must last more than 0 s, all together at most a week")
        if not np.all(np.isfinite(rates)) or rates.min() < 0 or rates.max() <= 0:
            raise DataError(f"trace {name!r}: rates must be finite, none below 0 and at least one above 0")
        self.name = name
        self._rates = rates
        times = np.concatenate([[0.0], np.cumsum(durations)])
        carried = np.concatenate([[0.0], np.cumsum(durations * rates / 8.0)])
        # Lists: one lookup at a time is several times faster than in an array.
        self._times: list[float] = times.tolist()
        self._bytes: list[float] = carried.tolist()
        self._times_array, self._bytes_array = times, carried

    @classmethod
    def steps(cls, schedule: Iterable[tuple[float, float]], name: str = "steps") -> Trace:
        """From (seconds, bits a second) pairs, one after the other. A rate of 0 is an outage."""
        pairs = list(schedule)
        return cls([seconds for seconds, _ in pairs], [rate for _, rate in pairs], name)

    @property
    def duration_s(self) -> float:
        """Seconds until it begins anew."""
        return self._times[-1]

    @property
    def mean_bps(self) -> float:
        """Mean rate over the whole trace, bits a second."""
        return 8.0 * self._bytes[-1] / self._times[-1]

    @property
    def pieces(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Durations in seconds and rates in bits a second, float64 [pieces] each."""
        return np.diff(self._times), self._rates.copy()

    def rate_at(self, time_s: float) -> float:
        """Bits a second at a time >= 0."""
        piece = bisect_right(self._times, math.fmod(time_s, self.duration_s)) - 1
        return float(self._rates[min(piece, len(self._rates) - 1)])

    def carried(self, time_s: float) -> float:
        """Bytes that the link can carry from 0 until `time_s` >= 0."""
        loops, rest = divmod(time_s, self.duration_s)
        piece = min(bisect_right(self._times, rest) - 1, len(self._rates) - 1)
        within = (rest - self._times[piece]) * float(self._rates[piece]) / 8.0
        return loops * self._bytes[-1] + self._bytes[piece] + within

    def finish(self, start_s: float, size_bytes: float) -> float:
        """When `size_bytes` bytes that begin at `start_s` have left; the exact inverse of `carried`."""
        if size_bytes <= 0:
            return start_s
        target = self.carried(start_s) + size_bytes
        loops, rest = divmod(target, self._bytes[-1])
        if rest <= NO_BYTES:  # the loop's last byte, not the next loop's none
            loops, rest = loops - 1, self._bytes[-1]
        # The first boundary at which enough has been carried; rounding must not push it behind an outage.
        end = bisect_left(self._bytes, rest - NO_BYTES)
        piece = max(end - 1, 0)
        within = (rest - self._bytes[piece]) * 8.0 / float(self._rates[piece])
        return max(loops * self.duration_s + self._times[piece] + within, start_s)

    def finish_all(self, start_s: NDArray[np.float64], size_bytes: NDArray[np.float64]) -> NDArray[np.float64]:
        """`finish` for many at once: float64 arrays that broadcast, sizes > 0; result of their common shape."""
        loops, rest = np.divmod(start_s, self.duration_s)
        carried = loops * self._bytes[-1] + np.interp(rest, self._times_array, self._bytes_array)
        loops, rest = np.divmod(carried + size_bytes, self._bytes[-1])
        over = rest <= NO_BYTES
        loops, rest = loops - over, np.where(over, self._bytes[-1], rest)
        piece = np.maximum(np.searchsorted(self._bytes_array, rest - NO_BYTES) - 1, 0)
        within = (rest - self._bytes_array[piece]) * 8.0 / self._rates[piece]
        return np.asarray(np.maximum(loops * self.duration_s + self._times_array[piece] + within, start_s))

    def window(self, start_s: float, duration_s: float, name: str = "") -> Trace:
        """The stretch from `start_s` on, wrapping around at the end."""
        durations, rates = self.pieces
        cut_durations: list[float] = []
        cut_rates: list[float] = []
        position = math.fmod(start_s, self.duration_s)
        left = duration_s
        piece = min(bisect_right(self._times, position) - 1, len(rates) - 1)
        while left > 1e-12:
            take = min(self._times[piece + 1] - position, left)
            if take > 0:
                cut_durations.append(take)
                cut_rates.append(float(rates[piece]))
                left -= take
            piece = (piece + 1) % len(durations)
            position = self._times[piece]
        return Trace(cut_durations, cut_rates, name or f"{self.name}+{start_s:g}s")

    def scaled(self, factor: float) -> Trace:
        """The same with every rate multiplied by `factor`."""
        durations, rates = self.pieces
        return Trace(durations.tolist(), (rates * factor).tolist(), f"{self.name}x{factor:g}")


def read_trace(path: Path, form: Format | None = None) -> Trace:
    """Read a recorded link.

    Args:
        path: the file.
        form: its format; None: `mahimahi` for one number a line, `seconds-mbit` for two (`ms-kbit` must be named).

    Raises:
        DataError: the file can't be read, or is not in that format.
    """
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"trace {path} cannot be read: {error}") from error
    if not lines:
        raise DataError(f"trace {path} is empty")
    if form is None:
        form = "mahimahi" if len(lines[0]) == 1 else "seconds-mbit"
    columns = 1 if form == "mahimahi" else 2
    values: list[list[float]] = []
    for number, fields in enumerate(lines, start=1):
        try:
            values.append([float(field) for field in fields])
        except ValueError as error:
            raise DataError(f"trace {path}, line {number}: not a number; is it really {form}?") from error
        if len(fields) != columns or not all(math.isfinite(value) and value >= 0 for value in values[-1]):
            raise DataError(f"trace {path}, line {number}: {form} has {columns} number(s) >= 0 a line")
    table = np.array(values)
    if np.any(np.diff(table[:, 0]) < 0):
        raise DataError(f"trace {path}: times must not go back")
    if form == "mahimahi":
        return _from_packet_times(table[:, 0], path)
    seconds, bits = (1.0, 1e6) if form == "seconds-mbit" else (1e-3, 1e3)
    return _from_samples(table[:, 0] * seconds, table[:, 1] * bits, path)


def _from_packet_times(times_ms: NDArray[np.float64], path: Path) -> Trace:
    if times_ms[-1] > MAX_TRACE_S * 1000 or np.any(times_ms != np.floor(times_ms)):
        raise DataError(f"trace {path}: mahimahi has whole milliseconds, at most a week of them")
    # A packet that may leave at millisecond t is carried during (t - 1, t]; one at 0 during the first millisecond.
    slots = np.maximum(times_ms.astype(np.int64) - 1, 0)
    packets = np.bincount(slots, minlength=max(int(times_ms[-1]), 1))
    change = np.flatnonzero(np.diff(packets)) + 1
    starts = np.concatenate([[0], change, [len(packets)]])
    durations = np.diff(starts) / 1000.0
    rates = packets[starts[:-1]] * MAHIMAHI_PACKET_BYTES * 8.0 * 1000.0
    return Trace(durations.tolist(), rates.tolist(), path.name)


def _from_samples(times_s: NDArray[np.float64], rates_bps: NDArray[np.float64], path: Path) -> Trace:
    if len(times_s) == 1:
        return Trace([1.0], rates_bps.tolist(), path.name)
    gaps = np.diff(times_s)
    # The last line has no next one: it lasts as long as lines usually do.
    durations = np.concatenate([gaps, [float(np.median(gaps[gaps > 0])) if np.any(gaps > 0) else 1.0]])
    kept = durations > 0
    return Trace(durations[kept].tolist(), rates_bps[kept].tolist(), path.name)

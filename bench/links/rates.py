"""What an emulated link asks of its capacity, and a recorded trace as that.

`RateSchedule` (steps, the last one holds on) and `TraceRates` (a recorded trace, for ever anew) are both `Rates`:
immutable functions of time, so that a packet under way can be reckoned anew after a change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from .schedule import RateSchedule
from .traces import Trace

_PAST_S = 600.0
_A_MOMENT_BYTES = 1e-3
"""So few bytes that they take no time to speak of, but enough to find where a trace's next rate above 0 begins."""


class Rates(Protocol):
    """A link's rate in bit/s as a function of time in seconds."""

    def rate(self, at: float) -> float:
        """Bit/s at a time; 0 is an outage, infinity no limit."""

    def finish(self, start: float, bits: float) -> float:
        """When `bits` have passed that begin at `start`; infinity when never."""

    def shifted(self, by: float) -> Rates:
        """The same, `by` seconds later."""

    def changed(self, at: float, bps: float) -> Rates:
        """The same until `at`, then `bps` for good."""

    def outages_only(self) -> Rates:
        """No limit where there is any rate, 0 where there is none."""


@dataclass(frozen=True)
class TraceRates:
    """A trace as `Rates`: it begins at `origin` and again whenever it has ended.

    Attributes:
        trace: the trace; its first rate above 0 holds before it begins.
        origin: when it begins, in seconds.
        unlimited: no limit where the trace has any rate.
    """

    trace: Trace
    origin: float = 0.0
    unlimited: bool = False

    @cached_property
    def _first(self) -> float:
        return float(next(rate for rate in self.trace.pieces[1] if rate > 0))

    def rate(self, at: float) -> float:
        """See `Rates`."""
        bps = self._first if at < self.origin else self.trace.rate_at(at - self.origin)
        return math.inf if self.unlimited and bps > 0 else bps

    def finish(self, start: float, bits: float) -> float:
        """See `Rates`."""
        if self.unlimited:
            free = start < self.origin or self.trace.rate_at(start - self.origin) > 0
            return start if free else self.origin + self.trace.finish(start - self.origin, _A_MOMENT_BYTES)
        if start < self.origin:
            done = start + bits / self._first
            if done <= self.origin:
                return done
            bits, start = bits - (self.origin - start) * self._first, self.origin
        return self.origin + self.trace.finish(start - self.origin, bits / 8)

    def shifted(self, by: float) -> TraceRates:
        """See `Rates`."""
        return replace(self, origin=self.origin + by)

    def changed(self, at: float, bps: float) -> RateSchedule:
        """See `Rates`. Of the time before, the last ten minutes are kept."""
        first = max(self.origin, at - _PAST_S)
        past = [(min(first, at) - 1.0, self._first), *self._steps(first, at)]
        if self.unlimited:
            past = [(time, math.inf if rate > 0 else 0.0) for time, rate in past]
        return RateSchedule([*past, (at, bps)])

    def _steps(self, start: float, end: float) -> Iterator[tuple[float, float]]:
        """The trace's steps that hold at any time in between, the first one from `start` on."""
        durations, rates = self.trace.pieces
        time = self.origin + math.floor((start - self.origin) / self.trace.duration_s) * self.trace.duration_s
        while time < end:
            for seconds, rate in zip(durations.tolist(), rates.tolist(), strict=True):
                if time + seconds > start and time < end:
                    yield max(time, start), rate
                time += seconds

    def outages_only(self) -> TraceRates:
        """See `Rates`."""
        return replace(self, unlimited=True)


def as_rates(capacity: float | RateSchedule | Trace) -> Rates:
    """A constant rate in bit/s, a schedule or a trace as `Rates` that begin at 0."""
    if isinstance(capacity, Trace):
        return TraceRates(capacity)
    return capacity if isinstance(capacity, RateSchedule) else RateSchedule([(0.0, capacity)])

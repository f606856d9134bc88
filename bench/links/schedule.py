"""A link's rate over time, as the emulated links take it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .traces import Trace


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of a schedule: seconds, and Mbit/s (0: outage)."""

    seconds: float
    mbps: float


def parse_phases(text: str) -> list[Phase]:
    """Read "8:4,0:2.5" (Mbit/s:seconds, ...).

    Raises:
        ValueError: the text is not of that form.
    """
    phases = []
    for part in text.split(","):
        rate, colon, seconds = part.partition(":")
        try:
            phase = Phase(float(seconds), float(rate))
        except ValueError:
            colon = ""
        if not colon or not (0 <= phase.mbps < math.inf and 0 < phase.seconds < math.inf):
            raise ValueError(f"{part!r} is no phase; write MBITS:SECONDS, such as 8:4,0.5:4,0:2")
        phases.append(phase)
    return phases


class RateSchedule:
    """Rate in bit/s over time in seconds, piecewise constant. Before the first step the first rate holds, after the
    last one the last. 0 is an outage, infinity no limit. Immutable."""

    def __init__(self, steps: Iterable[tuple[float, float]]) -> None:
        """Keep the steps: (from second, bit/s) in rising order, at least one.

        Raises:
            ValueError: there are none, they are not in order, or a rate is negative.
        """
        self.steps = tuple(steps)
        self._starts = [start for start, _ in self.steps]
        if not self.steps or self._starts != sorted(self._starts) or any(rate < 0 for _, rate in self.steps):
            raise ValueError("a rate schedule needs steps in rising order of time, of rates of at least 0")

    @classmethod
    def of_phases(cls, phases: Sequence[Phase]) -> RateSchedule:
        """The schedule that begins at 0 and keeps the last phase's rate."""
        steps, at = [], 0.0
        for phase in phases:
            steps.append((at, phase.mbps * 1e6))
            at += phase.seconds
        return cls(steps)

    @classmethod
    def of_trace(cls, trace: Trace, seconds: float) -> RateSchedule:
        """That many seconds of a trace, which begins anew when it ends."""
        steps, at = [], 0.0
        while at < seconds:
            for duration, rate in zip(*trace.pieces, strict=True):
                steps.append((at, float(rate)))
                at += float(duration)
        return cls(steps)

    def rate(self, at: float) -> float:
        """Bit/s at a time."""
        return self.steps[max(0, bisect_right(self._starts, at) - 1)][1]

    def finish(self, start: float, bits: float) -> float:
        """When `bits` have passed that begin at `start`; infinity when never. 0 bits too wait for the end of an
        outage."""
        index, at = max(0, bisect_right(self._starts, start) - 1), start
        while True:
            rate = self.steps[index][1]
            end = self.steps[index + 1][0] if index + 1 < len(self.steps) else math.inf
            if rate > 0:
                done = at + (0.0 if math.isinf(rate) else bits / rate)
                if done <= end:
                    return done
                bits -= (end - at) * rate
            elif math.isinf(end):
                return math.inf
            index, at = index + 1, end

    def shifted(self, by: float) -> RateSchedule:
        """The same, `by` seconds later."""
        return RateSchedule((start + by, rate) for start, rate in self.steps)

    def changed(self, at: float, bps: float) -> RateSchedule:
        """The same until `at`, then `bps` for good."""
        past = [step for step in self.steps if step[0] < at] or [(-math.inf, self.steps[0][1])]
        return RateSchedule([*past, (at, bps)])

    def outages_only(self) -> RateSchedule:
        """No limit where there is any rate, 0 where there is none."""
        return RateSchedule((start, math.inf if rate > 0 else 0.0) for start, rate in self.steps)

"""What the device can answer by itself, how long that takes, and which frames it keeps. No I/O, no clock.

The uncut model is right by definition and slow; an exit behind a head is quick and less often right. A frame that is
not sent gets the most accurate of them that is in time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..models.operating_point import Kind, OperatingPoint

GAIN = 0.3
"""Weight of the newest answer in the estimate of what the next one takes."""


class OnDevice:
    """The local operating points, and what their answers take."""

    def __init__(self, points: Sequence[OperatingPoint], uncut_s: float, exits_s: Mapping[str, float]) -> None:
        """Keep those of kind `local`.

        Args:
            points: all that may be chosen.
            uncut_s: seconds that the uncut model is expected to take.
            exits_s: seconds of exits by `OperatingPoint.stage`; an exit without one is taken for as slow.
        """
        local = (p for p in points if p.kind is Kind.LOCAL)
        self._points = sorted(local, key=lambda p: p.accuracy, reverse=True)
        self._seconds = {p.stage: exits_s.get(p.stage, uncut_s) if p.is_exit else uncut_s for p in self._points}

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._points)

    @property
    def quickest_s(self) -> float:
        """Seconds that the quickest answer takes; infinite without one."""
        return min(self._seconds.values(), default=float("inf"))

    def in_time(self, left_s: float, wanted: OperatingPoint | None = None) -> OperatingPoint | None:
        """The point to use within so many seconds: `wanted` if it is local and fits, else the most accurate that does.

        None where none does.
        """
        fitting = [p for p in self._points if self._seconds[p.stage] <= left_s]
        return wanted if wanted in fitting else next(iter(fitting), None)

    def late(self, wanted: OperatingPoint) -> OperatingPoint:
        """The point to use where none is in time: `wanted` if it is local, else the quickest."""
        return wanted if wanted in self._points else min(self._points, key=lambda p: self._seconds[p.stage])

    def took(self, point: OperatingPoint, seconds: float) -> None:
        """An answer took so long; one at a point that is not there any more says nothing."""
        if point.stage in self._seconds:
            self._seconds[point.stage] += GAIN * (seconds - self._seconds[point.stage])


class Keeping:
    """Which frames need not be sent because an exit is sure of them."""

    def __init__(self, confidence: float, keep_alive_s: float) -> None:
        """What is enough.

        Args:
            confidence: an exit that is at least so sure answers for the server, 0..1.
            keep_alive_s: after so many seconds without a packet the next frame is sent however sure it is: what the
                link carries is known from what is sent.
        """
        self._confidence, self._keep_alive_s = confidence, keep_alive_s
        self._sent_at = float("-inf")

    def sure(self, now: float) -> float | None:
        """How sure an exit has to be of the frame that is taken up now; None if it has to be sent."""
        return self._confidence if now - self._sent_at < self._keep_alive_s else None

    def on_written(self, now: float) -> None:
        """A packet was handed to the stream."""
        self._sent_at = now

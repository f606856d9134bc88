"""What packets took, kept until the control loop is told. No I/O, no clock.

Not when a packet is made: then it is waited for on the wire. The loop is told when a result comes or a point is chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..models.operating_point import OperatingPoint
from .interfaces import Control

if TYPE_CHECKING:
    from .engine import Encoded


class _Lesson(NamedTuple):
    point: OperatingPoint
    seconds: float
    alone_bytes: float
    share: float | None
    at: float


class Lessons:
    """What is still to be told."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._kept: list[_Lesson] = []

    def add(self, point: OperatingPoint, coded: Encoded, now: float) -> None:
        """A packet was made. Of a frame that is coded twice, the first one: the second says nothing new."""
        self._kept.append(_Lesson(point, coded.seconds, coded.alone_bytes, coded.share, now))

    def tell(self, control: Control) -> None:
        """Tell the control loop."""
        for point, seconds, alone_bytes, share, at in self._kept:
            control.on_computed(point, seconds, at)
            control.on_coded(point, alone_bytes)
            if share is not None:
                control.on_predicted(share)
        self._kept.clear()

"""The answer in reserve: what an exit says of a frame that is sent, in case the server is late. No I/O, no clock.

    head --> encoder --> packet --> written ------------------------> answered in time?  `ok`
      |                     |                                               | no
      +--- features --------+--> exit (the core is free by now) --> the exit's answer, `local`

No link tells before it stalls. But a split point with an exit has the features for an answer of its own on the device
already, for a few percent of the uncut model's time, and that time is after the packet has left. So a frame that is
sent there is a bet that cannot be lost: with the chance p that the server's answer is in time it is worth

    p x accuracy of the point  +  (1 - p) x accuracy of the exit
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..models.operating_point import Kind, OperatingPoint
from .measurement import Floats

Indexes = NDArray[np.intp]
GAIN = 0.2
"""Weight of the newest measurement."""


class Fallback:
    """What each point has in reserve.

    Args:
        points: all operating points; an exit among them serves the points of its split point.
        stage_of: index of each point's compute stage, [points].
        seconds: what an exit is expected to take.
        active: whether answers are kept in reserve at all.

    Attributes:
        accuracy: of the answer in reserve, 0..1; 0 where there is none; float64 [points].
        seconds: what an exit takes beyond head and encoder.
    """

    def __init__(
        self, points: Sequence[OperatingPoint], stage_of: Indexes, *, seconds: float, active: bool = True
    ) -> None:
        exits = {point.split: point.accuracy for point in points if point.is_exit and active}
        self.accuracy: Floats = np.array([exits.get(p.split, 0.0) if p.kind is Kind.FEATURE else 0.0 for p in points])
        self.seconds = seconds
        self._any = bool(self.accuracy.any())
        self._has = np.zeros(int(stage_of.max()) + 1)
        np.maximum.at(self._has, stage_of, self.accuracy > 0)

    def __bool__(self) -> bool:
        """Whether any point has one."""
        return self._any

    def of(self, index: int | None) -> float:
        """Accuracy of what the point at `index` has in reserve; 0 where there is none."""
        return 0.0 if index is None else float(self.accuracy[index])

    def add(self, seconds: float) -> None:
        """An exit took so long."""
        self.seconds += GAIN * (seconds - self.seconds)

    def seconds_of(self) -> Floats:
        """What the answer in reserve takes at each point, float64 [points]."""
        return np.where(self.accuracy > 0, self.seconds, 0.0)

    def done(self, ready: Floats) -> Floats:
        """When the core is free again behind a packet that is ready at `ready`, both float64 [stages]."""
        return ready + self.seconds * self._has if self._any else ready

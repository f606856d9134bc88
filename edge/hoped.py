"""Answers in time, and frames on their way whose answers would count if they come in time. No I/O, no clock."""

from __future__ import annotations

import math
from collections.abc import Callable

MOST = 256
"""Answers that are waited for at once; those of more frames than that never came."""


class Hoped:
    """When each frame's answer is due, and what it is worth, until it comes.

    Args:
        tell: are told the accuracy, 0..1, of each answer in time.
    """

    def __init__(self, *tell: Callable[[float], None]) -> None:
        self._tell = tell
        self._frames: dict[int, tuple[float, float]] = {}  # frame id -> due, accuracy

    def add(self, frame_id: int, due: float, accuracy: float) -> None:
        """A frame was sent whose answer is of that accuracy, 0..1, if it comes by `due`, in seconds."""
        if len(self._frames) >= MOST:
            self._frames.pop(next(iter(self._frames)))
        self._frames[frame_id] = due, accuracy

    def came(self, frame_id: int, now: float, *, answered: bool) -> None:
        """The server has said something of the frame; it counts if it is an answer, in time, and waited for."""
        due, accuracy = self._frames.pop(frame_id, (-math.inf, 0.0))
        if answered and now <= due:
            self.given(accuracy)

    def instead(self, frame_id: int, accuracy: float) -> None:
        """Another answer was given to the frame, in time: its own counts for nothing any more."""
        self._frames.pop(frame_id, None)
        self.given(accuracy)

    def given(self, accuracy: float) -> None:
        """An answer of this accuracy was given in time."""
        for tell in self._tell:
            tell(accuracy)

    def clear(self) -> None:
        """Whatever is on its way is lost."""
        self._frames.clear()

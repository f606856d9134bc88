"""Frames on their way whose answers would count, if they come in time. No I/O, no clock."""

from __future__ import annotations

import math

MOST = 256
"""Answers that are waited for at once; those of more frames than that never came."""


class Hoped:
    """When each frame's answer is due, and what it is worth, until it comes."""

    def __init__(self) -> None:
        """None."""
        self._frames: dict[int, tuple[float, float]] = {}  # frame id -> due, accuracy

    def add(self, frame_id: int, due: float, accuracy: float) -> None:
        """A frame was sent whose answer is of that accuracy, 0..1, if it comes by `due`, in seconds."""
        if len(self._frames) >= MOST:
            self._frames.pop(next(iter(self._frames)))
        self._frames[frame_id] = due, accuracy

    def came(self, frame_id: int, now: float) -> float | None:
        """The frame's answer is here: its accuracy, 0..1; None if it is late, or of no frame that is waited for."""
        due, accuracy = self._frames.pop(frame_id, (-math.inf, 0.0))
        return accuracy if now <= due else None

    def forget(self, frame_id: int) -> None:
        """Another answer was given to the frame: its own counts for nothing any more."""
        self._frames.pop(frame_id, None)

    def clear(self) -> None:
        """Whatever is on its way is lost."""
        self._frames.clear()

"""Frames that are written and have no answer yet, in the order in which they were written. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterator

from .ledger import Frame


class Unanswered:
    """Also those that have their outcome already: what comes back of them still says something of the link."""

    def __init__(self) -> None:
        """None."""
        self._frames: dict[int, Frame] = {}
        self._heard_at = float("-inf")

    def __len__(self) -> int:
        """How many."""
        return len(self._frames)

    def __contains__(self, frame_id: object) -> bool:
        """Whether the frame of this id is one."""
        return frame_id in self._frames

    def __iter__(self) -> Iterator[Frame]:
        """All of them; a frame may be taken out meanwhile."""
        return iter(list(self._frames.values()))

    def add(self, frame: Frame) -> None:
        """It was written."""
        self._frames[frame.id] = frame

    def take(self, frame_id: int, now: float) -> Frame | None:
        """The frame that was answered; None if no answer of it is waited for."""
        frame = self._frames.pop(frame_id, None)
        if frame is not None:
            self._heard_at = now
        return frame

    def take_all(self) -> list[Frame]:
        """All of them, of which none will be answered."""
        frames = list(self._frames.values())
        self._frames.clear()
        return frames

    def connected(self, now: float) -> None:
        """A new stream is as good as an answer."""
        self._heard_at = now

    def stalls_at(self, stall_s: float) -> float | None:
        """When nothing has been heard for `stall_s` seconds while frames were on their way; None while none are."""
        oldest = next(iter(self._frames.values()), None)
        if oldest is None or oldest.written_at is None:
            return None
        return max(oldest.written_at, self._heard_at) + stall_s

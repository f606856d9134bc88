"""Captured frames that wait for the device, oldest first. No I/O, no clock."""

from __future__ import annotations

from collections import deque

from .ledger import Frame, Ledger, Outcome


class Waiting:
    """The oldest of them makes room where there are too many, or where it is too late for it."""

    def __init__(self, ledger: Ledger, most: int) -> None:
        """None; at most so many at once."""
        self._ledger, self._most = ledger, most
        self._frames: deque[Frame] = deque()

    def __len__(self) -> int:
        """How many."""
        return len(self._frames)

    def add(self, frame: Frame, reason: str) -> None:
        """The newest one; those that make room for it are dropped for `reason`."""
        while self and (len(self) >= self._most or self._frames[0].deadline_at <= frame.captured_at):
            self._ledger.close(self._frames.popleft(), Outcome.DROPPED, reason)
        self._frames.append(frame)

    def pop(self) -> Frame:
        """The oldest one, which waits no longer."""
        return self._frames.popleft()

    def put_back(self, frame: Frame) -> None:
        """The one that was taken out last waits again."""
        self._frames.appendleft(frame)

    def clear(self) -> None:
        """None any more; their outcomes are given elsewhere."""
        self._frames.clear()

"""Packets that are ready and wait for the stream, and a frame that leaves in parts. No I/O, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator
from dataclasses import replace

from ..protos.messages import Continuation
from .interfaces import Limits, Outgoing, PartsLink
from .ledger import Frame
from .parts import Parts


class Outbox:
    """First in, first out; slices of a frame that has begun to leave go before the next frame."""

    def __init__(self) -> None:
        """Empty."""
        self._frames: deque[Frame] = deque()
        self._parts: Parts | None = None

    def __len__(self) -> int:
        """Frames whose packets wait; not the one that leaves in parts."""
        return len(self._frames)

    def __iter__(self) -> Iterator[Frame]:
        """These frames in order."""
        return iter(self._frames)

    def add(self, frame: Frame, *, first: bool = False) -> None:
        """Its packet is ready; `first`: it goes before all others."""
        (self._frames.appendleft if first else self._frames.append)(frame)

    def pop(self) -> Frame | None:
        """The frame whose packet is next."""
        return self._frames.popleft() if self._frames else None

    def take_all(self) -> list[Frame]:
        """All of them, which wait no longer."""
        frames = list(self._frames)
        self._frames.clear()
        return frames

    @property
    def has_some(self) -> bool:
        """Whether a packet, or a slice whose time has come, can be written."""
        return bool(self._frames) or (self._parts is not None and self._parts.due)

    # A frame that leaves in parts.

    def leaves_in_parts(self, unanswered: Container[int]) -> bool:
        """Whether a frame does; not if it is answered already, from what the server had."""
        if self._parts is None:
            return False
        if self._parts.frame.id in unanswered:
            return True
        self._parts.give_up()
        self._parts = None
        return False

    def next_part(self, now: float) -> Continuation | None:
        """The next slice of it, or the word that the rest is given up; None before its time."""
        if self._parts is None:
            return None
        continuation = self._parts.next_to_write(now, self._frames)
        if self._parts.done:
            self._parts = None
        return continuation

    def begin(self, frame: Frame, link: PartsLink, limits: Limits, now: float) -> Outgoing:
        """What is written of a frame now: its packet, or its first slice."""
        remaining_ms = 0 if limits.lossless else max(1, round((frame.deadline_at - now) * 1000))
        outgoing = Outgoing(frame.packet, remaining_ms)
        if limits.cut_short and not limits.lossless:
            self._parts = Parts.of(frame, link, now)
        if self._parts is not None:
            outgoing = self._parts.first(now, remaining_ms)
        return replace(outgoing, size=frame.size) if limits.say_size else outgoing

    def begun(self, now: float) -> None:
        """It was written."""
        if self._parts is not None:
            self._parts.wait(now)

    def tick(self, now: float) -> None:
        """See whether the next slice may leave."""
        if self._parts is not None:
            self._parts.tick(now)

    @property
    def next_timer(self) -> float | None:
        """When `tick` is due."""
        return self._parts.next_timer if self._parts is not None else None

    def break_off(self) -> None:
        """The stream is down: what was leaving in parts leaves no more."""
        self._parts = None

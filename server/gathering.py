"""Gathering: a frame that came with its first slices only, until the rest is here, given up, or waited for no longer.

    Frame (first slices) ──► Continuation ──► Continuation ──► ...     all here: answered whole
                                     └──► cut, or out of patience      answered from the prefix that is here

Slices come in order of importance, and any prefix of them decodes; so there is an answer at every moment.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from ..models.bitstream import MAX_SLICE_BYTES, MAX_SLICES, Packet
from ..protos.messages import Continuation, Frame
from .exceptions import InvalidError

LONGEST_S = 5.0
"""Most patience, whatever a frame asks for."""


class Budget:
    """Bytes that all frames together may gather: a client that announces slices for ever fills no memory."""

    def __init__(self, limit: int) -> None:
        """`limit` bytes."""
        self._left = limit

    def take(self, size: int) -> bool:
        """Take `size` bytes of it, if they are left."""
        if size > self._left:
            return False
        self._left -= size
        return True

    def give_back(self, size: int) -> None:
        """What was taken is free again."""
        self._left += size


class Gathering:
    """One frame whose slices are still coming. Belongs to one event loop."""

    def __init__(
        self, frame: Frame, received: float, max_bytes: int, clock: Callable[[], float], budget: Budget | None = None
    ) -> None:
        """Begin with what the frame brought.

        Args:
            frame: with `slices_to_come` > 0.
            received: when it came, by `clock`.
            max_bytes: most bytes that all its slices together may have.
            clock: seconds.
            budget: what all frames may gather; without one there is no such limit.

        Raises:
            BitstreamError, LimitError: its packet cannot be read.
            InvalidError: it announces more slices than a packet can have.
        """
        self._packet = Packet.from_bytes(frame.packet, max_bytes)
        self._missing = frame.slices_to_come
        if len(self._packet.slices) + self._missing > MAX_SLICES:
            raise InvalidError(
                f"{len(self._packet.slices)} slices and {self._missing} to come are more than a packet's {MAX_SLICES}"
            )
        if self._missing and (largest := max(map(len, self._packet.slices))) > MAX_SLICE_BYTES:
            raise InvalidError(f"a slice of {largest} bytes is the last one, and {self._missing} are to come")
        self._frame, self._received, self._changed, self._clock = frame, received, received, clock
        self._slices = list(self._packet.slices)
        self._room = max_bytes - len(frame.packet)
        self._budget, self._taken = budget or Budget(max_bytes), 0
        self._ended = asyncio.Event()

    @property
    def frame_id(self) -> int:
        """Of the frame."""
        return self._packet.frame_id

    def add(self, continuation: Continuation, now: float) -> None:
        """A slice came, or the word that no more will. What is damaged or too large ends the frame before it."""
        if self._ended.is_set():
            return
        self._changed = now
        room = min(self._room, MAX_SLICE_BYTES) if self._missing > 1 else self._room
        fits = len(continuation.slice) <= room and zlib.crc32(continuation.slice) == continuation.crc
        if continuation.cut or not fits or not self._budget.take(len(continuation.slice)):
            self.end()
            return
        self._taken += len(continuation.slice)
        self._slices.append(continuation.slice)
        self._room -= len(continuation.slice)
        self._missing -= 1
        if not self._missing:
            self.end()

    def end(self) -> None:
        """Wait for no more."""
        self._ended.set()

    async def whole(self) -> tuple[Frame, float]:
        """The frame with the slices that came in time, and when it was complete: the last slice, or patience ended."""
        patience = min((self._frame.patience_ms or self._frame.remaining_ms) / 1e3 or LONGEST_S, LONGEST_S)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._received + patience - self._clock())):
                    await self._ended.wait()
        finally:
            self._budget.give_back(self._taken)
            self._taken = 0
        complete = self._changed if self._ended.is_set() else self._clock()
        self.end()
        packet = replace(self._packet, slices=tuple(self._slices)).to_bytes()
        gone_ms = round((complete - self._received) * 1e3)
        # A deadline of 0 would mean that there is none.
        remaining = max(1, self._frame.remaining_ms - gone_ms) if self._frame.remaining_ms else 0
        asked = self._frame
        whole = Frame(packet, remaining, trace=asked.trace, width=asked.width, height=asked.height)
        return whole, complete

"""Parts: a packet whose slices leave one after another, so that its rest can still be given up. No I/O, no clock.

    first slice ──► (link free again) ──► next slice ──► ... ──► last slice
                             └──► the rest would make its own answer late, or that of the next frame: cut

What was handed to the stream cannot be taken back: gRPC and the kernel take a whole frame at once and let it leave as
the link allows. So on a link that needs long for a frame, the next slice is held back until the one before should have
left. Slices come in order of importance, and the server answers from the prefix that it holds.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence

from ..models.bitstream import Packet
from ..protos.messages import Continuation
from .interfaces import Outgoing, PartsLink
from .ledger import Frame


class Parts:
    """A frame whose first slice goes ahead of the others."""

    def __init__(self, frame: Frame, packet: Packet, link: PartsLink) -> None:
        """Take the packet apart; it has at least two slices."""
        self.frame, self._link = frame, link
        self._first = packet.prefix(1).to_bytes()
        self._rest = deque(packet.slices[1:])
        self._next_at = 0.0
        self.due = False
        """Whether the time of the next slice has come."""

    @classmethod
    def of(cls, frame: Frame, link: PartsLink, now: float) -> Parts | None:
        """The frame's packet in parts; None if it should leave whole, or has but one slice."""
        if not link.in_parts(now, len(frame.packet)):
            return None
        packet = Packet.from_bytes(frame.packet)
        return cls(frame, packet, link) if len(packet.slices) > 1 else None

    def first(self, now: float, remaining_ms: int) -> Outgoing:
        """What goes ahead."""
        patience_s = self._link.patience_s(now, self.frame.captured_at, len(self._first))
        return Outgoing(self._first, remaining_ms, len(self._rest), max(1, round(patience_s * 1e3)))

    def wait(self, now: float) -> None:
        """A part has just been handed to the stream."""
        self._next_at, self.due = self._link.next_part_at(now), False
        self._link.on_held(self._rest_bytes)

    def give_up(self) -> None:
        """The rest will not leave."""
        self._rest.clear()
        self._link.on_held(0)

    @property
    def next_timer(self) -> float | None:
        """When `tick` is due."""
        return None if self.due else self._next_at

    def tick(self, now: float) -> None:
        """See whether the next slice may leave."""
        self.due = now >= self._next_at

    @property
    def done(self) -> bool:
        """Whether no further slice leaves."""
        return not self._rest

    def next_to_write(self, now: float, following: Sequence[Frame]) -> Continuation | None:
        """The next slice, if it is time, or the word that the rest is given up.

        Args:
            now: seconds.
            following: frames whose packets wait behind this one, in order.
        """
        late = not self._link.fits(now, self.frame.captured_at, len(self._rest[0]))
        if self.frame.outcome is not None or late or self._harms(following, now):
            self.give_up()
            return Continuation(self.frame.id, cut=True)
        if now < self._next_at:
            return None
        data = self._rest.popleft()
        self._link.continued(self.frame.id, len(data))
        self.frame.sent_bytes += len(data)
        self.wait(now)
        return Continuation(self.frame.id, data, zlib.crc32(data))

    def _harms(self, following: Sequence[Frame], now: float) -> bool:
        """Whether the rest would make the next frame late, which would be in time without it."""
        if not following:
            return False
        captured_at, size = following[0].captured_at, len(following[0].packet)
        fits = self._link.fits
        return fits(now, captured_at, size) and not fits(now, captured_at, size + self._rest_bytes)

    @property
    def _rest_bytes(self) -> int:
        return sum(map(len, self._rest))

"""A full server says when to come again; until then nothing is sent to it. No I/O, no clock."""

from __future__ import annotations

import math

MOST_HELD_S = 10.0
"""Longest delay that a server is granted: a broken one must not silence a device."""


class Holding:
    """Whether frames are held back; never for a device that may lose no frame (`lossless`)."""

    def __init__(self, lossless: bool) -> None:
        """The server has asked for nothing."""
        self._lossless = lossless
        self._until, self._encode_s = -math.inf, 0.0

    def connected(self) -> None:
        """There is a new stream, perhaps to another server."""
        self._until = -math.inf

    def told(self, retry_ms: int, now: float) -> None:
        """A refused frame's result said when to send again; 0: it did not."""
        self._until = max(self._until, now + min(retry_ms / 1e3, MOST_HELD_S))

    def encoded(self, seconds: float) -> None:
        """Making a packet took so long; the next one is expected to take as long."""
        self._encode_s = seconds

    def at(self, now: float) -> bool:
        """Whether a packet that is ready now is not to be sent."""
        return not self._lossless and now < self._until

    def when_ready(self, now: float) -> bool:
        """Whether a packet that is begun now would not be sent when it is ready."""
        return self.at(now + self._encode_s)

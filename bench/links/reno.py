"""TCP Reno's congestion window in virtual time, as far as a stream of frames notices it.

Counted in segments: ten at first, doubling each round trip in slow start, one more a round trip afterwards, half after
a loss (once a round trip). It only grows while it is what limits the sender (RFC 7661), and is not forgotten in pauses
(`tcp_slow_start_after_idle=0`). Fast retransmit, SACK and the tail loss probe are the sender's (`VirtualLink`).
"""

from __future__ import annotations

import heapq
import math

FIRST_WINDOW = 10.0
LEAST_WINDOW = 2.0


class RenoWindow:
    """How many segments may be on their way, and when the next one may go."""

    def __init__(self) -> None:
        """A new connection."""
        self.segments = FIRST_WINDOW
        self._threshold = math.inf
        self._acks: list[float] = []  # heap of the times at which segments on their way are acknowledged
        self._most_on_their_way = 0
        self._recovered = -math.inf

    def opens(self, now: float) -> float:
        """When the next segment may go, not before `now`."""
        while self._acks and (self._acks[0] <= now or len(self._acks) >= int(self.segments)):
            now = max(now, heapq.heappop(self._acks))
            self._acknowledged()
        return now

    def sent(self, acknowledged: float) -> None:
        """A segment goes, and will be acknowledged then."""
        heapq.heappush(self._acks, acknowledged)
        self._most_on_their_way = max(self._most_on_their_way, len(self._acks))

    def lost(self, sent: float, noticed: float) -> None:
        """A segment that went at `sent` is missed at `noticed`. One round trip's losses halve the window once."""
        if sent >= self._recovered:
            self._recovered = noticed
            self.segments = self._threshold = max(self.segments / 2, LEAST_WINDOW)
            self._most_on_their_way = 0

    def _acknowledged(self) -> None:
        if self.segments < self._threshold:
            if self.segments < 2 * self._most_on_their_way:
                self.segments += 1
        elif self._most_on_their_way >= int(self.segments):
            self.segments += 1 / self.segments

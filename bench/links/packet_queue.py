"""One direction of a packet link, without I/O: losses, a bounded queue, a rate, a delay.

offer -> loss -> [ queue, drop-tail ] -> rate -> delay + jitter, in order -> take

The clock is an argument, so it is tested in exact numbers; the TUN relay drives it with the real one.
"""

from __future__ import annotations

import math
import random
from collections import deque

from .record import RECORD_BIN_S, SideCounts
from .spec import LinkSpec, Side


class PacketQueue:
    """One side of a link. Times are seconds of any one clock, in rising order.

    Attributes:
        counts: what it has seen.
        passed: bytes by bins of `RECORD_BIN_S` since `begin`.
    """

    def __init__(self, spec: LinkSpec, side: Side) -> None:
        """Describe it; until `begin` the schedule's first rate above 0 holds."""
        self.counts = SideCounts()
        self.passed: dict[int, int] = {}
        self._schedule = spec.rates(side)
        self._rates = self._schedule.shifted(_NOT_YET)
        self._delay_s, self._jitter_s = spec.delay_s, spec.jitter_s
        self._loss, self._limit = spec.loss, spec.queue_bytes
        self._dice: random.Random = spec.dice(side)
        self._origin = math.inf
        self._queue: deque[tuple[float, bytes]] = deque()  # arrived
        self._queued = 0
        self._line: deque[tuple[float, bytes]] = deque()  # due
        self._free = self._last_due = -math.inf
        self._finish: float | None = None  # of the first in the queue, once reckoned

    def begin(self, origin: float) -> None:
        """The schedule begins at `origin`."""
        self._origin = origin
        self._rates, self._finish = self._schedule.shifted(origin), None

    def set_rate(self, now: float, bps: float) -> None:
        """Leave the schedule: this rate from now on."""
        self._advance(now)
        self._rates, self._finish = self._rates.changed(now, bps), None

    def offer(self, packet: bytes, now: float) -> None:
        """A packet arrives; it may be lost, or dropped because the queue is full."""
        self._advance(now)
        if self._loss and self._dice.random() < self._loss:
            self.counts.lost += 1
        elif self._queue and self._queued + len(packet) > self._limit:
            self.counts.overflowed += 1
        else:
            self._queue.append((now, packet))
            self._queued += len(packet)
            self.counts.queue_bytes_max = max(self.counts.queue_bytes_max, self._queued)

    def take(self, now: float) -> list[bytes]:
        """Packets that are delivered by now, in order."""
        self._advance(now)
        due = []
        while self._line and self._line[0][0] <= now:
            due.append(self._line.popleft()[1])
        return due

    def next_at(self) -> float:
        """When there is something to do next; infinity when only an offer can change anything."""
        return min(self._line[0][0] if self._line else math.inf, self._head_finish() if self._queue else math.inf)

    def _head_finish(self) -> float:
        if self._finish is None:
            arrived, packet = self._queue[0]
            self._finish = self._rates.finish(max(arrived, self._free), 8 * len(packet))
        return self._finish

    def _advance(self, now: float) -> None:
        while self._queue and (finish := self._head_finish()) <= now:
            arrived, packet = self._queue.popleft()
            self._finish, self._free = None, finish
            self._queued -= len(packet)
            self._count(arrived, finish, len(packet))
            jitter = self._dice.random() * self._jitter_s if self._jitter_s else 0.0
            self._last_due = max(self._last_due, finish + self._delay_s + jitter)
            self._line.append((self._last_due, packet))

    def _count(self, arrived: float, finish: float, size: int) -> None:
        self.counts.packets += 1
        self.counts.bytes += size
        self.counts.queue_s_max = max(self.counts.queue_s_max, finish - arrived)
        if finish >= self._origin:
            key = int((finish - self._origin) / RECORD_BIN_S)
            self.passed[key] = self.passed.get(key, 0) + size


_NOT_YET = 1e12
"""Seconds; a schedule that begins so late holds its first rate until `begin` moves it."""

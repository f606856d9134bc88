"""A link in virtual time: exact, without I/O, many thousands of packets a second.

write -> [ FIFO queue ] -> the trace's rate -> one-way delay, jitter -> in order -> delivered

It carries one TCP connection: what is written arrives whole and in order. A packet that is lost is sent again about
one round trip later, and everything behind it waits for it (head-of-line blocking); the copy takes its share of the
link. A sender that meets a full queue loses one packet a round trip, as a congestion window that has grown too large
does, and keeps the rest back. Slow start is not modelled: with a stream's frames it is the exception
(`tcp_slow_start_after_idle=0`).
"""

from __future__ import annotations

import math
import random
from collections import deque

from .link_spec import LinkSpec, Side
from .rates import Rates
from .traces import Trace

SEGMENT_BYTES = 1448
"""What one Ethernet frame carries of TCP."""


class VirtualLink:
    """One direction of a link: a FIFO that a trace empties, then a delay.

    Args:
        trace: what the link can carry.
        delay_s: one-way propagation, added after the last byte has left.
        start_s: the trace's time at virtual time 0.
        overhead_bytes: added to everything that is written, on the wire.
        jitter_s: most further delay of a segment, drawn evenly.
        loss: probability that a segment is lost, 0 to under 1.
        queue_bytes: most bytes that wait at the bottleneck; infinity for no limit.
        seed: of losses and jitter: a text, a number, or a source of random numbers.

    Attributes:
        bytes_sent: written and overhead, copies of lost segments included.
        lost: segments lost at random.
        overflowed: segments lost because the queue was full.
    """

    def __init__(
        self,
        trace: Trace | Rates,
        *,
        delay_s: float = 0.0,
        start_s: float = 0.0,
        overhead_bytes: int = 0,
        jitter_s: float = 0.0,
        loss: float = 0.0,
        queue_bytes: float = math.inf,
        seed: int | str | random.Random = 0,
    ) -> None:
        self.trace = trace
        self.delay_s = delay_s
        self.start_s = start_s
        self.overhead_bytes = overhead_bytes
        self.jitter_s, self.loss, self.queue_bytes = jitter_s, loss, queue_bytes
        self.bytes_sent = self.lost = self.overflowed = 0
        self._dice = seed if isinstance(seed, random.Random) else random.Random(seed)
        self._ideal = not jitter_s and not loss and math.isinf(queue_bytes)
        self._free_at = 0.0
        self._delivered = 0.0  # what comes later is not delivered before
        self._copies = 0  # bytes of copies that have not taken their share of the link yet
        self._waiting: deque[tuple[float, int]] = deque()  # when it leaves, bytes
        self._queued = 0
        self._next_overflow = 0.0

    @classmethod
    def of(cls, spec: LinkSpec, side: Side = "up", *, start_s: float = 0.0, overhead_bytes: int = 0) -> VirtualLink:
        """One side of a described link; its schedule begins at virtual time `-start_s`."""
        return cls(
            spec.up if side == "up" and isinstance(spec.up, Trace) else spec.rates(side),
            delay_s=spec.delay_s,
            start_s=start_s,
            overhead_bytes=overhead_bytes,
            jitter_s=spec.jitter_s,
            loss=spec.loss,
            queue_bytes=spec.queue_bytes,
            seed=spec.dice(side),
        )

    @property
    def free_at(self) -> float:
        """When everything that was written has left."""
        return self._free_at

    def write(self, size_bytes: int, now: float) -> float:
        """Queue a packet; returns when its last byte is delivered. Calls must be in order of `now`."""
        total = size_bytes + self.overhead_bytes
        self.bytes_sent += total
        if self._ideal:
            self._free_at = self._finish(max(now, self._free_at), total)
            return self._free_at + self.delay_s
        return self._write_segments(total, now)

    def _write_segments(self, total: int, now: float) -> float:
        if self._copies:
            self._free_at = self._finish(max(now, self._free_at), self._copies)
            self._copies = 0
        while self._waiting and self._waiting[0][0] <= now:
            self._queued -= self._waiting.popleft()[1]
        round_trip = 2 * self.delay_s + self.jitter_s
        again: list[tuple[float, int]] = []  # when its loss is noticed, bytes
        for offset in range(0, max(total, 1), SEGMENT_BYTES):
            size = min(SEGMENT_BYTES, total - offset)
            if self.loss and self._dice.random() < self.loss:
                self.lost += 1
                again.append((max(now, self._free_at) + round_trip, size))
                continue
            leaves = self._finish(max(now, self._free_at), size)
            if self._queued + size > self.queue_bytes and leaves >= self._next_overflow:
                self.overflowed += 1
                self._next_overflow = leaves + round_trip
                again.append((self._next_overflow, size))
                continue
            self._free_at = leaves
            self._queued += size
            self._waiting.append((leaves, size))
            self._arrive(leaves)
        for noticed, size in again:
            self._send_again(noticed, size, round_trip)
        return self._delivered

    def _send_again(self, noticed: float, size: int, round_trip: float) -> None:
        """The copy goes when its loss is noticed, behind what this write has queued. The link is not held free for it
        meanwhile: its share is taken from the next write's."""
        while self.loss and self._dice.random() < self.loss:
            self.lost += 1
            noticed += round_trip
        self.bytes_sent += size
        self._copies += size
        self._arrive(self._finish(max(noticed, self._free_at), size))

    def _arrive(self, left: float) -> None:
        jitter = self._dice.random() * self.jitter_s if self.jitter_s else 0.0
        self._delivered = max(self._delivered, left + self.delay_s + jitter)

    def _finish(self, begin: float, size_bytes: float) -> float:
        if isinstance(self.trace, Trace):
            return self.trace.finish(self.start_s + begin, size_bytes) - self.start_s
        return self.trace.finish(self.start_s + begin, 8 * size_bytes) - self.start_s

"""A link in virtual time: exact, without I/O, many thousands of packets a second.

write -> [ FIFO queue, shared with other traffic ] -> the trace's rate -> one-way delay -> in order -> delivered
                                                                              lost: later by a retransmission

A lost segment is sent again, and what was sent after it waits for it (head-of-line blocking, as in any one TCP stream).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

import numpy as np

from .traces import Trace

SEGMENT_BYTES = 1448


class VirtualLink:
    """One direction of a link: a FIFO that a trace empties, then a constant delay.

    Args:
        trace: what the link can carry.
        delay_s: one-way propagation, added after the last byte has left.
        start_s: the trace's time at virtual time 0.
        overhead_bytes: added to every packet on the wire.
        loss: probability that a segment of 1448 bytes is lost, 0..1.
        recovery_s: how much later a lost segment arrives. A tail loss probe takes two round trips (RFC 8985).
        others: other traffic in the same queue, (virtual time, bytes), whose deliveries nobody asks about.
        seed: of the losses.
    """

    def __init__(
        self,
        trace: Trace,
        *,
        delay_s: float = 0.0,
        start_s: float = 0.0,
        overhead_bytes: int = 0,
        loss: float = 0.0,
        recovery_s: float = 0.0,
        others: Iterable[tuple[float, float]] = (),
        seed: int = 0,
    ) -> None:
        self.trace = trace
        self.delay_s = delay_s
        self.start_s = start_s
        self.overhead_bytes = overhead_bytes
        self.loss = loss
        self.recovery_s = recovery_s
        self._others = deque(sorted(others))
        self._random = np.random.default_rng(seed)
        self._free_at = 0.0
        self._delivered_at = 0.0
        self.bytes_sent = 0

    @property
    def free_at(self) -> float:
        """When everything that was written has left."""
        return self._free_at

    def write(self, size_bytes: int, now: float) -> float:
        """Queue a packet; returns when its last byte is delivered. Calls must be in order of `now`."""
        while self._others and self._others[0][0] <= now:
            at, other_bytes = self._others.popleft()
            self._send(other_bytes, at)
        total = size_bytes + self.overhead_bytes
        self._send(total, now)
        self.bytes_sent += total
        arrives = self._free_at + self.delay_s
        if self.loss and self._random.random() > (1 - self.loss) ** math.ceil(total / SEGMENT_BYTES):
            arrives += self.recovery_s
        self._delivered_at = max(self._delivered_at, arrives)
        return self._delivered_at

    def _send(self, size_bytes: float, at: float) -> None:
        self._free_at = self.trace.finish(self.start_s + max(at, self._free_at), size_bytes) - self.start_s

"""A link in virtual time: exact, without I/O, many thousands of packets a second.

write -> [ FIFO queue ] -> the trace's rate -> one-way delay -> delivered
"""

from __future__ import annotations

from .traces import Trace


class VirtualLink:
    """One direction of a link: a FIFO that a trace empties, then a constant delay.

    Args:
        trace: what the link can carry.
        delay_s: one-way propagation, added after the last byte has left.
        start_s: the trace's time at virtual time 0.
        overhead_bytes: added to every packet on the wire.
    """

    def __init__(self, trace: Trace, *, delay_s: float = 0.0, start_s: float = 0.0, overhead_bytes: int = 0) -> None:
        self.trace = trace
        self.delay_s = delay_s
        self.start_s = start_s
        self.overhead_bytes = overhead_bytes
        self._free_at = 0.0
        self.bytes_sent = 0

    @property
    def free_at(self) -> float:
        """When everything that was written has left."""
        return self._free_at

    def write(self, size_bytes: int, now: float) -> float:
        """Queue a packet; returns when its last byte is delivered. Calls must be in order of `now`."""
        begin = max(now, self._free_at)
        total = size_bytes + self.overhead_bytes
        self._free_at = self.trace.finish(self.start_s + begin, total) - self.start_s
        self.bytes_sent += total
        return self._free_at + self.delay_s

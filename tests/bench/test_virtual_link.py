"""The virtual link is a FIFO with a delay, exact."""

from __future__ import annotations

import pytest
from headrace.bench.traces import Trace
from headrace.bench.virtual_link import VirtualLink


def test_packets_queue_behind_each_other_and_the_delay_does_not() -> None:
    link = VirtualLink(Trace.steps([(10.0, 80_000)]), delay_s=0.5)
    assert link.write(1000, now=0.0) == pytest.approx(0.6)
    assert link.free_at == pytest.approx(0.1)
    assert link.write(1000, now=0.05) == pytest.approx(0.7)
    assert link.write(1000, now=1.0) == pytest.approx(1.6)
    assert link.bytes_sent == 3000


def test_outage_holds_the_queue_and_start_shifts_the_trace() -> None:
    trace = Trace.steps([(1.0, 8000), (4.0, 0.0), (5.0, 8000)])
    link = VirtualLink(trace, start_s=0.5)
    assert link.write(500, now=0.0) == pytest.approx(0.5)
    assert link.write(500, now=0.0) == pytest.approx(5.0)


def test_overhead_travels_too() -> None:
    link = VirtualLink(Trace.steps([(1.0, 8000)]), overhead_bytes=100)
    assert link.write(400, now=0.0) == pytest.approx(0.5)

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


def test_other_traffic_is_in_the_same_queue() -> None:
    link = VirtualLink(Trace.steps([(1.0, 8000)]), others=[(0.5, 500), (0.1, 200), (9.0, 1000)])
    assert link.write(100, now=1.0) == pytest.approx(0.5 + 0.5 + 0.1)  # 0.1 to 0.3 and 0.5 to 1.0 are others'
    assert link.bytes_sent == 100


def test_lost_segment_holds_up_what_comes_after_it() -> None:
    trace = Trace.steps([(1.0, 8e6)])
    every = VirtualLink(trace, delay_s=0.01, loss=1.0, recovery_s=0.06)
    assert every.write(1000, now=0.0) == pytest.approx(0.001 + 0.01 + 0.06)
    every.loss = 0.0
    assert every.write(1000, now=0.02) == pytest.approx(0.071), "in order: not before the one that was lost"
    assert every.write(1000, now=0.10) == pytest.approx(0.111)
    some = VirtualLink(trace, loss=0.02, recovery_s=0.06, seed=1)
    late = [some.write(4000, now=n / 10) - n / 10 > 0.05 for n in range(5000)]
    assert sum(late) / 5000 == pytest.approx(1 - 0.98**3, abs=0.01)

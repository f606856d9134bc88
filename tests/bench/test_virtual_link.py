"""The virtual link is a FIFO with a delay, exact."""

from __future__ import annotations

import random
import time

import pytest
from headrace.bench.links.schedule import RateSchedule
from headrace.bench.links.spec import LinkSpec
from headrace.bench.links.traces import Trace
from headrace.bench.links.virtual_link import VirtualLink


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


FLAT = Trace.steps([(1.0, 8 * 1448 * 100)])
"""One segment every 10 ms."""


def test_a_description_makes_the_same_link() -> None:
    for capacity in (FLAT, 8.0 * 1448 * 100, RateSchedule([(0, 8 * 1448 * 100)])):
        link = VirtualLink.of(LinkSpec(up=capacity, delay_s=0.5, queue_bytes=2**20))
        assert link.write(1448, 0.0) == pytest.approx(0.51)
        assert link.write(9 * 1448, 0.0) == pytest.approx(0.60)
        assert link.write(0, 2.0) == pytest.approx(2.5)
    assert VirtualLink.of(LinkSpec(up=8e3), "down").write(10**6, 0.0) == 0.0


def test_a_lost_segment_costs_a_round_trip_for_it_and_all_behind_it() -> None:
    class OneLoss(random.Random):
        """The fifth segment is lost."""

        drawn = 0

        def random(self) -> float:
            self.drawn += 1
            return 0.0 if self.drawn == 5 else 1.0

    clean = VirtualLink(FLAT, delay_s=0.1)
    lossy = VirtualLink(FLAT, delay_s=0.1, loss=0.02, seed=OneLoss())
    assert clean.write(14480, 0.0) == pytest.approx(0.2)
    # The three behind it leave by 0.07 and are acknowledged by 0.27: then it is sent again, 0.01 + 0.1 on its way.
    assert lossy.write(14480, 0.0) == pytest.approx(0.38)
    assert lossy.free_at == pytest.approx(0.09)
    # The window is halved to five: the next one goes when four are left on their way, at 0.26, and comes in order.
    assert lossy.write(1448, 0.1) == pytest.approx(0.38)
    assert lossy.free_at == pytest.approx(0.27)
    assert lossy.write(1448, 0.5) == pytest.approx(0.61)
    assert (lossy.lost, lossy.bytes_sent) == (1, 14480 + 1448 + 1448 + 1448)


def test_losses_are_seeded_and_as_frequent_as_said() -> None:
    def run(seed: int) -> tuple[int, list[float]]:
        link = VirtualLink.of(LinkSpec(up=FLAT, delay_s=0.02, loss=0.02, seed=seed))
        times = [link.write(1448, n * 0.1) for n in range(5000)]
        return link.lost, times

    one, again, other = run(1), run(1), run(2)
    assert one == again != other
    assert one[1] == sorted(one[1])
    assert 60 <= one[0] <= 145
    assert sum(at - n * 0.1 > 0.045 for n, at in enumerate(one[1])) == pytest.approx(one[0], abs=4)


def test_jitter_stays_in_its_range_and_order() -> None:
    link = VirtualLink.of(LinkSpec(delay_s=0.1, jitter_s=0.05, seed=3))
    waits = [link.write(100, n * 0.2) - n * 0.2 for n in range(300)]
    assert 0.1 <= min(waits) < 0.105
    assert 0.145 < max(waits) <= 0.15
    close = [link.write(100, 100 + n * 1e-4) for n in range(300)]
    assert close == sorted(close)


def test_the_window_opens_by_round_trips_and_is_kept_in_pauses() -> None:
    wide = Trace.steps([(1.0, 8e9)])
    link = VirtualLink(wide, delay_s=0.1, queue_bytes=2**20)
    assert link.write(10 * 1448, 0.0) == pytest.approx(0.1, abs=0.001)
    assert link.write(30 * 1448, 1.0) == pytest.approx(1.3, abs=0.002)  # 11 of 30 go at once, then the rest
    assert link.write(30 * 1448, 60.0) == pytest.approx(60.1, abs=0.001)
    # The last of its segments is lost: nobody is behind it, and a probe finds out after two round trips.
    probed = VirtualLink(wide, delay_s=0.1, loss=0.5, seed=LastOfThree())
    assert probed.write(3 * 1448, 0.0) == pytest.approx(0.5, abs=0.001)


class LastOfThree(random.Random):
    drawn = 0

    def random(self) -> float:
        self.drawn += 1
        return 0.0 if self.drawn == 3 else 1.0


def test_a_full_queue_drops_and_the_link_stays_in_use() -> None:
    roomy, tight = (VirtualLink(FLAT, delay_s=0.02, queue_bytes=n * 1448) for n in (10_000, 8))
    ideal = VirtualLink(FLAT, delay_s=0.02)
    frames = [(5 * 1448, n * 0.05) for n in range(400)]  # exactly what it carries
    late = {link: max(link.write(*frame) - frame[1] for frame in frames) for link in (ideal, roomy, tight)}
    assert late[ideal] == pytest.approx(0.07)
    assert roomy.overflowed == 0
    assert late[roomy] < 0.1
    bulk = tight.write(2000 * 1448, 100.0) - 100.0
    assert tight.overflowed > 5
    assert 20.0 < bulk < 30.0
    roomy.write(2000 * 1448, 100.0)
    assert roomy.overflowed == 0
    assert roomy.free_at == pytest.approx(120.0, abs=0.2)


def test_thousands_of_frames_a_second_also_with_losses() -> None:
    link = VirtualLink.of(LinkSpec(up=8e6, delay_s=0.02, jitter_s=0.002, loss=0.02))
    began = time.process_time()
    for n in range(2000):
        link.write(8000, n * 0.1)
    assert 2000 / (time.process_time() - began) > 2000


def test_other_traffic_is_in_the_same_queue() -> None:
    link = VirtualLink(Trace.steps([(1.0, 8000)]), others=[(0.5, 500), (0.1, 200), (9.0, 1000)])
    assert link.write(100, now=1.0) == pytest.approx(0.5 + 0.5 + 0.1)  # 0.1 to 0.3 and 0.5 to 1.0 are others'
    assert link.bytes_sent == 100

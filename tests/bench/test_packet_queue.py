"""One direction of the TUN relay, without a TUN and without a clock: exact."""

from __future__ import annotations

import math

import pytest
from headrace.bench.links.packet_queue import PacketQueue
from headrace.bench.links.schedule import RateSchedule
from headrace.bench.links.spec import LinkSpec

PACKET = bytes(1000)  # 1 ms at 8 Mbit/s


def drain(queue: PacketQueue, until: float = math.inf) -> list[float]:
    """When packets come out, if somebody looks exactly when there is something to do."""
    found = []
    while (at := queue.next_at()) <= until and at < math.inf:
        found += [at] * len(queue.take(at))
    return found


def test_rate_delay_and_a_full_queue():
    queue = PacketQueue(LinkSpec(up=8e6, delay_s=0.5, queue_bytes=3000), "up")
    assert queue.next_at() == math.inf
    for _ in range(5):
        queue.offer(PACKET, 1.0)
    assert drain(queue) == pytest.approx([1.501, 1.502, 1.503])
    assert (queue.counts.packets, queue.counts.bytes, queue.counts.overflowed) == (3, 3000, 2)
    assert (queue.counts.queue_bytes_max, queue.counts.queue_s_max) == (3000, pytest.approx(0.003))
    queue.offer(PACKET, 2.0)
    assert drain(queue) == pytest.approx([2.501])


def test_a_queue_of_a_second_holds_packets_for_a_second():
    queue = PacketQueue(LinkSpec(up=80e3, queue_bytes=10_000), "up")
    for _ in range(30):
        queue.offer(PACKET, 0.0)
    assert drain(queue) == pytest.approx([0.1 * n for n in range(1, 11)])
    assert queue.counts.overflowed == 20
    assert queue.counts.queue_s_max == pytest.approx(1.0)


def test_losses_are_seeded_counted_and_take_no_room():
    counts = []
    for seed in (1, 1, 2):
        queue = PacketQueue(LinkSpec(up=8e6, loss=0.02, queue_bytes=2**24, seed=seed), "up")
        for n in range(5000):
            queue.offer(PACKET, n * 0.01)
        passed = drain(queue)
        assert len(passed) == queue.counts.packets == 5000 - queue.counts.lost
        counts.append((queue.counts.lost, passed))
    assert counts[0] == counts[1] != counts[2]
    assert all(60 <= lost <= 145 for lost, _ in counts)  # 100 expected, four standard deviations


def test_jitter_delays_but_nothing_overtakes():
    queue = PacketQueue(LinkSpec(delay_s=0.1, jitter_s=0.05), "down")
    for n in range(200):
        queue.offer(n.to_bytes(2), n * 0.001)
    out, times = [], []
    while (at := queue.next_at()) < math.inf:
        for packet in queue.take(at):
            out.append(int.from_bytes(packet))
            times.append(at)
    assert out == list(range(200))
    assert all(0.1 <= at - n * 0.001 <= 0.15 + 1e-9 for n, at in zip(out, times, strict=True))
    alone = []
    for n in range(10, 210):
        queue.offer(PACKET, n)
        alone += [at - n for at in drain(queue)]
    assert 0.1 <= min(alone) < 0.105
    assert 0.145 < max(alone) <= 0.15 + 1e-9


def test_a_schedule_begins_when_told_and_counts_by_bins():
    queue = PacketQueue(LinkSpec(up=RateSchedule([(0, 8e6), (0.1005, 0), (0.3, 8e6)]), queue_bytes=2**20), "up")
    queue.offer(PACKET, 4.0)
    assert drain(queue) == pytest.approx([4.001])  # before it begins, its first rate
    assert queue.passed == {}
    queue.begin(5.0)
    for _ in range(150):
        queue.offer(PACKET, 5.0)
    times = drain(queue)
    assert len(times) == 150
    assert sum(at < 5.1005 for at in times) == 100
    assert all(not 5.1005 < at < 5.3 for at in times)
    assert sum(queue.passed.values()) == 150_000
    assert set(queue.passed) <= {0, 1, 2, 3}


def test_an_outage_holds_what_is_under_way_and_the_rest_follows():
    queue = PacketQueue(LinkSpec(up=8e6, queue_bytes=2**20), "up")
    for _ in range(10):
        queue.offer(PACKET, 0.0)
    assert len(queue.take(0.0045)) == 4
    queue.set_rate(0.0045, 0.0)
    assert queue.next_at() == math.inf
    assert queue.take(9.0) == []
    queue.set_rate(10.0, 8e6)
    assert drain(queue) == pytest.approx([10.0005, *(10.0005 + 0.001 * n for n in range(1, 6))])


def test_a_packet_larger_than_the_room_passes_an_empty_queue():
    queue = PacketQueue(LinkSpec(up=8e6, queue_bytes=1500), "up")
    queue.offer(bytes(2000), 0.0)
    queue.offer(bytes(100), 0.0)
    assert len(drain(queue)) == 1

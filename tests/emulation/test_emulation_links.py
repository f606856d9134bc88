"""Real TCP over every emulator that this machine has: rate, delay, loss, queue, traces, outages.

Those that it does not have are skipped by name. Traffic stays in namespaces that the tests make, or on loopback.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import socket
import statistics

import pytest
from headrace.bench.links.namespaces import congestion_controls
from headrace.bench.links.spec import LinkSpec
from headrace.bench.links.traces import Trace, read_trace
from headrace.bench.links.virtual_link import VirtualLink

from .traffic import Connection, ends, sending

pytestmark = pytest.mark.timeout(60)
ALL = pytest.mark.parametrize("emulator", ["netem", "tun", "proxy"])
PACKETS = pytest.mark.parametrize("emulator", ["netem", "tun"])
PAYLOAD = {"netem": 1448 / 1514, "tun": 1448 / 1500, "proxy": 1.0}
"""What a packet's bytes, as the emulator counts them, carry of the stream."""


def goodput(connection: Connection, emulator: str, skip_s: float) -> float:
    """Bit/s on the wire, from the stream's bytes after the first `skip_s` seconds."""
    since = connection.arrivals[0][0] + skip_s
    kept = [(at, size) for at, size in connection.arrivals if at >= since]
    (first, head), (last, _) = kept[0], kept[-1]
    return 8 * (sum(size for _, size in kept) - head) / (last - first) / PAYLOAD[emulator]


@ALL
@pytest.mark.parametrize("mbps", [0.5, 8, 40])
async def test_the_rate_is_kept_within_a_tenth(emulator, mbps):
    # The queue holds all that TCP sends in that time, so that no drop of its own disturbs the measurement.
    async with ends(emulator, LinkSpec(up=mbps * 1e6, delay_s=0.005, queue_bytes=2**23)) as there:
        connection = await there.connect()
        there.link.begin()
        async with sending(connection):
            await connection.receive(2.0)
        assert goodput(connection, emulator, 0.5) == pytest.approx(mbps * 1e6, rel=0.1)
        record = await there.record()
        assert sum(record.up.values()) == pytest.approx(mbps * 1e6 / 8 * 2.0, rel=0.15)


@ALL
async def test_the_delay_is_one_way_on_both_ways(emulator):
    async with ends(emulator, LinkSpec(up=20e6, delay_s=0.04)) as there:
        connection = await there.connect()
        if emulator != "proxy":  # which hides the handshake's round trip
            assert 0.08 <= connection.connect_s < 0.12
        rounds = [await connection.ping() for _ in range(5)]
        assert min(rounds) >= 0.08
        assert statistics.median(rounds) < 0.095


@ALL
async def test_jitter_comes_on_top(emulator):
    async with ends(emulator, LinkSpec(up=20e6, delay_s=0.01, jitter_s=0.03, seed=1)) as there:
        connection = await there.connect()
        rounds = [await connection.ping() for _ in range(20)]
        assert min(rounds) >= 0.02
        assert statistics.median(rounds) < 0.08 + 0.015
        assert max(rounds) - min(rounds) > 0.015


@PACKETS
async def test_losses_are_counted_and_tcp_repairs_them(emulator):
    async with ends(emulator, LinkSpec(up=16e6, delay_s=0.002, loss=0.02, seed=2, queue_bytes=2**18)) as there:
        connection = await there.connect()
        there.link.begin()
        size = 3_000_000
        async with sending(connection):
            await asyncio.wait_for(connection.receive_bytes(size), 20)
        up = (await there.record()).up_counts
        assert up.bytes >= size
        assert 0.01 < up.lost / (up.lost + up.packets) < 0.035


async def test_a_proxy_holds_a_lost_chunk_for_a_round_trip():
    async with ends("proxy", LinkSpec(up=16e6, delay_s=0.05, loss=0.05, seed=2)) as there:
        connection = await there.connect()
        rounds = [await connection.ping() for _ in range(40)]
        counts = there.link.record()
        lost = counts.up_counts.lost + counts.down_counts.lost
        assert lost > 0
        assert sum(each > 0.19 for each in rounds) in range(lost - 1, lost + 2)
        assert statistics.median(rounds) < 0.13


@PACKETS
async def test_a_bottleneck_with_a_queue_of_a_second(emulator):
    async with ends(emulator, LinkSpec(up=4e6, delay_s=0.005, queue_bytes=500_000)) as there:
        bulk = await there.connect()
        there.link.begin()
        async with sending(bulk):
            await bulk.receive(2.5)
            # Whoever comes now waits behind all of it. (A full queue may drop the first try; the next is 1 s later.)
            receiving = asyncio.create_task(bulk.receive(8))
            late = await asyncio.wait_for(there.connect(), 8)
            receiving.cancel()
        assert 0.6 < late.connect_s < 3.5
        up = (await there.record()).up_counts
        if emulator == "tun":
            assert 0.8 < up.queue_s_max < 1.05
            assert up.queue_bytes_max <= 500_000


@PACKETS
async def test_a_short_queue_overflows_and_delays_little(emulator):
    async with ends(emulator, LinkSpec(up=4e6, delay_s=0.02, queue_bytes=30_000)) as there:
        connection = await there.connect()
        there.link.begin()
        async with sending(connection):
            await connection.receive(2.0)
        up = (await there.record()).up_counts
        assert up.overflowed > 0
        if emulator == "tun":
            assert up.queue_s_max < 0.065
            assert up.lost == 0


def trace_text(trace: Trace, form: str) -> str:
    """A trace as a file of any of the formats."""
    durations, rates = trace.pieces
    starts = [0.0, *itertools.accumulate(durations.tolist())][:-1]
    if form == "seconds-mbit":
        return "".join(f"{start} {rate / 1e6}\n" for start, rate in zip(starts, rates, strict=True))
    if form == "ms-kbit":
        return "".join(f"{start * 1000} {rate / 1e3}\n" for start, rate in zip(starts, rates, strict=True))
    packets = int(trace.carried(trace.duration_s) / 1500)
    return "".join(f"{int(trace.finish(0, 1500 * (n + 1)) * 1000 + 0.999)}\n" for n in range(packets))


@pytest.mark.parametrize(
    ("emulator", "form"),
    [("netem", "mahimahi"), ("tun", "mahimahi"), ("tun", "seconds-mbit"), ("tun", "ms-kbit"), ("proxy", "mahimahi")],
)
async def test_a_trace_is_replayed(emulator, form, tmp_path):
    path = tmp_path / "trace"
    path.write_text(trace_text(Trace.steps([(0.6, 6e6), (0.6, 1.5e6), (0.6, 3e6)]), form))
    trace = read_trace(path, form)
    async with ends(emulator, LinkSpec(up=trace, delay_s=0.002, queue_bytes=2**22)) as there:
        connection = await there.connect()
        # The connection has work before the schedule begins, so that slow start is not what is measured.
        async with sending(connection):
            await connection.receive(0.4)
            loop = asyncio.get_running_loop()
            origin = loop.time()
            there.link.begin()
            await connection.receive(2.5)
        for start in (0.0, 0.6, 1.2, 1.8):
            expected = trace.carried(start + 0.6) - trace.carried(start)
            got = connection.received(origin + start, origin + start + 0.6) / PAYLOAD[emulator]
            assert got == pytest.approx(expected, rel=0.15), f"from second {start}"


@ALL
async def test_an_outage_and_the_recovery(emulator):
    async with ends(emulator, LinkSpec(up=8e6, delay_s=0.005, queue_bytes=100_000)) as there:
        connection = await there.connect()
        there.link.begin()
        loop = asyncio.get_running_loop()
        async with sending(connection):
            await connection.receive(0.6)
            there.link.set_rate(0)
            out = loop.time()
            await connection.receive(1.0)
            there.link.set_rate(8e6)
            back = loop.time()
            await connection.receive(1.2)
        # A packet or two may have been under way.
        assert connection.received(out + 0.15, back) <= 3000
        assert connection.received(back, back + 0.5) > 50_000
        assert connection.received(back, back + 1.2) > 0.6 * 1.2e6


@PACKETS
@pytest.mark.parametrize("congestion", ["reno", "bbr"])
async def test_congestion_control_is_pinned_and_shows(emulator, congestion):
    allowed, _ = congestion_controls()
    if congestion not in allowed:
        pytest.skip(f"CONGESTION CONTROL {congestion} UNAVAILABLE: namespaces may use {', '.join(allowed)}")
    async with ends(emulator, LinkSpec(up=8e6, delay_s=0.03, loss=0.03, seed=5), congestion) as there:
        connection = await there.connect()
        for each in (connection.edge, connection.server):
            assert each.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode() == congestion
        there.link.begin()
        async with sending(connection):
            await connection.receive(2.5)
        rate = goodput(connection, emulator, 0.7)
        # Reno halves its window at every loss, BBR does not take them for congestion.
        assert rate < 4e6 if congestion == "reno" else rate > 5e6


@pytest.mark.slow
@PACKETS
@pytest.mark.parametrize(("loss", "low", "high"), [(0.0, 0.95, 1.15), (0.02, 0.7, 1.6)])
async def test_the_virtual_link_delays_a_stream_of_frames_as_the_real_one_does(emulator, loss, low, high):
    """Frames of 8 KB, 20 a second, over 4 Mbit/s and 20 ms: their mean time until the last byte has come."""
    spec, size, interval, frames = LinkSpec(up=4e6, delay_s=0.02, loss=loss, seed=1), 8000, 0.05, 300
    async with ends(emulator, spec) as there:
        connection = await there.connect()
        loop = asyncio.get_running_loop()
        sent: list[float] = []

        async def send() -> None:
            origin = loop.time()
            for n in range(frames):
                await asyncio.sleep(origin + n * interval - loop.time())
                sent.append(loop.time())
                await loop.sock_sendall(connection.edge, bytes(size))

        await asyncio.gather(send(), connection.receive_bytes(frames * size))
    came, total = [], 0
    for at, got in connection.arrivals:
        total += got
        came += [at] * (total // size - len(came))
    real = statistics.mean(end - start for start, end in zip(sent, came, strict=True))
    virtual = []
    for seed in range(10):
        link = VirtualLink.of(dataclasses.replace(spec, seed=seed))
        virtual += [link.write(size, n * interval) - n * interval for n in range(frames)]
    assert low < real / statistics.mean(virtual) < high

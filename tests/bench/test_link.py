"""The emulated link: its schedule in exact numbers, and the proxy over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
from headrace.bench.links.process import LinkProcess
from headrace.bench.links.proxy import CHUNK_BYTES, TcpProxyLink
from headrace.bench.links.record import LinkRecord
from headrace.bench.links.schedule import Phase, RateSchedule, parse_phases
from headrace.bench.links.spec import DEFAULT_QUEUE_BYTES, LinkSpec
from headrace.bench.links.traces import Trace

pytestmark = pytest.mark.timeout(60)


def test_a_schedule_finishes_across_steps_and_outages() -> None:
    schedule = RateSchedule.of_phases([Phase(2, 1), Phase(1, 0), Phase(1, 4), Phase(9, 2)])
    assert [schedule.rate(t) for t in (-5, 0, 1.9, 2, 3, 4, 100)] == [1e6, 1e6, 1e6, 0, 4e6, 2e6, 2e6]
    assert schedule.finish(0, 1e6) == 1
    assert schedule.finish(-3, 1e6) == -2
    assert schedule.finish(1.5, 0.5e6) == 2  # to the last bit before the outage
    assert schedule.finish(1.5, 2.5e6) == 3.5  # half before the outage, the rest behind it
    assert schedule.finish(2.5, 0) == 3  # even an end of stream waits
    assert schedule.finish(3.5, 4e6) == 5  # across a step


def test_a_schedule_may_change_from_now_on() -> None:
    schedule = RateSchedule.of_phases([Phase(2, 1), Phase(2, 8)]).shifted(10)
    outage = schedule.changed(11, 0)
    assert outage.finish(10, 1e6) == 11
    assert outage.finish(10, 1.1e6) == math.inf
    assert outage.changed(20, 1e6).finish(10, 2e6) == 21
    assert schedule.changed(5, 4e6).finish(0, 5e6) == 5  # the first rate held until then
    assert schedule.outages_only().finish(10, 1e12) == 10
    assert outage.outages_only().finish(11, 1) == math.inf


def test_a_trace_is_a_schedule_that_repeats() -> None:
    schedule = RateSchedule.of_trace(Trace.steps([(1, 1e6), (2, 0), (1, 2e6)]), 7)
    assert schedule.steps == ((0, 1e6), (1, 0), (3, 2e6), (4, 1e6), (5, 0), (7, 2e6))


@pytest.mark.parametrize("text", ["", "8", "8:", "8:0", "-1:2", "8:4,,2:1", "nan:1", "1:inf"])
def test_a_bad_schedule_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="no phase"):
        parse_phases(text)


def test_phases_are_read() -> None:
    assert parse_phases("8:4,0:2.5") == [Phase(4, 8), Phase(2.5, 0)]
    with pytest.raises(ValueError, match="rising"):
        RateSchedule([(1, 1), (0, 1)])


class Sink:
    """A server that notes when bytes came, and answers each connection's end with as many bytes back."""

    def __init__(self) -> None:
        self.arrivals: list[tuple[float, int]] = []
        self.total = 0
        self.more = asyncio.Condition()
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                self.total += len(data)
                self.arrivals.append((asyncio.get_running_loop().time(), len(data)))
                async with self.more:
                    self.more.notify_all()
            writer.write(b"end")
        writer.close()

    async def until(self, total: int) -> None:
        async with self.more:
            await self.more.wait_for(lambda: self.total >= total)


@contextlib.asynccontextmanager
async def sink_behind(link_rate: float, **options: Any) -> AsyncIterator[tuple[Sink, TcpProxyLink]]:
    sink = Sink()
    server = await asyncio.start_server(sink.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with TcpProxyLink(f"{host}:{port}", LinkSpec(up=link_rate, **options)) as link:
        try:
            yield sink, link
        finally:
            server.close()


async def connect(link: TcpProxyLink | LinkProcess) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = link.address.split(":")
    return await asyncio.open_connection(host, int(port))


@pytest.mark.parametrize("mbps", [0.1, 1, 8, 50])
async def test_the_rate_is_kept(mbps: float) -> None:
    size = max(8 * CHUNK_BYTES, int(mbps * 1e6 / 8 * 0.6))
    async with sink_behind(mbps * 1e6) as (sink, link):
        link.begin()
        _, writer = await connect(link)
        writer.write(bytes(size))
        await sink.until(size)
        (first, head), (last, _) = sink.arrivals[0], sink.arrivals[-1]
        assert 8 * (size - head) / (last - first) == pytest.approx(mbps * 1e6, rel=0.06)
        assert sum(link.record().up.values()) == size
        writer.close()


async def test_connections_share_the_link_and_the_queue_pushes_back() -> None:
    async with sink_behind(1e6, queue_bytes=8 * CHUNK_BYTES) as (sink, link):
        writers = [(await connect(link))[1] for _ in range(2)]
        for writer in writers:
            writer.transport.set_write_buffer_limits(0)
            writer.write(bytes(10_000_000))
        await sink.until(30_000)
        # Far more was written than passed: it waits at the senders, not in the link.
        assert all(writer.transport.get_write_buffer_size() > 0 for writer in writers)
        assert sink.total < 30_000 + 2 * DEFAULT_QUEUE_BYTES
        assert len(sink.writers) == 2
        for writer in writers:
            writer.transport.abort()


async def test_delay_is_one_way_on_both_ways_and_ends_are_passed_on() -> None:
    async with sink_behind(50e6, delay_s=0.1) as (sink, link):
        reader, writer = await connect(link)
        loop = asyncio.get_running_loop()
        began = loop.time()
        writer.write(b"x")
        writer.write_eof()
        assert await reader.read() == b"end"
        assert sink.arrivals[0][0] - began >= 0.1
        assert loop.time() - began >= 0.2
        writer.close()


async def test_nothing_passes_in_an_outage_and_connections_survive_it() -> None:
    async with sink_behind(8e6) as (sink, link):
        reader, writer = await connect(link)
        writer.write(b"before")
        await sink.until(6)
        link.set_rate(0)
        writer.write(b"during")
        sink.writers[0].write(b"answer")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(1), 0.3)
        assert sink.total == 6
        link.set_rate(8e6)
        assert await reader.readexactly(6) == b"answer"
        await sink.until(12)
        writer.close()


async def test_a_dead_server_is_a_reset_and_a_new_one_is_found() -> None:
    sink = Sink()
    server = await asyncio.start_server(sink.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with TcpProxyLink(f"{host}:{port}", LinkSpec(up=8e6)) as link:
        reader, writer = await connect(link)
        writer.write(b"x")
        await sink.until(1)
        server.close()
        sink.writers[0].transport.abort()
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        reader, writer = await connect(link)  # the proxy accepts, then finds nobody
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        server = await asyncio.start_server(sink.serve, host, port)
        _, writer = await connect(link)
        writer.write(b"yz")
        await sink.until(3)
        writer.close()
        server.close()


async def test_the_link_as_a_process(tmp_path) -> None:
    sink = Sink()
    server = await asyncio.start_server(sink.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    link = await LinkProcess.start(f"{host}:{port}", LinkSpec(up=8e6, delay_s=0.001), record=tmp_path / "link.json")
    assert "TCP proxy" in link.kind
    _, writer = await connect(link)
    writer.write(b"early")
    await sink.until(5)
    link.begin()
    link.set_rate(4e6)
    writer.write(bytes(5000))
    await sink.until(5005)
    writer.close()
    await link.close()
    record = link.record()
    assert record.connections == 1
    assert 0 < sum(record.up.values()) <= 5005
    assert LinkRecord.from_json(record.to_json()) == record
    server.close()

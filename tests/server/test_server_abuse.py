"""Peers that ask for too much: refused with the right code, and nobody else is harmed."""

from __future__ import annotations

import asyncio
import resource
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from headrace.models.bitstream import VERSION, Packet
from headrace.protos import messages
from headrace.protos.messages import Frame, Hello, Status
from headrace.server import token_commands
from headrace.server.session import REFUSALS

MakePacket = Callable[..., Packet]
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_message_of_a_gigabyte_is_refused(start: Any, make_packet: MakePacket) -> None:
    server = await start()
    other = await server.stream()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Channels to one address otherwise share a connection, which the gigabyte would fill.
    own = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(server.server.address, options=own) as channel:
        greedy = channel.stream_stream("/headrace.v1.Headrace/Stream")()
        sending = asyncio.create_task(greedy.write(bytes(2**30)))
        assert await greedy.code() is EXHAUSTED
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    # The client's own copies of it are in this process too; a server that received it would have had another.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2.6 * 2**20
    await other.send(make_packet(1))
    assert (await other.result()).status is Status.OK


@pytest.mark.parametrize("with_tokens", [False, True])
async def test_a_client_with_thousands_of_streams_is_refused_all_but_a_few(
    start: Any, make_packet: MakePacket, tmp_path: Any, with_tokens: bool
) -> None:
    greedy, frugal = (token_commands.add(tmp_path / "tokens", name) for name in ("greedy", "frugal"))
    server = await start(**({"tokens": tmp_path / "tokens"} if with_tokens else {}), max_streams_per_device=5)
    held = set()
    codes: Counter[grpc.StatusCode] = Counter()
    own = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(server.server.address, options=own) as channel:
        stub = messages.HeadraceStub(channel)
        for _ in range(20):
            calls = [stub.Stream(metadata=(("authorization", f"Bearer {greedy}"),)) for _ in range(100)]
            waits = {asyncio.ensure_future(call.code()): call for call in calls} | dict(held)
            while len(waits) > 5:
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                codes.update(task.result() for task in done)
                for task in done:
                    del waits[task]
            held = set(waits.items())
        assert codes == {EXHAUSTED: 1995}
        other = server.stub.Stream(metadata=(("authorization", f"Bearer {frugal}"),))
        await other.write(messages.hello_request(Hello(server.bundle.fingerprint, VERSION)))
        await other.read()
        await other.write(messages.frame_request(Frame(make_packet(1).to_bytes())))
        assert messages.read_response(await other.read()).status is Status.OK
        if with_tokens:  # another connection does not help
            again = server.stub.Stream(metadata=(("authorization", f"Bearer {greedy}"),))
            assert await again.code() is EXHAUSTED
        for task, call in held:
            call.cancel()
            await asyncio.gather(task, return_exceptions=True)
    stream = await server.stream() if not with_tokens else None
    assert stream is None or stream.welcome is not None


async def test_streams_are_limited_in_all(start: Any) -> None:
    server = await start(max_streams=3, max_streams_per_device=2)
    channels = [
        grpc.aio.insecure_channel(server.server.address, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(3)
    ]
    hello = messages.hello_request(Hello(server.bundle.fingerprint, VERSION))
    calls = []
    for channel in (channels[0], channels[0], channels[1]):
        calls.append(messages.HeadraceStub(channel).Stream())
        await calls[-1].write(hello)
        await calls[-1].read()
    last = messages.HeadraceStub(channels[2]).Stream()
    assert await last.code() is EXHAUSTED
    calls[0].cancel()
    await server.service_has_streams(2)
    async with asyncio.timeout(30):
        while True:  # the place is free a moment after the stream is closed
            last = messages.HeadraceStub(channels[2]).Stream()
            try:
                await last.write(hello)
                assert await last.read() is not grpc.aio.EOF
                break
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                assert await last.code() is EXHAUSTED
    for channel in channels:
        await channel.close()


def http2_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame of HTTP/2 (RFC 9113, section 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def literal(name: str, value: str) -> bytes:
    """A header that is not indexed, without Huffman coding (RFC 7541, section 6.2.2)."""
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


async def test_a_flood_of_100000_streams_that_heeds_no_limit_harms_nobody(start: Any, make_packet: MakePacket) -> None:
    """A client that opens streams without asking, as none of gRPC's would."""
    server = await start()
    other = await server.stream()
    host, _, port = server.server.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + http2_frame(4, 0, 0, b""))
    headers = b"".join(
        literal(name, value)
        for name, value in (
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/headrace.v1.Headrace/Stream"),
            (":authority", "x"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        )
    )
    reading = asyncio.create_task(reader.read(-1))
    opened = 0
    most = 0.0
    try:
        for first in range(1, 200_001, 2000):
            writer.write(b"".join(http2_frame(1, 0x4, stream, headers) for stream in range(first, first + 2000, 2)))
            await writer.drain()
            opened += 1000
            if first % 20_000 == 1:
                await other.send(make_packet(first))
                assert (await other.result()).status is Status.OK
            most = max(most, server.server.metrics.registry.get_sample_value("headrace_server_streams") or 0)
    except ConnectionError:
        pass  # the server had enough
    assert opened >= 1000
    assert most <= 17, "sixteen of one connection, and the other's"
    await other.send(make_packet(9))
    assert (await other.result()).status is Status.OK
    writer.close()
    await asyncio.gather(reading, writer.wait_closed(), return_exceptions=True)
    again = await server.stream()
    await again.send(make_packet(10))
    assert (await again.result()).status is Status.OK


async def test_a_peer_that_reads_nothing_is_ended_and_holds_up_nobody(start: Any, make_packet: MakePacket) -> None:
    server = await start(unread_s=0.5, max_in_flight=64, max_streams_per_device=1)
    other = await server.stream()
    own = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    async with grpc.aio.insecure_channel(server.server.address, options=own) as channel:
        deaf = messages.HeadraceStub(channel).Stream()
        await deaf.write(messages.hello_request(Hello(server.bundle.fingerprint, VERSION)))
        await deaf.read()
        answered = 0
        packet = messages.frame_request(Frame(make_packet(2).to_bytes()))

        # As many as the server reads before it waits for its results to be read: none of these writes is left pending,
        # which would be this client's own error.
        for _ in range(64 + REFUSALS - 6):
            await deaf.write(packet)
        async with asyncio.timeout(60):
            while await _streams(server) == 2:
                await other.send(make_packet(3))
                assert (await other.result()).status is Status.OK
                answered += 1
        assert answered > 0
        await server.service_has_streams(1)
        async with asyncio.timeout(30):
            try:
                while await deaf.read() is not grpc.aio.EOF:
                    pass
            except grpc.aio.AioRpcError:
                pass
        assert await deaf.code() is EXHAUSTED
        assert "no result was read" in await deaf.details()
    await other.send(make_packet(4))
    assert (await other.result()).status is Status.OK
    received, answered = server.sums()
    assert received == answered, "every frame that was received has its status"


async def _streams(server: Any) -> float:
    return server.server.metrics.registry.get_sample_value("headrace_server_streams") or 0.0

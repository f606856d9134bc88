"""How a stream begins: Hello and Welcome, and every other beginning, refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from headrace.models.bitstream import VERSION, Packet
from headrace.models.bundle import Bundle, short
from headrace.models.operating_point import Kind
from headrace.protos import messages
from headrace.protos.messages import Frame, Hello, Status

MakePacket = Callable[..., Packet]


async def test_welcome_says_what_is_served_and_its_limits(start: Any, bundle: Bundle) -> None:
    stream = await (await start(max_packet_bytes=50_000, max_in_flight=3)).stream()
    assert stream.welcome.fingerprint == bundle.fingerprint
    assert (stream.welcome.max_packet_bytes, stream.welcome.max_in_flight) == (50_000, 3)
    assert stream.welcome.bundle == bundle.name
    sendable = [p.id for p in bundle.operating_points if p.kind is not Kind.LOCAL]
    assert list(stream.welcome.operating_points) == sendable


async def test_a_mismatch_names_both_fingerprints_and_the_remedy(start: Any, bundle: Bundle) -> None:
    server = await start()
    theirs = bytes(range(32))
    stream = await server.raw_stream(messages.hello_request(Hello(theirs, VERSION)))
    code, text = await stream.ended()
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert short(theirs) in text and short(bundle.fingerprint) in text and "GetBundle" in text


async def test_another_packet_version_is_refused_with_the_side_to_update(start: Any, bundle: Bundle) -> None:
    server = await start()
    for version, side in ((VERSION + 1, "server"), (VERSION - 1, "device")):
        stream = await server.raw_stream(messages.hello_request(Hello(bundle.fingerprint, version)))
        code, text = await stream.ended()
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert f"version {version}" in text and f"update headrace on the {side}" in text


async def test_a_stream_begins_with_hello(start: Any, make_packet: MakePacket) -> None:
    server = await start()
    for request in (messages.frame_request(Frame(make_packet(1).to_bytes())), messages.StreamRequest()):
        code, text = await (await server.raw_stream(request)).ended()
        assert code is grpc.StatusCode.INVALID_ARGUMENT and "begins with Hello" in text
    silent = await server.raw_stream()
    await silent.call.done_writing()
    assert (await silent.ended())[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_after_hello_only_frames(start: Any, bundle: Bundle, make_packet: MakePacket) -> None:
    server = await start()
    for request in (messages.hello_request(Hello(bundle.fingerprint, VERSION)), messages.StreamRequest()):
        stream = await server.stream()
        await stream.send(make_packet(1))
        await stream.call.write(request)
        assert (await stream.result()).status is Status.OK, "what came before is answered"
        code, text = await stream.ended()
        assert code is grpc.StatusCode.INVALID_ARGUMENT and "carries frames" in text


async def test_bytes_that_are_no_protobuf_end_only_their_own_stream(start: Any, make_packet: MakePacket) -> None:
    server = await start()
    good = await server.stream()
    raw = server.channel.stream_stream(f"/{messages.SERVICE}/Stream")()
    await raw.write(b"\xff\xff\xff not protobuf")
    with pytest.raises(grpc.aio.AioRpcError):
        while await raw.read() is not grpc.aio.EOF:
            pass
        pytest.fail("the stream ended well")
    await good.send(make_packet(1))
    assert (await good.result()).status is Status.OK

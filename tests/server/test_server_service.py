"""The service over real gRPC: what a client sees for good frames, broken ones, and too many."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import msgpack
import numpy as np
import pytest
from headrace.models.bitstream import VERSION, Packet
from headrace.models.bundle import Bundle, short
from headrace.models.codec import Codec
from headrace.models.operating_point import Kind
from headrace.protos import messages
from headrace.protos.messages import Frame, Status
from headrace.server.engine import FeatureInput, TailKey
from headrace.server.exceptions import StartError

MakePacket = Callable[..., Packet]


# Frames


async def test_a_frame_gets_its_labels_and_timings(start: Any, make_packet: MakePacket) -> None:
    server = await start()
    stream = await server.stream()
    await stream.send(make_packet(77))
    result = await stream.result()
    assert (result.frame_id, result.status, result.message, result.slices) == (77, Status.OK, "", 4)
    assert result.outputs == server.engine.answer
    assert result.timing.tail_us == 1000
    assert await server.finished(stream) is grpc.StatusCode.OK
    assert server.sums() == (1, 1)


async def test_timings_are_durations_by_the_servers_clock(start: Any, make_packet: MakePacket) -> None:
    server = await start()
    stream = await server.stream()
    server.engine.gate.clear()
    await stream.send(make_packet(1))
    await server.engine.began.get()
    await stream.send(make_packet(2))
    await server.decoded(2)
    await stream.send(b"broken")  # its result says that frame 2 waits
    broken = await stream.result()
    assert (broken.status, broken.queue_depth) == (Status.INVALID, 1)
    server.clock.now += 0.040
    server.engine.gate.set()
    first, second = await stream.result(), await stream.result()
    assert (first.timing.queue_us, first.timing.total_us, first.queue_depth) == (0, 40_000, 1)
    assert (second.timing.queue_us, second.timing.total_us, second.queue_depth) == (40_000, 40_000, 0)


@pytest.mark.parametrize("kept", [1, 2, 3])
async def test_a_prefix_is_answered_from_what_it_has(
    start: Any, make_packet: MakePacket, bundle: Bundle, codec: Codec, kept: int
) -> None:
    server = await start()
    stream = await server.stream()
    packet = make_packet(1, "blocks.2@3").prefix(kept)
    await stream.send(packet)
    result = await stream.result()
    assert (result.status, result.slices) == (Status.OK, kept)
    [(key, [given])] = server.engine.batches
    assert key == TailKey(bundle.fingerprint, "blocks.2")
    assert isinstance(given, FeatureInput)
    assert np.array_equal(given.symbols, codec.decompress(packet))


def broken_packets(packet: Packet, bundle: Bundle) -> dict[str, tuple[bytes, str]]:
    """Packets that are wrong in one way each, and what has to be said about it."""
    whole = packet.to_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    local = next(p.id for p in bundle.operating_points if p.kind is Kind.LOCAL)
    image = next(p.id for p in bundle.operating_points if p.kind is Kind.IMAGE)
    unused = next(i for i in range(128) if i not in {p.id for p in bundle.operating_points})
    return {
        "empty": (b"", "not a packet"),
        "text": (b"GET / HTTP/1.1\r\n\r\n", "not a packet"),
        "cut short": (whole[:-1], "not a packet"),
        "header only": (whole[:6], "not a packet"),
        "something behind it": (whole + b"x", "not a packet"),
        "a flipped bit": (bytes(flipped), "CRC"),
        "another version": (bytes([whole[0], VERSION + 2]) + whole[2:], "version"),
        "predicted from nothing": (bytes([whole[0], VERSION + 1]) + whole[2:], "CRC"),
        "msgpack of something else": (msgpack.packb({"a": [1, 2]}), "not a packet"),
        "a declared gigabyte": (b"\x94\x01\x05\x07\xc6\x40\x00\x00\x00", "not a packet"),
        "deep nesting": (b"\x91" * 5000, "not a packet"),
        "over the limit": (bytes(70_000), "over the limit"),
        "unknown operating point": (replace(packet, operating_point=unused).to_bytes(), "no operating point"),
        "a local point": (replace(packet, operating_point=local).to_bytes(), "answered on the device"),
        "a slice too many": (replace(packet, slices=(*packet.slices, b"x")).to_bytes(), "slices"),
        "a slice too short": (replace(packet, slices=(b"abc",)).to_bytes(), "too short"),
        "an image that is none": (
            Packet(image, 5, (b"\x89PNG\r\n\x1a\n" + bytes(50),)).to_bytes(),
            "cannot be decoded",
        ),
    }


async def test_every_broken_packet_is_answered_and_the_stream_survives(
    start: Any, make_packet: MakePacket, bundle: Bundle
) -> None:
    server = await start(max_packet_bytes=69_000)
    stream = await server.stream()
    packet = make_packet(4321)
    kinds = broken_packets(packet, bundle)
    for name, (data, message) in kinds.items():
        await stream.send(data)
        result = await stream.result()
        assert result.status is Status.INVALID, name
        assert message in result.message, name
    assert server.engine.batches == []
    await stream.send(packet)
    assert (await stream.result()).status is Status.OK
    assert server.count("invalid") == len(kinds)
    assert server.sums() == (len(kinds) + 1, len(kinds) + 1)


async def test_a_damaged_packet_keeps_its_frame_id(start: Any, make_packet: MakePacket) -> None:
    stream = await (await start()).stream()
    await stream.send(make_packet(4321).to_bytes()[:-1])
    assert (await stream.result()).frame_id == 4321


async def test_a_message_beyond_the_limit_is_not_even_received(start: Any, make_packet: MakePacket) -> None:
    server = await start(max_packet_bytes=20_000)
    other, stream = await server.stream(), await server.stream()
    await stream.send(bytes(40_000))
    assert (await stream.ended())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    await other.send(make_packet(1))
    assert (await other.result()).status is Status.OK


# Batches, deadlines, limits


async def test_what_waits_is_batched_across_rate_levels_and_prefixes(start: Any, make_packet: MakePacket) -> None:
    server = await start()
    one, other = await server.stream(), await server.stream()
    server.engine.gate.clear()
    await one.send(make_packet(1))
    assert await server.engine.began.get() == 1
    await one.send(make_packet(2, "blocks.3@0"))
    await one.send(make_packet(3, "blocks.3@7").prefix(2))
    await one.send(make_packet(4, "blocks.5@4"), 60_000)
    await one.send(b"broken")
    assert (await one.result()).status is Status.INVALID
    await other.send(make_packet(5, "blocks.3@5"))
    await other.send(b"broken")
    assert (await other.result()).status is Status.INVALID
    await server.decoded(5)
    server.engine.gate.set()
    assert {(await one.result()).frame_id for _ in range(4)} == {1, 2, 3, 4}
    assert (await other.result()).frame_id == 5
    assert [(key.split, len(inputs)) for key, inputs in server.engine.batches] == [
        ("blocks.3", 1),
        ("blocks.3", 3),
        ("blocks.5", 1),
    ]


async def test_a_frame_whose_deadline_passed_is_not_computed(start: Any, make_packet: MakePacket) -> None:
    server = await start()
    stream = await server.stream()
    server.engine.seconds = 0.002
    server.engine.gate.clear()
    await stream.send(make_packet(1), 100)
    await server.engine.began.get()
    await stream.send(make_packet(2), 100)
    await stream.send(make_packet(3), 103)
    await stream.send(make_packet(4), 100)
    await server.decoded(4)  # a packet that is being decoded while the clock is turned would seem to take so long
    server.clock.now += 0.0995
    server.engine.gate.set()
    results = {r.frame_id: r for r in [await stream.result() for _ in range(4)]}
    assert results[1].status is Status.OK, "a batch that began is finished"
    for late in (2, 4):  # half a millisecond is left, and the tail was seen to take two
        assert results[late].status is Status.DEADLINE_EXCEEDED and "remained of the deadline" in results[late].message
    assert results[3].status is Status.OK
    assert sum(len(inputs) for _, inputs in server.engine.batches) == 2
    assert server.count("deadline_exceeded") == 2
    await stream.send(make_packet(5), 1)
    await stream.send(make_packet(6), 50)
    assert {(r := await stream.result()).frame_id: r.status for _ in range(2)} == {
        5: Status.DEADLINE_EXCEEDED,
        6: Status.OK,
    }, "told before it waits"


async def test_frames_that_wait_undecoded_go_on_when_all_that_were_decoded_are_late(
    start: Any, make_packet: MakePacket
) -> None:
    server = await start(max_batch=2)
    stream = await server.stream()
    server.engine.gate.clear()
    await stream.send(make_packet(1))
    await server.engine.began.get()
    for frame_id in (2, 3):
        await stream.send(make_packet(frame_id), 100)
    await server.decoded(3)
    await stream.send(make_packet(4))  # a batch's worth is decoded already
    await server.waiting(3)
    server.clock.now += 1.0
    server.engine.gate.set()
    async with asyncio.timeout(60):
        results = [await stream.result() for _ in range(4)]
    late = Status.DEADLINE_EXCEEDED
    assert {r.frame_id: r.status for r in results} == {1: Status.OK, 2: late, 3: late, 4: Status.OK}


async def test_one_frame_more_than_may_be_in_flight_is_refused(start: Any, make_packet: MakePacket) -> None:
    server = await start(max_in_flight=2)
    stream, other = await server.stream(), await server.stream()
    server.engine.gate.clear()
    for frame_id in (1, 2, 3):
        await stream.send(make_packet(frame_id))
    refused = await stream.result()
    assert (refused.frame_id, refused.status) == (3, Status.RESOURCE_EXHAUSTED)
    assert "max_in_flight" in refused.message
    await other.send(make_packet(9))  # the limit is each stream's own
    server.engine.gate.set()
    assert {(await stream.result()).frame_id for _ in range(2)} == {1, 2}
    assert (await other.result()).status is Status.OK
    await stream.send(make_packet(4))
    assert (await stream.result()).status is Status.OK
    assert (server.count("ok"), server.count("resource_exhausted")) == (4, 1)


async def test_a_full_queue_refuses_over_all_streams(start: Any, make_packet: MakePacket) -> None:
    server = await start(queue_limit=2)
    stream, other = await server.stream(), await server.stream()
    server.engine.gate.clear()
    await stream.send(make_packet(1))
    await server.engine.began.get()
    for frame_id in (2, 3, 4):
        await stream.send(make_packet(frame_id))
    refused = await stream.result()
    assert (refused.frame_id, refused.status, refused.queue_depth) == (4, Status.RESOURCE_EXHAUSTED, 2)
    await other.send(make_packet(5))
    assert (await other.result()).status is Status.RESOURCE_EXHAUSTED
    server.engine.gate.set()
    assert {(await stream.result()).frame_id for _ in range(3)} == {1, 2, 3}


async def test_a_stream_that_does_not_read_stalls_no_other(start: Any, make_packet: MakePacket) -> None:
    server = await start(max_in_flight=4)
    deaf, other = await server.stream(), await server.stream()

    async def shout() -> None:
        while True:
            await deaf.send(bytes(1000))

    shouting = asyncio.create_task(shout())
    frame_id = quiet = refused = 0
    while quiet < 50:  # the other's frames in a row during which nothing more was read from the deaf stream
        await other.send(make_packet(frame_id))
        assert (await asyncio.wait_for(other.result(), 30)).frame_id == frame_id
        frame_id += 1
        quiet = quiet + 1 if server.count("invalid") == refused else 0
        refused = server.count("invalid")
    assert refused > 0 and not shouting.done()
    shouting.cancel()
    deaf.call.cancel()


async def test_a_failing_tail_is_the_servers_fault_and_not_the_end(start: Any, make_packet: MakePacket) -> None:
    server = await start()
    stream = await server.stream()
    server.engine.error = ValueError("secret detail")
    await stream.send(make_packet(1))
    result = await stream.result()
    assert result.status is Status.INTERNAL and "secret" not in result.message
    server.engine.error = None
    await stream.send(make_packet(2))
    assert (await stream.result()).status is Status.OK


async def test_frames_of_a_client_that_went_away_are_counted_and_not_computed(
    start: Any, make_packet: MakePacket
) -> None:
    server = await start()
    gone, stays = await server.stream(), await server.stream()
    server.engine.gate.clear()
    await gone.send(make_packet(1))
    await server.engine.began.get()
    await gone.send(make_packet(2))
    await gone.send(b"broken")
    await gone.result()
    gone.call.cancel()
    await server.service_has_streams(1)
    server.engine.gate.set()
    await stays.send(make_packet(3))
    assert (await stays.result()).status is Status.OK
    assert sum(len(inputs) for _, inputs in server.engine.batches) == 2, "frame 2 was computed for nobody"
    assert (server.count("cancelled"), server.count("ok"), server.count("invalid")) == (2, 1, 1)
    assert server.sums() == (4, 4)


# Infer


async def test_infer_answers_one_packet(start: Any, make_packet: MakePacket, bundle: Bundle) -> None:
    server = await start()
    message = await server.stub.Infer(messages.infer_request(bundle.fingerprint, Frame(make_packet(8).to_bytes())))
    result = messages.read_result(message)
    assert (result.frame_id, result.status, result.outputs) == (8, Status.OK, server.engine.answer)


async def test_infer_says_by_its_code_what_a_result_says_by_its_status(
    start: Any, make_packet: MakePacket, bundle: Bundle
) -> None:
    server = await start(queue_limit=1)

    def infer(packet: bytes, fingerprint: bytes = bundle.fingerprint, remaining_ms: int = 0) -> Any:
        return server.stub.Infer(messages.infer_request(fingerprint, Frame(packet, remaining_ms)))

    async def code_of(call: Any) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return caught.value.code(), caught.value.details()

    code, text = await code_of(infer(b"broken"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "not a packet" in text
    code, text = await code_of(infer(make_packet(1).to_bytes(), bytes(32)))
    assert code is grpc.StatusCode.FAILED_PRECONDITION and short(bundle.fingerprint) in text
    server.engine.gate.clear()
    running = infer(make_packet(1).to_bytes())
    await server.engine.began.get()
    waiting = infer(make_packet(2).to_bytes(), remaining_ms=50)
    await server.waiting(1)
    code, text = await code_of(infer(make_packet(3).to_bytes()))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "its limit" in text
    await server.decoded(2)
    server.clock.now += 1.0
    server.engine.gate.set()
    assert messages.read_result(await running).status is Status.OK
    assert (await code_of(waiting))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    server.engine.error = ValueError()
    assert (await code_of(infer(make_packet(4).to_bytes())))[0] is grpc.StatusCode.INTERNAL


async def test_infer_knows_the_deadline_of_the_call(start: Any, make_packet: MakePacket, bundle: Bundle) -> None:
    server = await start()
    server.engine.gate.clear()
    stream = await server.stream()
    await stream.send(make_packet(1))
    await server.engine.began.get()
    request = messages.infer_request(bundle.fingerprint, Frame(make_packet(2).to_bytes()))
    call = server.stub.Infer(request, timeout=60)
    await server.waiting(1)
    await server.decoded(2)
    server.clock.now += 61
    server.engine.gate.set()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "deadline passed" in caught.value.details(), "it is the server that says so"


# Starting


async def test_a_taken_port_is_an_error_with_a_remedy(start: Any) -> None:
    taken = (await start()).server.address.rpartition(":")[2]
    with pytest.raises(StartError, match=f"{taken}.*another --port"):
        await start(port=int(taken))
    free = await start(metrics_port=0)
    metrics = free.server.metrics_address.rpartition(":")[2]
    with pytest.raises(StartError, match=f"{metrics}.*--metrics-port"):
        await start(metrics_port=int(metrics))


async def test_a_cache_that_cannot_be_written_is_named(start: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    server = await start(cache_dir=tmp_path / "file")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.stub.GetBundle(messages.GetBundleRequest()).read()
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert str(tmp_path / "file") in caught.value.details() and "--cache-dir" in caught.value.details()

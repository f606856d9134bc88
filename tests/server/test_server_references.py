"""Predicted frames over real gRPC: what the server keeps of a stream, and what it says when it does not."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest
from headrace.models.bitstream import VERSION, Packet
from headrace.models.bundle import Bundle
from headrace.models.codec import Codec, Coded
from headrace.models.temporal import Reference
from headrace.protos import messages
from headrace.protos.messages import Continuation, Frame, Hello, Status
from headrace.server.references import References

from .conftest import Running, Stream, point_named, symbols_for

POINT = "blocks.5@6"


class Device:
    """An edge's codec: every frame differs a little from the first."""

    def __init__(self, bundle: Bundle, codec: Codec) -> None:
        self._codec, self._point = codec, point_named(bundle, POINT)
        self._first = symbols_for(bundle, self._point.split)
        self.kept: dict[int, Reference | None] = {}

    def symbols(self, frame_id: int) -> np.ndarray:
        changed = np.random.default_rng(frame_id).random(self._first.shape) < 0.02
        return self._first + changed.astype(np.int32)

    def code(self, frame_id: int, earlier_id: int | None = None) -> Packet:
        earlier, back = (None, 0) if earlier_id is None else (self.kept[earlier_id], frame_id - earlier_id)
        coded: Coded = self._codec.compress_video(self.symbols(frame_id), self._point, frame_id, earlier, back)
        assert coded.packet.back == back
        self.kept[frame_id] = coded.reference
        return coded.packet

    def sent(self, frame_id: int) -> np.ndarray:
        return self._codec.decompress(self._codec.compress_symbols(self.symbols(frame_id), self._point, frame_id))


@pytest.fixture
def device(bundle: Bundle, codec: Codec) -> Device:
    return Device(bundle, codec)


async def predicting(server: Running) -> Stream:
    return await server.stream(Hello(server.bundle.fingerprint, VERSION, "test", predicts=True))


async def answered(stream: Stream, packet: Packet) -> Status:
    await stream.send(packet)
    result = await stream.result()
    assert result.frame_id == packet.frame_id
    return result.status


async def test_a_chain_of_predicted_frames_decodes_to_the_same_symbols(start: Any, device: Device) -> None:
    server = await start()
    stream = await predicting(server)
    assert stream.welcome is not None
    assert stream.welcome.references == 8
    assert await answered(stream, device.code(0)) is Status.OK
    for frame_id in range(1, 12):
        assert await answered(stream, device.code(frame_id, frame_id - 1)) is Status.OK
    for frame_id, (_, [given]) in enumerate(server.engine.batches):
        assert np.array_equal(given.symbols, device.sent(frame_id))


async def test_only_who_says_so_is_offered_references(start: Any, device: Device) -> None:
    server = await start()
    stream = await server.stream()
    assert stream.welcome is not None
    assert stream.welcome.references == 0
    assert await answered(stream, device.code(0)) is Status.OK
    await stream.send(device.code(1, 0))
    result = await stream.result()
    assert result.status is Status.MISSING_REFERENCE
    assert "frame 1 is predicted from frame 0" in result.message
    assert "send key frames" in result.message
    assert await answered(stream, device.code(2)) is Status.OK
    assert server.sums() == (3, 3)
    assert server.count("missing_reference") == 1


async def test_frames_are_kept_in_the_order_of_their_results_up_to_a_number(start: Any, device: Device) -> None:
    server = await start(references=3)
    stream = await predicting(server)
    for frame_id in range(4):
        assert await answered(stream, device.code(frame_id)) is Status.OK
    assert await answered(stream, device.code(10, 0)) is Status.MISSING_REFERENCE  # pushed out by 3
    assert await answered(stream, device.code(11, 1)) is Status.OK  # a refused frame pushes nothing out; 11 does
    assert await answered(stream, device.code(12, 1)) is Status.MISSING_REFERENCE
    assert await answered(stream, device.code(13, 2)) is Status.OK


async def test_a_frame_that_was_not_answered_is_none(start: Any, device: Device) -> None:
    server = await start()
    stream = await predicting(server)
    server.engine.error = RuntimeError("broken")
    assert await answered(stream, device.code(0)) is Status.INTERNAL
    server.engine.error = None
    assert await answered(stream, device.code(1, 0)) is Status.MISSING_REFERENCE


async def test_a_frame_that_was_cut_short_is_answered_but_none(start: Any, device: Device) -> None:
    server = await start()
    stream = await predicting(server)
    assert await answered(stream, device.code(0)) is Status.OK
    assert await answered(stream, device.code(1, 0).prefix(2)) is Status.OK
    assert await answered(stream, device.code(2, 1)) is Status.MISSING_REFERENCE
    assert await answered(stream, device.code(3, 0)) is Status.OK


async def test_a_predicted_frame_may_come_in_parts(start: Any, device: Device) -> None:
    import zlib

    server = await start()
    stream = await predicting(server)
    assert await answered(stream, device.code(0)) is Status.OK
    packet = device.code(1, 0)
    await stream.call.write(messages.frame_request(Frame(packet.prefix(1).to_bytes(), 0, 3, 5000)))
    for each in packet.slices[1:]:
        await stream.call.write(messages.continuation_request(Continuation(1, each, zlib.crc32(each))))
    result = await stream.result()
    assert (result.status, result.slices) == (Status.OK, 4)
    assert np.array_equal(server.engine.batches[-1][1][0].symbols, device.sent(1))
    assert await answered(stream, device.code(2, 1)) is Status.OK


async def test_streams_share_nothing_and_a_new_one_begins_empty(start: Any, device: Device) -> None:
    server = await start()
    one, other = await predicting(server), await predicting(server)
    assert await answered(one, device.code(0)) is Status.OK
    assert await answered(other, device.code(1, 0)) is Status.MISSING_REFERENCE
    assert await server.finished(one) is grpc.StatusCode.OK
    again = await predicting(server)
    assert await answered(again, device.code(2, 0)) is Status.MISSING_REFERENCE


async def test_what_streams_keep_is_bounded_before_it_is_kept(start: Any, device: Device, codec: Codec) -> None:
    server = await start(references=4, reference_bytes=9 * codec.reference_bytes())
    streams = [await predicting(server) for _ in range(3)]
    assert [s.welcome.references for s in streams if s.welcome] == [4, 4, 0]
    assert await server.finished(streams[0]) is grpc.StatusCode.OK
    await server.service_has_streams(2)
    freed = await predicting(server)
    assert freed.welcome is not None
    assert freed.welcome.references == 4


async def test_infer_takes_key_frames_only(start: Any, device: Device) -> None:
    server = await start()
    key, predicted = device.code(0), device.code(1, 0)
    await server.stub.Infer(messages.infer_request(server.bundle.fingerprint, Frame(key.to_bytes())))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.stub.Infer(messages.infer_request(server.bundle.fingerprint, Frame(predicted.to_bytes())))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "send a key frame" in (caught.value.details() or "")


async def test_a_picture_cannot_be_predicted(start: Any, bundle: Bundle, device: Device) -> None:
    server = await start()
    stream = await predicting(server)
    image = next(p for p in bundle.operating_points if p.codec)
    assert await answered(stream, device.code(0)) is Status.OK
    assert await answered(stream, Packet(image.id, 1, (b"x",), 1)) is Status.INVALID


async def test_a_reference_of_another_split_point_is_refused(start: Any, bundle: Bundle, device: Device) -> None:
    server = await start()
    stream = await predicting(server)
    assert await answered(stream, device.code(0)) is Status.OK
    packet = device.code(1, 0)
    other = point_named(bundle, "blocks.3@6")
    assert await answered(stream, Packet(other.id, 1, packet.slices, 1)) is Status.INVALID


def test_a_frame_that_comes_again_is_kept_once() -> None:
    kept = References(2)
    frames = [Reference("a", 0, np.zeros(1, np.int16), np.full(1, i, np.int32)) for i in range(4)]
    kept.add(1, frames[0])
    kept.add(2, frames[1])
    kept.add(1, frames[2])
    kept.add(3, frames[3])
    assert len(kept) == 2
    assert (kept.find(1), kept.find(2), kept.find(3)) == (frames[2], None, frames[3])

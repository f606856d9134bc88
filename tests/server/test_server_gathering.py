"""Frames whose slices come one by one: answered whole, or from the prefix that is there."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from headrace.models.bitstream import MAX_SLICE_BYTES, Packet
from headrace.models.bundle import Bundle
from headrace.models.codec import Codec
from headrace.protos import messages
from headrace.protos.messages import Continuation, Frame, Status
from headrace.server.engine import FeatureInput
from headrace.server.exceptions import InvalidError
from headrace.server.gathering import Gathering

from .conftest import Clock, HeldEngine, point_named, symbols_for

MakePacket = Callable[..., Packet]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience is real time; with what the server allows a machine that stands still for seconds would end it."""
    monkeypatch.setattr("headrace.server.gathering.LONGEST_S", 60.0)


@pytest.fixture
def whole(bundle: Bundle, codec: Codec) -> Packet:
    """A packet of all its slices."""
    point = point_named(bundle, "blocks.3@0")
    packet = codec.compress_symbols(symbols_for(bundle, "blocks.3"), point, 9)
    assert len(packet.slices) >= 4
    return packet


def first(packet: Packet, count: int = 1, patience_ms: int = 60_000) -> Frame:
    return Frame(packet.prefix(count).to_bytes(), 0, len(packet.slices) - count, patience_ms)


def slice_of(packet: Packet, index: int) -> Continuation:
    data = packet.slices[index]
    return Continuation(packet.frame_id, data, zlib.crc32(data))


def seen(engine: HeldEngine) -> np.ndarray:
    """The symbols that the engine was given."""
    ((_, (given,)),) = engine.batches
    assert isinstance(given, FeatureInput)
    return given.symbols


async def write(stream: Any, *parts: Frame | Continuation) -> None:
    for part in parts:
        if isinstance(part, Frame):
            await stream.call.write(messages.frame_request(part))
        else:
            await stream.call.write(messages.continuation_request(part))


async def test_slices_that_come_one_by_one_are_the_whole_packet(start: Any, whole: Packet, codec: Codec) -> None:
    running = await start()
    stream = await running.stream()
    await write(stream, first(whole), *(slice_of(whole, i) for i in range(1, len(whole.slices))))
    result = await stream.result()
    assert (result.frame_id, result.status, result.slices) == (9, Status.OK, len(whole.slices))
    assert np.array_equal(seen(running.engine), codec.decompress(whole))


@pytest.mark.parametrize("received", [1, 2, 3])
async def test_a_frame_that_is_cut_is_answered_from_its_prefix(
    start: Any, whole: Packet, codec: Codec, received: int
) -> None:
    running = await start()
    stream = await running.stream()
    more = [slice_of(whole, i) for i in range(1, received)]
    await write(stream, first(whole), *more, Continuation(9, cut=True))
    result = await stream.result()
    assert (result.status, result.slices) == (Status.OK, received)
    assert np.array_equal(seen(running.engine), codec.decompress(whole.prefix(received)))


async def test_patience_ends(start: Any, whole: Packet) -> None:
    running = await start()
    stream = await running.stream()
    await write(stream, first(whole, 2, patience_ms=30))
    result = await stream.result()
    assert (result.status, result.slices) == (Status.OK, 2)
    # What comes after the answer is ignored, and the stream goes on.
    await write(stream, slice_of(whole, 2), first(whole, 2, patience_ms=1))
    assert (await stream.result()).slices == 2


async def test_a_damaged_slice_ends_the_frame_before_it(start: Any, whole: Packet) -> None:
    running = await start()
    stream = await running.stream()
    damaged = Continuation(9, whole.slices[1], zlib.crc32(whole.slices[1]) ^ 1)
    await write(stream, first(whole), damaged, slice_of(whole, 2))
    assert (await stream.result()).slices == 1


async def test_more_slices_than_a_packet_has_are_refused(start: Any, whole: Packet) -> None:
    running = await start()
    stream = await running.stream()
    await write(stream, Frame(whole.to_bytes(), 9000, 2**32 - 1, 2**32 - 1))
    result = await stream.result()
    assert (result.frame_id, result.status) == (9, Status.INVALID)
    assert "to come are more than a packet's" in result.message
    await write(stream, Frame(b"garbage", 9000, 1, 10))
    assert (await stream.result()).status is Status.INVALID


async def test_an_ended_stream_waits_for_no_slices(start: Any, whole: Packet) -> None:
    running = await start()
    stream = await running.stream()
    await write(stream, first(whole))
    await stream.call.done_writing()
    async with asyncio.timeout(30):  # half as long as it would be patient
        assert (await stream.result()).slices == 1


async def test_a_continuation_of_nothing_is_ignored(start: Any, whole: Packet) -> None:
    running = await start()
    stream = await running.stream()
    await write(stream, Continuation(77, b"x", 3), Continuation(77, cut=True), first(whole), Continuation(9, cut=True))
    assert (await stream.result()).frame_id == 9


async def test_all_slices_together_are_bounded() -> None:
    packet = Packet(3, 9, (b"a" * 50, b"b" * 50, b"c" * 50))
    gathering = Gathering(first(packet), 1000.0, 140, Clock())
    for index in (1, 2):
        gathering.add(slice_of(packet, index), 1000.0)
    frame, _ = await gathering.whole()
    assert Packet.from_bytes(frame.packet).slices == packet.slices[:2]
    with pytest.raises(InvalidError):
        Gathering(Frame(packet.to_bytes(), 0, 3, 0), 1000.0, 10_000, Clock())


async def test_what_remains_of_the_deadline_is_counted_from_the_last_slice() -> None:
    clock, packet = Clock(), Packet(3, 9, (b"a", b"b"))
    gathering = Gathering(Frame(packet.prefix(1).to_bytes(), 250, 1, 200), clock.now, 10_000, clock)
    gathering.add(slice_of(packet, 1), clock.now + 0.12)
    frame, complete = await gathering.whole()
    assert (frame.remaining_ms, round(complete - clock.now, 3)) == (130, 0.12)


async def test_slices_that_no_packet_could_hold_end_the_frame_before_them() -> None:
    small, large = b"s", b"l" * (MAX_SLICE_BYTES + 1)

    async def gathered(*slices: bytes) -> tuple[bytes, ...]:
        packet = Packet(1, 9, (small,))
        it = Gathering(Frame(packet.to_bytes(), 0, 3, 60_000), 0.0, 2**20, lambda: 0.0)
        for each in slices:
            it.add(Continuation(9, each, zlib.crc32(each)), 0.0)
        return Packet.from_bytes((await it.whole())[0].packet).slices

    assert await gathered(small, small, large) == (small, small, small, large), "the last one may be that large"
    assert await gathered(small, large, small) == (small, small)
    with pytest.raises(InvalidError, match="a slice of 16384 bytes is the last one"):
        Gathering(Frame(Packet(1, 9, (large,)).to_bytes(), 0, 1), 0.0, 2**20, lambda: 0.0)

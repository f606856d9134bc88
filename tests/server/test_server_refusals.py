"""Refusals that come up within a moment are written together, to who reads them so; each frame has its one status."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from headrace.models.bitstream import VERSION, Packet
from headrace.protos import messages
from headrace.protos.messages import Hello, Result, Status
from headrace.server.refusals import Moment, Refusals
from headrace.server.session import REFUSALS

from .conftest import HeldEngine, Running, Stream

MakePacket = Callable[..., Packet]


@pytest.fixture
def moment_s(monkeypatch: pytest.MonkeyPatch) -> float:
    """Long enough for all that a test sends."""
    monkeypatch.setattr("headrace.server.pipeline.AFTER_S", 0.3)
    return 0.3


async def full(server: Running, make_packet: MakePacket, *, several: bool) -> Stream:
    """A stream whose device has a frame in a batch that is held, and two that wait, which is its limit."""
    stream = await server.stream(Hello(server.bundle.fingerprint, VERSION, "test", several=several))
    server.engine.gate.clear()
    await stream.send(make_packet(1))
    await server.engine.began.get()
    await stream.send(make_packet(2))
    await stream.send(make_packet(3))
    await server.waiting(2)
    return stream


async def responses(stream: Stream, count: int) -> list[list[Result]]:
    """The next responses, until they hold so many results."""
    found: list[list[Result]] = []
    while sum(len(results) for results in found) < count:
        async with asyncio.timeout(30):
            response = await stream.call.read()
        assert response is not grpc.aio.EOF
        found.append(list(messages.results_of(response)))
    return found


async def refused(server: Running, frames: int) -> None:
    async with asyncio.timeout(30):
        while server.count("resource_exhausted") < frames:
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("several", [True, False])
async def test_each_refused_frame_has_its_status_however_they_are_written(
    start: Any, make_packet: MakePacket, moment_s: float, several: bool
) -> None:
    server = await start(device_queue_limit=2, max_in_flight=64)
    stream = await full(server, make_packet, several=several)
    for frame_id in range(10, 16):
        await stream.send(make_packet(frame_id))
    await refused(server, 6)
    server.clock.now += 0.05
    found = await responses(stream, 6)
    assert [len(results) for results in found] == ([6] if several else [1] * 6)
    results = [result for each in found for result in each]
    assert [r.frame_id for r in results] == list(range(10, 16))
    assert {r.status for r in results} == {Status.RESOURCE_EXHAUSTED} and all(r.retry_ms > 0 for r in results)
    assert all("limit" in r.message for r in results)
    assert {r.timing.total_us for r in results} == {50_000}, "until they are written, the wait for others included"
    server.engine.gate.set()
    answered = [result for each in await responses(stream, 3) for result in each]
    assert {(r.frame_id, r.status) for r in answered} == {(n, Status.OK) for n in (1, 2, 3)}
    assert await server.finished(stream) is grpc.StatusCode.OK
    assert server.sums() == (9, 9)


async def test_frames_over_the_streams_own_limit_are_refused_in_the_same_message(
    start: Any, make_packet: MakePacket, moment_s: float
) -> None:
    server = await start(max_in_flight=3)
    stream = await full(server, make_packet, several=True)
    for frame_id in (10, 11):
        await stream.send(make_packet(frame_id))
    (results,) = await responses(stream, 2)
    assert [(r.frame_id, r.status) for r in results] == [(n, Status.RESOURCE_EXHAUSTED) for n in (10, 11)]
    assert all("max_in_flight" in r.message for r in results)


async def test_what_is_refused_is_written_before_the_stream_ends(
    start: Any, make_packet: MakePacket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.server.pipeline.AFTER_S", 60.0)
    server = await start(device_queue_limit=2, max_in_flight=64)
    stream = await full(server, make_packet, several=True)
    for frame_id in (10, 11):
        await stream.send(make_packet(frame_id))
    await refused(server, 2)
    await stream.call.done_writing()
    server.engine.gate.set()
    results = [result for each in await responses(stream, 5) for result in each]
    assert sorted(r.frame_id for r in results) == [1, 2, 3, 10, 11]
    assert await server.finished(stream) is grpc.StatusCode.OK
    assert server.sums() == (5, 5)


async def test_so_many_are_written_at_once_whatever_the_moment(
    start: Any, make_packet: MakePacket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.server.pipeline.AFTER_S", 60.0)
    server = await start(device_queue_limit=2, max_in_flight=64)
    stream = await full(server, make_packet, several=True)
    for frame_id in range(10, 10 + REFUSALS):
        await stream.send(make_packet(frame_id))
    assert [len(results) for results in await responses(stream, REFUSALS)] == [REFUSALS]


async def test_where_there_is_one_core_they_are_written_before_the_next_batch(
    start: Any, make_packet: MakePacket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.server.dispatch.one_core", lambda: True)
    monkeypatch.setattr("headrace.server.pipeline.AFTER_S", 60.0)
    monkeypatch.setattr("headrace.server.pipeline.BETWEEN_S", 60.0)
    monkeypatch.setattr(HeldEngine, "on_our_cores", True)
    server = await start(device_queue_limit=2, max_in_flight=64)
    stream = await full(server, make_packet, several=True)
    for frame_id in (10, 11):
        await stream.send(make_packet(frame_id))
    await refused(server, 2)
    server.engine.gate.set()
    await server.engine.began.get()
    server.engine.gate.clear()  # the second batch is held
    results = [result for each in await responses(stream, 3) for result in each]
    assert {r.frame_id for r in results} == {1, 10, 11}


async def test_a_moment_is_over_for_all_at_once_and_once() -> None:
    called: list[str] = []
    moment = Moment(0.01)
    moment.soon(lambda: called.append("one"))
    moment.soon(lambda: called.append("other"))
    await asyncio.sleep(0.05)
    assert called == ["one", "other"]
    moment.soon(lambda: called.append("early"))
    moment.over()
    assert called[2:] == ["early"]
    await asyncio.sleep(0.05)
    assert len(called) == 3
    moment.soon(lambda: called.append("late"))
    await asyncio.sleep(0.05)
    assert called[3:] == ["late"]


@pytest.mark.parametrize("several", [True, False])
def test_what_is_taken_is_gone(several: bool) -> None:
    refusals = Refusals(several)
    assert not refusals and list(refusals.take(0.0)) == []
    refusals.add(1.0, 5, Status.RESOURCE_EXHAUSTED, "full", 7, 20)
    refusals.add_result(2.0, Result(6, Status.INVALID, "damaged"))
    assert len(refusals) == 2
    found = [result for response in refusals.take(2.5) for result in messages.results_of(response)]
    assert [(r.frame_id, r.status, r.message, r.timing.total_us) for r in found] == [
        (5, Status.RESOURCE_EXHAUSTED, "full", 1_500_000),
        (6, Status.INVALID, "damaged", 500_000),
    ]
    assert (found[0].queue_depth, found[0].retry_ms) == (7, 20)
    assert not refusals and list(refusals.take(3.0)) == []

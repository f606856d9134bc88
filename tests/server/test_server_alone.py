"""The short way: a frame that has the server to itself is decoded and answered in the engine's own thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest_asyncio
from headrace.models.bitstream import Packet
from headrace.models.bundle import Bundle
from headrace.protos.messages import Frame, Label, Status, TailOutput
from headrace.server.decoder import PacketDecoder
from headrace.server.dispatch import Job
from headrace.server.engine import LocalEngine, TailInput, TailKey
from headrace.server.metrics import Metrics
from headrace.server.pipeline import Pipeline, PipelineSettings

ANSWER = (TailOutput("classification", (Label(3, 0.5),)),)


class HeldTail:
    """Answers when the test opens the gate, and remembers how many frames each batch had and in which thread."""

    def __init__(self) -> None:
        self.gate, self.began = threading.Event(), threading.Semaphore(0)
        self.gate.set()
        self.batches: list[int] = []
        self.threads: set[str] = set()

    def __call__(self, inputs: Sequence[TailInput], /) -> list[tuple[TailOutput, ...]]:
        self.batches.append(len(inputs))
        self.threads.add(threading.current_thread().name)
        self.began.release()
        assert self.gate.wait(60)
        return [ANSWER] * len(inputs)

    def example(self) -> Any:
        raise NotImplementedError


class Alone:
    """A pipeline over the engine that servers have, with a tail that the test holds."""

    def __init__(self, bundle: Bundle, make_packet: Callable[..., Packet]) -> None:
        self.tail, self.metrics, self._make_packet = HeldTail(), Metrics(), make_packet
        self.engine = LocalEngine(lambda _: {})
        self.engine._tails[TailKey(bundle.fingerprint, "blocks.3")] = self.tail
        settings = PipelineSettings(2**20, 100, 100, 2**30, 8, 0.0, 1)
        self.pipeline, self.decoder = Pipeline(settings, self.engine, self.metrics), PacketDecoder(bundle)

    def enter(self, frame_id: int) -> Job:
        frame = Frame(self._make_packet(frame_id).to_bytes())
        entered = self.pipeline.enter(self.decoder, frame, self.pipeline.clock())
        assert isinstance(entered, Job)
        return entered

    async def tail_began(self) -> None:
        assert await asyncio.to_thread(self.tail.began.acquire, timeout=60)

    def answered(self, status: str) -> float:
        return self.metrics.registry.get_sample_value("headrace_server_frames_total", {"status": status}) or 0.0


@pytest_asyncio.fixture
async def alone(bundle: Bundle, make_packet: Callable[..., Packet]) -> AsyncIterator[Alone]:
    made = Alone(bundle, make_packet)
    yield made
    made.tail.gate.set()
    await made.pipeline.close()
    await made.engine.close()


async def test_its_thread_begins_before_anybody_waits_for_its_answer(alone: Alone) -> None:
    job = alone.enter(1)
    await alone.tail_began()
    result = await alone.pipeline.go_on(job)
    assert (result.status, result.frame_id, result.outputs) == (Status.OK, 1, ANSWER)
    assert alone.tail.threads == {"tail"} and result.timing.decode_us > 0


async def test_others_that_come_meanwhile_wait_for_it_and_form_a_batch(alone: Alone) -> None:
    alone.tail.gate.clear()
    jobs = [alone.enter(1)]
    await alone.tail_began()
    jobs += [alone.enter(frame_id) for frame_id in (2, 3, 4)]
    answers = [asyncio.create_task(alone.pipeline.go_on(job)) for job in jobs]
    # Decoded while the first one is answered, so that they can go together.
    async with asyncio.timeout(60):
        while not all(job.decoded for job in jobs[1:]):
            await asyncio.sleep(0.001)
    alone.tail.gate.set()
    results = await asyncio.gather(*answers)
    assert [r.status for r in results] == [Status.OK] * 4 and alone.tail.batches == [1, 3]


async def test_whoever_goes_away_leaves_the_server_free(alone: Alone) -> None:
    alone.tail.gate.clear()
    alone.pipeline.leave(alone.enter(1))
    await asyncio.sleep(0)
    assert alone.pipeline.admission.open == 0 and alone.answered("cancelled") == 1
    alone.tail.gate.set()
    result = await alone.pipeline.go_on(alone.enter(2))
    assert (result.status, result.frame_id) == (Status.OK, 2)
    await asyncio.sleep(0)
    assert (alone.answered("cancelled"), alone.answered("ok")) == (1, 1)
    await alone.pipeline.idle()


async def test_who_came_after_one_that_goes_away_is_answered(alone: Alone) -> None:
    alone.tail.gate.clear()
    gone = alone.enter(1)
    await alone.tail_began()
    waits = alone.enter(2)
    answer = asyncio.create_task(alone.pipeline.go_on(waits))
    async with asyncio.timeout(60):
        while not waits.decoded:  # from here on nothing happens by itself
            await asyncio.sleep(0.001)
        alone.pipeline.leave(gone)
        alone.tail.gate.set()
        assert (await answer).status is Status.OK


async def test_a_packet_that_cannot_be_decoded_is_told_and_the_next_is_answered(alone: Alone) -> None:
    whole = alone._make_packet(1)
    longer = Packet(whole.operating_point, 1, (*whole.slices, b"\0"))
    entered = alone.pipeline.enter(alone.decoder, Frame(longer.to_bytes()), alone.pipeline.clock())
    assert isinstance(entered, Job)
    assert (await alone.pipeline.go_on(entered)).status is Status.INVALID
    assert (await alone.pipeline.go_on(alone.enter(2))).status is Status.OK

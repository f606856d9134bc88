"""The way of a frame on the server. Read this first.

    admit ──► decode ──► batch ──► tail ──► result

A frame is **admitted** if the queue has room, **decoded** in a worker thread (packet -> symbols, or image -> pixels),
waits until it is in a **batch** with other frames of its tail, earliest deadline first, and the **tail** makes its
labels. Whatever happens on the way, every frame gets exactly one result: its status says how it ended.
`Pipeline.answer` is this sentence as code; who calls it, and over what wire, is `service.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import structlog

from ..models.bitstream import Packet
from ..models.exceptions import HeadraceError
from ..protos.messages import Frame, Result, Status, TailOutput, Timing
from .batcher import Admission, Batcher, Place, deadline_at
from .decoder import PacketDecoder, frame_id_of
from .engine import Engine, TailInput, TailKey
from .exceptions import ExpiredError, FrameError, InferenceError, InvalidError
from .metrics import Metrics
from .placing import placed

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class PipelineSettings:
    """See `ServerSettings` for what each one means; `max_wait_s` is in seconds."""

    max_packet_bytes: int
    queue_limit: int
    max_batch: int
    max_wait_s: float
    decode_threads: int


class Decoded(NamedTuple):
    """A frame that can go to its tail: `seconds` is what decoding took."""

    key: TailKey
    input: TailInput
    slices: int
    seconds: float


class Answer(NamedTuple):
    """What the tail said, and how: when the batch began (server's clock), the seconds that the whole batch took, and
    the frames that waited when it was done, before the next batch takes some of them."""

    outputs: tuple[TailOutput, ...]
    began: float
    seconds: float
    queue_depth: int


@dataclass(slots=True, eq=False)
class Job:
    """A decoded frame that waits for its tail. `answer` gets what the tail said, or why it said nothing."""

    place: Place
    deadline: float
    decoded: Decoded
    answer: asyncio.Future[Answer]


class Pipeline:
    """Answers frames. Belongs to one event loop; only decoding and the engine run elsewhere."""

    def __init__(
        self,
        settings: PipelineSettings,
        engine: Engine,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make an idle one; `clock` gives seconds and is read from several threads."""
        self.clock = clock
        self.admission = Admission(settings.queue_limit)
        self._settings = settings
        self._engine = engine
        self._metrics = metrics
        self._batcher: Batcher[Job] = Batcher(settings.max_batch, settings.max_wait_s)
        self._decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._batches: asyncio.Task[None] | None = None
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.queue_depth.set_function(lambda: self.admission.waiting)

    async def answer(self, decoder: PacketDecoder, frame: Frame, received: float) -> Result:
        """Take a frame all the way: admit, decode, batch, tail, result.

        Args:
            decoder: of the bundle that the edge holds.
            frame: packet and what remains of its deadline.
            received: when it came, by `clock`.

        Returns:
            Its result, whatever its status. `Timing.total_us` is still open: who hands it to gRPC knows it.
        """
        self._metrics.received(len(frame.packet))
        frame_id = frame_id_of(frame.packet)
        deadline = deadline_at(received, frame.remaining_ms)
        result: Result | None = None
        try:
            with self._admit() as place:
                if self._engine.decodes_alone and self.admission.open == 1:
                    decoded, answer = await self._decode_and_tail(place, decoder, frame.packet, deadline)
                else:
                    decoded = await self._decode(decoder, frame.packet, deadline)
                    answer = await self._batch_and_tail(place, decoded, deadline)
                outputs = placed(answer.outputs, (frame.width, frame.height), decoder.bundle.preprocessing)
                result = self._result(frame_id, received, decoded, answer._replace(outputs=outputs))
        except FrameError as error:
            result = self._failure(frame_id, error)
        except Exception:
            log.exception("a frame failed", frame=frame_id)
            result = self._failure(frame_id, InferenceError("the server failed on this frame; its log says why"))
        finally:
            # The caller went away if there is none. Counted a turn of the loop later: the result leaves first.
            asyncio.get_running_loop().call_soon(self._metrics.answered, result.status if result else None)
        return result

    def refuse(self, frame: Frame, error: FrameError) -> Result:
        """The result of a frame that its stream may not send now."""
        self._metrics.received(len(frame.packet))
        self._metrics.answered(error.status)
        return self._failure(frame_id_of(frame.packet), error)

    def drain(self) -> None:
        """Admit no more frames; those admitted are answered."""
        self.admission.draining = True

    async def idle(self) -> None:
        """Wait until every admitted frame is answered."""
        await self._idle.wait()

    async def close(self) -> None:
        """End the worker threads and the batch loop, when no caller waits any more."""
        if self._batches is not None:
            self._batches.cancel()
            await asyncio.wait({self._batches})
        await asyncio.to_thread(self._decoders.shutdown, cancel_futures=True)

    @contextmanager
    def _admit(self) -> Iterator[Place]:
        place = self.admission.admit()
        self._idle.clear()
        try:
            yield place
        finally:
            place.leave()
            if not self.admission.open:
                self._idle.set()

    async def _decode(self, decoder: PacketDecoder, data: bytes, deadline: float) -> Decoded:
        loop = asyncio.get_running_loop()
        decoded = await loop.run_in_executor(self._decoders, self._decode_now, decoder, data, deadline)
        self._metrics.decode.observe(decoded.seconds)
        return decoded

    def _decode_now(self, decoder: PacketDecoder, data: bytes, deadline: float) -> Decoded:
        """Runs in a worker thread."""
        began = self.clock()
        if deadline <= began:
            raise ExpiredError(f"the deadline passed {_ms(began - deadline)} before decoding began")
        try:
            packet = Packet.from_bytes(data, self._settings.max_packet_bytes)
            point = decoder.bundle.operating_point(packet.operating_point)
        except HeadraceError as error:
            raise InvalidError(str(error)) from error
        tail_input = decoder.decode(packet, point)
        key = TailKey(decoder.bundle.fingerprint, point.split)
        return Decoded(key, tail_input, len(packet.slices), self.clock() - began)

    async def _decode_and_tail(
        self, place: Place, decoder: PacketDecoder, data: bytes, deadline: float
    ) -> tuple[Decoded, Answer]:
        """The short way of a frame that has the server to itself: there is nothing to form a batch with."""
        place.begin()
        began = self.clock()
        decode = partial(self._decode_now, decoder, data, deadline)
        try:
            decoded, done = await self._engine.run_alone(decode)
        except FrameError:
            raise
        except Exception as error:
            log.exception("a frame failed in its tail")
            raise InferenceError("the tail failed on this frame; the server's log says why") from error
        asyncio.get_running_loop().call_soon(self._metrics.ran_alone, decoded.seconds, done.seconds)
        return decoded, Answer(done.outputs[0], began + decoded.seconds, done.seconds, self.admission.waiting)

    async def _batch_and_tail(self, place: Place, decoded: Decoded, deadline: float) -> Answer:
        job = Job(place, deadline, decoded, asyncio.get_running_loop().create_future())
        self._batcher.put(job, decoded.key, deadline, self.clock())
        self._arrived.set()
        if self._batches is None or self._batches.done():
            self._batches = asyncio.create_task(self._run_batches())
        return await job.answer

    async def _run_batches(self) -> None:
        """Batch after batch until nothing waits; while one runs, the next one gathers."""
        while (ready_at := self._batcher.ready_at(now := self.clock())) is not None:
            if ready_at > now:
                self._arrived.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._arrived.wait(), ready_at - now)
                continue
            batch, expired = self._batcher.take(now)
            for job in expired:
                if not job.answer.done():
                    job.answer.set_exception(
                        ExpiredError(f"the deadline passed {_ms(now - job.deadline)} before the frame's batch began")
                    )
            if batch is not None:
                await self._run_batch(batch.key, [job for job in batch.items if not job.answer.done()])

    async def _run_batch(self, key: TailKey, jobs: list[Job]) -> None:
        """One batch; `jobs` may be empty when all their callers went away."""
        if not jobs:
            return
        began = self.clock()
        for job in jobs:
            job.place.begin()
        self._metrics.batch_size.observe(len(jobs))
        try:
            done = await self._engine.run(key, [job.decoded.input for job in jobs])
        except Exception:
            log.exception("a batch failed", split=key.split or "uncut", frames=len(jobs))
            for job in jobs:
                if not job.answer.done():
                    job.answer.set_exception(InferenceError("the tail failed on this batch; the server's log says why"))
            return
        self._metrics.tail.observe(done.seconds)
        depth = self.admission.waiting
        for job, outputs in zip(jobs, done.outputs, strict=True):
            if not job.answer.done():
                job.answer.set_result(Answer(outputs, began, done.seconds, depth))

    def _result(self, frame_id: int, received: float, decoded: Decoded, answer: Answer) -> Result:
        waited = max(0.0, answer.began - received - decoded.seconds)
        asyncio.get_running_loop().call_soon(self._metrics.queue.observe, waited)
        timing = Timing(queue_us=micros(waited), decode_us=micros(decoded.seconds), tail_us=micros(answer.seconds))
        return Result(
            frame_id,
            Status.OK,
            outputs=answer.outputs,
            timing=timing,
            queue_depth=answer.queue_depth,
            slices=decoded.slices,
        )

    def _failure(self, frame_id: int, error: FrameError) -> Result:
        return Result(frame_id, error.status, str(error), queue_depth=self.admission.waiting)


def micros(seconds: float) -> int:
    """Microseconds as the wire holds them, at most 2**32 - 1."""
    return min(round(seconds * 1e6), 2**32 - 1)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"

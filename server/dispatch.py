"""From admission to answer: an admitted frame's ways to its tail.

    line ──► decode ──► batch ──► tail        every frame that is not alone
    ──────── decode ─────────────► tail       a frame that has the server to itself, in the tail's own thread

Packets wait in the line as they came and are decoded by worker threads no earlier than a batch will want them, most
urgent first; while one batch runs, the next ones are decoded. The tail takes what is decoded when it is free.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import structlog

from ..models.bundle import Preprocessing
from ..models.temporal import Reference
from ..protos.messages import Frame
from .admission import Admission, Place
from .batcher import Batcher, Line
from .costs import LIKELY, Costs, Plan
from .engine import Engine, EngineResult, Outputs, TailInput, TailKey
from .exceptions import ExpiredError, FrameError, InferenceError
from .metrics import Metrics
from .one_core import one_core
from .workers import Workers

log = structlog.get_logger(__name__)

AHEAD = 1
"""Batches of each tail that may be decoded ahead; what waits longer waits as a packet, in its line, and has cost next
to nothing if it is given up there."""

CHUNK = 8
"""Most packets that a worker thread decodes before the event loop hears of them."""

LEAD = 0.3
"""Share of a running batch before whose end the packets for the next one are decoded, all together: earlier nobody
needs them, and whenever the event loop is woken it finds the caches full of the tail's weights. Where there is one core
they are decoded between the batches: beside one they take half as long again, and the fewest of them are too late."""


class Decoded(NamedTuple):
    """A frame that can go to its tail: `seconds` is what decoding took."""

    key: TailKey
    input: TailInput
    slices: int
    seconds: float


class Answer(NamedTuple):
    """What the tail said, and how: when the batch began (server's clock), the seconds that the whole batch took, and
    the frames that waited when it was done, before the next batch takes some of them."""

    outputs: Outputs
    began: float
    seconds: float
    queue_depth: int
    decoded: Decoded


def _nothing() -> Decoded:
    raise AssertionError("a job without a packet")


class Alone(NamedTuple):
    """A frame on the short way: when that began (server's clock), and what its end will say."""

    began: float
    done: asyncio.Future[tuple[Decoded, EngineResult]]


@dataclass(slots=True, eq=False)
class Job:
    """An admitted frame. `decode` runs in another thread; `answer` gets what the tail said, or why it said nothing.
    On the short way it is `alone`."""

    place: Place
    frame: Frame
    frame_id: int
    received: float
    deadline: float
    key: TailKey
    preprocessing: Preprocessing
    answer: asyncio.Future[Answer]
    decode: Callable[[], Decoded] = _nothing
    alone: Alone | None = None
    decoded: Decoded | None = None
    left: bool = False
    reference: Reference | None = None
    """Once it is decoded: what its stream keeps of it, if it is answered."""

    def fail(self, error: Exception) -> None:
        """It is not answered by a tail; nothing happens if it is answered already, or its caller went away."""
        if not self.answer.done():
            self.answer.set_exception(error)


class Dispatcher:
    """Takes admitted frames to their tails. Belongs to one event loop.

    Attributes:
        costs: what decoding and batches were measured to take.
        running: batches in the engine.
    """

    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        metrics: Metrics,
        clock: Callable[[], float],
        *,
        max_batch: int,
        max_wait_s: float,
        decode_threads: int,
        before_batch: Callable[[], None],
    ) -> None:
        """Nothing waits. Where there is one core, `before_batch` is called before each batch."""
        self.costs = Costs()
        self.running = 0
        self._engine, self._admission, self._metrics, self._clock = engine, admission, metrics, clock
        self._max_batch, self._decode_threads = max_batch, decode_threads
        self._before_batch = before_batch
        self._one_core = engine.on_our_cores and one_core()
        self._line: Line[Job] = Line(admission.shares)
        self._batcher: Batcher[Job] = Batcher(max_batch, max_wait_s, self.costs, admission.shares)
        self._threads = Workers("decode", decode_threads)
        self._decoding: dict[TailKey, int] = {}
        self._workers = 0
        self._free_at = 0.0
        self._last_done: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._decode_timer: asyncio.TimerHandle | None = None
        self._decoding_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    def busy_s(self, now: float) -> float:
        """Seconds until what runs now is done, as planned."""
        return max(0.0, self._free_at - now) if self.running else 0.0

    def plan(self, key: TailKey, now: float) -> Plan:
        """What frames of a tail that come now are planned with."""
        return self.costs.plan(key, self._max_batch, now)

    @property
    def one_by_one(self) -> bool:
        """Whether batches are answered one after the other: where several run at a time, they are no plan to go by."""
        return self._engine.slots == 1

    async def close(self) -> None:
        """End the worker threads and the batches, when no caller waits any more."""
        for timer in (self._timer, self._decode_timer):
            if timer is not None:
                timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._threads.close()

    # The short way of a frame that has the server to itself

    def begin_alone(self, job: Job) -> None:
        """Send an admitted frame on the short way if it has the server to itself: its thread begins at once."""
        if not self._engine.decodes_alone or self._admission.open != 1 or self.running:
            return
        job.place.begin()
        began = self._begin_batch(job.key, 1)
        done = self._engine.run_alone(job.decode)
        done.add_done_callback(self._alone_done)
        job.alone = Alone(began, done)

    def _alone_done(self, _: asyncio.Future[tuple[Decoded, EngineResult]]) -> None:
        """The frame is answered, or given up."""
        self.running -= 1
        self._decoding_at = 0.0
        if self._admission.waiting:  # others came meanwhile
            self._turn()

    async def alone(self, way: Alone) -> Answer:
        """The answer of a frame on the short way."""
        try:
            decoded, done = await way.done
        except FrameError:
            raise
        except Exception as error:
            log.exception("a frame failed in its tail")
            raise InferenceError("the tail failed on this frame; the server's log says why") from error
        asyncio.get_running_loop().call_soon(self._note_alone, decoded, done)  # the answer does not wait for it
        (outputs,) = done.outputs
        if isinstance(outputs, FrameError):
            raise outputs
        return Answer(outputs, way.began + decoded.seconds, done.seconds, self._admission.waiting, decoded)

    # The way of all others: line, decode, batch, tail

    async def batched(self, job: Job) -> Answer:
        """Let a frame wait for its turn: line, decode, batch, tail."""
        self._line.put(job, job.key, job.deadline, job.received, start=job.place.start, cost=job.place.cost)
        self._turn()
        return await job.answer

    def _turn(self) -> None:
        """Whoever can go on goes on: called whenever a frame came, was decoded, or was answered."""
        self._start_decoding()
        self._start_batches()

    def _start_decoding(self) -> None:
        """Give packets to worker threads that are free, as far as there is a batch to decode them for."""
        if (begin := self._decoding_at) > (now := self._clock()) and not self._engine.decodes:
            if self._decode_timer is None and len(self._line) and math.isfinite(begin):
                self._decode_timer = asyncio.get_running_loop().call_later(begin - now, self._decode_now)
            return
        while self._workers < self._decode_threads or self._engine.decodes:
            jobs = self._next_to_decode(min(CHUNK, -(-len(self._line) // self._decode_threads)))
            if not jobs:
                return
            if self._engine.decodes:
                for job in jobs:
                    self._decoded(job, job.decode())
                continue
            self._workers += 1
            for job in jobs:
                self._decoding[job.key] = self._decoding.get(job.key, 0) + 1
            working = self._threads.begin(partial(_decode_all, jobs))
            working.add_done_callback(partial(self._worker_done, jobs))

    def _decode_now(self) -> None:
        self._decode_timer = None
        self._start_decoding()

    def _next_to_decode(self, most: int) -> list[Job]:
        now, jobs = self._clock(), list[Job]()
        while len(jobs) < most and (entry := self._line.first(self._has_room)) is not None:
            job = self._line.pop(entry.key).item
            if job.answer.done():
                continue
            left, needed = job.deadline - now, self.costs.alone_s(job.key, now)
            if left <= 0 or left < needed:
                job.fail(expired_error(left, needed, "before it was decoded"))
            else:
                jobs.append(job)
        return jobs

    def _has_room(self, key: TailKey) -> bool:
        ahead = self._batcher.waiting(key) + self._decoding.get(key, 0)
        return ahead < AHEAD * self._max_batch * self._engine.slots

    def _worker_done(self, jobs: list[Job], working: asyncio.Future[list[Decoded | Exception]]) -> None:
        self._workers -= 1
        for job in jobs:
            self._decoding[job.key] -= 1
            if not self._decoding[job.key]:
                del self._decoding[job.key]
        if working.cancelled() or working.exception() is not None:
            for job in jobs:
                job.fail(InferenceError("the server is stopping"))
            return
        for job, decoded in zip(jobs, working.result(), strict=True):
            if isinstance(decoded, Decoded):
                self._note_decoded(decoded)
                self._decoded(job, decoded)
            else:
                job.fail(decoded)
        self._turn()

    def _decoded(self, job: Job, decoded: Decoded) -> None:
        job.decoded = decoded
        if not job.answer.done():
            place, whole = job.place, job.deadline - job.received
            self._batcher.put(
                job, job.key, job.deadline, self._clock(), start=place.start, cost=place.cost, whole=whole
            )

    def _start_batches(self) -> None:
        """Give the engine batches until its slots are taken or nothing is ready."""
        while self.running < self._engine.slots:
            now = self._clock()
            ready_at = self._batcher.ready_at(now)
            if ready_at is None:
                return
            if ready_at > now:
                self._turn_in(ready_at - now)
                return
            key = self._batcher.next_key()
            if key is not None and self._company_comes(key):
                return
            batch, expired = self._batcher.take(now)
            for job in expired:
                job.fail(
                    expired_error(job.deadline - now, self.costs.batch_s(job.key, 1, now), "before its batch began")
                )
            jobs = [job for job in batch.items if not job.answer.done()] if batch else []
            if jobs:
                for job in jobs:
                    job.place.begin()
                key = jobs[0].key
                if self._one_core:
                    self._before_batch()
                self._spawn(self._run_batch(key, jobs, self._begin_batch(key, len(jobs))))
            self._start_decoding()  # there is room for the batches after this one, or for this one if nothing was left

    def _company_comes(self, key: TailKey) -> bool:
        """Whether the next batch of that tail waits for what is being decoded: for a moment, if that is most of it.

        Where there is one core, until the batch is full: beside it decoding would take as much of the core.
        """
        decoding, decoded = self._decoding.get(key, 0), self._batcher.waiting(key)
        return decoding > 0 and decoded < self._max_batch if self._one_core else decoding > decoded

    def _turn_in(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._turn)

    async def _run_batch(self, key: TailKey, jobs: list[Job], began: float) -> None:
        try:
            done = await self._engine.run(key, [job.decoded.input for job in jobs if job.decoded])
        except Exception:
            log.exception("a batch failed", split=key.split or "uncut", frames=len(jobs))
            done = None
        self.running -= 1
        self._decoding_at = 0.0
        depth = self._admission.waiting
        if done is not None:
            self._note_batch(key, len(jobs), done)
        if not self._one_core:
            self._turn()  # the next batch does not wait for this one's answers
        for job, outputs in zip(jobs, done.outputs if done else [None] * len(jobs), strict=True):
            if outputs is None:
                job.fail(InferenceError("the tail failed on this batch; the server's log says why"))
            elif isinstance(outputs, FrameError):
                job.fail(outputs)
            elif not job.answer.done() and job.decoded and done:
                job.answer.set_result(Answer(outputs, began, done.seconds, depth, job.decoded))
        if self._one_core:
            await asyncio.sleep(0)  # answers are written first: beside the next batch they would wait for the core
            self._turn()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # What things cost

    def _begin_batch(self, key: TailKey, size: int) -> float:
        """A batch begins now: when that is."""
        self.running += 1
        now = self._clock()
        self._free_at = now + self.costs.batch_s(key, size, now, LIKELY)
        if self._engine.slots == 1:
            beside = math.inf if self._one_core else (1 - LEAD) * self.costs.batch_mean_s(key, size)
            self._decoding_at = now + beside
        return now

    def _note_batch(self, key: TailKey, size: int, done: EngineResult) -> None:
        now = self._clock()
        self._metrics.batch_size.observe(size)
        self._metrics.tail.observe(done.seconds)
        self.costs.batch_done(key, size, done.seconds, now)
        # From batch to batch without a pause: all that it takes, not the tail alone.
        if self._last_done is not None:
            self.costs.paced(key, (now - self._last_done) / size, now)
        self._last_done = now if self._admission.waiting else None

    def _note_alone(self, decoded: Decoded, done: EngineResult) -> None:
        self._note_decoded(decoded)
        self._note_batch(decoded.key, 1, done)

    def _note_decoded(self, decoded: Decoded) -> None:
        self._metrics.decode.observe(decoded.seconds)
        self.costs.decoded(decoded.key, decoded.seconds, self._clock())


def _decode_all(jobs: list[Job]) -> list[Decoded | Exception]:
    """Runs in a worker thread. One packet that cannot be decoded is no other's fault."""
    found: list[Decoded | Exception] = []
    for job in jobs:
        try:
            found.append(job.decode())
        except Exception as error:
            found.append(error)
    return found


def expired_error(left: float, needed: float, when: str) -> ExpiredError:
    if left <= 0:
        return ExpiredError(f"the deadline passed {_ms(-left)} {when}")
    return ExpiredError(f"{_ms(left)} remained of the deadline {when}; decoder and tail take {_ms(needed)} here")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"

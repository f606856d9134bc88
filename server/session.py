"""Session: one stream after its Welcome. Frames are read and admitted; results leave as they are ready, in any order.

Each frame has a task of its own; the tasks of one stream are bounded, and so are the results that a slow reader leaves
lying: a stream that does not read is not read from either, and no other stream notices.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import grpc
import structlog

from ..models.exceptions import HeadraceError
from ..models.temporal import Reference
from ..protos import messages
from ..protos.messages import Continuation, Frame, Result, Status
from .bundles import Served
from .delay import Delay
from .dispatch import Job
from .exceptions import DrainingError, FrameError, FullError, InvalidError, Reason
from .gathering import Budget, Gathering
from .pipeline import Pipeline, retry_ms
from .references import References
from .refusals import Refusals

log = structlog.get_logger(__name__)

REFUSALS = 32
"""Refused frames of one stream whose results are not written yet; with so many, reading pauses."""

JITTER_MS = 3
"""A delay on the way that is no longer is not taken off a frame's deadline."""

END_OF_STREAM = grpc.aio.EOF  # type: ignore[attr-defined]

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Of one stream: bytes of a packet, frames without a result; streams of one peer; bytes that gather in all; seconds
    that results may lie unread; frames that are kept to predict others from, and bytes that all streams may keep so."""

    packet_bytes: int
    in_flight: int
    streams_per_peer: int
    gathered_bytes: int
    unread_s: float = 20.0
    references: int = 0
    reference_bytes: int = 0


class Session:
    """One stream after its Welcome."""

    def __init__(
        self,
        pipeline: Pipeline,
        served: Served,
        context: Context,
        limits: StreamLimits,
        device: str,
        gathered: Budget,
        references: References,
        *,
        several: bool,
    ) -> None:
        """Nothing is read yet; `several`: the device reads several results of one response."""
        self.frames = 0
        self._unread = asyncio.Event()
        self._pipeline = pipeline
        self._served = served
        self._context = context
        self._limits = limits
        self._device = device
        self._gathered = gathered
        self._references = references
        self._in_flight = 0
        self._refusals = Refusals(several)
        self._flushing = False
        self._writing = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._delay = Delay()
        self._write_began: float | None = None
        self._watching: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._gathering: dict[int, Gathering] = {}

    async def run(self) -> tuple[grpc.StatusCode, str] | None:
        """Read frames and write results until the edge ends the stream, or its bundle or the server stops.

        Returns:
            None for a good end, or the status and text with which the stream has to be aborted.
        """
        reading = asyncio.create_task(self._read())
        drained = asyncio.create_task(self._served.stop.wait())
        unread = asyncio.create_task(self._unread.wait())
        try:
            await asyncio.wait({reading, drained, unread}, return_when=asyncio.FIRST_COMPLETED)
            # Every admitted frame has its task by now. While it drains, what still comes is read and refused.
            await self._finish(unread)
            if stopped := not reading.done():
                reading.cancel()
                await asyncio.wait({reading})
                await self._finish(unread)
            if self._unread.is_set():
                seconds = self._limits.unread_s
                return grpc.StatusCode.RESOURCE_EXHAUSTED, f"no result was read for {seconds:g} s; read faster"
            return (grpc.StatusCode.UNAVAILABLE, str(self._stopping())) if stopped else reading.result()
        finally:
            if self._watching is not None:
                self._watching.cancel()
            for task in (reading, drained, unread, *self._tasks):
                task.cancel()
            await asyncio.gather(reading, drained, unread, *self._tasks, return_exceptions=True)

    async def _finish(self, unread: asyncio.Task[Any]) -> None:
        """Wait until the frames that have come so far are answered, or it turns out that nobody reads the answers."""
        for _ in range(2):  # what was refused while others were written is written after them
            self._flush()
            left: set[asyncio.Task[Any]] = set(self._tasks)
            while left and not unread.done():
                await asyncio.wait({*left, unread}, return_when=asyncio.FIRST_COMPLETED)
                left = {task for task in left if not task.done()}

    async def _read(self) -> tuple[grpc.StatusCode, str] | None:
        while True:
            while len(self._tasks) >= self._limits.in_flight + REFUSALS or len(self._refusals) >= REFUSALS:
                self._flush()
                await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            request = await self._context.read()
            received = self._pipeline.clock()
            if request is END_OF_STREAM:
                for gathering in self._gathering.values():
                    gathering.end()
                return None
            asked = self._turn_away(request, received)
            if asked is None:
                continue
            frame = messages.read_request(request)
            if isinstance(frame, Continuation):
                if frame.frame_id in self._gathering:
                    self._gathering[frame.frame_id].add(frame, received)
                continue
            if not isinstance(frame, Frame):
                return grpc.StatusCode.INVALID_ARGUMENT, "after Hello a stream carries frames, one a request"
            self.frames += 1
            if (remaining_ms := self._remaining_ms(frame, received)) != frame.remaining_ms:
                frame = replace(frame, remaining_ms=remaining_ms)
            entered = self._enter(frame, received, asked=asked)
            if isinstance(entered, Result):  # refused: that needs no task
                self._write_soon()
                self._refusals.add_result(received, entered)
                continue
            task = asyncio.create_task(self._answer(entered, received))
            self._tasks.add(task)
            task.add_done_callback(partial(self._done, entered))
            if isinstance(entered, Job) and entered.alone is not None:
                # It comes before the preparation for the next one: its task takes the first turn of the loop, the
                # thread that it hands the frame to gets the interpreter in the second.
                await asyncio.sleep(0)
                await asyncio.sleep(0)

    def _turn_away(self, request: messages.StreamRequest, received: float) -> bool | None:
        """Refuse a frame that is not worth being read: None if it is, else whether it was looked at."""
        pipeline = self._pipeline
        if not pipeline.admission.waiting:
            return False
        message = messages.whole_frame(request)
        if message is None or self._served.stop.is_set() or self._in_flight >= self._limits.in_flight:
            return False
        remaining_ms = self._remaining_ms(message, received)
        found = pipeline.turn_away(self._served.decoder, message.packet, remaining_ms, received, self._device)
        if isinstance(found, bool):
            return found
        self.frames += 1
        self._write_soon()
        frame_id, error = found
        self._refusals.add(received, frame_id, error.status, str(error), pipeline.admission.waiting, retry_ms(error))
        return None

    def _remaining_ms(self, frame: Frame | messages.FrameMessage, received: float) -> int:
        """What is left of a frame's deadline now that it is here; 0: it has none."""
        late_ms = self._delay.of(frame.clock_ms, received)
        return (
            max(1, frame.remaining_ms - late_ms) if frame.remaining_ms and late_ms > JITTER_MS else frame.remaining_ms
        )

    def _enter(self, frame: Frame, received: float, *, asked: bool) -> Job | Gathering | Result:
        """Admit a frame, or begin to gather it, or refuse it: known before more is read."""
        try:
            if self._served.stop.is_set():
                raise self._stopping()
            if self._in_flight >= self._limits.in_flight:
                raise FullError(
                    f"{self._in_flight} frames of this stream have no result yet, which is its limit (max_in_flight)",
                    retry_s=self._pipeline.admission.retry_s(),
                    reason=Reason.IN_FLIGHT,
                )
            if frame.slices_to_come:
                return self._gather(frame, received)
        except FrameError as error:
            return self._pipeline.refuse(frame, error)
        entered = self._enter_whole(frame, received, asked=asked)
        if not isinstance(entered, Result):
            self._in_flight += 1
        return entered

    def _enter_whole(self, frame: Frame, received: float, *, asked: bool = False) -> Job | Result:
        return self._pipeline.enter(self._served.decoder, frame, received, self._device, self._references, asked=asked)

    def _gather(self, frame: Frame, received: float) -> Gathering:
        """Whoever collects the slices that follow."""
        try:
            gathering = Gathering(frame, received, self._limits.packet_bytes, self._pipeline.clock, self._gathered)
        except HeadraceError as error:
            raise InvalidError(str(error)) from error
        self._in_flight += 1
        if gathering.frame_id in self._gathering:
            self._gathering[gathering.frame_id].end()
        self._gathering[gathering.frame_id] = gathering
        return gathering

    async def _answer(self, entered: Job | Gathering, received: float) -> None:
        job: Job | Result
        try:
            if isinstance(entered, Gathering):
                frame, received = await entered.whole()
                if self._gathering.get(entered.frame_id) is entered:
                    del self._gathering[entered.frame_id]
                job = self._enter_whole(frame, received)
            else:
                job = entered
            result = job if isinstance(job, Result) else await self._pipeline.go_on(job)
        finally:
            # Before it is written: the edge may send its next frame as soon as it has the result.
            self._in_flight -= 1
        await self._write(result, received, None if isinstance(job, Result) else job.reference)

    async def _write(self, result: Result, received: float, reference: Reference | None = None) -> None:
        async with self._writing:
            if self._unread.is_set():  # gRPC still holds the result before this one
                raise FullError("nobody reads the results of this stream")
            if reference is not None and result.status is Status.OK:
                # In the order in which results are written: the edge counts on it.
                self._references.add(result.frame_id, reference)
            total_us = messages.micros(self._pipeline.clock() - received)  # up to where it is handed to gRPC
            await self._put(messages.result_response(result, total_us))

    def _write_soon(self) -> None:
        """A refusal is about to be added: see to it that it is written."""
        if not self._refusals:
            self._pipeline.moment.soon(self._flush)

    def _flush(self) -> None:
        """The moment is over: what was refused in it is written."""
        if self._refusals and not self._flushing:
            self._flushing = True
            task = asyncio.create_task(self._write_refused())
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    async def _write_refused(self) -> None:
        try:
            async with self._writing:
                for response in self._refusals.take(self._pipeline.clock()):
                    if self._unread.is_set():  # gRPC still holds the response before this one
                        raise FullError("nobody reads the results of this stream")
                    await self._put(response)
        finally:
            self._flushing = False
            if self._refusals:  # they came while the others were written
                self._pipeline.moment.soon(self._flush)

    async def _put(self, response: messages.StreamResponse) -> None:
        """Hand a response to gRPC; returns once it has taken it."""
        self._write_began = self._loop.time()
        if self._watching is None:
            self._watching = self._loop.call_later(self._limits.unread_s, self._watch)
        try:
            await self._context.write(response)
        finally:
            self._write_began = None

    def _watch(self) -> None:
        """Look whether a result has lain unread for too long. One timer a stream, not one a result: they are dear."""
        self._watching = None
        if self._write_began is None:
            return
        left = self._write_began + self._limits.unread_s - self._loop.time()
        if left > 0:
            self._watching = self._loop.call_later(left, self._watch)
        else:  # whoever writes results waits for this one, and reading waits for them: the stream stands still
            self._unread.set()

    def _stopping(self) -> FrameError:
        if self._pipeline.admission.draining:
            return draining_error()
        name = self._served.bundle.name
        return DrainingError(f"this version of bundle {name} is no longer served; connect again, and fetch the new one")

    def _done(self, entered: Job | Gathering, task: asyncio.Task[None]) -> None:
        if isinstance(entered, Job):
            self._pipeline.leave(entered)  # a task that is cancelled before it began has not said so
        self._ended(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("a result could not be written", error=repr(error))


def draining_error() -> FrameError:
    """What is said while the server drains."""
    return DrainingError("the server is draining; connect again in a moment")

"""The service on the wire: Stream, Infer and GetBundle of `headrace.proto` over grpc.aio.

A stream's frames are answered as they become ready, in any order. Each frame has a task of its own; the tasks of one
stream are bounded, and so are the results that a slow reader leaves lying: a stream that does not read is not read
from either, and no other stream notices.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeAlias

import grpc
import structlog

from .. import __version__
from ..models.bitstream import VERSION
from ..models.bundle import Bundle, short
from ..models.exceptions import HeadraceError, OperatingPointError
from ..models.operating_point import Kind
from ..models.temporal import Reference
from ..protos import messages
from ..protos.messages import Continuation, Frame, Hello, Result, Status, Welcome
from .bundles import Bundles, Served
from .dispatch import Job
from .edge_halves import EdgeHalves
from .exceptions import DrainingError, EdgeHalfError, FrameError, FullError, InvalidError, Reason
from .gathering import Budget, Gathering
from .guard import caller
from .metrics import Metrics
from .pipeline import Pipeline, micros
from .references import References

log = structlog.get_logger(__name__)

HELLO_S = 10.0
"""How long a new stream may take to say Hello."""

GOODBYE_S = 5.0
"""How long a stream's status may take to be sent; then its place is free again."""

REFUSALS = 32
"""Refused frames of one stream whose results are not written yet; with more, reading pauses."""

CODES: Mapping[Status, grpc.StatusCode] = {
    Status.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Status.RESOURCE_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Status.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Status.INTERNAL: grpc.StatusCode.INTERNAL,
    Status.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Status.MISSING_REFERENCE: grpc.StatusCode.FAILED_PRECONDITION,
}
"""How `Infer` says what a result says by its status."""

END_OF_STREAM = grpc.aio.EOF  # type: ignore[attr-defined]

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


PUSHBACK = "grpc-retry-pushback-ms"
"""Metadata by which gRPC clients are told when to try again (gRFC A6)."""


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


class HeadraceService(messages.HeadraceServicer):
    """Answers calls by means of a pipeline."""

    def __init__(
        self, pipeline: Pipeline, bundles: Bundles, edge_halves: EdgeHalves, metrics: Metrics, limits: StreamLimits
    ) -> None:
        """Serve what `bundles` holds at any time."""
        self.pipeline = pipeline
        self.limits = limits
        self.draining = asyncio.Event()
        self._bundles = bundles
        self._edge_halves = edge_halves
        self._metrics = metrics
        self._gathered, self._kept = Budget(limits.gathered_bytes), Budget(limits.reference_bytes)
        self._streams: Counter[str] = Counter()
        self._answering: set[asyncio.Task[Any]] = set()
        self._downloads: set[asyncio.Task[Any]] = set()

    async def Stream(self, request_iterator: Any, context: Context) -> None:  # noqa: N802, ARG002
        """Hello, Welcome; then frames up and results down until the edge ends it or the server drains."""
        peer = peer_of(context)
        if self._streams[peer] >= self.limits.streams_per_peer:
            await _abort(
                context,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{peer} has {self._streams[peer]} streams, which is its limit (max_streams_per_peer); end some",
            )
        self._streams[peer] += 1
        self._metrics.streams.inc()
        try:
            reason = await self._stream(context, peer)
        finally:
            self._metrics.streams.dec()
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]
        if reason is not None:
            await _abort(context, *reason)

    async def _stream(self, context: Context, peer: str) -> tuple[grpc.StatusCode, str] | None:
        hello = await self._hello(context)
        served = await self._find(hello.fingerprint, context)
        if self.draining.is_set():
            await _abort(context, grpc.StatusCode.UNAVAILABLE, str(_draining()))
        _remember(self._answering)
        with served.used(), self._references(hello, served) as references:
            await context.write(messages.welcome_response(self._welcome(served.bundle, references.keep)))
            # A name of the device's own within the address that it comes from: it takes no other address's share.
            device = f"{peer}/{hello.device[:64]}"
            who = caller.get()
            if who is not None and who.name:  # proved by token or certificate: no name of its own gives it more
                device = who.key
            session = Session(self.pipeline, served, context, self.limits, device, self._gathered, references)
            log.info("stream opened", device=hello.device[:64], peer=context.peer(), version=hello.client_version[:32])
            try:
                return await session.run()
            finally:
                log.info("stream closed", device=hello.device[:64], peer=context.peer(), frames=session.frames)

    async def Infer(self, request: messages.InferRequest, context: Context) -> messages.ResultMessage:  # noqa: N802
        """One packet, one result; what is not OK becomes the call's status."""
        _remember(self._answering)
        received = self.pipeline.clock()
        served = await self._find(request.fingerprint, context)
        asked = request.frame
        left = _remaining_ms(asked.remaining_ms, context)
        frame = Frame(asked.packet, left, trace=asked.trace, width=asked.width, height=asked.height)
        with served.used():
            result = await self.pipeline.answer(served.decoder, frame, received, f"{peer_of(context)}/")
        if result.status is not Status.OK:
            if result.retry_ms:
                context.set_trailing_metadata(((PUSHBACK, str(result.retry_ms)),))
            await _abort(context, CODES[result.status], result.message)
        return messages.result_message(result, micros(self.pipeline.clock() - received))

    async def GetBundle(self, request: messages.GetBundleRequest, context: Context) -> None:  # noqa: N802
        """The edge's half of a bundle, file by file, the manifest last."""
        _remember(self._downloads)
        if self.draining.is_set():
            await _abort(context, grpc.StatusCode.UNAVAILABLE, str(_draining()))
        default = self._bundles.default
        fingerprint = request.fingerprint or (default.bundle.fingerprint if default else b"")
        served = await self._find(fingerprint, context)
        bundle = served.bundle
        try:
            with served.used():
                async for chunk in self._edge_halves.chunks(bundle, tuple(request.splits)):
                    message = messages.BundleChunk(data=chunk.data, files_left=chunk.files_left)
                    if chunk.entry is not None:
                        message.fingerprint, message.name = bundle.fingerprint, chunk.name
                        message.size, message.sha256 = chunk.entry.size, chunk.entry.sha256
                    await context.write(message)
        except OperatingPointError as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except EdgeHalfError as error:
            log.error("no edge half for a device", error=str(error))
            await _abort(context, grpc.StatusCode.INTERNAL, str(error))

    def drain(self) -> None:
        """Refuse new frames and streams; streams end once their admitted frames are answered."""
        self.pipeline.drain()
        self.draining.set()
        self._bundles.stop()

    async def answered(self) -> None:
        """Wait until no stream and no `Infer` is open, their last words included."""
        await _ended(self._answering)

    async def downloaded(self) -> None:
        """Wait until no device is fetching its half."""
        await _ended(self._downloads)

    async def _hello(self, context: Context) -> Hello:
        try:
            request = await asyncio.wait_for(context.read(), HELLO_S)
        except TimeoutError:
            await _abort(context, grpc.StatusCode.DEADLINE_EXCEEDED, f"no Hello within {HELLO_S:.0f} s")
        hello = None if request is END_OF_STREAM else messages.read_request(request)
        if not isinstance(hello, Hello):
            await _abort(
                context, grpc.StatusCode.INVALID_ARGUMENT, "a stream begins with Hello; send it before any frame"
            )
        if hello.packet_version != VERSION:
            older = "device" if hello.packet_version < VERSION else "server"
            await _abort(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the device writes packets of version {hello.packet_version}, this server reads version {VERSION}; "
                f"update headrace on the {older}",
            )
        return hello

    async def _find(self, fingerprint: bytes, context: Context) -> Served:
        found = self._bundles.find(fingerprint)
        if found is None:
            ours = ", ".join(f"{short(s.bundle.fingerprint)} ({s.bundle.name})" for s in self._bundles) or "none"
            await _abort(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                f"fingerprint mismatch: the device holds bundle {short(fingerprint)}, this server serves {ours}; "
                "fetch the device's half from this server (GetBundle), or serve the device's bundle with --bundles",
            )
        return found

    def _welcome(self, bundle: Bundle, references: int) -> Welcome:
        points = tuple(p.id for p in bundle.operating_points if p.kind is not Kind.LOCAL)
        limits, name = self.limits, bundle.name
        return Welcome(bundle.fingerprint, limits.packet_bytes, limits.in_flight, __version__, name, points, references)

    @contextmanager
    def _references(self, hello: Hello, served: Served) -> Iterator[References]:
        """Room for what is kept of a stream's frames, taken for all of them before there is one."""
        decoder = served.decoder
        keep = self.limits.references if hello.predicts and decoder.predicts and self.pipeline.keeps_references else 0
        size = keep * decoder.reference_bytes
        if not self._kept.take(size):
            keep = size = 0
        try:
            yield References(keep)
        finally:
            self._kept.give_back(size)


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
    ) -> None:
        """Nothing is read yet."""
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
        self._room = asyncio.Semaphore(limits.in_flight + REFUSALS)
        self._writing = asyncio.Lock()
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
            if self._unread.is_set():
                seconds = self._limits.unread_s
                return grpc.StatusCode.RESOURCE_EXHAUSTED, f"no result was read for {seconds:g} s; read faster"
            # Every admitted frame has its task by now. While it drains, what still comes is read and refused.
            await self._finish()
            if not reading.done():
                reading.cancel()
                await asyncio.wait({reading})
                await self._finish()
                return grpc.StatusCode.UNAVAILABLE, str(self._stopping())
            return reading.result()
        finally:
            for task in (reading, drained, unread, *self._tasks):
                task.cancel()
            await asyncio.gather(reading, drained, unread, *self._tasks, return_exceptions=True)

    async def _finish(self) -> None:
        """Wait until the frames that have come so far are answered."""
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    async def _read(self) -> tuple[grpc.StatusCode, str] | None:
        while True:
            await self._room.acquire()
            request = await self._context.read()
            received = self._pipeline.clock()
            if request is END_OF_STREAM:
                for gathering in self._gathering.values():
                    gathering.end()
                return None
            frame = messages.read_request(request)
            if isinstance(frame, Continuation):
                if frame.frame_id in self._gathering:
                    self._gathering[frame.frame_id].add(frame, received)
                self._room.release()
                continue
            if not isinstance(frame, Frame):
                return grpc.StatusCode.INVALID_ARGUMENT, "after Hello a stream carries frames, one a request"
            self.frames += 1
            entered = self._enter(frame, received)
            if isinstance(entered, Result):  # refused: that needs no task
                await self._write(entered, received)
                self._room.release()
                continue
            task = asyncio.create_task(self._answer(entered, received))
            self._tasks.add(task)
            task.add_done_callback(partial(self._done, entered))
            # The frame comes before the preparation for the next one: its task takes the first turn of the loop, the
            # thread that it hands the frame to gets the interpreter in the second.
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    def _enter(self, frame: Frame, received: float) -> Job | Gathering | Result:
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
        entered = self._enter_whole(frame, received)
        if not isinstance(entered, Result):
            self._in_flight += 1
        return entered

    def _enter_whole(self, frame: Frame, received: float) -> Job | Result:
        return self._pipeline.enter(self._served.decoder, frame, received, self._device, self._references)

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
            total_us = micros(self._pipeline.clock() - received)  # up to where it is handed to gRPC
            response = messages.result_response(result, total_us)
            try:
                async with asyncio.timeout(self._limits.unread_s):
                    await self._context.write(response)
            except TimeoutError:
                # Whoever writes results waits for this one, and reading waits for them: the stream stands still.
                self._unread.set()
                raise

    def _stopping(self) -> FrameError:
        if self._pipeline.admission.draining:
            return _draining()
        name = self._served.bundle.name
        return DrainingError(f"this version of bundle {name} is no longer served; connect again, and fetch the new one")

    def _done(self, entered: Job | Gathering, task: asyncio.Task[None]) -> None:
        if isinstance(entered, Job):
            self._pipeline.leave(entered)  # a task that is cancelled before it began has not said so
        self._tasks.discard(task)
        self._room.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("a result could not be written", error=repr(error))


def _draining() -> FrameError:
    return DrainingError("the server is draining; connect again in a moment")


def peer_of(context: Context) -> str:
    """The address of whoever calls, without its port."""
    return str(context.peer()).rpartition(":")[0]


def _remember(calls: set[asyncio.Task[Any]]) -> None:
    """Keep the running call among `calls` until gRPC is done with it."""
    task = asyncio.current_task()
    if task is not None:
        calls.add(task)
        task.add_done_callback(calls.discard)


async def _ended(calls: set[asyncio.Task[Any]]) -> None:
    while calls:
        await asyncio.wait(set(calls))


def _remaining_ms(stated: int, context: Context) -> int:
    """What remains of an Infer's deadline: what the frame states, or what gRPC knows, whichever is less; 0: none."""
    left = context.time_remaining()
    if left is None or not math.isfinite(left):
        return stated
    call = max(1, int(left * 1e3))
    return min(stated, call) if stated else call


async def _abort(context: Context, code: grpc.StatusCode, text: str) -> NoReturn:
    async with asyncio.timeout(GOODBYE_S):  # whoever does not read does not read this either
        await context.abort(code, text)
    raise AssertionError("abort returned")

"""The service on the wire: Stream, Infer and GetBundle of `headrace.proto` over grpc.aio.

A stream's frames are answered as they become ready, in any order. Each frame has a task of its own; the tasks of one
stream are bounded, and so are the results that a slow reader leaves lying: a stream that does not read is not read
from either, and no other stream notices.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import grpc
import structlog

from .. import __version__
from ..models.bitstream import VERSION
from ..models.bundle import Bundle, short
from ..models.exceptions import HeadraceError, OperatingPointError
from ..models.operating_point import Kind
from ..protos import messages
from ..protos.messages import Continuation, Frame, Hello, Result, Status, Welcome
from .decoder import PacketDecoder
from .edge_halves import EdgeHalves
from .exceptions import DrainingError, EdgeHalfError, FrameError, FullError, InvalidError
from .gathering import Gathering
from .metrics import Metrics
from .pipeline import Pipeline, micros

log = structlog.get_logger(__name__)

HELLO_S = 10.0
"""How long a new stream may take to say Hello."""

REFUSALS = 32
"""Refused frames of one stream whose results are not written yet; with more, reading pauses."""

CODES: Mapping[Status, grpc.StatusCode] = {
    Status.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Status.RESOURCE_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Status.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Status.INTERNAL: grpc.StatusCode.INTERNAL,
    Status.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
}
"""How `Infer` says what a result says by its status."""

END_OF_STREAM = grpc.aio.EOF  # type: ignore[attr-defined]

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class HeadraceService(messages.HeadraceServicer):
    """Answers calls by means of a pipeline."""

    def __init__(
        self,
        pipeline: Pipeline,
        decoders: Sequence[PacketDecoder],
        edge_halves: EdgeHalves,
        metrics: Metrics,
        *,
        max_packet_bytes: int,
        max_in_flight: int,
    ) -> None:
        """Serve the bundles of `decoders`; the first is the default of GetBundle."""
        self.pipeline = pipeline
        self.max_in_flight = max_in_flight
        self.draining = asyncio.Event()
        self._decoders = {d.bundle.fingerprint: d for d in decoders}
        self._default = decoders[0].bundle
        self._edge_halves = edge_halves
        self._metrics = metrics
        self._max_packet_bytes = max_packet_bytes
        self._answering: set[asyncio.Task[Any]] = set()
        self._downloads: set[asyncio.Task[Any]] = set()

    async def Stream(self, request_iterator: Any, context: Context) -> None:  # noqa: N802, ARG002
        """Hello, Welcome; then frames up and results down until the edge ends it or the server drains."""
        hello = await self._hello(context)
        decoder = await self._decoder(hello.fingerprint, context)
        if self.draining.is_set():
            await _abort(context, grpc.StatusCode.UNAVAILABLE, str(_draining()))
        _remember(self._answering)
        await context.write(messages.welcome_response(self._welcome(decoder.bundle)))
        log.info("stream opened", device=hello.device[:64], peer=context.peer(), version=hello.client_version[:32])
        self._metrics.streams.inc()
        session = Session(self.pipeline, decoder, context, self.max_in_flight, self._max_packet_bytes)
        try:
            reason = await session.run(self.draining)
        finally:
            self._metrics.streams.dec()
            log.info("stream closed", device=hello.device[:64], peer=context.peer(), frames=session.frames)
        if reason is not None:
            await _abort(context, *reason)

    async def Infer(self, request: messages.InferRequest, context: Context) -> messages.ResultMessage:  # noqa: N802
        """One packet, one result; what is not OK becomes the call's status."""
        _remember(self._answering)
        received = self.pipeline.clock()
        decoder = await self._decoder(request.fingerprint, context)
        asked = request.frame
        remaining_ms = _remaining_ms(asked.remaining_ms, context)
        frame = Frame(asked.packet, remaining_ms, width=asked.width, height=asked.height)
        result = await self.pipeline.answer(decoder, frame, received)
        if result.status is not Status.OK:
            await _abort(context, CODES[result.status], result.message)
        return messages.result_message(result, micros(self.pipeline.clock() - received))

    async def GetBundle(self, request: messages.GetBundleRequest, context: Context) -> None:  # noqa: N802
        """The edge's half of a bundle, file by file, the manifest last."""
        _remember(self._downloads)
        if self.draining.is_set():
            await _abort(context, grpc.StatusCode.UNAVAILABLE, str(_draining()))
        bundle = (await self._decoder(request.fingerprint or self._default.fingerprint, context)).bundle
        try:
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

    async def _decoder(self, fingerprint: bytes, context: Context) -> PacketDecoder:
        found = self._decoders.get(fingerprint)
        if found is None:
            ours = ", ".join(f"{short(f)} ({d.bundle.name})" for f, d in self._decoders.items())
            await _abort(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                f"fingerprint mismatch: the device holds bundle {short(fingerprint)}, this server serves {ours}; "
                "fetch the device's half from this server (GetBundle), or serve the device's bundle with --bundles",
            )
        return found

    def _welcome(self, bundle: Bundle) -> Welcome:
        points = tuple(p.id for p in bundle.operating_points if p.kind is not Kind.LOCAL)
        return Welcome(bundle.fingerprint, self._max_packet_bytes, self.max_in_flight, __version__, bundle.name, points)


class Session:
    """One stream after its Welcome."""

    def __init__(
        self,
        pipeline: Pipeline,
        decoder: PacketDecoder,
        context: Context,
        max_in_flight: int,
        max_packet_bytes: int,
    ) -> None:
        """Nothing is read yet."""
        self.frames = 0
        self._pipeline = pipeline
        self._decoder = decoder
        self._context = context
        self._max_in_flight = max_in_flight
        self._max_packet_bytes = max_packet_bytes
        self._in_flight = 0
        self._room = asyncio.Semaphore(max_in_flight + REFUSALS)
        self._writing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._gathering: dict[int, Gathering] = {}

    async def run(self, draining: asyncio.Event) -> tuple[grpc.StatusCode, str] | None:
        """Read frames and write results until the edge ends the stream or the server drains.

        Returns:
            None for a good end, or the status and text with which the stream has to be aborted.
        """
        reading = asyncio.create_task(self._read())
        drained = asyncio.create_task(draining.wait())
        try:
            await asyncio.wait({reading, drained}, return_when=asyncio.FIRST_COMPLETED)
            # Every admitted frame has its task by now. While a server drains, what still comes is read and refused.
            await self._finish()
            if not reading.done():
                reading.cancel()
                await asyncio.wait({reading})
                await self._finish()
                return grpc.StatusCode.UNAVAILABLE, str(_draining())
            return reading.result()
        finally:
            for task in (reading, drained, *self._tasks):
                task.cancel()
            await asyncio.gather(reading, drained, *self._tasks, return_exceptions=True)

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
            task = asyncio.create_task(self._answer(frame, received, self._gather(frame, received)))
            self._tasks.add(task)
            task.add_done_callback(self._done)
            # The frame comes before the preparation for the next one: its task takes the first turn of the loop, the
            # thread that it hands the frame to gets the interpreter in the second.
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    def _gather(self, frame: Frame, received: float) -> Gathering | FrameError | None:
        """Whoever collects the slices that follow; None for a frame that is whole. Known before more is read."""
        if self._in_flight >= self._max_in_flight:
            return FullError(
                f"{self._in_flight} frames of this stream have no result yet, which is its limit (max_in_flight)"
            )
        self._in_flight += 1
        if not frame.slices_to_come:
            return None
        try:
            gathering = Gathering(frame, received, self._max_packet_bytes, self._pipeline.clock)
        except HeadraceError as error:
            self._in_flight -= 1
            return InvalidError(str(error))
        if gathering.frame_id in self._gathering:
            self._gathering[gathering.frame_id].end()
        self._gathering[gathering.frame_id] = gathering
        return gathering

    async def _answer(self, frame: Frame, received: float, gathering: Gathering | FrameError | None) -> None:
        if isinstance(gathering, FrameError):
            await self._write(self._pipeline.refuse(frame, gathering), received)
            return
        try:
            if gathering is not None:
                frame, received = await gathering.whole()
                if self._gathering.get(gathering.frame_id) is gathering:
                    del self._gathering[gathering.frame_id]
            result = await self._pipeline.answer(self._decoder, frame, received)
        finally:
            # Before it is written: the edge may send its next frame as soon as it has the result.
            self._in_flight -= 1
        await self._write(result, received)

    async def _write(self, result: Result, received: float) -> None:
        async with self._writing:
            total_us = micros(self._pipeline.clock() - received)  # up to where it is handed to gRPC
            await self._context.write(messages.result_response(result, total_us))

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("a result could not be written", error=repr(error))


def _draining() -> FrameError:
    return DrainingError("the server is draining; connect again in a moment")


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
    await context.abort(code, text)
    raise AssertionError("abort returned")

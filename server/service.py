"""The service on the wire: Stream, Infer and GetBundle of `headrace.proto` over grpc.aio.

What happens on a stream after its greeting is in `session.py`.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc
import structlog

from .. import __version__
from ..models.bitstream import VERSION
from ..models.bundle import Bundle, short
from ..models.exceptions import OperatingPointError
from ..models.operating_point import Kind
from ..protos import messages
from ..protos.messages import Frame, Hello, Status, Welcome
from .bundles import Bundles, Served
from .edge_halves import EdgeHalves
from .exceptions import EdgeHalfError
from .gathering import Budget
from .guard import caller
from .metrics import Metrics
from .pipeline import Pipeline
from .references import References
from .session import END_OF_STREAM, Context, Session, StreamLimits, draining_error

log = structlog.get_logger(__name__)

HELLO_S = 10.0
"""How long a new stream may take to say Hello."""

GOODBYE_S = 5.0
"""How long a stream's status may take to be sent; then its place is free again."""

CODES: Mapping[Status, grpc.StatusCode] = {
    Status.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Status.RESOURCE_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Status.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Status.INTERNAL: grpc.StatusCode.INTERNAL,
    Status.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Status.MISSING_REFERENCE: grpc.StatusCode.FAILED_PRECONDITION,
}
"""How `Infer` says what a result says by its status."""

PUSHBACK = "grpc-retry-pushback-ms"
"""Metadata by which gRPC clients are told when to try again (gRFC A6)."""


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
            await _abort(context, grpc.StatusCode.UNAVAILABLE, str(draining_error()))
        _remember(self._answering)
        with served.used(), self._references(hello, served) as references:
            welcome = messages.welcome_response(self._welcome(served.bundle, references.keep))
            try:
                async with asyncio.timeout(self.limits.unread_s):
                    await context.write(welcome)
            except TimeoutError:
                return grpc.StatusCode.RESOURCE_EXHAUSTED, "Welcome was not read"
            # A name of the device's own within the address that it comes from: it takes no other address's share.
            device = f"{peer}/{hello.device[:64]}"
            who = caller.get()
            if who is not None and who.name:  # proved by token or certificate: no name of its own gives it more
                device = who.key
            session = Session(
                self.pipeline, served, context, self.limits, device, self._gathered, references, several=hello.several
            )
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
        return messages.result_message(result, messages.micros(self.pipeline.clock() - received))

    async def GetBundle(self, request: messages.GetBundleRequest, context: Context) -> None:  # noqa: N802
        """The edge's half of a bundle, file by file, the manifest last."""
        _remember(self._downloads)
        if self.draining.is_set():
            await _abort(context, grpc.StatusCode.UNAVAILABLE, str(draining_error()))
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
                    async with asyncio.timeout(self.limits.unread_s):
                        await context.write(message)
        except TimeoutError:
            text = f"nothing was read for {self.limits.unread_s:g} s; read faster"
            await _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, text)
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

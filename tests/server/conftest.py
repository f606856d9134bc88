"""A server on a free port with an engine that the test holds, and a client that speaks real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from headrace.models.bitstream import VERSION, Packet
from headrace.models.bundle import Bundle
from headrace.models.codec import Codec
from headrace.models.operating_point import OperatingPoint
from headrace.protos import messages
from headrace.protos.messages import Frame, Hello, Label, Result, TailOutput, Welcome
from headrace.server.config import SHIPPED_BUNDLE, ServerSettings
from headrace.server.daemon import Server
from headrace.server.engine import Engine, EngineResult, TailInput, TailKey

ANSWER = (TailOutput("classification", (Label(7, 0.5),)),)


class HeldEngine(Engine):
    """An engine that finishes a batch when the test opens the gate, says that it took `seconds`, and remembers what it
    was given."""

    answer = ANSWER

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.loaded = asyncio.Event()
        self.loaded.set()
        self.batches: list[tuple[TailKey, list[TailInput]]] = []
        self.began: asyncio.Queue[int] = asyncio.Queue()
        self.error: Exception | None = None
        self.seconds = 0.001
        self.bundles: list[bytes] = []

    async def start(self) -> None:
        await self.loaded.wait()

    async def load(self, bundle: Bundle) -> dict[TailKey, dict[int, float]]:
        self.bundles.append(bundle.fingerprint)
        return {}

    async def unload(self, fingerprint: bytes) -> None:
        self.bundles.remove(fingerprint)

    async def run(self, key: TailKey, inputs: Sequence[TailInput]) -> EngineResult:
        self.batches.append((key, list(inputs)))
        self.began.put_nowait(len(inputs))
        await self.gate.wait()
        if self.error:
            raise self.error
        return EngineResult([ANSWER] * len(inputs), self.seconds)

    async def close(self) -> None:
        pass


@dataclass
class Clock:
    """A clock that the test turns."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Stream:
    """The edge's end of one stream."""

    call: Any
    welcome: Welcome | None = None
    results: dict[int, Result] = field(default_factory=dict)

    async def send(self, packet: Packet | bytes, remaining_ms: int = 0) -> None:
        data = packet if isinstance(packet, bytes) else packet.to_bytes()
        await self.call.write(messages.frame_request(Frame(data, remaining_ms)))

    async def result(self) -> Result:
        response = await self.call.read()
        assert response is not grpc.aio.EOF, "the stream ended"
        result = messages.read_response(response)
        assert isinstance(result, Result)
        return result

    async def ended(self) -> tuple[grpc.StatusCode, str]:
        """Wait for the stream's end: its status and text."""
        with_results = True
        while with_results:
            try:
                with_results = await self.call.read() is not grpc.aio.EOF
            except grpc.aio.AioRpcError:
                break
        return await self.call.code(), await self.call.details()


@dataclass
class Running:
    """A running server and a channel to it."""

    server: Server
    engine: HeldEngine
    clock: Clock
    channel: grpc.aio.Channel
    bundle: Bundle

    @property
    def stub(self) -> messages.HeadraceStub:
        return messages.HeadraceStub(self.channel)

    async def stream(self, hello: Hello | None = None) -> Stream:
        stream = await self.raw_stream(messages.hello_request(hello or Hello(self.bundle.fingerprint, VERSION, "test")))
        welcome = messages.read_response(await stream.call.read())
        assert isinstance(welcome, Welcome)
        stream.welcome = welcome
        return stream

    async def raw_stream(self, *requests: messages.StreamRequest) -> Stream:
        call = self.stub.Stream()
        for request in requests:
            await call.write(request)
        return Stream(call)

    async def finished(self, stream: Stream) -> grpc.StatusCode:
        """End the stream from the edge's end; its status."""
        await stream.call.done_writing()
        assert await stream.call.read() is grpc.aio.EOF
        return await stream.call.code()

    async def waiting(self, frames: int) -> None:
        """Until the queue has that depth; there is no event for it that a client could see."""
        await self._until("headrace_server_queue_depth", frames)

    async def decoded(self, frames: int) -> None:
        """Until that many frames have been decoded by the threads that do so ahead of a batch."""
        await self._until("headrace_server_stage_duration_seconds_count", frames, {"stage": "decode"})

    async def service_has_streams(self, streams: int) -> None:
        """Until the server has that many streams."""
        await self._until("headrace_server_streams", streams)

    async def _until(self, metric: str, value: float, labels: dict[str, str] | None = None) -> None:
        async with asyncio.timeout(30):
            while self.server.metrics.registry.get_sample_value(metric, labels or {}) != value:
                await asyncio.sleep(0.002)

    def count(self, status: str) -> int:
        """Frames answered with that status."""
        value = self.server.metrics.registry.get_sample_value("headrace_server_frames_total", {"status": status})
        assert value is not None
        return int(value)

    def sums(self) -> tuple[int, int]:
        """Frames received, and frames answered over all statuses."""
        registry = self.server.metrics.registry
        answered = sum(
            sample.value
            for family in registry.collect()
            for sample in family.samples
            if sample.name == "headrace_server_frames_total"
        )
        return int(registry.get_sample_value("headrace_server_received_frames_total") or 0), int(answered)


Start = Callable[..., Awaitable[Running]]


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return Bundle.load(SHIPPED_BUNDLE)


@pytest.fixture(scope="session")
def codec(bundle: Bundle) -> Codec:
    return Codec(bundle)


def point_named(bundle: Bundle, name: str) -> OperatingPoint:
    return next(p for p in bundle.operating_points if p.name == name)


def symbols_for(bundle: Bundle, split: str, seed: int = 0) -> np.ndarray:
    """int32 [K, H, W], small and seeded."""
    return np.rint(np.random.default_rng(seed).laplace(0, 1, bundle.split(split).latent_shape)).astype(np.int32)


@pytest.fixture
def make_packet(bundle: Bundle, codec: Codec) -> Callable[..., Packet]:
    def make(frame_id: int, name: str = "blocks.3@4", seed: int = 0) -> Packet:
        point = point_named(bundle, name)
        return codec.compress_symbols(symbols_for(bundle, point.split, seed), point, frame_id)

    return make


def another_version(bundle: Bundle, folder: Path, factor: float = 1.01) -> Bundle:
    """Save the bundle with other gains, which is another fingerprint, and load it from there."""
    tensors = {name: t * np.float32(factor) if name.endswith("/gains") else t for name, t in bundle.tensors.items()}
    replace(bundle, tensors=tensors).save(folder)
    return Bundle.load(folder)


@pytest.fixture(autouse=True)
def several_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is decoded beside a batch, however many cores the tests have."""
    monkeypatch.setattr("headrace.server.dispatch.one_core", lambda: False)


@pytest.fixture
def make_engine() -> Callable[[], HeldEngine]:
    return HeldEngine


@pytest.fixture
async def start(bundle: Bundle, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts servers with given settings; all are closed in the end."""
    running: list[Running] = []

    async def start_one(**settings: Any) -> Running:
        engine, clock = HeldEngine(), Clock()
        # One decoding thread: frames are then decoded in the order in which they come. Nothing waits for company: the
        # clock stands still.
        plain = {"port": 0, "decode_threads": 1, "max_wait_ms": 0, "cache_dir": tmp_path / "cache", "drain_s": 30.0}
        admin_services = settings.pop("admin_services", [])
        server = Server(ServerSettings.load(**(plain | settings)), lambda _: engine, clock)
        server.admin_services += admin_services
        await server.start()
        channel = grpc.aio.insecure_channel(server.address)
        running.append(Running(server, engine, clock, channel, bundle))
        return running[-1]

    yield start_one
    for each in running:
        each.engine.gate.set()
        await each.channel.close()
        await each.server.close()

"""`headrace serve`: loads bundles, warms up, listens, and drains on SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined]

from ..models.bundle import Bundle, short
from ..models.exceptions import HeadraceError
from ..models.extras import how_to_install
from ..protos import event_loop, messages
from .auth import Scope, TokenFile
from .bundle_dir import BundleDir
from .bundles import Bundles
from .config import ServerSettings
from .edge_halves import EdgeHalves
from .engine import Engine, LocalEngine, Tail, TailKey
from .exceptions import StartError
from .grpc_metrics import GrpcMetrics
from .guard import Guard, Streams, refused_calls
from .listening import bracketed, make_grpc, open_port
from .metrics import Metrics, MetricsEndpoint, Probes
from .one_core import one_core, take_turns
from .pipeline import Pipeline, PipelineSettings
from .ray_engine import RayEngine, RaySettings
from .security import loopback
from .service import HeadraceService
from .session import StreamLimits
from .tracing import Tracer

log = structlog.get_logger(__name__)

SWITCH_S = 0.0001
"""How long one thread may hold Python's lock while another one wants it, in seconds. A tail takes it again after every
operator: with the default of 5 ms, an event loop that is busy refusing would let it wait that long a hundred times a
batch."""

GOODBYE_S = 1.0
"""What connections get to close in order after a drain; watchers of the health service stay until then."""

_SERVING = health_pb2.HealthCheckResponse.SERVING


class Server:
    """A whole server: gRPC, health, metrics, engine. `start`, then `drain` or `close`.

    Attributes:
        address: host:port of gRPC, once started.
        metrics_address: host:port of the HTTP endpoint, None when it is off.
        admin_address: host:port of the listener for admin calls, None when it is off.
        admin_services: what is served there beside health; each puts a service on the listener before it opens.
        metrics: the counters.
        fingerprint: of the default bundle, once started.
    """

    def __init__(
        self,
        settings: ServerSettings,
        engine: Callable[[ServerSettings], Engine] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            settings: see `ServerSettings`.
            engine: makes another engine than the one that the settings name.
            clock: seconds; by it deadlines pass and durations are measured.
        """
        self.address = ""
        self.metrics_address: str | None = None
        self.admin_address: str | None = None
        self.admin_services: list[Callable[[grpc.aio.Server], None]] = []
        self.metrics = Metrics()
        self.fingerprint = b""
        self._settings = settings
        self._clock = clock
        self._make_engine = engine or engine_of
        self._probes = Probes()
        self._endpoint: MetricsEndpoint | None = None
        self._edge_halves = EdgeHalves(settings.cache_dir)
        self._health = health_aio.HealthServicer()
        self._engine: Engine | None = None
        self._pipeline: Pipeline | None = None
        self._tracer: Tracer | None = None
        self._bundles: Bundles | None = None
        self._watching: asyncio.Task[None] | None = None
        self._service: HeadraceService | None = None
        self._grpc: grpc.aio.Server | None = None
        self._admin: grpc.aio.Server | None = None
        self._guarding: list[asyncio.Task[None]] = []
        self._beating: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load, warm up, and listen; when it returns, the first frame finds everything ready.

        Raises:
            HeadraceError: something is missing or in use; `close` has been called then.
        """
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise

    async def _start(self) -> None:
        s = self._settings
        if s.metrics_port is not None:
            self._endpoint = MetricsEndpoint(self.metrics, self._probes, s.metrics_host, s.metrics_port)
            self.metrics_address = self._endpoint.address
        self._beating = asyncio.create_task(self._beat())
        self._tracer = Tracer(clock=self._clock) if s.tracing else None
        self._engine = self._make_engine(s)
        await self._engine.start()
        self._pipeline = Pipeline(
            PipelineSettings(
                s.max_packet_bytes,
                s.queue_limit,
                s.device_queue_limit,
                s.queue_bytes,
                s.max_batch,
                s.max_wait_ms / 1e3,
                s.decode_threads,
            ),
            self._engine,
            self.metrics,
            self._clock,
            self._tracer,
        )
        self._bundles = Bundles(
            self._engine, self._pipeline, self._health, linger_s=s.linger_s, max_elements=s.max_elements
        )
        await self._load(self._bundles)
        self._service = HeadraceService(
            self._pipeline,
            self._bundles,
            self._edge_halves,
            self.metrics,
            StreamLimits(
                s.max_packet_bytes,
                s.max_in_flight,
                s.max_streams_per_peer,
                s.queue_bytes,
                s.unread_s,
                s.references,
                s.reference_bytes,
            ),
        )
        await self._listen(self._service)
        # What is loaded stays; the collector need not walk through PyTorch's modules again and again.
        gc.collect()
        gc.freeze()
        self._probes.not_ready = None

    async def _load(self, bundles: Bundles) -> None:
        for folder in self._settings.given_bundles:
            await bundles.load(folder)
        if self._settings.bundle_dir is not None:
            watched = BundleDir(self._settings.bundle_dir, bundles, [s.bundle.fingerprint for s in bundles])
            await watched.scan()
            self._watching = asyncio.create_task(watched.run())
        if bundles.default is None:
            raise StartError(
                f"no bundle in {self._settings.bundle_dir} can be served; put one there, or give --bundles"
            )
        self.fingerprint = bundles.default.bundle.fingerprint

    async def _listen(self, service: HeadraceService) -> None:
        """Open the listeners: devices', and the one for admin calls where there is one."""
        s = self._settings
        certificates = s.certificates()
        tokens = TokenFile(s.tokens) if s.tokens is not None else None
        streams, refused = Streams(s.max_streams_per_device), refused_calls(self.metrics)
        guard = Guard(tokens, Scope.DEVICE, streams, refused)
        self._grpc = make_grpc(s, [GrpcMetrics(self.metrics.registry), guard])
        messages.add_HeadraceServicer_to_server(service, self._grpc)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        if s.reflection:
            add_reflection(self._grpc)
        for name in ("", messages.SERVICE):
            await self._health.set(name, _SERVING)
        port = open_port(self._grpc, s.host, s.port, certificates, "--port")
        self._guarding = [asyncio.create_task(guard.watch())]
        if s.admin_port is not None:
            admin_guard = Guard(tokens, Scope.ADMIN, streams, refused)
            self._admin = make_grpc(s, [admin_guard])
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._admin)
            for add in self.admin_services:
                add(self._admin)
            admin_port = open_port(self._admin, s.admin_host, s.admin_port, certificates, "--admin-port")
            self._guarding.append(asyncio.create_task(admin_guard.watch()))
            await self._admin.start()
            self.admin_address = f"{bracketed(s.admin_host)}:{admin_port}"
        await self._grpc.start()
        self.address = f"{bracketed(s.host)}:{port}"
        if s.lacks() and not loopback(s.host):
            log.warning("listening to everybody, as --insecure says", address=self.address, lacking=s.lacks())

    async def drain(self) -> bool:
        """Refuse what is new, answer what was admitted, and close.

        Returns:
            Whether everything was answered within `drain_s`.
        """
        if self._pipeline is None or self._service is None:
            await self.close()
            return True
        deadline = asyncio.get_running_loop().time() + self._settings.drain_s
        self._probes.not_ready = "draining"
        if self._watching is not None:
            self._watching.cancel()
        await self._health.enter_graceful_shutdown()
        self._service.drain()
        answered = False
        try:
            async with asyncio.timeout_at(deadline):
                await self._service.answered()
                await self._pipeline.idle()
                answered = True
                await self._service.downloaded()
        except TimeoutError:
            log.warning("calls were cut off", frames=self._pipeline.admission.open, answered=answered)
        await self.close(GOODBYE_S)
        return answered

    async def close(self, grace: float = 0.0) -> None:
        """Let go of everything; calls under way are cut off after `grace` seconds."""
        gc.unfreeze()
        for task in (*self._guarding, *([] if self._watching is None else [self._watching])):
            task.cancel()
        if self._watching is not None:
            await asyncio.wait({self._watching})
        for each in (self._grpc, self._admin):
            if each is not None:
                await each.stop(grace)
        await self._edge_halves.close()
        if self._bundles is not None:
            await self._bundles.close()
        if self._pipeline is not None:
            await self._pipeline.close()
        if self._engine is not None:
            await self._engine.close()
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait({self._beating})
        if self._endpoint is not None:
            await asyncio.to_thread(self._endpoint.close)
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)

    async def _beat(self) -> None:
        while True:
            self._probes.beat()
            await asyncio.sleep(1.0)


def engine_of(settings: ServerSettings) -> Engine:
    """The engine that the settings name."""
    if settings.engine == "ray":
        return RayEngine(
            RaySettings(
                settings.ray_address,
                settings.ray_min_replicas or settings.ray_replicas,
                settings.ray_replicas,
                settings.ray_cpus,
                settings.device,
                settings.runtime,
                settings.threads,
                settings.max_batch,
                settings.decode_threads,
                settings.max_packet_bytes,
            )
        )

    def load(bundle: Bundle) -> dict[TailKey, Tail]:
        from .tail import tails_of  # imports PyTorch

        return tails_of(bundle, settings.device, settings.runtime, settings.threads)

    def set_up() -> None:
        from .tail import set_up_torch

        set_up_torch(settings.device, settings.threads)

    return LocalEngine(load, set_up, settings.max_batch, settings.device == "cpu")


def add_reflection(server: grpc.aio.Server) -> None:
    """Describe the services to whoever asks.

    Raises:
        StartError: the package for it is not installed.
    """
    try:
        from grpc_reflection.v1alpha import reflection
    except ImportError as error:
        raise StartError(f"--reflection needs grpcio-reflection; {how_to_install('server')}") from error
    reflection.enable_server_reflection((messages.SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME), server)


def run(settings: ServerSettings) -> int:
    """Serve until SIGTERM or SIGINT.

    One line of JSON on standard output says that the server answers, and where:
    `{"event":"listening","address":"127.0.0.1:50051","metrics":null,"fingerprint":"..."}`. Logs go to standard error.

    Returns:
        Exit code: 0 after a drain that answered everything, 1 when it could not start or had to give frames up.
    """
    configure_logging(settings.log_level, settings.log_format)
    sys.setswitchinterval(SWITCH_S)
    if one_core() and settings.engine == "local" and settings.device == "cpu":
        take_turns()
    # Read by OpenMP when PyTorch is loaded. Its threads otherwise spin between operators: on a machine that is shared
    # (with an edge in the demo) tails then took five times as long, and the event loop waited for a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return event_loop.run(_serve(settings))
    except HeadraceError as error:
        sys.stderr.write(f"headrace serve: {error}\n")
        return 1


async def _serve(settings: ServerSettings) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def listen_to_signals() -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, stop.set)

    listen_to_signals()
    server = Server(settings)
    starting = asyncio.create_task(server.start())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        log.info("stopped before it listened")
        starting.cancel()
        with suppress(asyncio.CancelledError):
            await starting
        return 0
    starting.result()
    # Once more: what was loaded may have put handlers of its own in their place (Ray's abort after three seconds).
    listen_to_signals()
    listening = {
        "event": "listening",
        "address": server.address,
        "metrics": server.metrics_address,
        **({"admin": server.admin_address} if server.admin_address else {}),
        "fingerprint": server.fingerprint.hex(),
    }
    sys.stdout.write(json.dumps(listening) + "\n")
    sys.stdout.flush()
    log.info("listening", address=server.address, metrics=server.metrics_address, bundle=short(server.fingerprint))
    await stopping
    log.info("draining")
    return 0 if await server.drain() else 1


def configure_logging(level: str, form: str = "text") -> None:
    """Logs on standard error: as text for people, or ("json") one object a line."""
    rendered: list[Any] = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    if form == "json":
        rendered = [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *rendered,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )

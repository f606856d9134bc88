"""Daemon: puts the edge together, runs it until its frames end or a signal comes, and ends it cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import random
import signal
import socket
import sys
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, TextIO, TypeVar

import structlog

from .. import __version__
from ..models.bitstream import VERSION
from ..models.bundle import Bundle
from ..models.edge_half import load_edge_half
from ..models.exceptions import HeadraceError
from ..models.operating_point import Kind
from ..protos import event_loop
from ..protos.messages import Hello, Welcome
from .access import Access
from .assembly import Half, frame_interval_s, make_control, make_ready, most_in_flight
from .capture import Capture, Captured
from .config import EdgeSettings
from .device import pin
from .driver import Driver
from .exceptions import FetchError, FingerprintRefusedError, SourceError, StreamError
from .fetch import Cache, fetch_edge_half
from .filtering import Filtering
from .frames import Source, open_sources
from .interfaces import Limits
from .ledger import Frame, Ledger
from .metrics import Metrics
from .on_device import Keeping
from .pipeline import Pipeline
from .render import Render
from .report import Report
from .stream import Backoff, StreamClient
from .tracing import Tracer
from .worker import Worker

log = structlog.get_logger(__name__)

LOSSLESS_PATIENCE_S = 10.0
"""With --as-fast-as-possible an answer is waited for at least this long."""

FETCH_RETRY_S = 10.0
"""Largest wait between attempts to fetch the edge half, which is dear for the server."""

T = TypeVar("T")


def run(settings: EdgeSettings) -> int:
    """Run the edge; returns the process's exit code: 0 when it ended as it should, 1 when something broke, 2 when it
    could not begin."""
    configure_logging(settings.log_level)
    try:
        if settings.emulated or settings.cpu is not None:
            log.info("keeping to one core", cpu=pin(settings.cpu))
        sources = open_sources(settings.source, settings.fps)
        code = event_loop.run(Daemon(settings, sources, sys.stdout).run())
    except HeadraceError as error:
        log.error("the edge cannot run", reason=str(error))
        return 2
    return code


def configure_logging(level: str) -> None:
    """Log lines go to standard error; standard output is for results."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=False),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


class StoppedError(Exception):
    """A signal came before the first frame."""


class Daemon:
    """One run of the edge."""

    def __init__(self, settings: EdgeSettings, sources: list[Source], out: TextIO) -> None:
        """Keep what is run and where its lines go."""
        self._settings, self._sources, self._out = settings, sources, out
        self._clock = time.monotonic
        self._metrics = Metrics()
        self._rng = random.Random()
        self._access = Access.of(settings)
        self._cache = Cache(settings.cache_dir, settings.splits)
        self._interval_s = frame_interval_s(settings, [s.fps for s in sources])
        self._control: Any = None
        self._welcome: Welcome | None = None
        self._greeted_at = 0.0
        self._render: Render | None = None

    async def run(self) -> int:
        """From start to summary; returns the exit code."""
        loop = asyncio.get_running_loop()
        self._stop, self._defect = asyncio.Event(), False
        loop.set_exception_handler(self._on_defect)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        worker = Worker(loop)
        try:
            if self._settings.metrics_port is not None:
                port = self._metrics.serve(self._settings.metrics_host, self._settings.metrics_port)
                log.info("metrics are served", address=f"{self._settings.metrics_host}:{port}")
            self._bundle = await self._or_stop(self._find_bundle())
            self._half: Half = await self._or_stop(worker.call(lambda: make_ready(self._bundle, self._settings)))
            # What is loaded by now stays; looking through it again and again would cost frames milliseconds.
            gc.collect()
            gc.freeze()
            return await self._run_frames(worker)
        except StoppedError:
            log.info("stopped before the first frame")
            return 0
        finally:
            worker.stop()

    async def _run_frames(self, worker: Worker) -> int:
        settings = self._settings
        ledger = Ledger(self._on_closed, keep_pictures=settings.render is not None)
        self._metrics.declare(self._half.points)
        self._control = make_control(self._half, settings, self._interval_s)
        filtering = self._filter = self._filtering()
        self._pipeline = Pipeline(
            self._control,
            self._half.points,
            self._limits(),
            ledger,
            local_s=self._half.local_s,
            exits_s=self._half.exits_s,
            keeping=self._keeping(),
            filtering=filtering,
        )
        self._tracer = Tracer(clock=self._clock) if settings.tracing else None
        if self._tracer is not None:
            self._pipeline.trace_of = self._tracer.ids
        self._pipeline.disconnect(self._clock())
        self._driver = Driver(self._pipeline, ledger, self._half.engine, worker, clock=self._clock)
        self._driver.on_limits = self._on_limits
        self._report = Report(self._out, self._bundle.labels, self._clock(), self._bundle.preprocessing)
        if settings.render is not None:
            fps = settings.fps or 1 / self._interval_s
            self._render = Render(settings.render, fps, self._bundle.labels, self._bundle.preprocessing)
        connection = None
        if self._half.remote:
            client = self._driver.stream = self._client()
            connection = asyncio.create_task(self._stay_connected(client, worker))
            await self._first_attempt(client, connection)
        self._report.began = self._clock()
        problem = await self._capture(connection)
        limits = self._pipeline.limits
        await self._driver.drain(limits.deadline_s + limits.grace_s + self._half.local_s)
        if connection is not None:
            connection.cancel()
            await asyncio.gather(connection, return_exceptions=True)
        self._report.summary(ledger, self._clock(), filtering.audits if filtering else None)
        if self._render is not None:
            await asyncio.to_thread(self._render.close)
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
        if problem is not None:
            log.error("the edge ends", reason=str(problem) or repr(problem))
        return 1 if problem is not None or self._defect or self._report.unread else 0

    async def _capture(self, connection: asyncio.Task[None] | None) -> Exception | None:
        """Play the sources to their end, or until a signal or a final refusal; what went wrong, if something did."""
        settings, driver, loop = self._settings, self._driver, asyncio.get_running_loop()

        def on_frame(captured: Captured) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(driver.on_frame, captured)

        def on_end(problem: SourceError | None) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(driver.on_capture_end, problem)

        stopping = asyncio.create_task(self._stop.wait())
        if not (self._stop.is_set() or (connection is not None and connection.done())):
            driver.start_capture(
                Capture(
                    self._sources,
                    fps=settings.fps,
                    on_demand=settings.as_fast_as_possible,
                    loop=settings.loop,
                    max_frames=settings.max_frames,
                    clock=self._clock,
                    on_frame=on_frame,
                    on_end=on_end,
                )
            )
        ends: set[asyncio.Future[Any]] = {driver.captured_all, stopping}
        if connection is not None:
            ends.add(connection)
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if connection is not None and connection.done() and (error := connection.exception()) is not None:
            return error if isinstance(error, Exception) else None
        return driver.captured_all.result() if driver.captured_all.done() else None

    def _client(self) -> StreamClient:
        settings = self._settings
        return StreamClient(
            settings.server,
            self._driver,
            Backoff(settings.reconnect_min_s, settings.reconnect_max_s, self._rng),
            connect_timeout_s=settings.connect_timeout_s,
            clock=self._clock,
            access=self._access,
        )

    async def _stay_connected(self, client: StreamClient, worker: Worker) -> None:
        """Keep the stream; when the server has a new bundle and ours came from it, go on with the new one.

        Raises:
            RefusedError: the server refuses this device for good.
        """
        settings = self._settings
        backoff, since = Backoff(settings.reconnect_min_s, FETCH_RETRY_S, self._rng), math.inf
        while True:
            device = settings.device_name or socket.gethostname()
            try:
                predicts = settings.predict and self._bundle.temporal_tables() is not None
                await client.run(Hello(self._bundle.fingerprint, VERSION, device, __version__, predicts, several=True))
            except FingerprintRefusedError as error:
                if settings.bundle is not None:
                    raise
                log.warning("the server has another bundle; fetching it", reason=str(error))
                before, self._bundle = self._bundle, await self._fetch(self._bundle)
                if self._bundle is before:
                    # It gives what it then refuses. Behind one address may stand several servers, not all of them
                    # brought up to date yet.
                    since = min(since, self._clock()) if self._greeted_at < since else self._clock()
                    if self._clock() - since >= settings.update_patience_s:
                        raise
                    await asyncio.sleep(backoff.next_s())
                    continue
                since = math.inf
                backoff.reset()
                self._half = await worker.call(lambda: make_ready(self._bundle, settings))
                self._control = make_control(self._half, settings, self._interval_s)
                half = self._half
                self._driver.use(half.engine, self._control, half.points, half.local_s, half.exits_s)
                self._pipeline.limits = replace(self._pipeline.limits, say_size="detection" in self._bundle.task)
                if self._filter is not None and self._bundle.filter is not None:
                    self._filter.watch(self._bundle.filter.classes)
                self._report.labels = self._bundle.labels
                self._report.preprocessing = self._bundle.preprocessing
                if self._render is not None:
                    self._render.labels, self._render.preprocessing = self._bundle.labels, self._bundle.preprocessing
                self._welcome = None

    async def _first_attempt(self, client: StreamClient, connection: asyncio.Task[None]) -> None:
        """Let the first attempt to connect succeed or fail before frames are captured."""
        waits = {asyncio.create_task(client.attempted.wait()), asyncio.create_task(self._stop.wait())}
        ends: set[asyncio.Future[Any]] = {connection, *waits}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for each in waits:
            each.cancel()

    async def _find_bundle(self) -> Bundle:
        """The edge half: as given, from the cache, or from the server, however long that takes."""
        if self._settings.bundle is not None:
            return await asyncio.to_thread(load_edge_half, self._settings.bundle, self._settings.splits)
        cached = await asyncio.to_thread(self._cache.last_from, self._settings.server)
        return cached or await self._fetch()

    async def _fetch(self, held: Bundle | None = None) -> Bundle:
        """The server's edge half; `held` itself, if it is that one."""
        backoff = Backoff(self._settings.reconnect_min_s, FETCH_RETRY_S, self._rng)
        while True:
            try:
                return await fetch_edge_half(self._settings.server, self._cache, access=self._access, held=held)
            except (StreamError, FetchError) as error:
                wait_s = backoff.next_s()
                log.warning("no edge half yet", reason=str(error), next_try_s=round(wait_s, 2))
                await asyncio.sleep(wait_s)

    async def _or_stop(self, work: Coroutine[Any, Any, T]) -> T:
        """The work's result, unless a signal comes first."""
        task, stopping = asyncio.ensure_future(work), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                task.cancel()
                raise StoppedError
            return task.result()
        finally:
            stopping.cancel()

    def _keeping(self) -> Keeping | None:
        """What keeps frames on the device of which an exit is sure, if the settings ask for it."""
        if self._settings.exit_confidence is None:
            return None
        return Keeping(self._settings.exit_confidence, self._settings.keep_alive_s)

    def _filtering(self) -> Filtering | None:
        settings, spec = self._settings, self._bundle.filter
        if not settings.filter or spec is None:
            return None
        return Filtering(
            spec.classes, audit_share=settings.audit_share, keep_alive_s=settings.keep_alive_s, rng=self._rng
        )

    def _limits(self) -> Limits:
        settings = self._settings
        patience = LOSSLESS_PATIENCE_S if settings.as_fast_as_possible else 0.0
        return Limits(
            deadline_s=settings.deadline_ms / 1000,
            grace_s=max(settings.grace_ms / 1000, patience),
            stall_s=max(settings.stall_s, patience),
            max_in_flight=most_in_flight(settings),
            most_waiting=1 if settings.as_fast_as_possible else self._control.most_waiting,
            lossless=settings.as_fast_as_possible,
            cut_short=settings.cut_short,
            fallback=settings.fallback,
            say_size="detection" in self._bundle.task,
        )

    def _on_limits(self, welcome: Welcome) -> None:
        """Choose only what this server decodes; another server may stand behind the same address after a restart."""
        before = self._welcome.operating_points if self._welcome is not None else ()
        self._welcome, self._greeted_at = welcome, self._clock()
        self._metrics.connected.set(1)
        offered = {p.id for p in self._half.points if p.kind is not Kind.LOCAL}
        if before != welcome.operating_points and not offered <= set(welcome.operating_points):
            self._control = make_control(self._half, self._settings, self._interval_s, welcome.operating_points)
            self._pipeline.use(self._control, self._half.points, self._half.local_s, self._half.exits_s)

    def _on_defect(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:  # noqa: ARG002
        """Something in the event loop failed that should not: say so and end, rather than go on with wrong sums."""
        log.error("defect in the edge", message=context.get("message"), exc_info=context.get("exception"))
        self._defect = True
        self._stop.set()

    def _on_closed(self, frame: Frame) -> None:
        """A frame has its outcome: tell everyone."""
        pipeline, now = self._pipeline, self._clock()
        rate = self._control.rate_bps(now) if pipeline.connected else None
        if self._tracer is not None:
            self._tracer.closed(frame, now)
        self._metrics.count(frame)
        self._metrics.sent_bytes.inc(frame.sent_bytes)
        self._metrics.connected.set(pipeline.connected)
        self._metrics.rate.set(rate if rate is not None and math.isfinite(rate) else math.nan)
        self._report.frame(
            frame,
            deadline_s=pipeline.limits.deadline_s,
            in_flight=pipeline.in_flight,
            rate_bps=rate,
            connected=pipeline.connected,
        )
        if self._render is not None:
            self._render.frame(frame)
        if self._report.unread and not self._stop.is_set():
            log.error("nobody reads the results any more")
            self._stop.set()

"""Driver: does what the pipeline says. Everything here runs in the event loop's thread, without awaiting anything.

    capture thread --frame--> pipeline --work--> compute thread
                                 |  ^ \\
                          packet |  | result
                                 v  |
                                stream
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import structlog

from ..models.exceptions import HeadraceError
from ..models.operating_point import OperatingPoint
from ..protos.messages import Continuation, Result, Welcome
from .capture import Capture, Captured
from .engine import Encoded, Engine, LocalAnswer
from .exceptions import AbandonedError, SourceError
from .head import Abandon
from .interfaces import Control, Outgoing, Work
from .ledger import STOPPED, Frame, Ledger
from .pipeline import Pipeline
from .stream import StreamClient
from .worker import Worker

log = structlog.get_logger(__name__)


class Driver:
    """Carries events to the pipeline and its wishes to threads, stream and timer."""

    def __init__(
        self, pipeline: Pipeline, ledger: Ledger, engine: Engine, worker: Worker, *, clock: Callable[[], float]
    ) -> None:
        """Nothing moves before `start_capture`; a stream is given by setting `stream`."""
        self.pipeline, self._ledger, self._engine, self._worker, self._clock = pipeline, ledger, engine, worker, clock
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None
        self._due = 0.0
        self._capture: Capture | None = None
        self._requested = False
        self._abandon: Abandon | None = None
        self.stream: StreamClient | None = None
        self.on_limits: Callable[[Welcome], None] = lambda _: None
        """Told of each greeting before the pipeline is: which operating points does this server take?"""
        self.captured_all: asyncio.Future[SourceError | None] = self._loop.create_future()
        self._idle = asyncio.Event()

    # Capture.

    def start_capture(self, capture: Capture) -> None:
        """Begin to capture; frames and the end come in through `from_capture_thread`."""
        self._capture = capture
        capture.start()
        self._pump()

    def on_frame(self, captured: Captured) -> None:
        """A frame was captured."""
        self._requested = False
        if self.captured_all.done():
            return
        if isinstance(captured.picture, SourceError):
            self.pipeline.captured(None, captured.at, str(captured.picture))
        else:
            self.pipeline.captured(captured.picture, captured.at)
        self._pump()

    def on_capture_end(self, problem: SourceError | None) -> None:
        """There are no more frames."""
        if not self.captured_all.done():
            self.captured_all.set_result(problem)
        self._pump()

    async def drain(self, timeout_s: float) -> None:
        """Capture nothing more, wait for what is on its way, then close what is still open."""
        if self._capture is not None:
            self._capture.stop()
        self.on_capture_end(None)
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("some frames got no answer before the end", frames=self._ledger.open)
        if self._timer is not None:
            self._timer.cancel()
        self.pipeline.finish()

    # Compute.

    def _compute(self, work: Work) -> None:
        frame, engine = work.frame, self._engine
        picture, pixels, point = frame.picture, frame.pixels, frame.point
        if work.again is not None:
            self._worker.submit(work.again, lambda r, e: self._on_computed(frame, r, e))
        elif work.reserve is not None:
            self._worker.submit(
                lambda: engine.answer(picture, pixels, work.reserve),
                lambda r, e: self._on_computed(frame, r, e, in_reserve=True),
            )
        elif work.local:
            self._worker.submit(
                lambda: engine.answer(picture, pixels, point), lambda r, e: self._on_computed(frame, r, e)
            )
        elif picture is not None and point is not None:
            abandon = self._abandon = Abandon()
            self._worker.submit(
                lambda: engine.encode(
                    picture,
                    point,
                    frame.id,
                    abandon,
                    filtered=work.filtered,
                    earlier=work.earlier,
                    sure=work.sure,
                ),
                lambda r, e: self._on_computed(frame, r, e),
            )

    def _on_computed(
        self,
        frame: Frame,
        result: Encoded | LocalAnswer | None,
        error: Exception | None,
        *,
        in_reserve: bool = False,
    ) -> None:
        if isinstance(result, Encoded):
            self.pipeline.encoded(frame, result, self._clock())
            if self.stream is not None and self.pipeline.has_packets:
                self.stream.wake()
                self._loop.call_soon(self._pump)  # after the packet is written: it has waited for longest
                return
        elif isinstance(result, LocalAnswer) and in_reserve:
            self.pipeline.reserved(frame, result, self._clock())
        elif isinstance(result, LocalAnswer):
            self.pipeline.answered_locally(frame, result, self._clock())
        elif isinstance(error, AbandonedError):
            self.pipeline.abandoned(frame, self._clock())
        else:
            if not isinstance(error, HeadraceError):
                log.error("computing a frame failed", frame=frame.id, exc_info=error)
            self.pipeline.compute_failed(frame, str(error) if isinstance(error, HeadraceError) else repr(error))
        self._pump()

    def use(
        self,
        engine: Engine,
        control: Control,
        points: Sequence[OperatingPoint],
        local_s: float,
        exits_s: Mapping[str, float] = {},
    ) -> None:
        """Go on with another bundle; called while there is no stream."""
        self._engine = engine
        self.pipeline.forget_packets()
        self.pipeline.use(control, points, local_s, exits_s)
        self.pipeline.disconnect(self._clock())

    # Stream: what `StreamClient` calls.

    def on_welcome(self, welcome: Welcome, round_trip_s: float) -> None:
        """The stream is up."""
        self.on_limits(welcome)
        self.pipeline.connect(
            self._clock(),
            max_in_flight=welcome.max_in_flight,
            max_packet_bytes=welcome.max_packet_bytes,
            round_trip_s=round_trip_s,
            references=welcome.references,
        )
        log.info(
            "stream is up",
            server_version=welcome.server_version,
            bundle=welcome.bundle,
            predicts=welcome.references > 0,
        )
        self._pump()

    def on_result(self, result: Result) -> None:
        """A frame was answered."""
        self.pipeline.answered(result, self._clock())
        self._pump()

    def on_broken(self, reason: str) -> None:
        """The stream is down."""
        tell = log.info if reason == STOPPED else log.warning
        tell("stream is down", reason=reason, in_flight=self.pipeline.in_flight)
        if self._abandon is not None and not self.pipeline.limits.lossless:
            self._abandon.set()  # the device has better things to do than a packet that cannot be sent
        self.pipeline.disconnect(self._clock())
        self._pump()

    def next_to_write(self) -> Outgoing | Continuation | None:
        """The stream can take something."""
        outgoing = self.pipeline.next_to_write(self._clock())
        self._loop.call_soon(self._pump)  # after it is written: its timer, and what became of frames too old for it
        return outgoing

    # After every event.

    def _pump(self) -> None:
        """See what the pipeline wants now."""
        work = self.pipeline.take_up(self._clock())
        if work is not None:
            self._compute(work)
        if self.stream is not None and self.pipeline.has_packets:
            self.stream.wake()
        capturing = self._capture is not None and not self.captured_all.done()
        if self._capture is not None and capturing and not self._requested and self.pipeline.wants_frame:
            self._requested = True
            self._capture.request()
        self._arm_timer()
        if self._ledger.open == 0 and self.captured_all.done():
            self._idle.set()

    def _arm_timer(self) -> None:
        due = self.pipeline.next_timer()
        if self._timer is not None:
            if due is not None and not self._timer.cancelled() and self._due <= due:
                return  # it looks again when it fires
            self._timer.cancel()
            self._timer = None
        if due is not None:
            # Kept here: what uvloop gives for a moment that has come already does not know its time.
            self._due = due
            self._timer = self._loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = self._clock()
        self.pipeline.tick(now)
        stalls_at = self.pipeline.stalls_at()
        if stalls_at is not None and now >= stalls_at and self.stream is not None:
            self.stream.give_up_connection(f"no answer for {self.pipeline.limits.stall_s:g} s")
        self._pump()

"""Spans of OpenTelemetry for a frame on the device, from capture to answer, made once its outcome is known.

Trace and span ids follow from the frame's id and a run's random number, so that nothing has to be remembered while the
frame is on its way; they are sent with the packet, and the server's spans are children of the frame's.

    frame ──► wait, prepare, compute, compress, link        server (on the server) ──► queue, decode, tail
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

from ..models.extras import how_to_install
from .exceptions import EdgeError
from .ledger import ON_TIME, Frame

STAGES = ("wait", "prepare", "compute", "compress", "again")
"""On the device, one after the other; what the link took is what is left of the time to the answer."""


class Tracer:
    """Makes a frame's spans on the device."""

    def __init__(self, provider: Any = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Take a provider, or one that sends by OTLP to where OTEL_EXPORTER_OTLP_ENDPOINT says.

        Raises:
            EdgeError: OpenTelemetry is not installed.
        """
        try:
            from opentelemetry import trace
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
        except ImportError as error:
            raise EdgeError(f"--tracing needs OpenTelemetry; {how_to_install('tracing')}") from error

        class Ids(RandomIdGenerator):
            """The ids that a frame was sent with, for its first span; others at random."""

            next_span: int | None = None
            next_trace: int | None = None

            def generate_span_id(self) -> int:
                given, self.next_span = self.next_span, None
                return given or super().generate_span_id()

            def generate_trace_id(self) -> int:
                given, self.next_trace = self.next_trace, None
                return given or super().generate_trace_id()

        self._ids = Ids()
        self._run = secrets.token_bytes(20)
        self._clock, self._trace = clock, trace
        if provider is None:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            provider = TracerProvider(resource=Resource.create({"service.name": "headrace-edge"}))
            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        provider.id_generator = self._ids
        self._provider = provider
        self._tracer = provider.get_tracer("headrace.edge")

    def ids(self, frame_id: int) -> bytes:
        """Trace id (16 bytes) and span id (8) of a frame, as they are sent."""
        number = frame_id.to_bytes(4, "big")
        return self._run[:12] + number + self._run[12:16] + number[::-1]

    def closed(self, frame: Frame, now: float) -> None:
        """Make the spans of a frame that has its outcome."""
        offset = time.time() - self._clock()
        ids = self.ids(frame.id)
        self._ids.next_trace, self._ids.next_span = int.from_bytes(ids[:16], "big"), int.from_bytes(ids[16:], "big")
        begun = frame.captured_at
        span = self._tracer.start_span(
            "frame", self._trace.set_span_in_context(self._trace.INVALID_SPAN), **_at(begun + offset)
        )
        span.set_attribute("headrace.frame", frame.id)
        span.set_attribute("headrace.outcome", str(frame.outcome))
        span.set_attribute("headrace.bytes", frame.sent_bytes)
        if frame.point is not None:
            span.set_attribute("headrace.point", frame.point.name)
        within = self._trace.set_span_in_context(span)
        for name in STAGES:
            if name in frame.timings:
                self._stage(name, within, begun + offset, frame.timings[name])
                begun += frame.timings[name]
        if frame.written_at is not None and "server" in frame.timings:
            self._stage(
                "link and server", within, frame.written_at + offset, frame.timings["link"] + frame.timings["server"]
            )
        if frame.outcome not in ON_TIME:
            span.set_status(self._trace.StatusCode.ERROR, frame.reason)
        span.end(int((now + offset) * 1e9))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _stage(self, name: str, within: Any, start: float, seconds: float) -> None:
        self._tracer.start_span(name, within, **_at(start)).end(int((start + seconds) * 1e9))


def _at(seconds: float) -> dict[str, int]:
    return {"start_time": int(seconds * 1e9)}

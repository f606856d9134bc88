"""Spans of OpenTelemetry, made once a frame is answered: nothing of it is on the frame's way.

The device begins a frame's trace and sends its ids with the packet; the server's spans are children of the device's. No
wall clock crosses the wire: each side stamps its spans by its own.

    frame (device) ──► server ──► queue, decode, tail
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..models.extras import how_to_install
from .exceptions import StartError

TRACE_BYTES = 24
"""Trace id (16 bytes) and span id (8)."""


@dataclass(frozen=True, slots=True)
class Stages:
    """When a frame was received, how long it was decoded, when its batch began and how long that took, and when it was
    answered; seconds of the server's clock."""

    received: float
    decode_s: float
    batch_began: float
    batch_s: float
    answered: float


class Tracer:
    """Makes a frame's spans on the server."""

    def __init__(self, provider: Any = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Take the provider that the environment configures (OTEL_EXPORTER_OTLP_ENDPOINT and the like), or another.

        Raises:
            StartError: OpenTelemetry is not installed.
        """
        try:
            from opentelemetry import trace
        except ImportError as error:
            raise StartError(f"--tracing needs OpenTelemetry; {how_to_install('tracing')}") from error
        self._trace = trace
        self._provider = provider or configured_provider("headrace-server")
        self._tracer = self._provider.get_tracer("headrace.server")
        self._clock = clock

    def answered(self, ids: bytes, stages: Stages) -> None:
        """Make the spans of a frame that was answered; ids of a wrong length are the device's mistake and ignored."""
        if len(ids) != TRACE_BYTES or not any(ids[:16]) or not any(ids[16:]):
            return
        # From the server's clock to the wall clock's nanoseconds, for this side alone.
        offset = time.time() - self._clock()

        def stamp(seconds: float) -> int:
            return int((seconds + offset) * 1e9)

        parent = self._trace.SpanContext(
            int.from_bytes(ids[:16], "big"),
            int.from_bytes(ids[16:], "big"),
            is_remote=True,
            trace_flags=self._trace.TraceFlags(self._trace.TraceFlags.SAMPLED),
        )
        context = self._trace.set_span_in_context(self._trace.NonRecordingSpan(parent))
        span = self._tracer.start_span(
            "server", context, kind=self._trace.SpanKind.SERVER, start_time=stamp(stages.received)
        )
        within = self._trace.set_span_in_context(span)
        began, decode_s = stages.batch_began, stages.decode_s
        for name, start, end in (
            ("queue", stages.received, began),
            ("decode", began - decode_s, began),
            ("tail", began, began + stages.batch_s),
        ):
            self._tracer.start_span(name, within, start_time=stamp(start)).end(stamp(end))
        span.end(stamp(stages.answered))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def configured_provider(service: str) -> Any:
    """A provider that sends by OTLP to where OTEL_EXPORTER_OTLP_ENDPOINT says."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider

"""A frame's spans on the device, and the server's among them."""

from __future__ import annotations

import pytest
from headrace.edge.ledger import Frame, Outcome
from headrace.edge.tracing import Tracer
from headrace.server.tracing import Stages
from headrace.server.tracing import Tracer as ServerTracer

pytest.importorskip("opentelemetry.sdk", reason="the extra `tracing` is not installed")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    made = TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(exporter))
    return made


def test_a_frame_is_one_trace_from_capture_to_result() -> None:
    exporter = InMemorySpanExporter()
    tracer = Tracer(provider(exporter), lambda: 10.1)
    server = ServerTracer(provider(exporter), lambda: 500.0)
    timings = {"wait": 0.001, "prepare": 0.002, "compute": 0.020, "compress": 0.003, "link": 0.030, "server": 0.012}
    for number in (7, 8):
        server.answered(tracer.ids(number), Stages(500.0, 0.002, 500.004, 0.008, 500.012))
        frame = Frame(number, 10.0, 10.25, written_at=10.026, timings=timings, outcome=Outcome.OK)
        tracer.closed(frame, 10.068)
    spans = exporter.get_finished_spans()
    assert len({s.context.trace_id for s in spans}) == 2
    of = {s.name: s for s in spans if s.context.trace_id == int.from_bytes(tracer.ids(7)[:16], "big")}
    assert set(of) == {
        "frame", "wait", "prepare", "compute", "compress", "link and server", "server", "queue", "decode", "tail",
    }  # fmt: skip
    root = of["frame"]
    assert root.parent is None and root.context.span_id == int.from_bytes(tracer.ids(7)[16:], "big")
    took = {name: (s.end_time - s.start_time) / 1e6 for name, s in of.items()}
    assert took["frame"] == pytest.approx(68, abs=0.01)
    assert took["compute"] == pytest.approx(20, abs=0.01) and took["link and server"] == pytest.approx(42, abs=0.01)
    assert of["compute"].start_time - root.start_time == pytest.approx(3e6, abs=1e4)
    for name in ("wait", "link and server", "server"):
        assert of[name].parent.span_id == root.context.span_id
    assert of["tail"].parent.span_id == of["server"].context.span_id


def test_ids_are_of_one_run_and_one_frame() -> None:
    one, other = (Tracer(TracerProvider()) for _ in range(2))
    ids = {tracer.ids(number) for tracer in (one, other) for number in range(100)}
    assert len(ids) == 200 and {len(each) for each in ids} == {24}


def test_a_frame_that_missed_its_deadline_says_why() -> None:
    exporter = InMemorySpanExporter()
    Tracer(provider(exporter), lambda: 1.0).closed(
        Frame(1, 0.5, 0.75, outcome=Outcome.DROPPED, reason="it would have come too late"), 0.9
    )
    (span,) = exporter.get_finished_spans()
    assert span.attributes["headrace.outcome"] == "dropped"
    assert not span.status.is_ok and span.status.description == "it would have come too late"

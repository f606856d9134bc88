"""What operators see: calls counted, services described, logs as JSON, spans; and limits of streams."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import structlog
from headrace.models.bitstream import VERSION, Packet
from headrace.models.bundle import Bundle
from headrace.protos import messages
from headrace.protos.messages import SERVICE, Continuation, Frame, Hello, Status
from headrace.server.daemon import configure_logging
from headrace.server.exceptions import Reason
from headrace.server.gathering import Budget, Gathering
from headrace.server.metrics import Metrics
from headrace.server.tracing import Stages, Tracer

MakePacket = Callable[..., Packet]


def handled(server: Any, method: str, code: str, kind: str) -> float:
    labels = {"grpc_service": SERVICE, "grpc_method": method, "grpc_code": code, "grpc_type": kind}
    return server.server.metrics.registry.get_sample_value("grpc_server_handled_total", labels) or 0


async def test_calls_are_counted_by_method_and_code(start: Any, make_packet: MakePacket, bundle: Bundle) -> None:
    server = await start()
    stream = await server.stream()
    assert await server.finished(stream) is grpc.StatusCode.OK
    await server.stub.Infer(messages.infer_request(bundle.fingerprint, Frame(make_packet(1).to_bytes())))
    with pytest.raises(grpc.aio.AioRpcError):
        await server.stub.Infer(messages.infer_request(bytes(32), Frame(b"")))
    unknown = server.channel.unary_unary("/headrace.v1.Headrace/Nothing")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await unknown(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    gone = await server.stream()
    server.engine.gate.clear()
    await gone.send(make_packet(2))
    await server.engine.began.get()  # that of the call before
    await server.engine.began.get()
    # A cancelled stream ends for its reader too, as one does that was ended well, and whichever the handler hears of
    # first decides its code; with a frame under way it waits, and hears of both.
    gone.call.cancel()
    async with asyncio.timeout(30):
        while not handled(server, "Stream", "CANCELLED", "bidi_stream"):
            await asyncio.sleep(0.005)
    assert handled(server, "Stream", "OK", "bidi_stream") == 1
    assert handled(server, "Infer", "OK", "unary") == 1
    assert handled(server, "Infer", "FAILED_PRECONDITION", "unary") == 1
    registry = server.server.metrics.registry
    methods = {s.labels["grpc_method"] for f in registry.collect() for s in f.samples if "grpc_method" in s.labels}
    assert methods == {"Stream", "Infer"}, "what does not exist has no label"


async def test_refusals_are_counted_by_reason(start: Any, make_packet: MakePacket) -> None:
    server = await start(max_in_flight=1, queue_limit=1)
    stream, other = await server.stream(), await server.stream()
    server.engine.gate.clear()
    await stream.send(make_packet(1))
    await server.engine.began.get()
    await stream.send(make_packet(2))
    refused = await stream.result()
    assert refused.status is Status.RESOURCE_EXHAUSTED and refused.retry_ms >= 1
    await other.send(b"broken")
    await other.result()
    server.engine.gate.set()
    await stream.result()
    value = server.server.metrics.registry.get_sample_value
    counted = {reason: value("headrace_server_rejected_total", {"reason": reason}) for reason in Reason}
    assert counted == dict.fromkeys(Reason, 0.0) | {Reason.IN_FLIGHT: 1.0, Reason.INVALID: 1.0}


async def test_infer_is_told_when_to_come_again(start: Any, make_packet: MakePacket, bundle: Bundle) -> None:
    server = await start(queue_limit=1)
    server.engine.gate.clear()
    stream = await server.stream()
    await stream.send(make_packet(1))
    await server.engine.began.get()
    await stream.send(make_packet(2))
    await server.waiting(1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.stub.Infer(messages.infer_request(bundle.fingerprint, Frame(make_packet(3).to_bytes())))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    metadata = dict(caught.value.trailing_metadata())
    assert int(metadata["grpc-retry-pushback-ms"]) >= 1
    server.engine.gate.set()


async def test_a_peer_has_so_many_streams_and_its_devices_share_fairly(start: Any, make_packet: MakePacket) -> None:
    server = await start(max_streams_per_peer=2)
    one, two = await server.stream(), await server.stream()
    third = await server.raw_stream()
    code, text = await third.ended()
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "max_streams_per_peer" in text
    assert await server.finished(two) is grpc.StatusCode.OK
    await server.service_has_streams(1)
    again = await server.stream()
    for stream in (one, again):
        await stream.send(make_packet(1))
        assert (await stream.result()).status is Status.OK


async def test_a_device_has_so_many_frames_in_the_queue_over_all_its_streams(
    start: Any, make_packet: MakePacket, bundle: Bundle
) -> None:
    server = await start(device_queue_limit=2)
    named = Hello(bundle.fingerprint, VERSION, "one")
    streams = [await server.stream(named) for _ in range(3)]
    other = await server.stream(Hello(bundle.fingerprint, VERSION, "other"))
    server.engine.gate.clear()
    await streams[0].send(make_packet(1))
    await server.engine.began.get()
    for i in (0, 1):
        await streams[i].send(make_packet(10 + i))
    await server.waiting(2)
    await streams[2].send(make_packet(12))
    refused = await streams[2].result()
    assert refused.status is Status.RESOURCE_EXHAUSTED and "of this device" in refused.message
    await other.send(make_packet(20))
    await server.waiting(3)
    server.engine.gate.set()
    assert (await other.result()).status is Status.OK


async def test_calls_over_all_peers_are_bounded(start: Any, make_packet: MakePacket) -> None:
    server = await start(max_streams=2)
    one, _ = await server.stream(), await server.stream()
    third = await server.raw_stream()
    assert (await third.ended())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    await one.send(make_packet(1))
    assert (await one.result()).status is Status.OK


async def test_slices_that_gather_are_bounded_over_all_frames(make_packet: MakePacket) -> None:
    whole, budget = make_packet(1), Budget(len(make_packet(1).slices[1]))
    frames = [Gathering(Frame(whole.prefix(1).to_bytes(), 9000, 3), 0.0, 2**20, lambda: 0.0, budget) for _ in range(2)]
    for frame in frames:
        frame.add(Continuation(1, whole.slices[1], zlib.crc32(whole.slices[1])), 0.0)
    frames[0].end()
    found = [Packet.from_bytes((await frame.whole())[0].packet).slices for frame in frames]
    assert [len(slices) for slices in found] == [2, 1], "the second is answered from what it has"
    assert budget.take(len(whole.slices[1])), "and what was taken is free again"


async def test_services_are_described_only_when_asked_for(start: Any) -> None:
    reflection = pytest.importorskip("grpc_reflection.v1alpha.reflection_pb2")
    from grpc_reflection.v1alpha import reflection_pb2_grpc

    async def services(server: Any) -> set[str]:
        stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        call = stub.ServerReflectionInfo(iter([reflection.ServerReflectionRequest(list_services="")]))
        async for answer in call:
            return {s.name for s in answer.list_services_response.service}
        return set()

    assert await services(await start(reflection=True)) >= {SERVICE, "grpc.health.v1.Health"}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await services(await start())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_logs_can_be_one_json_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    before = structlog.get_config()
    try:
        configure_logging("info", "json")
        log = structlog.get_logger("test").bind(device="cam")
        log.info("stream opened", frames=3)
        try:
            raise ValueError("why")
        except ValueError:
            log.exception("a frame failed")
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    finally:
        structlog.configure(**before)
    assert (lines[0]["event"], lines[0]["device"], lines[0]["frames"], lines[0]["level"]) == (
        "stream opened",
        "cam",
        3,
        "info",
    )
    assert "ValueError" in json.dumps(lines[1]["exception"]) and len(lines) == 2


def test_labels_are_bounded() -> None:
    samples = [s for f in Metrics().registry.collect() for s in f.samples]
    assert len(samples) < 120
    assert {name for s in samples for name in s.labels} <= {"status", "reason", "stage", "le"}


async def test_a_traced_frame_has_spans_from_the_devices_on(start: Any, make_packet: MakePacket) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="the extra `tracing` is not installed")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    server = await start()
    server.server._pipeline._tracer = Tracer(provider, server.clock)
    stream = await server.stream()
    ids = bytes(range(1, 25))
    for trace in (b"", b"short", bytes(24), ids):
        await stream.call.write(messages.frame_request(Frame(make_packet(1).to_bytes(), trace=trace)))
        assert (await stream.result()).status is Status.OK
    spans = {s.name: s for s in exporter.get_finished_spans()}
    assert set(spans) == {"server", "queue", "decode", "tail"}, "of the one frame with whole ids"
    assert {s.context.trace_id for s in spans.values()} == {int.from_bytes(ids[:16], "big")}
    assert spans["server"].parent.span_id == int.from_bytes(ids[16:], "big")
    for name in ("queue", "decode", "tail"):
        assert spans[name].parent.span_id == spans["server"].context.span_id


def test_spans_say_how_long_each_stage_took() -> None:
    pytest.importorskip("opentelemetry.sdk", reason="the extra `tracing` is not installed")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    Tracer(provider, lambda: 11.0).answered(bytes(range(24)), Stages(10.0, 0.002, 10.030, 0.020, 10.051))
    took = {s.name: (s.end_time - s.start_time) / 1e6 for s in exporter.get_finished_spans()}
    assert took == pytest.approx({"queue": 30, "decode": 2, "tail": 20, "server": 51}, abs=0.01)

"""Draining, probes and metrics: nothing admitted is lost, and the sums add up."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace.models.bitstream import VERSION, Packet
from headrace.models.bundle import Bundle
from headrace.protos import messages
from headrace.protos.messages import SERVICE, Frame, Status
from headrace.server.config import ServerSettings
from headrace.server.daemon import Server
from headrace.server.metrics import ALIVE_S, Metrics, Probes

MakePacket = Callable[..., Packet]
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def get(address: str, path: str) -> tuple[int, str]:
    def fetch() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(fetch)


async def test_a_drain_answers_every_admitted_frame_and_refuses_the_rest(
    start: Any, make_packet: MakePacket, bundle: Bundle
) -> None:
    server = await start(max_batch=2, metrics_port=0)
    one, other, idle = [await server.stream() for _ in range(3)]
    health = health_pb2_grpc.HealthStub(server.channel)
    for name in ("", SERVICE):
        assert (await health.Check(health_pb2.HealthCheckRequest(service=name))).status == SERVING
    server.engine.gate.clear()
    infer = server.stub.Infer(messages.infer_request(bundle.fingerprint, Frame(make_packet(50).to_bytes())))
    await server.engine.began.get()
    for frame_id in range(5):
        await one.send(make_packet(frame_id))
        await other.send(make_packet(100 + frame_id, "blocks.5@2"))
    await server.waiting(10)

    draining = asyncio.create_task(server.server.drain())
    assert (await idle.ended())[0] is grpc.StatusCode.UNAVAILABLE  # a stream without frames ends at once
    assert await get(server.server.metrics_address, "/readyz") == (503, "draining\n")
    assert (await get(server.server.metrics_address, "/livez"))[0] == 200
    for name in ("", SERVICE):
        assert (await health.Check(health_pb2.HealthCheckRequest(service=name))).status == NOT_SERVING
    await one.send(make_packet(6))
    refused = await one.result()
    assert (refused.frame_id, refused.status) == (6, Status.UNAVAILABLE)
    late = await server.raw_stream(
        messages.hello_request(messages.Hello(bundle.fingerprint, VERSION)),
    )
    assert (await late.ended())[0] is grpc.StatusCode.UNAVAILABLE
    for call in (
        server.stub.Infer(messages.infer_request(bundle.fingerprint, Frame(make_packet(7).to_bytes()))),
        server.stub.GetBundle(messages.GetBundleRequest()).read(),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    server.engine.gate.set()
    assert {(await one.result()).frame_id for _ in range(5)} == set(range(5))
    assert {(await other.result()).frame_id for _ in range(5)} == set(range(100, 105))
    assert messages.read_result(await infer).status is Status.OK
    code, text = await one.ended()
    assert code is grpc.StatusCode.UNAVAILABLE and "draining" in text
    assert await draining is True
    assert (server.count("ok"), server.count("unavailable")) == (11, 2)
    assert server.sums() == (13, 13)


async def test_a_drain_gives_up_after_its_time_and_says_so(start: Any, make_packet: MakePacket) -> None:
    server = await start(drain_s=0.05)
    stream = await server.stream()
    server.engine.gate.clear()
    await stream.send(make_packet(1))
    await server.engine.began.get()
    assert await server.server.drain() is False
    assert (await stream.ended())[0] is not grpc.StatusCode.OK
    assert (server.count("cancelled"), server.sums()) == (1, (1, 1))


async def test_probes_and_metrics_over_http(start: Any, make_packet: MakePacket) -> None:
    server = await start(metrics_port=0)
    address = server.server.metrics_address
    assert await get(address, "/livez") == (200, "ok\n")
    assert await get(address, "/readyz") == (200, "ok\n")
    assert (await get(address, "/"))[0] == 404
    stream = await server.stream()
    data = make_packet(1).to_bytes()
    await stream.send(data)
    await stream.send(b"broken")
    assert {(await stream.result()).status for _ in range(2)} == {Status.OK, Status.INVALID}
    status, text = await get(address, "/metrics")
    assert status == 200
    for line in (
        'headrace_server_frames_total{status="ok"} 1.0',
        'headrace_server_frames_total{status="invalid"} 1.0',
        'headrace_server_frames_total{status="deadline_exceeded"} 0.0',
        "headrace_server_received_frames_total 2.0",
        f"headrace_server_received_bytes_total {float(len(data) + 6)}",
        "headrace_server_streams 1.0",
        "headrace_server_queue_depth 0.0",
        "headrace_server_batch_size_count 1.0",
        'headrace_server_stage_duration_seconds_count{stage="queue"} 1.0',
        'headrace_server_stage_duration_seconds_count{stage="decode"} 1.0',
        'headrace_server_stage_duration_seconds_count{stage="tail"} 1.0',
    ):
        assert line in text.splitlines()


async def test_it_is_alive_and_not_ready_while_it_loads(make_engine: Any) -> None:
    engine = make_engine()
    engine.loaded.clear()
    server = Server(ServerSettings.load(port=0, metrics_port=0), lambda _: engine)
    starting = asyncio.create_task(server.start())
    try:
        async with asyncio.timeout(30):
            while server.metrics_address is None:
                await asyncio.sleep(0)
        assert await get(server.metrics_address, "/readyz") == (503, "loading\n")
        assert (await get(server.metrics_address, "/livez"))[0] == 200
        assert server.address == "", "it must not listen before it can answer"
        engine.loaded.set()
        await starting
        assert await get(server.metrics_address, "/readyz") == (200, "ok\n")
    finally:
        engine.loaded.set()
        await starting
        await server.close()


def test_a_hanging_event_loop_is_not_alive() -> None:
    now = 100.0
    probes = Probes(lambda: now)
    assert probes.alive()[0]
    now += ALIVE_S
    assert not probes.alive()[0]
    probes.beat()
    assert probes.alive()[0]


def test_every_status_has_its_counter_from_the_start() -> None:
    metrics = Metrics()
    for status in Status:
        if status is not Status.UNSPECIFIED:
            labels = {"status": status.name.lower()}
            assert metrics.registry.get_sample_value("headrace_server_frames_total", labels) == 0
            metrics.answered(status)
            assert metrics.registry.get_sample_value("headrace_server_frames_total", labels) == 1


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
async def test_drains_under_load_lose_no_admitted_frame(start: Any, make_packet: MakePacket, times: int) -> None:
    for time in range(times):
        server = await start(max_batch=4)
        loaded = asyncio.Event()

        async def device(stream: Any, number: int, server: Any = server, loaded: asyncio.Event = loaded) -> int:
            """Sends as much as may be in flight, until the stream ends; how many frames were answered."""
            answered: list[Status] = []

            async def read() -> None:
                while (response := await stream.call.read()) is not grpc.aio.EOF:
                    result = messages.read_response(response)
                    assert isinstance(result, messages.Result)
                    answered.append(result.status)
                    if len(answered) == 10:
                        loaded.set()

            reading = asyncio.create_task(read())
            try:
                frame_id = 0
                while not reading.done():
                    await stream.send(make_packet(frame_id))
                    frame_id += 1
                    while frame_id - len(answered) >= 12 and not reading.done():
                        await asyncio.sleep(0.001)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass
            with pytest.raises(grpc.aio.AioRpcError):
                await reading
            # INTERNAL is what gRPC's client says of a stream that ended while it wrote; what it had not read is lost.
            assert await stream.call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)
            assert set(answered) <= {Status.OK, Status.UNAVAILABLE}
            return len(answered)

        devices = [asyncio.create_task(device(await server.stream(), i)) for i in range(3)]
        await loaded.wait()
        await asyncio.sleep(0.005 * time)  # a moment of its own each time
        assert await server.server.drain() is True
        got = sum(await asyncio.gather(*devices))
        received, answered = server.sums()
        assert received == answered and server.count("cancelled") == 0
        assert 10 <= got <= answered

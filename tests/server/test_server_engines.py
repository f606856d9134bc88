"""The same tests on every engine: real weights, a real server in this process; on Ray with two replicas of its own.

The Ray engine needs the extra `ray`; without it these tests say so and are skipped.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from headrace.models.bitstream import VERSION, Packet
from headrace.models.bundle import Bundle
from headrace.models.codec import Codec
from headrace.protos import messages
from headrace.protos.messages import Frame, Hello, Result, Status
from headrace.server import bundle_dir
from headrace.server.config import SHIPPED_BUNDLE, ServerSettings
from headrace.server.daemon import Server
from headrace.server.engine import FeatureInput, TailKey
from headrace.server.tail import tails_of

from .conftest import another_version, point_named, symbols_for

ENGINES = [
    ("local", "onnx"),
    pytest.param(("local", "torch"), marks=pytest.mark.slow),
    pytest.param(
        ("ray", "onnx"),
        marks=[
            pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: extra ray"),
            pytest.mark.timeout(600),
            pytest.mark.filterwarnings("ignore::DeprecationWarning"),
        ],
    ),
]


@pytest.fixture(scope="module")
def tail(bundle: Bundle) -> Any:
    return tails_of(bundle, "cpu")[TailKey(bundle.fingerprint, "blocks.5")]


@pytest.fixture(scope="module")
def packets(bundle: Bundle, codec: Codec) -> list[Packet]:
    """Of all rate levels and prefixes at one split point."""
    found = []
    for frame_id in range(12):
        point = point_named(bundle, f"blocks.5@{frame_id % 8}")
        symbols = symbols_for(bundle, "blocks.5", frame_id)
        found.append(codec.compress_symbols(symbols, point, frame_id).prefix(1 + frame_id % 4))
    return found


@pytest.fixture(scope="module")
def expected(bundle: Bundle, codec: Codec, packets: list[Packet], tail: Any) -> list[tuple[Any, ...]]:
    """What the tail in PyTorch says of each frame by itself."""
    inputs = []
    for packet in packets:
        gain = bundle.gain("blocks.5", bundle.operating_point(packet.operating_point).rate_level)
        inputs.append(FeatureInput(codec.decompress(packet), gain))
    return [tail([each])[0] for each in inputs]


@pytest.fixture(params=ENGINES)
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Server]:
    shutil.copytree(SHIPPED_BUNDLE, tmp_path / "bundles" / "a")
    settings = ServerSettings.load(
        port=0,
        engine=request.param[0],
        runtime=request.param[1],
        ray_replicas=2,
        threads=1,
        max_in_flight=64,
        cache_dir=tmp_path / "cache",
        bundle_dir=tmp_path / "bundles",
        linger_s=0,
        drain_s=60.0,
    )
    server = Server(settings)
    await server.start()
    yield server
    await server.close()


async def ask(
    server: Server, bundle: Bundle, packets: list[bytes], device: str = "", written: asyncio.Event | None = None
) -> list[Result]:
    """Results of one stream in order of frame ids; `written` is set when all frames have been sent."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = messages.HeadraceStub(channel).Stream()
        await call.write(messages.hello_request(Hello(bundle.fingerprint, VERSION, device)))
        await call.read()
        for packet in packets:
            await call.write(messages.frame_request(Frame(packet)))
        await call.done_writing()
        if written is not None:
            written.set()
        results = []
        while (response := await call.read()) is not grpc.aio.EOF:
            result = messages.read_response(response)
            assert isinstance(result, Result)
            results.append(result)
    return sorted(results, key=lambda r: r.frame_id)


def check(results: list[Result], packets: list[Packet], expected: list[tuple[Any, ...]]) -> None:
    """A batch may round differently than one frame does."""
    assert [r.frame_id for r in results] == [p.frame_id for p in packets]
    for result, packet, (output,) in zip(results, packets, expected, strict=True):
        assert (result.status, result.slices) == (Status.OK, len(packet.slices))
        scores = [x.score for x in result.outputs[0].labels]
        assert np.allclose(scores, [x.score for x in output.labels], atol=1e-3)


async def test_an_engine_answers_mixes_says_no_swaps_and_drains(
    server: Server,
    bundle: Bundle,
    packets: list[Packet],
    expected: list[tuple[Any, ...]],
    make_packet: Callable[..., Packet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One test, because Ray takes long to start: each step stands for itself."""
    monkeypatch.setattr(bundle_dir, "EVERY_S", 0.1)
    # Frames of different devices, rate levels and prefixes.
    data = [packet.to_bytes() for packet in packets]
    halves = await asyncio.gather(ask(server, bundle, data[:6]), ask(server, bundle, data[6:]))
    check(sorted([*halves[0], *halves[1]], key=lambda r: r.frame_id), packets, expected)
    sizes = server.metrics.registry.get_sample_value("headrace_server_batch_size_count")
    assert sizes is not None and sizes < len(packets), "they shared batches"
    # A broken packet is no other's fault, whether it shows at the door or in the decoder.
    slices = make_packet(1, "blocks.5@4").slices
    bad = Packet(packets[0].operating_point, 50, (b"abc",)).to_bytes()
    whole = make_packet(51, "blocks.5@4")
    results = await ask(server, bundle, [bad, whole.to_bytes(), b"broken"])
    assert {r.frame_id: r.status for r in results} == {0: Status.INVALID, 50: Status.INVALID, 51: Status.OK}
    assert "too short" in next(r.message for r in results if r.frame_id == 50) and slices
    # Another version is put beside it and then takes its place, while frames are answered.
    second = another_version(bundle, tmp_path / "second")
    (tmp_path / "second").rename(tmp_path / "bundles" / "b")
    async with asyncio.timeout(120):
        while (await asyncio.gather(ask(server, bundle, data[:2]), asyncio.sleep(0.1)))[0] and not (
            server._bundles and server._bundles.find(second.fingerprint)
        ):
            pass
    assert [r.status for r in await ask(server, second, data)] == [Status.OK] * len(data)
    shutil.rmtree(tmp_path / "bundles" / "a")
    async with asyncio.timeout(120):
        while server._bundles and (server._bundles.find(bundle.fingerprint) or server._bundles._retiring):
            assert [r.status for r in await ask(server, second, data[:2])] == [Status.OK] * 2
    # It drains: what was admitted is answered.
    # A stream that ends while its client still writes is an internal error of gRPC's client, whatever the server says.
    written = asyncio.Event()
    asking = asyncio.create_task(ask(server, second, data, written=written))
    async with asyncio.timeout(60):
        await written.wait()
    draining = asyncio.create_task(server.drain())
    assert await draining is True
    try:
        assert {r.status for r in await asking} <= {Status.OK, Status.UNAVAILABLE}
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.UNAVAILABLE
    value = server.metrics.registry.get_sample_value
    assert value("headrace_server_frames_total", {"status": "cancelled"}) == 0


@pytest.mark.parametrize("server", ENGINES[2:], indirect=True)
async def test_a_replica_that_is_killed_under_load_loses_no_admitted_frame(
    server: Server, bundle: Bundle, packets: list[Packet], expected: list[tuple[Any, ...]]
) -> None:
    engine: Any = server._engine
    pids = {await engine._handle.process_id.remote() for _ in range(40)}
    assert len(pids) == 2
    data = [packet.to_bytes() for packet in packets]
    asking = [asyncio.create_task(ask(server, bundle, data, f"device {i}")) for i in range(12)]
    value = server.metrics.registry.get_sample_value
    async with asyncio.timeout(60):
        while (value("headrace_server_frames_total", {"status": "ok"}) or 0) < 20:
            await asyncio.sleep(0.001)
    os.kill(pids.pop(), signal.SIGKILL)
    for results in await asyncio.gather(*asking):
        check(results, packets, expected)
    # The one that is left answers, and Ray starts another one.
    check(await ask(server, bundle, data), packets, expected)
    async with asyncio.timeout(180):
        while len(now := {await engine._handle.process_id.remote() for _ in range(40)}) < 2:
            await asyncio.sleep(0.5)
    assert now > pids


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: extra ray")
@pytest.mark.timeout(600)
def test_sigterm_ends_a_front_end_on_ray_with_0(tmp_path: Path) -> None:
    """Ray has a signal handler of its own, which would end the process after three seconds by SIGABRT."""
    command = ["serve", "--port", "0", "--engine", "ray", "--ray-replicas", "1", "--cache-dir", str(tmp_path)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "headrace.cli", *command], stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert process.stdout is not None
        assert "listening" in process.stdout.readline(), (tmp_path / "log").read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in (tmp_path / "log").read_text()

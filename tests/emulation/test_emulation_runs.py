"""Unmodified server and edge over the best link under real packets: every frame has exactly one outcome.

The short form is a link that loses packets, one whose queue is bloated and one that is out for two seconds; the whole
one has more of each, all of them together, and recorded links.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from headrace.bench.links.emulators import choose, open_link
from headrace.bench.links.record import EmulatedLink
from headrace.bench.links.spec import LinkSpec
from headrace.bench.links.tun_relay import TunRelayLink
from headrace.bench.processes import Process, Server, arguments

from .conftest import EdgeRun, outcome

pytestmark = pytest.mark.timeout(600)
PORT = 50051
LIVE = {"fps": 8, "deadline_ms": 500, "device_uncut_ms": 150, "loop": True}


@pytest.fixture
async def over(edge_half, photographs, tmp_path) -> AsyncIterator[Callable[..., Any]]:
    """Starts a server and an edge at the two ends of a link."""
    emulator, why = choose()
    if emulator == "proxy":
        pytest.skip(f"NO EMULATOR OF PACKETS, NOTHING TESTED: {why}")
    async with contextlib.AsyncExitStack() as stack:

        async def start(spec: LinkSpec, **flags: object) -> tuple[EmulatedLink, EdgeRun]:
            link = await open_link(emulator, spec, PORT)
            stack.push_async_callback(link.close)
            serve = {"host": link.server_host, "insecure": True, "port": PORT, "cache_dir": tmp_path / "server"}
            server = await Server.listening(serve, tmp_path / "server.log", prefix=link.server_prefix)
            stack.push_async_callback(server.stop)
            flags = {"server": link.address, "bundle": edge_half, "source": photographs, **LIVE, **flags}
            flags["cache_dir"] = tmp_path / "cache"
            edge = EdgeRun(await Process.start("edge", flags, tmp_path / "edge.log", prefix=link.edge_prefix))
            stack.push_async_callback(edge.close)
            link.begin()
            return link, edge

        yield start


async def finish(edge: EdgeRun) -> Counter[str]:
    assert await edge.terminate() == 0, edge.process.log_end()
    edge.assert_sums()
    assert edge.counts()["error"] == 0
    assert all(line["latency_ms"] <= 500 for line in edge.frames if line["outcome"] in ("ok", "local"))
    return edge.counts()


async def test_two_percent_of_packets_are_lost(over):
    link, edge = await over(LinkSpec(up=4e6, delay_s=0.02, loss=0.02, seed=1))
    await edge.until(outcome("ok", count=16))
    await finish(edge)
    await link.close()
    record = link.record()
    assert record.up_counts.lost + record.down_counts.lost > 0
    assert record.up_counts.bytes >= sum(line["bytes"] for line in edge.frames if line["outcome"] == "ok")


@pytest.mark.slow
async def test_heavy_loss_and_jitter(over):
    _, edge = await over(LinkSpec(up=2e6, delay_s=0.03, jitter_s=0.02, loss=0.05, seed=1))
    await edge.until(outcome("ok", count=40))
    counts = await finish(edge)
    assert counts["ok"] + counts["local"] > 0.5 * sum(counts.values())


@pytest.mark.parametrize("frames", [8, pytest.param(20, marks=pytest.mark.slow)])
async def test_a_bloated_queue_does_not_stay_full(over, frames):
    """1 s of queue at the bottleneck, and a rate that falls to a sixteenth: the loop stops filling the queue."""
    link, edge = await over(LinkSpec(up=8e6, delay_s=0.02, queue_bytes=1_000_000))
    narrow_from = await edge.until(outcome("ok", count=frames))
    link.set_rate(500e3)  # the queue now holds 16 s
    settled = await edge.until(outcome("ok", "local", "late", "dropped", count=frames + 4), narrow_from)
    await edge.until(outcome("ok", count=frames - 4), settled)
    await finish(edge)
    later = edge.counts(settled)
    assert later["ok"] + later["local"] > 0.6 * sum(later.values())
    if isinstance(link, TunRelayLink):
        record = await link.refresh()
        assert record.up_counts.queue_s_max < 4
        assert record.up_counts.overflowed == 0


@pytest.mark.parametrize(("outages", "frames"), [(1, 6), pytest.param(2, 10, marks=pytest.mark.slow)])
async def test_outages_of_seconds_are_answered_locally_and_the_stream_recovers(over, outages, frames):
    link, edge = await over(LinkSpec(up=4e6, delay_s=0.01))
    seen = await edge.until(outcome("ok", count=8))
    for _ in range(outages):
        link.set_rate(0)
        seen = await edge.until(outcome("local", count=frames), seen)
        link.set_rate(4e6)
        seen = await edge.until(outcome("ok", count=8), seen)
    await finish(edge)


@pytest.mark.slow
async def test_loss_bloat_and_outage_together(over):
    link, edge = await over(LinkSpec(up=2e6, down=1e6, delay_s=0.03, jitter_s=0.01, loss=0.02, queue_bytes=250_000))
    seen = await edge.until(outcome("ok", count=16))
    link.set_rate(0)
    seen = await edge.until(outcome("local", count=6), seen)
    link.set_rate(300e3)
    seen = await edge.until(outcome("ok", count=10), seen)
    link.set_rate(2e6)
    await edge.until(outcome("ok", count=16), seen)
    await finish(edge)


@pytest.mark.slow
@pytest.mark.parametrize("emulator", ["auto", "proxy"])
def test_headrace_emulate_with_real_processes_over_a_recorded_link(emulator, edge_half, photographs, tmp_path):
    """As a user would: one command, a Mahimahi trace, 60 frames, one line a frame on standard output."""
    trace = tmp_path / "link.up"
    # 2.4 Mbit/s (a packet every 5 ms) for 3 s, then 0.6 for 2 s, then nothing for 1 s.
    times = [*range(5, 3001, 5), *range(3020, 5001, 20), 6000]
    trace.write_text("".join(f"{ms}\n" for ms in times))
    flags = {"host": "{host}", "port": "{port}", "insecure": True, "cache_dir": tmp_path / "server"}
    serve = ["headrace", "serve", *arguments(flags)]
    flags = {"server": "{server}", "bundle": edge_half, "source": photographs, **LIVE, "max_frames": 60}
    edge = ["headrace", "edge", *arguments(flags | {"cache_dir": tmp_path / "cache"})]
    command = [
        *(sys.executable, "-m", "headrace.cli", "emulate", "--emulator", emulator, "--up-trace", str(trace)),
        *("--delay-ms", "20", "--loss", "0.01", "--seed", "3", "--json", str(tmp_path / "passed.json")),
        *("--server", shlex.join(serve), "--edge", shlex.join(edge)),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said, log = process.communicate(timeout=240)
    assert process.returncode == 0, log
    lines = [json.loads(line) for line in said.splitlines()]
    frames = [line for line in lines if line["event"] == "frame"]
    summary = next(line for line in lines if line["event"] == "summary")
    assert sorted(line["frame"] for line in frames) == list(range(60))
    assert summary["frames"] == sum(summary["outcomes"].values()) == 60
    assert {k: n for k, n in summary["outcomes"].items() if n} == dict(Counter(line["outcome"] for line in frames))
    assert summary["outcomes"]["ok"] > 10
    passed = json.loads((tmp_path / "passed.json").read_text())
    assert passed["up_counts"]["bytes"] >= sum(line["bytes"] for line in frames if line["outcome"] == "ok")
    assert not list(Path("/run/netns").glob(f"headrace-{process.pid}-*"))

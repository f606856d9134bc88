"""The daemon as a process of its own, against a server that answers, hangs, dies and comes back."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from headrace.edge.report import STAGES
from headrace.models.bundle import Bundle
from headrace.protos.messages import Status

PROGRAM = """
import json, sys
from headrace.edge.config import EdgeSettings
from headrace.edge.daemon import run
code = run(EdgeSettings.load(None, **json.loads(sys.argv[1])))
assert "torch" not in sys.modules, "the edge imports torch"
assert not any(name.startswith("headrace.server") for name in sys.modules)
sys.exit(code)
"""
TIMEOUT_S = 60


class Edge:
    """A running edge whose lines are read as they come."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self.log: list[str] = []
        self._reading_log = asyncio.create_task(self._read_log())

    async def _read_log(self) -> None:
        async for line in self.process.stderr:
            self.log.append(line.decode())

    async def until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Read lines up to the first that is wanted."""
        async with asyncio.timeout(TIMEOUT_S):
            while line := await self.process.stdout.readline():
                self.lines.append(json.loads(line))
                if wanted(self.lines[-1]):
                    return self.lines[-1]
        raise AssertionError("the edge ended first: " + "".join(self.log))

    async def logged(self, pattern: str) -> re.Match[str]:
        """Wait for a line of the log."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                for line in self.log:
                    if match := re.search(pattern, line):
                        return match
                await asyncio.sleep(0.01)

    async def end(self, send: int | None = None) -> int:
        """Read to the end; returns the exit code. The sums are checked."""
        if send is not None:
            self.process.send_signal(send)
        async with asyncio.timeout(TIMEOUT_S):
            async for line in self.process.stdout:
                self.lines.append(json.loads(line))
            code = await self.process.wait()
            await self._reading_log
        if self.lines:
            summary = self.lines[-1]
            assert summary["event"] == "summary"
            assert sorted(f["frame"] for f in self.frames) == list(range(summary["frames"]))
            assert sum(summary["outcomes"].values()) == summary["frames"]
            for outcome, count in summary["outcomes"].items():
                assert count == sum(f["outcome"] == outcome for f in self.frames)
            assert summary["bytes"] == sum(f["bytes"] for f in self.frames)
            assert summary["on_time"] == summary["outcomes"]["ok"] + summary["outcomes"]["local"]
        return code

    @property
    def frames(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == "frame"]

    @property
    def outcomes(self) -> dict[str, int]:
        return self.lines[-1]["outcomes"]


@pytest.fixture
async def start(tmp_path, pictures, edge_half) -> AsyncIterator[Callable[..., Any]]:
    """Starts edges, and ends those that still run."""
    running: list[Edge] = []

    async def run(**flags: Any) -> Edge:
        given = {"source": [str(pictures)], "cache_dir": str(tmp_path / "cache"), "reconnect_max_s": 0.2} | flags
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            PROGRAM,
            json.dumps(given),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # A proxy that is not there: the stream has to go past it.
            env={k: v for k, v in os.environ.items() if not k.startswith("HEADRACE_")}
            | {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "no_grpc_proxy": ""},
        )
        running.append(Edge(process))
        return running[-1]

    yield run
    for edge in running:
        if edge.process.returncode is None:
            edge.process.kill()
            await edge.process.wait()


async def test_a_folder_is_answered_frame_by_frame_by_the_server(server, start):
    """The edge half comes from the server, and nothing of it all needs torch."""
    edge = await start(server=server.address, as_fast_as_possible=True, point="stage.1@0")
    assert await edge.end() == 0, "".join(edge.log)
    assert edge.outcomes == {"ok": 6, "late": 0, "local": 0, "dropped": 0, "filtered": 0, "error": 0}
    for frame in edge.frames:
        assert (frame["point"], frame["kind"], frame["connected"]) == ("stage.1@0", "feature", True)
        assert frame["labels"] == [
            {"index": 3, "label": "class 3", "score": 0.5},
            {"index": 1, "label": "class 1", "score": 0.25},
        ]
        assert 0 < frame["latency_ms"] <= frame["deadline_ms"] == 250
        assert set(frame["timings_ms"]) == set(STAGES) - {"again"}
        assert frame["queue_depth"] == 2
    assert [f["bytes"] for f in sorted(edge.frames, key=lambda f: f["frame"])] == [len(f.packet) for f in server.frames]
    assert server.hellos[0].fingerprint == server.fingerprint


async def test_without_a_server_a_cached_edge_half_answers_everything_locally(server, start):
    first = await start(server=server.address, as_fast_as_possible=True, max_frames=1)
    assert await first.end() == 0
    await server.kill()
    edge = await start(server=server.address, as_fast_as_possible=True)
    assert await edge.end() == 0
    assert edge.outcomes["local"] == 6
    assert {f["connected"] for f in edge.frames} == {False}
    assert {f["point"] for f in edge.frames} == {"local"}


async def test_a_local_point_needs_no_server_at_all(start, edge_half):
    edge = await start(server="127.0.0.1:1", bundle=str(edge_half), point="local", as_fast_as_possible=True)
    assert await edge.end() == 0
    assert edge.outcomes["local"] == 6
    assert not any("no stream" in line for line in edge.log)


async def test_when_the_server_is_killed_frames_are_local_within_a_deadline_and_the_stream_resumes(server, start):
    edge = await start(server=server.address, loop=True, fps=20, kinds=["feature", "local"], device_uncut_ms=100)
    await edge.until(lambda f: f["outcome"] == "ok")
    server.answer = lambda frame: None  # so that frames are in flight when it dies
    count = len(server.frames)
    while len(server.frames) == count:
        server.arrived.clear()
        await asyncio.wait_for(server.arrived.wait(), 10)
    await server.kill()
    broken = await edge.until(lambda f: not f["connected"])
    local = await edge.until(lambda f: f["outcome"] == "local" and not f["connected"])
    answered_at = local["captured_s"] + local["latency_ms"] / 1000
    # A deadline until the outage is known and one for the answer; as much again for a machine that does other things.
    assert answered_at - broken["captured_s"] < 4 * 0.25
    server.answer = lambda frame: (Status.OK, "")
    await server.start()
    await edge.until(lambda f: f["outcome"] == "ok" and f["frame"] > local["frame"])
    assert await edge.end(signal.SIGTERM) == 0
    assert edge.outcomes["ok"] and edge.outcomes["local"]
    assert edge.outcomes["error"] == 0


async def test_a_server_that_hangs_leaves_frames_late_and_the_edge_answers_by_itself(server, start):
    server.answer = lambda frame: None if frame > 3 else (Status.OK, "")
    edge = await start(
        server=server.address,
        loop=True,
        fps=20,
        kinds=["feature", "local"],
        device_uncut_ms=100,
        grace_ms=200,
        stall_s=1,
    )
    # One of the first may be answered, but late, on a busy machine.
    late = await edge.until(lambda f: f["outcome"] == "late" and f["reason"])
    assert late["reason"] == "no answer"
    assert late["latency_ms"] is None
    await edge.until(lambda f: f["outcome"] == "local")
    await edge.logged("stream is down.*no answer for 1 s")
    server.answer = lambda frame: (Status.OK, "")
    await edge.until(lambda f: f["outcome"] == "ok" and f["frame"] > late["frame"])
    assert await edge.end(signal.SIGTERM) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_cleanly(server, start, number):
    server.delay_s = 0.15
    edge = await start(server=server.address, loop=True, fps=20, point="stage.1@0")
    await edge.until(lambda f: f["outcome"] == "ok")
    assert await edge.end(number) == 0
    assert not {f["reason"] for f in edge.frames} & {"stopped", "no answer"}, "what is in flight is waited for"


async def test_a_signal_ends_it_while_it_waits_for_an_edge_half(start):
    edge = await start(server="127.0.0.1:1")
    await edge.logged("no edge half yet")
    assert await edge.end(signal.SIGTERM) == 0
    assert edge.lines == []


async def test_another_bundle_is_a_clear_error_when_it_was_given_by_hand(server, start, other_half):
    edge = await start(server=server.address, bundle=str(other_half))
    assert await edge.end() == 1
    text = "".join(edge.log)
    assert server.fingerprint.hex()[:16] in text
    assert Bundle.load(other_half).fingerprint.hex()[:16] in text


async def test_when_the_server_has_a_new_bundle_the_edge_fetches_it_and_goes_on(server, start, edge_half, other_half):
    edge = await start(server=server.address, loop=True, fps=20, point="stage.1@0")
    await edge.until(lambda f: f["outcome"] == "ok")
    await server.kill()
    server.half = other_half
    await server.start()
    await edge.logged("edge half fetched.*tiny1")
    before = len(edge.frames)
    await edge.until(lambda f: f["outcome"] == "ok" and f["frame"] > before)
    assert await edge.end(signal.SIGTERM) == 0
    assert {h.fingerprint for h in server.hellos[-1:]} == {server.fingerprint}


async def test_live_frames_are_dropped_not_queued(start, edge_half):
    edge = await start(bundle=str(edge_half), point="local", loop=True, fps=50, max_frames=60, device_uncut_ms=100)
    assert await edge.end() == 0
    assert edge.outcomes["dropped"] > 30
    assert {f["reason"] for f in edge.frames if f["outcome"] == "dropped"} <= {"busy", "stale", "outage"}
    waits = [f["timings_ms"]["wait"] for f in edge.frames if f["outcome"] == "local"]
    assert waits and max(waits) < 100, "only the newest frame waits"


async def test_a_damaged_picture_is_an_error_among_answers(start, edge_half, pictures, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    (folder / "2.png").write_bytes(b"damaged")
    edge = await start(bundle=str(edge_half), source=[str(folder)], point="local", as_fast_as_possible=True)
    assert await edge.end() == 0
    assert (edge.outcomes["local"], edge.outcomes["error"]) == (5, 1)
    assert "2.png is not a picture" in next(f["reason"] for f in edge.frames if f["outcome"] == "error")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"source": []}, "add --source"),
        ({"source": ["/missing.mp4"]}, "/missing.mp4 cannot be read"),
        ({"bundle": "/missing"}, "/missing/edge.msgpack cannot be read"),
        ({"point": "stage.1@9"}, "there is no operating point"),
        ({"metrics_host": "203.0.113.1", "metrics_port": 1}, "metrics cannot be served on 203.0.113.1:1"),
        ({"cpu": 100000}, "core 100000 cannot be used"),
    ],
)
async def test_what_cannot_begin_says_why(start, edge_half, flags, message):
    edge = await start(**({"bundle": str(edge_half)} | flags))
    assert await edge.end() == 2
    assert message in "".join(edge.log)
    assert edge.lines == []


async def test_metrics_add_up_too(server, start):
    edge = await start(server=server.address, loop=True, fps=20, point="stage.1@0", metrics_port=0)
    address = (await edge.logged(r"metrics are served\s+address=(\S+)")).group(1)
    for _ in range(5):
        await edge.until(lambda f: f["outcome"] == "ok")
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    value = lambda name: float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M).group(1))  # noqa: E731
    ok = value('headrace_edge_frames_total{outcome="ok"}')
    assert ok >= 5
    assert value('headrace_edge_frames_total{outcome="late"}') == 0
    assert value('headrace_edge_operating_point_total{point="stage.1@0"}') == ok
    assert value("headrace_edge_latency_seconds_count") == ok
    assert value('headrace_edge_stage_duration_seconds_count{stage="link"}') == ok
    assert value("headrace_edge_sent_bytes_total") > 0
    assert value("headrace_edge_connected") == 1
    assert value("headrace_edge_link_rate_bits_per_second") != 0
    assert await edge.end(signal.SIGTERM) == 0


async def test_a_server_that_takes_fewer_points_gets_only_those(server, start):
    server.points = (41,)
    edge = await start(server=server.address, as_fast_as_possible=True, kinds=["feature", "image"])
    assert await edge.end() == 0
    assert {f["point"] for f in edge.frames} == {"jpeg@50"}


async def test_when_nobody_reads_the_results_it_ends(start, edge_half):
    edge = await start(bundle=str(edge_half), point="local", loop=True, fps=50)
    await edge.until(lambda f: f["outcome"] == "local")
    edge.process._transport.get_pipe_transport(1).close()
    async with asyncio.timeout(TIMEOUT_S):
        assert await edge.process.wait() != 0
    await edge.logged("nobody reads the results")


async def test_a_server_that_gives_the_bundle_that_it_refuses_is_not_asked_for_ever(server, start):
    server.refuse = "fingerprint mismatch, whatever is sent"
    edge = await start(server=server.address, point="stage.1@0", loop=True, update_patience_s=1.0)
    assert await edge.end() == 1
    assert 2 <= len(server.hellos) <= 100


async def test_it_goes_on_when_one_of_several_servers_was_not_up_to_date_yet(server, start):
    """Behind one address: the stream meets the one that has another bundle, what is asked for its bundle one that has
    ours still."""
    server.refuse = "fingerprint mismatch: the new one"
    edge = await start(server=server.address, point="stage.1@0", loop=True)
    await edge.logged("the server has another bundle")
    server.refuse = None
    await edge.until(lambda f: f["outcome"] == "ok")

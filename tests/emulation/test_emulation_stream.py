"""From pictures to answers through real processes, over loopback and over an emulated link."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from headrace.bench.links.proxy import TcpProxyLink
from headrace.bench.links.spec import LinkSpec
from headrace.bench.processes import Server
from headrace.models.bundle import Bundle
from headrace.models.edge_half import load_edge_half, write_edge_manifest

from .conftest import outcome

pytestmark = pytest.mark.timeout(600)
QUEUE_BYTES = 32 * 1024
LIVE = {"fps": 8, "deadline_ms": 500, "device_uncut_ms": 150, "loop": True}
"""A device on which `local` cannot keep up, and a deadline that a busy test machine can meet."""


@pytest.mark.parametrize(("point", "least"), [("blocks.3@0", 9), ("blocks.5@0", 9), ("webp@90", 9)])
async def test_every_frame_is_answered_and_mostly_as_the_uncut_model_does(
    server, edge_half, photographs, start_edge, point, least
):
    flags = {"bundle": edge_half, "source": photographs, "as_fast_as_possible": True, "deadline_ms": 60_000}
    local = await start_edge(point="local", **flags)
    sent = await start_edge(server=server, point=point, **flags)
    for run in (local, sent):
        assert await run.end() == 0, run.process.log_end()
        run.assert_sums()
    assert local.counts() == {"local": 12}
    assert sent.counts() == {"ok": 12}
    assert all(line["point"] == point and line["bytes"] > 0 for line in sent.frames)
    assert all({"compute", "link", "server", "decode", "tail"} <= line["timings_ms"].keys() for line in sent.frames)
    uncut = {line["frame"]: line["labels"][0]["index"] for line in local.frames}
    assert sum(line["labels"][0]["index"] == uncut[line["frame"]] for line in sent.frames) >= least
    assert all(uncut[line["frame"]] in [x["index"] for x in line["labels"]] for line in sent.frames)


async def test_an_outage_is_answered_locally_and_the_stream_recovers(server, edge_half, photographs, start_edge):
    async with TcpProxyLink(server, LinkSpec(up=4e6, delay_s=0.005, queue_bytes=QUEUE_BYTES)) as link:
        edge = await start_edge(server=link.address, bundle=edge_half, source=photographs, **LIVE)
        out_from = await edge.until(outcome("ok", count=4))
        link.set_rate(0)
        back_from = await edge.until(outcome("local", count=6), out_from)
        link.set_rate(4e6)
        await edge.until(outcome("ok", count=4), back_from)
        assert await edge.terminate() == 0
        edge.assert_sums()
        assert all(line["latency_ms"] <= 500 for line in edge.frames if line["outcome"] in ("ok", "local"))


async def test_a_narrow_link_gets_smaller_packets(server, edge_half, photographs, start_edge):
    """A device too slow for a deep cut sends pictures over a wide link; a narrow one can carry none of them in time."""
    slow = LIVE | {"fps": 4, "deadline_ms": 700, "device_uncut_ms": 2000}
    async with TcpProxyLink(server, LinkSpec(up=20e6, delay_s=0.005, queue_bytes=QUEUE_BYTES)) as link:
        edge = await start_edge(server=link.address, bundle=edge_half, source=photographs, **slow)
        narrow_from = await edge.until(outcome("ok", count=8))
        link.set_rate(60e3)
        await edge.until(outcome("ok", count=12), narrow_from)
        assert await edge.terminate() == 0
        edge.assert_sums()
        wide = [line["bytes"] for line in edge.frames[:narrow_from] if line["outcome"] == "ok"]
        narrow = [line["bytes"] for line in edge.frames[narrow_from:] if line["outcome"] == "ok"]
        assert max(narrow[-6:]) < sorted(wide)[len(wide) // 2]


async def test_a_killed_server_is_survived_and_found_again(edge_half, photographs, start_edge, tmp_path):
    log = tmp_path / "server.log"
    server = await Server.listening({"port": 0, "cache_dir": tmp_path / "server"}, log)
    try:
        edge = await start_edge(server=server.address, bundle=edge_half, source=photographs, **LIVE)
        await edge.until(outcome("ok", count=4))
        server.kill()
        await server.wait()
        killed_at = len(edge.frames)
        # What was under way may be late; what is captured from now on is the device's own.
        await edge.until(outcome("local", count=4), killed_at)
        server = await Server.listening({"port": server.port, "cache_dir": tmp_path / "server"}, log)
        back_from = len(edge.frames)
        await edge.until(outcome("ok", count=4), back_from)
        away = edge.frames[killed_at:back_from]
        assert all(line["latency_ms"] <= 500 for line in away if line["outcome"] == "local")
        first_local = next(line for line in away if line["outcome"] == "local")
        assert first_local["captured_s"] - edge.frames[killed_at - 1]["captured_s"] < 2.5
        # The second way for a server to end: it answers what it has admitted, and the device goes on by itself.
        ended_at = len(edge.frames)
        assert await server.stop() == 0, server.log_end()
        await edge.until(outcome("local", count=3), ended_at)
        assert await edge.terminate() == 0
        edge.assert_sums()
        assert edge.counts()["error"] == 0
    finally:
        server.kill()
        await server.wait()


async def test_another_bundle_is_refused_and_both_fingerprints_are_named(
    server, edge_half, photographs, start_edge, tmp_path
):
    ours = load_edge_half(edge_half)
    other = tmp_path / "other"
    shutil.copytree(edge_half, other)
    name = f"{ours.splits[0].name}/gains"
    changed = dataclasses.replace(ours, tensors={**ours.tensors, name: ours.tensors[name] * 1.5}, folder=other)
    changed.save(other)
    write_edge_manifest(other, changed)
    assert Bundle.load(other).fingerprint != ours.fingerprint
    edge = await start_edge(server=server, bundle=other, source=photographs, fps=10, loop=True)
    assert await edge.end() == 1
    log = edge.process.log.read_text()
    assert ours.fingerprint.hex()[:16] in log
    assert changed.fingerprint.hex()[:16] in log
    edge.assert_sums()


async def test_a_frame_in_flight_is_cut_short_when_the_link_narrows(server, edge_half, photographs, start_edge):
    """Slices leave one by one on a slow link; the rest of a frame is given up and its prefix answered."""
    flags = {"server": server, "bundle": edge_half, "source": photographs, "point": "blocks.3@0", "loop": True}

    def cut(frames):
        return any(line["outcome"] in ("ok", "late") and 0 < line["slices"] < 4 for line in frames)

    async with TcpProxyLink(server, LinkSpec(up=400e3, delay_s=0.005, queue_bytes=QUEUE_BYTES)) as link:
        edge = await start_edge(**(flags | {"server": link.address, "fps": 5, "deadline_ms": 400}))
        seen = await edge.until(outcome("ok", count=6))
        for rate in (60e3, 400e3) * 10:
            link.set_rate(rate)
            seen = await edge.until(lambda frames: len(frames) >= 6, seen)
            if cut(edge.frames):
                break
        assert cut(edge.frames), edge.counts()
        assert await edge.terminate() == 0
        edge.assert_sums()

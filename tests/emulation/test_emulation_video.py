"""Predicted frames between real processes: the same answers from fewer bytes, also when the server goes and comes."""

from __future__ import annotations

from pathlib import Path

import pytest
from headrace.bench.processes import Server
from headrace.models.synthetic import moving
from PIL import Image

from .conftest import outcome

pytestmark = pytest.mark.timeout(600)
FRAMES = 24


@pytest.fixture(scope="module")
def scene(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames of a scene that moves."""
    folder = tmp_path_factory.mktemp("scene")
    one, other = (Image.open(path) for path in sorted(photographs.glob("*.jpg"))[:2])
    for number, pixels in enumerate(moving(one, other, 240, FRAMES, seed=5)):
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return folder


async def test_answers_are_the_same_from_fewer_bytes(server, edge_half, scene, start_edge) -> None:
    runs = {}
    for predict in (True, False):
        edge = await start_edge(
            server=server,
            bundle=edge_half,
            source=scene,
            point="blocks.5@2",
            as_fast_as_possible=True,
            predict=predict,
        )
        assert await edge.end() == 0, edge.process.log_end()
        edge.assert_sums()
        assert edge.counts() == {"ok": FRAMES}, edge.process.log_end()
        runs[predict] = sorted(edge.frames, key=lambda line: line["frame"])
    for with_it, without in zip(runs[True], runs[False], strict=True):
        assert with_it["labels"] == without["labels"]
    assert not any(line["predicted"] for line in runs[False])
    assert sum(line["predicted"] for line in runs[True]) > FRAMES / 2
    sizes = {predict: sum(line["bytes"] for line in lines) for predict, lines in runs.items()}
    assert sizes[True] < 0.8 * sizes[False]


async def test_after_the_server_was_gone_frames_are_predicted_anew(edge_half, scene, start_edge, tmp_path) -> None:
    serve = {"port": 0, "cache_dir": tmp_path / "server"}
    first = await Server.listening(serve, tmp_path / "first.log")
    edge = await start_edge(
        server=first.address,
        bundle=edge_half,
        source=scene,
        point="blocks.5@2",
        fps=10,
        loop=True,
        deadline_ms=1000,
        reconnect_max_s=0.2,
    )

    def predicted(lines):
        return sum(line["predicted"] and line["outcome"] == "ok" for line in lines) >= 3

    try:
        seen = await edge.until(predicted)
    finally:
        first.kill()
        await first.stop()
    seen = await edge.until(lambda lines: any(not line["connected"] for line in lines), seen)
    second = await Server.listening({**serve, "port": first.address.rpartition(":")[2]}, tmp_path / "second.log")
    try:
        await edge.until(predicted, seen)
        answered = [line for line in edge.frames[seen:] if line["outcome"] == "ok"]
        assert not answered[0]["predicted"]
        assert await edge.terminate() == 0, edge.process.log_end()
    finally:
        await second.stop()
    edge.assert_sums()
    assert edge.counts()["error"] == 0
    assert outcome("ok", count=6)(edge.frames)

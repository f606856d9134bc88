"""A device that uses some of a bundle's split points: other heads are neither fetched, nor loaded, nor missed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from headrace.edge.assembly import make_ready, of_splits
from headrace.edge.config import EdgeSettings
from headrace.edge.exceptions import ConfigError
from headrace.edge.fetch import Cache, fetch_edge_half
from headrace.edge.profile import profile
from headrace.models.bundle import Bundle
from headrace.models.edge_half import load_edge_half
from headrace.models.exceptions import BundleError
from headrace.models.operating_point import Kind

from .conftest import ScriptedServer, make_bundle, write_edge_half


@pytest.fixture(scope="module")
def two_splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The edge half of a bundle with a second split point."""
    tiny = make_bundle()
    second = {name.replace("stage.1", "stage.2"): tensor for name, tensor in tiny.tensors.items()}
    points = [replace(p, id=p.id + 2, split="stage.2") for p in tiny.operating_points if p.kind is Kind.FEATURE]
    bundle = replace(
        tiny,
        splits=(*tiny.splits, replace(tiny.splits[0], name="stage.2")),
        tensors={**tiny.tensors, **second},
        operating_points=(*tiny.operating_points, *points),
    )
    return write_edge_half(tmp_path_factory.mktemp("two"), bundle.check())


@pytest.fixture
async def server(two_splits: Path) -> AsyncIterator[ScriptedServer]:
    """Serves it."""
    script = ScriptedServer(two_splits)
    await script.start()
    yield script
    await script.kill()


def heads(folder: Path | None) -> set[str]:
    assert folder is not None
    return {p.name for p in folder.glob("head-*")}


async def test_only_the_heads_that_are_used_are_fetched(server: ScriptedServer, tmp_path: Path) -> None:
    cache = Cache(tmp_path, ["stage.2"])
    bundle = await fetch_edge_half(server.address, cache)
    assert heads(bundle.folder) == {"head-stage.2.onnx"}
    assert cache.last_from(server.address) is not None
    settings = EdgeSettings.load(bundle=bundle.folder, splits=["stage.2"], cache_dir=tmp_path)
    ready = make_ready(bundle, settings)
    assert {p.split for p in ready.points if p.kind is Kind.FEATURE} == {"stage.2"}
    assert {p.kind for p in ready.points} == {Kind.FEATURE, Kind.IMAGE, Kind.LOCAL}
    assert "stage.1" not in profile(settings, rounds=1).stages_ms


async def test_a_device_that_wants_more_heads_fetches_again(server: ScriptedServer, tmp_path: Path) -> None:
    some = await fetch_edge_half(server.address, Cache(tmp_path, ["stage.1"]))
    every = Cache(tmp_path)
    assert every.last_from(server.address) is None
    both = await fetch_edge_half(server.address, every)
    assert both.fingerprint == some.fingerprint
    assert heads(both.folder) == {"head-stage.1.onnx", "head-stage.2.onnx"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundles", "servers"], "what was replaced is gone"
    assert Cache(tmp_path, ["stage.1"]).last_from(server.address) is not None, "more than is asked for is fine"


async def test_a_split_point_that_the_server_lacks_ends_the_search(server: ScriptedServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--splits.*no split point 'stage\.7'.*stage\.1, stage\.2"):
        await fetch_edge_half(server.address, Cache(tmp_path, ["stage.7"]))


def test_a_head_that_is_used_is_missed(two_splits: Path, tmp_path: Path) -> None:
    half = write_edge_half(tmp_path / "half", Bundle.load(two_splits))
    (half / "head-stage.1.onnx").unlink()
    load_edge_half(half, ["stage.2"])
    for splits in ((), ["stage.1"], ["stage.2", "stage.1"]):
        with pytest.raises(BundleError, match=r"head-stage\.1\.onnx is missing"):
            load_edge_half(half, splits)


def test_an_unknown_split_point_is_named(two_splits: Path) -> None:
    with pytest.raises(ConfigError, match=r"no split point 'stage\.9'; --splits takes stage\.1, stage\.2"):
        of_splits(Bundle.load(two_splits), EdgeSettings.load(splits=["stage.9", "stage.1"]))

"""`headrace bench switch`: what it says of engines that load everything before, and of one that does not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from headrace.bench import switch
from headrace.bench.switch import Bench, Change, Memory, Timed, summarise
from headrace.cli import app
from headrace.edge.device import Device
from headrace.edge.engine import Engine
from headrace.models.bundle import Bundle
from headrace.models.edge_half import load_edge_half
from headrace.models.exceptions import DataError
from headrace.models.export import export_edge_half
from headrace.models.operating_point import Kind
from typer.testing import CliRunner

COMMITTED = Path(switch.__file__).parents[1] / "models" / "bundles" / "efficientnet_lite0"


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """The committed bundle's, as a device has it."""
    folder = tmp_path_factory.mktemp("half")
    export_edge_half(Bundle.load(COMMITTED), folder)
    return folder


def chosen(bundle: Bundle, *names: str):
    return [next(p for p in bundle.operating_points if p.name == name) for name in names]


@pytest.fixture(scope="module")
def points(half):
    """The warm-up runs one rate level of each split point: here are two others of each, and all other kinds."""
    bundle = load_edge_half(half)
    levels = [f"{split.name}@{level}" for split in bundle.splits for level in (0, split.rate_levels - 1)]
    return chosen(bundle, *levels, "webp@20", "jpeg@20", Kind.LOCAL)


def test_nothing_is_loaded_and_nothing_leaks_when_the_point_changes(half, points):
    memory = Bench(half, load_edge_half(half), points).memory()
    assert memory.switches == switch.LAPS * len(points)
    assert memory.leaked < 500, "bytes a change, once every point had its turn"
    # An allocator takes some hundred KB more once in a while, whatever is run: that is no change's doing.
    assert memory.allocated < 1_200_000, "a coder has 1.5 MB, a graph 2 MB"


@pytest.mark.parametrize(("always", "first", "least", "most"), [(10_000, 0, 6_000, 14_000), (0, 2_000_000, 0, 500)])
def test_what_each_change_leaves_behind_is_told_from_what_the_first_does(
    half, points, monkeypatch, always, first, least, most
):
    """An engine that computes nothing, and keeps 10 KB at every change, or 2 MB at the first one."""
    memory, before = [], []

    def frame(self, engine, point, picture=None):
        if before and before[-1] is not point:
            memory.append(bytes(always if memory else first))
        before[:] = [point]
        return 0.0

    monkeypatch.setattr(Bench, "engine", lambda self: None)
    monkeypatch.setattr(Bench, "frame", frame)
    found = Bench(half, load_edge_half(half), points).memory()
    assert least <= found.leaked <= most, found


def test_an_engine_that_was_not_warmed_up_is_found_out(half, monkeypatch):
    bundle = load_edge_half(half)
    points = chosen(bundle, "blocks.3@0", "blocks.3@4", "blocks.5@0")
    lazy = lambda self: Engine(self.bundle, self.folder, Device())  # noqa: E731
    monkeypatch.setattr(Bench, "engine", lazy)
    memory = Bench(half, bundle, points).memory()
    assert memory.traced > 1_000_000, "coders are made while frames are"


def test_the_command_measures_the_edge_half_it_is_given(half, tmp_path, monkeypatch):
    monkeypatch.setattr(switch, "LAPS", 1)
    cores = os.sched_getaffinity(0)
    done = CliRunner().invoke(
        app, ["bench", "switch", "--bundle", str(half), "--rounds", "2", "--json", str(tmp_path / "out.json")]
    )
    assert done.exit_code == 0, done.output
    assert os.sched_getaffinity(0) == cores
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["points"] == len(load_edge_half(half).operating_points)
    assert sum(c["switches"] for c in found["changes"].values()) == 2 * found["points"]
    low, high = found["share_of_frame_ci"]
    assert low <= found["share_of_frame"] <= high
    low, high = found["back_to_back_ci"]
    assert low <= found["back_to_back_share"] <= high
    assert 0 < found["frame_ms"] < 1000
    assert found["allocated_bytes"] >= 0 and found["leaked_bytes"] >= 0
    assert "changes of every kind leave" in done.output


def test_shares_of_known_times():
    """Two points of 10 and 20 ms, three rounds; a change adds 1 ms, back to back 2 ms to half of that."""
    stay = np.array([[0.010, 0.020]] * 3)
    changes = np.array([[Change.RATE_LEVEL, Change.SPLIT]] * 2 + [[Change.KIND, Change.KIND]], np.object_)
    switched = stay + 0.001
    switched[2] = 1.0  # to another kind, which is told apart
    found = summarise(Timed(stay, switched, stay / 2, stay / 2 + 0.002, changes), Memory(-5, 8192, 6))
    assert found["share_of_frame"] == pytest.approx((0.1 + 0.05) / 2)
    assert found["switch_us"] == pytest.approx(1000)
    assert found["frame_ms"] == pytest.approx(15)
    assert found["changes"]["rate level"] == {"share_of_frame": 0.1, "back_to_back_share": 0.4, "switches": 2}
    assert found["changes"]["split point or width"]["share_of_frame"] == 0.05
    assert found["changes"]["kind"]["share_of_frame"] == pytest.approx((99 + 49) / 2)
    assert found["allocated_bytes"] == 8192


def test_what_changed_is_told_by_the_points(half):
    bundle = load_edge_half(half)
    fine, coarse, other, picture, local = chosen(
        bundle, "blocks.3@0", "blocks.3@4", "blocks.5@0", "webp@20", Kind.LOCAL
    )
    assert Change.of(fine, coarse) is Change.RATE_LEVEL
    assert Change.of(coarse, other) is Change.SPLIT
    assert {Change.of(fine, picture), Change.of(local, fine), Change.of(picture, local)} == {Change.KIND}


def test_no_rounds_are_refused(half):
    with pytest.raises(DataError, match="--rounds is 0"):
        switch.run(half, rounds=0)

"""`headrace bench control` on links that are made here: windows, frames, rivals, and what is written."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headrace.bench.control.cells import (
    BEST_FIXED,
    EWMA,
    EWMA_NO_QUEUE,
    LOCAL,
    LOOP,
    ORACLE,
    POLICIES,
    WEBP,
    Cell,
    Conditions,
    Row,
    decision_us,
    draw_workload,
    run_cell,
    spread_points,
)  # fmt: skip
from headrace.bench.control.report import minus_best_fixed, over_adaptive_webp, summary, trace_table
from headrace.bench.control.run import Plan, run
from headrace.bench.links.trace_set import SQUARE_WAVE, Window, read_windows, square_wave
from headrace.bench.links.traces import Trace
from headrace.models.exceptions import DataError
from headrace.models.operating_point import Kind, OperatingPoint
from rich.console import Console

FEATURES = [(3600, 0.94), (2500, 0.92), (1700, 0.87), (1000, 0.76)]
IMAGES = [(14000, 0.94), (7300, 0.89), (4300, 0.81), (2400, 0.65)]
POINTS = [
    OperatingPoint(0, Kind.LOCAL, accuracy=1.0),
    *(
        OperatingPoint(1 + i, Kind.FEATURE, "blocks.3", 1.0, i, "", size, 1.2 * size, accuracy, 0.33)
        for i, (size, accuracy) in enumerate(FEATURES)
    ),
    *(
        OperatingPoint(5 + i, Kind.IMAGE, "", 1.0, 90 - 20 * i, "webp", size, 1.8 * size, accuracy, 0.14)
        for i, (size, accuracy) in enumerate(IMAGES)
    ),
]
SHORT = Conditions(deadlines_s=(0.2,), devices_s=(0.15,), seconds=12.0)


def fading() -> Window:
    steps = [(1.0, rate * 1e6) for rate in (3, 2, 1, 0.5, 0.3, 0.2, 0.3, 0.6, 1, 2, 4, 3)]
    return Window(Trace.steps(steps, "fading"), "made", cellular=True)


def folder_of_traces(folder: Path) -> Path:
    (folder / "lte").mkdir(parents=True)
    (folder / "LICENCE").write_text("not a trace")
    (folder / "lte" / "bus.log").write_text("".join(f"{n} {0.5 + n % 7 / 5}\n" for n in range(300)))
    (folder / "lte" / "fast.log").write_text("".join(f"{n} 20\n" for n in range(100)))
    (folder / "lte" / "trace_1_http---www.example.com").write_text("".join(f"{n} 1.0\n" for n in range(70)))
    return folder


def test_windows_are_spread_and_fast_ones_left_out(tmp_path: Path) -> None:
    folder = folder_of_traces(tmp_path)
    every = read_windows(folder, seconds=60, below_bps=5e6, per_trace=0)
    bus = [f"bus.log+{start}s" for start in range(0, 300, 60)]
    assert [w.trace.name for w in every] == [*bus, "trace_1_http---www.example.com+0s"]
    assert all(w.trace.duration_s == pytest.approx(60) and w.group == "lte" for w in every)
    assert [w.cellular for w in every] == [True] * 5 + [False]
    two = read_windows(folder, seconds=60, below_bps=5e6, per_trace=2)
    assert [w.trace.name for w in two][:2] == ["bus.log+0s", "bus.log+120s"]
    with pytest.raises(DataError):
        read_windows(folder, seconds=60, below_bps=1e5, per_trace=0)
    with pytest.raises(DataError):
        read_windows(folder / "none", seconds=60, below_bps=5e6, per_trace=0)


def test_frames_are_drawn_as_the_table_says_and_seeded() -> None:
    sizes, compute = draw_workload(POINTS, 0.15, 4000, 10.0, seed=3)
    again, _ = draw_workload(POINTS, 0.15, 4000, 10.0, seed=3)
    np.testing.assert_array_equal(sizes, again)
    assert np.all(sizes[:, 0] == 0)
    assert np.median(sizes[:, 1:], axis=0) == pytest.approx([p.bytes_median for p in POINTS[1:]], rel=0.05)
    assert np.quantile(sizes[:, 5], 0.95) == pytest.approx(POINTS[5].bytes_p95, rel=0.12)
    assert np.median(compute, axis=0) == pytest.approx([0.15 * p.edge_share for p in POINTS], rel=0.01)
    logs = np.log(sizes[:, 1])
    assert np.corrcoef(logs[1:], logs[:-1])[0, 1] > 0.6
    assert np.corrcoef(logs, np.log(sizes[:, 6]))[0, 1] > 0.7


def test_no_policy_beats_the_optimum_and_the_loop_beats_its_rivals() -> None:
    cell = run_cell(POINTS, fading(), 0.2, 0.15, SHORT)
    assert set(cell.rows) == set(POLICIES)
    shares = {name: cell.of_optimum(name) for name in POLICIES}
    assert all(0 < share <= 1 for share in shares.values())
    assert shares[LOOP] > 0.9
    assert shares[LOOP] > shares[BEST_FIXED] - 0.01
    assert shares[LOOP] > max(shares[EWMA], shares[EWMA_NO_QUEUE], shares[WEBP], shares[LOCAL])
    assert shares[ORACLE] > 0.9
    assert cell.rows[LOOP].miss < 0.15
    assert cell.rows[BEST_FIXED].switches == 0
    assert cell.rows[LOCAL].bytes == 0


def test_ewma_without_its_queue_collapses_where_frames_queue() -> None:
    """A link that has fallen to a twentieth: what was measured before is what it goes on sending."""
    link = Window(Trace.steps([(3.0, 4e6), (9.0, 0.2e6)], "falling"), "made", cellular=True)
    cell = run_cell(POINTS, link, 0.4, 0.15, SHORT, [LOOP, EWMA, EWMA_NO_QUEUE])
    assert cell.rows[LOOP].score > max(cell.rows[EWMA].score, cell.rows[EWMA_NO_QUEUE].score) + 0.1


def test_a_hundred_points_keep_stages_and_trade_off() -> None:
    many = spread_points(POINTS, 100)
    assert len(many) == 100
    assert [p.id for p in many] == list(range(100))
    assert {p.stage for p in many} == {p.stage for p in POINTS}
    webp = [p for p in many if p.codec == "webp"]
    assert (webp[0].bytes_median, webp[-1].bytes_median) == (2400, 14000)
    assert all(a.accuracy <= b.accuracy for a, b in pairwise(webp))
    assert 1 < decision_us(POINTS, fading(), SHORT) < 2000


def test_figures_are_what_they_say() -> None:
    cells = [run_cell(POINTS, w, 0.2, 0.15, SHORT, [LOOP, BEST_FIXED, WEBP, LOCAL]) for w in (fading(), square_wave())]
    loop, webp = ([c.rows[name].score for c in cells] for name in (LOOP, WEBP))
    assert over_adaptive_webp(cells) == pytest.approx(sum(loop) / sum(webp))
    difference = [c.rows[LOOP].score - c.rows[BEST_FIXED].score for c in cells]
    assert minus_best_fixed(cells) == pytest.approx(sum(difference) / 2)
    found = summary(cells, 12.34)
    assert found["mean_of_optimum"] == pytest.approx(
        sum(s / c.optimum for s, c in zip(loop, cells, strict=True)) / 2, abs=1e-4
    )
    assert found["worst_of_optimum"] == pytest.approx(
        min(s / c.optimum for s, c in zip(loop, cells, strict=True)), abs=1e-4
    )
    assert found["over_adaptive_webp"] == pytest.approx(
        loop[0] / webp[0], abs=1e-4
    )  # the square wave is no cellular link
    assert found["worst_set_minus_best_fixed"] == pytest.approx(min(difference), abs=1e-4)
    assert found["decision_us"] == 12.3
    assert found["policies"][ORACLE]["score"] is None
    assert [t["trace"] for t in found["traces"]] == ["fading", SQUARE_WAVE]


def test_a_trace_counts_with_all_its_windows_deadlines_and_devices() -> None:
    """In both ways: the mean of its cells' shares, and its accuracy over the optimum's, by what was possible."""

    def cell(trace: str, group: str, device_s: float, optimum: float, score: float) -> Cell:
        row = Row(score, 1 - score, 0, 0)
        return Cell(trace, group, True, 1e6, 0.1, device_s, 6.0, optimum, {LOOP: row, BEST_FIXED: row})

    cells = [
        cell("ferry.log+0s", "a", 0.15, 0.8, 0.76),
        cell("ferry.log+0s", "a", 0.5, 0.02, 0.01),  # nothing to speak of was possible
        cell("ferry.log+60.5s", "a", 0.15, 0.9, 0.81),
        cell("ferry.log+0s", "b", 0.15, 0.5, 0.45),
        cell("night+day", "b", 0.15, 0.5, 0.43),
        cell("dead+0s", "b", 0.15, 0.0, 0.0),
    ]
    found = summary(cells, 1.0)
    traces = {(t["set"], t["trace"]): t for t in found["traces"]}
    assert list(traces) == [("a", "ferry.log"), ("b", "ferry.log"), ("b", "night+day"), ("b", "dead")]
    ferry = traces["a", "ferry.log"]
    assert ferry["windows"] == 2
    assert [c["window"] for c in ferry["cells"]] == ["ferry.log+0s", "ferry.log+0s", "ferry.log+60.5s"]
    assert ferry["mean_of_optimum"] == pytest.approx((0.95 + 0.5 + 0.9) / 3, abs=1e-4)
    assert ferry["accuracy_of_optimum"] == pytest.approx((0.76 + 0.01 + 0.81) / (0.8 + 0.02 + 0.9), abs=1e-4)
    assert ferry["worst_of_optimum"] == 0.5
    assert traces["b", "dead"]["mean_of_optimum"] is traces["b", "dead"]["accuracy_of_optimum"] is None
    assert found["worst_of_optimum"] == 0.5
    assert found["worst_trace_of_optimum"] == pytest.approx((0.95 + 0.5 + 0.9) / 3, abs=1e-4)
    assert found["worst_trace_accuracy_of_optimum"] == pytest.approx(0.86)
    assert found["worst_traces"] == {"mean_of_optimum": "ferry.log", "accuracy_of_optimum": "night+day"}
    assert list(trace_table(cells, most=2).columns[-1].cells) == ["b/night+day", "b/ferry.log"]


def test_the_command_writes_table_csv_picture_and_json(tmp_path: Path) -> None:
    plan = Plan(tuple(POINTS), (fading(), square_wave()), SHORT)
    console = Console(record=True, width=200, file=(tmp_path / "log").open("w"))
    assert run(plan, tmp_path / "out", tmp_path / "figures.json", console) == 0
    assert "share of the offline optimum" in console.export_text()
    with (tmp_path / "out" / "control.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * len(POLICIES)
    assert all(math.isfinite(float(line["score"])) for line in lines)
    assert (tmp_path / "out" / "control.png").stat().st_size > 10_000
    figures = json.loads((tmp_path / "figures.json").read_text())
    wanted = {"mean_of_optimum", "worst_of_optimum", "minus_best_fixed", "over_adaptive_webp", "decision_us"}
    assert wanted <= figures.keys()
    assert len(figures["traces"]) == 2
    assert wanted - {"decision_us"} <= figures["traces"][0].keys()


def test_a_run_is_taken_up_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conditions = Conditions(deadlines_s=(0.2,), devices_s=(0.15, 0.5), seconds=3.0)
    plan = Plan(tuple(POINTS), (fading(), square_wave()), conditions)
    console = Console(width=200, file=(tmp_path / "log").open("w"))
    run(plan, tmp_path / "whole", tmp_path / "whole.json", console)
    lines = (tmp_path / "whole" / "cells.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 4
    (tmp_path / "cut").mkdir()
    kept = tmp_path / "cut" / "cells.jsonl"
    kept.write_text("".join(lines[:3]) + lines[3][:100])  # ended in the midst of the third cell
    measured: list[str] = []

    def counted(*arguments: Any) -> Cell:
        measured.append(arguments[1].trace.name)
        return run_cell(*arguments)

    monkeypatch.setattr("headrace.bench.control.run.run_cell", counted)
    resumed = replace(plan, resume=True)
    run(resumed, tmp_path / "cut", tmp_path / "cut.json", console)
    assert measured == [SQUARE_WAVE] * 2
    whole, cut = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "cut"))
    assert whole["traces"] == cut["traces"]
    assert kept.read_text() == "".join(lines)
    # Of another measurement nothing is taken over, and without the flag neither.
    other = replace(resumed, conditions=replace(conditions, fps=5.0))
    with pytest.raises(DataError, match="measured with other fps"):
        run(other, tmp_path / "cut", None, console)
    kept.write_text("no cells\n")
    with pytest.raises(DataError, match="holds no measured cells"):
        run(resumed, tmp_path / "cut", None, console)
    measured.clear()
    run(plan, tmp_path / "cut", None, console)
    assert len(measured) == 4


@pytest.mark.parametrize("wrong", [{"deadlines_ms": "a"}, {"deadlines_ms": "0"}, {"every": 0}, {"fps": 0.0}])
def test_numbers_that_cannot_be_used_are_refused(tmp_path: Path, wrong: dict[str, object]) -> None:
    arguments = {
        "deadlines_ms": "200", "devices_ms": "150", "fps": 10.0, "seconds": 60.0, "windows": 1, "every": 1,
        "below_mbps": 5.0, "rtt_ms": 30.0, "server_ms": 10.0, "seed": 0, "jobs": 1,
    }  # fmt: skip
    with pytest.raises(DataError):
        Plan.of(tmp_path, folder_of_traces(tmp_path / "t"), **(arguments | wrong))  # type: ignore[arg-type]

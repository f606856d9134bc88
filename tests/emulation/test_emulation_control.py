"""`headrace bench control --real`: a cell with real processes over an emulated link, and its simulation beside it."""

from __future__ import annotations

import statistics

import pytest
from headrace.bench.control.cells import Conditions
from headrace.bench.control.real import added_seconds, compute_factors, run_real, server_seconds
from headrace.bench.links.trace_set import Window
from headrace.bench.links.traces import Trace
from headrace.models.operating_point import Kind, OperatingPoint
from headrace.server.config import ServerSettings
from rich.console import Console

POINTS = [
    OperatingPoint(0, Kind.LOCAL, accuracy=1.0),
    OperatingPoint(1, Kind.FEATURE, "blocks.3", 1.0, 0, "", 2000, 2400, 0.95, 0.33),
]


def test_factors_are_each_frames_own_compute_over_its_stages_median() -> None:
    names = {point.kind: point.name for point in POINTS}
    took = [50, 52, 48, 50, 150, 50]
    lines = [{"point": names[Kind.FEATURE], "timings_ms": {"prepare": 1, "compute": ms - 1}} for ms in took]
    lines += [{"point": None, "timings_ms": {}}, {"point": names[Kind.LOCAL], "timings_ms": {"compute": 300}}]
    seconds, factors = compute_factors(POINTS, lines, {"local": 0.15, "blocks.3": 0.04})
    # The stage that ran often takes what it was measured to; the other what it was profiled to.
    assert seconds == {"local": 0.15, "blocks.3": pytest.approx(0.05)}
    assert factors == pytest.approx([1.0, 1.04, 0.96, 1.0, 3.0, 1.0, 1.0, 2.0])


def test_server_holds_each_frame_as_long_as_it_did() -> None:
    lines = [{"timings_ms": {"server": ms}} for ms in (10, 30, 20)] + [{"timings_ms": {}}]
    assert server_seconds(lines, 0.5) == pytest.approx([0.01, 0.03, 0.02, 0.02])
    assert server_seconds(lines[3:], 0.5) == [0.5]


def test_what_the_processes_add_is_what_stages_server_and_link_do_not_explain() -> None:
    """1000 bytes and 40 of overhead at 0.8 Mbit/s: 10.4 ms; 30 ms there and back, 10 ms of server, 20 ms of compute."""
    trace, conditions = Trace.steps([(10.0, 0.8e6)]), Conditions()
    timings = {"wait": 0.0, "compute": 20.0, "server": 10.0}
    lines = [
        {"captured_s": 5 + n / 10, "bytes": 1000, "latency_ms": 70.4 + over, "timings_ms": timings}
        for n, over in enumerate([4.0, 5.0, 6.0, 90.0, 5.0])
    ]
    lines.append({"captured_s": 5.5, "bytes": 0, "latency_ms": 150.0, "timings_ms": {"compute": 150.0}})
    assert added_seconds(lines, trace, conditions) == pytest.approx(0.005)
    assert added_seconds(lines[5:], trace, conditions) == 0.0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_cell_and_its_simulation(tmp_path) -> None:
    """Loose: on a busy machine the edge computes late, which its simulation knows only in part."""
    link = Window(Trace.steps([(3.0, 4e6), (3.0, 0.6e6)], "steps"), "made", cellular=True)
    console = Console(width=200, file=(tmp_path / "log").open("w+"))
    conditions = Conditions(fps=5.0, seconds=6.0)
    (cell,) = run_real(ServerSettings.load().bundles[0], [(link, 0.5, 0.15)], conditions, console)
    assert sum(cell.outcomes.values()) == conditions.frames
    assert cell.outcomes.get("error", 0) == 0
    assert 0.3 < statistics.mean([cell.measured, cell.simulated]) <= 1.0
    assert abs(cell.difference) < 0.4

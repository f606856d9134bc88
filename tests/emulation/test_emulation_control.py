"""`headrace bench control --real`: a cell with real processes over an emulated link, and its simulation beside it."""

from __future__ import annotations

import statistics

import pytest
from headrace.bench.control.cells import Conditions
from headrace.bench.control.real import compute_factors, run_real, server_seconds
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


@pytest.mark.slow
@pytest.mark.timeout(240)
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

"""`headrace bench control --real`: a cell with real processes over an emulated link, and its simulation beside it."""

from __future__ import annotations

import statistics

import pytest
from headrace.bench.control.cells import Conditions
from headrace.bench.control.real import (
    added_seconds,
    compute_seconds,
    pick_up_seconds,
    profile_in,
    recoding_seconds,
    run_real,
    server_seconds,
)
from headrace.bench.links.trace_set import Window
from headrace.bench.links.traces import Trace
from headrace.models.operating_point import Kind, OperatingPoint
from headrace.server.config import ServerSettings
from rich.console import Console

POINTS = [
    OperatingPoint(0, Kind.LOCAL, accuracy=1.0),
    OperatingPoint(1, Kind.FEATURE, "blocks.3", 1.0, 0, "", 2000, 2400, 0.95, 0.33),
    OperatingPoint(2, Kind.IMAGE, "", 1.0, 20, "jpeg", 4000, 5000, 0.7, 0.04),
]


def test_a_slow_frame_would_have_been_as_slow_at_other_points() -> None:
    """As far up among the times of that stage as it was among its own's; not by the same factor."""
    names = {point.stage: point.name for point in POINTS}
    took = {"jpeg": [6, 6, 10, 6, 6], "blocks.3": [50, 52, 48, 49, 80]}
    lines = [
        {"point": names[stage], "timings_ms": {"prepare": 1, "compute": ms - 2, "compress": 1}}
        for stage, times in took.items()
        for ms in times
    ]
    lines.append({"point": None, "timings_ms": {}})
    seconds = compute_seconds(POINTS, lines, {"local": 0.15, "blocks.3": 0.04, "jpeg": 0.006})
    by_stage = dict(zip(names, seconds.T * 1000, strict=True))
    assert by_stage["jpeg"][:5] == pytest.approx(took["jpeg"])
    assert by_stage["blocks.3"][5:10] == pytest.approx(took["blocks.3"])
    assert by_stage["blocks.3"][2] == pytest.approx(80)
    assert by_stage["jpeg"][9] == pytest.approx(10)
    assert by_stage["blocks.3"][10] == pytest.approx(50)  # nothing was computed: the median
    # Never ran: what it was profiled at, times the median of what the others took over theirs (1 and 1.25).
    assert by_stage["local"] == pytest.approx([150 * 1.125] * 11)


def test_a_free_device_picks_frames_up_as_soon_as_it_did() -> None:
    """The third waits for the device, the fourth perhaps for what the device computes in reserve, the last for none."""
    rows = [(0.0, 2.0, 30.0), (0.1, 4.0, 120.0), (0.2, 24.0, 30.0), (0.3, 40.0, 10.0), (0.4, 3.0, 10.0)]
    lines = [{"captured_s": at, "timings_ms": {"wait": wait, "compute": ms}} for at, wait, ms in rows]
    lines.append({"captured_s": 0.5, "timings_ms": {}})
    assert pick_up_seconds(lines) == pytest.approx([0.002, 0.004, 0.003, 0.003, 0.003, 0.003])


def test_coding_anew_takes_what_it_took() -> None:
    lines = [{"timings_ms": {"again": ms}} for ms in (20, 22, 21, 30, 20)]
    assert recoding_seconds(POINTS, lines, 0.15) == pytest.approx([0.0, 0.021, 0.04 * 0.15])
    assert recoding_seconds(POINTS, lines[:2], 0.15) == pytest.approx([0.0, 0.1 * 0.15, 0.04 * 0.15])


def test_the_simulation_begins_with_the_edges_own_times() -> None:
    log = "[info] device is ready  points=3 slowed_down=14.2 stages_ms={'local': 150.1, 'blocks.3': 61.0} measured=now"
    assert profile_in(log) == pytest.approx({"local": 0.1501, "blocks.3": 0.061})
    assert profile_in("nothing of the kind") == {}


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
    assert added_seconds(lines, trace, conditions) == pytest.approx([0.004, 0.005, 0.006, 0.09, 0.005, 0.005])
    assert added_seconds(lines[5:], trace, conditions) == [0.0]


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

"""The offline optimum against every schedule there is, on cases small enough to try them all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from headrace.bench.control.optimum import offline_optimum
from headrace.bench.control.simulate import best_fixed, replay
from headrace.bench.links.traces import Trace
from headrace.models.exceptions import DataError
from headrace.models.operating_point import Kind, OperatingPoint
from numpy.typing import NDArray

Floats = NDArray[np.float64]
DELAY, SERVER, FPS = 0.015, 0.01, 10.0

SMALL = [
    OperatingPoint(0, Kind.FEATURE, "a", 1.0, 0, "", 4000, 4000, 0.95, 0.4),
    OperatingPoint(1, Kind.FEATURE, "a", 1.0, 1, "", 1500, 1500, 0.8, 0.4),
    OperatingPoint(2, Kind.IMAGE, "", 1.0, 30, "webp", 6000, 6000, 0.9, 0.1),
    OperatingPoint(3, Kind.LOCAL, accuracy=1.0, edge_share=1.0),
]


def by_trying_all(
    points: Sequence[OperatingPoint], sizes: Floats, compute: Floats, trace: Trace, deadline_s: float
) -> float:
    """Every sequence of choices, "left out" among them, one frame after the other, until one is late."""

    def rest(frame: int, core: float, link: float) -> float:
        if frame == len(sizes):
            return 0.0
        best = rest(frame + 1, core, link)
        captured = frame / FPS
        for index, point in enumerate(points):
            ready = max(core, captured) + compute[index]
            answer, after = ready, link
            if point.kind is not Kind.LOCAL:
                after = trace.finish(max(ready, link), float(sizes[frame, index]))
                answer = after + 2 * DELAY + SERVER
            if answer <= captured + deadline_s + 1e-9:
                best = max(best, point.accuracy + rest(frame + 1, ready, after))
        return best

    return rest(0, 0.0, 0.0) / len(sizes)


def random_trace(seed: int) -> Trace:
    rng = np.random.default_rng(seed)
    return Trace.steps(
        [(float(rng.uniform(0.02, 0.3)), float(rng.choice([0.0, 5e4, 3e5, 1e6, 6e6]))) for _ in range(9)] + [(1, 2e5)]
    )


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("deadline_s", [0.1, 0.2, 0.4])
def test_it_is_the_best_of_all_schedules(seed: int, deadline_s: float) -> None:
    rng = np.random.default_rng(100 + seed)
    frames = 5
    sizes = np.array([p.bytes_median for p in SMALL]) * rng.uniform(0.7, 1.4, (frames, len(SMALL)))
    compute = np.array([p.edge_share for p in SMALL]) * rng.choice([0.05, 0.15, 0.3])
    trace = random_trace(seed)
    exact = by_trying_all(SMALL, sizes, compute, trace, deadline_s)
    for bound in ("upper", "lower"):
        found = offline_optimum(
            SMALL, sizes, compute, trace, delay_s=DELAY, deadline_s=deadline_s, fps=FPS, server_s=SERVER,
            cell_s=1e-4, bound=bound,  # type: ignore[arg-type]
        )  # fmt: skip
        assert found == pytest.approx(exact, abs=1e-9), bound


def bundle_like(frames: int, seed: int) -> tuple[list[OperatingPoint], Floats, Floats]:
    rng = np.random.default_rng(seed)
    points = [
        OperatingPoint(level, Kind.FEATURE, "a", 1.0, level, "", size, size, accuracy, 0.4)
        for level, (size, accuracy) in enumerate([(4000, 0.95), (2600, 0.92), (1700, 0.86), (1000, 0.76)])
    ]
    points += [
        OperatingPoint(4 + level, Kind.IMAGE, "", 1.0, level, "webp", size, size, accuracy, 0.14)
        for level, (size, accuracy) in enumerate([(9000, 0.93), (5000, 0.85), (2400, 0.65)])
    ]
    points.append(OperatingPoint(7, Kind.LOCAL, accuracy=1.0, edge_share=1.0))
    sizes = np.round(np.array([p.bytes_median for p in points]) * rng.uniform(0.8, 1.3, (frames, 1)))
    return points, sizes, np.array([p.edge_share for p in points])


@pytest.mark.parametrize(("deadline_s", "uncut_s"), [(0.2, 0.15), (0.4, 0.15), (0.4, 0.5)])
def test_both_bounds_are_near_each_other_and_no_run_is_better(deadline_s: float, uncut_s: float) -> None:
    """The stated error of merging states: the optimum of a longer run is known to 0.01."""
    points, sizes, share = bundle_like(150, 0)
    rng = np.random.default_rng(1)
    trace = Trace.steps([(0.25, float(rate)) for rate in np.exp(rng.normal(12.8, 1.0, 60))])
    every = {"delay_s": DELAY, "deadline_s": deadline_s, "fps": FPS, "server_s": SERVER}
    upper = offline_optimum(points, sizes, share * uncut_s, trace, **every)  # type: ignore[arg-type]
    lower = offline_optimum(points, sizes, share * uncut_s, trace, **every, bound="lower")  # type: ignore[arg-type]
    assert lower <= upper <= lower + 0.01
    assert replay(points, sizes, share * uncut_s, trace, **every).score < upper  # type: ignore[arg-type]
    assert best_fixed(points, sizes, share * uncut_s, trace, **every)[1].score <= upper  # type: ignore[arg-type]


def test_overhead_counts_and_a_dead_link_leaves_local_answers() -> None:
    """Local answers of 1.5 intervals: two of three frames. 1000 bytes and 24 of overhead at 81,920 bit/s: 100 ms."""
    dead = Trace.steps([(10.0, 0.0), (1.0, 1e3)])
    local = [OperatingPoint(0, Kind.LOCAL, accuracy=0.9)]
    found = offline_optimum(local, np.zeros((60, 1)), [0.15], dead, delay_s=0, deadline_s=0.21, fps=10)
    assert found == pytest.approx(0.9 * 2 / 3, abs=1e-9)
    sent = [OperatingPoint(0, Kind.FEATURE, "a", bytes_median=1000, bytes_p95=1000, accuracy=0.9)]
    slow = Trace.steps([(1.0, 81_920)])
    arguments = {"delay_s": 0.0, "deadline_s": 0.1, "fps": 10, "overhead_bytes": 24}
    for overhead, expected in ((24, 0.9), (26, 0.0)):
        arguments["overhead_bytes"] = overhead
        found = offline_optimum(sent, np.full((9, 1), 1000), [0.0], slow, **arguments)  # type: ignore[arg-type]
        assert found == pytest.approx(expected)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError):
        offline_optimum(SMALL, np.zeros((5, 2)), [0.1], random_trace(0), delay_s=0, deadline_s=0.1, fps=10)

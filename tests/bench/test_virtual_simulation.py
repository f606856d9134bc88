"""The loop, fixed points and restricted sets over virtual links: sums, exact small cases, and how well it does."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from headrace.bench.control.records import OUTCOMES, Replay
from headrace.bench.control.simulate import best_fixed, replay
from headrace.bench.links.traces import Trace, read_trace
from headrace.edge.controller import ControlLoop, ControlSettings
from headrace.models.exceptions import DataError
from headrace.models.operating_point import Kind, OperatingPoint
from numpy.typing import NDArray

Floats = NDArray[np.float64]
FPS, DEADLINE, DELAY, SERVER, UNCUT = 10.0, 0.25, 0.015, 0.01, 0.15

ROWS: list[tuple[Kind, str, str, float, list[tuple[int, float]]]] = [
    (Kind.FEATURE, "blocks.2", "", 0.45, [(4200, 0.97), (3300, 0.94), (2500, 0.89), (1700, 0.80)]),
    (Kind.FEATURE, "blocks.3", "", 0.55, [(2650, 0.98), (1900, 0.97), (1520, 0.96), (1200, 0.94), (790, 0.81)]),
    (Kind.FEATURE, "blocks.5", "", 0.86, [(1880, 0.99), (1430, 0.97), (1100, 0.95), (860, 0.93), (550, 0.83)]),
    (Kind.IMAGE, "", "webp", 0.15, [(12000, 0.98), (8000, 0.96), (6200, 0.94), (3700, 0.82), (2000, 0.62)]),
    (Kind.IMAGE, "", "jpeg", 0.03, [(15000, 0.98), (10900, 0.96), (6500, 0.91), (4400, 0.82)]),
    (Kind.LOCAL, "", "", 1.0, [(0, 1.0)]),
]


def table() -> list[OperatingPoint]:
    """Points as a bundle has them: measured sizes and agreement with the uncut model."""
    points: list[OperatingPoint] = []
    for kind, split, codec, share, rows in ROWS:
        for level, (size, accuracy) in enumerate(rows):
            points.append(
                OperatingPoint(
                    len(points), kind, split, 1.0, level, codec, float(size), 1.4 * size, accuracy, edge_share=share
                )
            )
    return points


POINTS = table()
LOCAL = len(POINTS) - 1
WEBP = [index for index, point in enumerate(POINTS) if point.codec == "webp"]


def workload(frames: int, uncut_s: float = UNCUT, seed: int = 0) -> tuple[Floats, Floats]:
    """Sizes [frames, points] that scatter as the table says, alike from frame to frame; compute [frames, points]."""
    rng = np.random.default_rng(seed)
    content = np.empty(frames)
    level = 0.0
    for frame in range(frames):
        if frame % 10 == 0:
            level = float(rng.standard_normal())
        content[frame] = level
    noise = 0.9 * content[:, None] + math.sqrt(1 - 0.81) * rng.standard_normal((frames, len(POINTS)))
    median = np.array([point.bytes_median for point in POINTS])
    share = np.array([point.edge_share for point in POINTS])
    sizes = np.round(median * np.exp(math.log(1.4) / 1.645 * noise))
    return sizes, share * uncut_s * np.exp(0.03 * rng.standard_normal((frames, 1)))


def markov(seed: int, seconds: float) -> Trace:
    """A link that jumps between levels from 60 kbit/s to 8 Mbit/s every 2.5 s or so, and flickers."""
    rng = np.random.default_rng(seed)
    levels = np.array([0.06, 0.15, 0.4, 1.0, 3.0, 8.0]) * 1e6
    state, steps = 3, []
    for _ in range(int(seconds * 10)):
        if rng.random() < 0.04:
            state = int(np.clip(state + rng.choice([-2, -1, 1, 2]), 0, 5))
        steps.append((0.1, float(levels[state]) * math.exp(0.25 * float(rng.standard_normal()))))
    return Trace.steps(steps, "markov")


SQUARE = Trace.steps([(10, 8e6), (10, 0.3e6)], "square wave")
DEMO = Trace.steps([(8, 8e6), (8, 2e6), (8, 0.5e6), (8, 0.1e6), (4, 0), (8, 0.5e6), (8, 8e6)], "demo")


def run(trace: Trace, frames: int, *, fixed: int | None = None, allowed: Sequence[int] | None = None) -> Replay:
    sizes, compute = workload(frames)
    return replay(
        POINTS, sizes, compute, trace,
        delay_s=DELAY, deadline_s=DEADLINE, fps=FPS, server_s=SERVER, fixed=fixed, allowed=allowed,
    )  # fmt: skip


def fixed_in_hindsight(trace: Trace, frames: int) -> float:
    sizes, compute = workload(frames)
    return best_fixed(
        POINTS, sizes, compute, trace, delay_s=DELAY, deadline_s=DEADLINE, fps=FPS, server_s=SERVER
    )[1].score  # fmt: skip


# Exact small cases ---------------------------------------------------------------------------------------------------


def test_one_fixed_point_in_exact_numbers() -> None:
    """1000 bytes at 80 kbit/s are 100 ms; 20 ms of compute, 10 ms each way, 5 ms in the server."""
    points = [OperatingPoint(7, Kind.FEATURE, "cut", bytes_median=1000, bytes_p95=1000, accuracy=0.9, edge_share=0.2)]
    result = replay(
        points, np.full((5, 1), 1000), [0.02], Trace.steps([(1.0, 80_000)]),
        delay_s=0.01, deadline_s=0.2, fps=5, server_s=0.005, fixed=0,
    )  # fmt: skip
    assert [record.outcome for record in result.records] == ["ok"] * 5
    assert [record.latency_s for record in result.records] == pytest.approx([0.02 + 0.1 + 0.02 + 0.005] * 5)
    assert [record.captured_s for record in result.records] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    assert result.score == pytest.approx(0.9)
    assert result.on_time == 1.0
    assert (result.bytes, result.bytes_per_frame, result.switches) == (5000, 1000, 0)


def test_frames_may_be_seen_late_and_their_answers_take_longer() -> None:
    """As above; the second frame is noticed 7 ms after its capture, the third's answer takes 9 ms more."""
    points = [OperatingPoint(7, Kind.FEATURE, "cut", bytes_median=1000, bytes_p95=1000, accuracy=0.9, edge_share=0.2)]
    result = replay(
        points, np.full((3, 1), 1000), [0.02], Trace.steps([(1.0, 80_000)]),
        delay_s=0.01, deadline_s=0.2, fps=5, server_s=0.005, fixed=0, seen_s=[0, 0.007, 0], back_s=[0, 0, 0.009],
    )  # fmt: skip
    assert [record.latency_s for record in result.records] == pytest.approx([0.145, 0.152, 0.154])


def test_the_loop_begins_with_the_devices_profile() -> None:
    """By the bundle's share the exit takes 40 ms, in truth 120: who was profiled knows at once that it is late."""
    points = [
        OperatingPoint(0, Kind.LOCAL, "cut", accuracy=0.6, edge_share=0.2),
        OperatingPoint(1, Kind.FEATURE, "cut", bytes_median=900, bytes_p95=900, accuracy=0.5, edge_share=0.2),
    ]
    arguments = {"delay_s": 0.005, "deadline_s": 0.1, "fps": 8.0, "uncut_s": 0.2}
    runs = [
        replay(
            points, np.tile([0, 900], (4, 1)), [0.12, 0.04], Trace.steps([(1.0, 4e6)]),
            **arguments, profile_s=profile_s,  # type: ignore[arg-type]
        )
        for profile_s in ({}, {"exit@cut": 0.12, "cut": 0.04})
    ]  # fmt: skip
    assert runs[0].records[0].point == 0 and runs[0].records[0].outcome == "late"
    assert [record.outcome for record in runs[1].records] == ["ok"] * 4


def test_queue_of_the_link_makes_frames_late_and_the_cap_holds() -> None:
    points = [OperatingPoint(0, Kind.FEATURE, "cut", bytes_median=1000, bytes_p95=1000, accuracy=1.0)]
    arguments = {"delay_s": 0.0, "deadline_s": 0.25, "fps": 10.0, "fixed": 0}
    slow = Trace.steps([(1.0, 40_000)])  # 200 ms a packet, one every 100 ms
    result = replay(points, np.full((6, 1), 1000), [0.0], slow, **arguments, max_in_flight=100)  # type: ignore[arg-type]
    assert [record.latency_s for record in result.records] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    assert [record.outcome for record in result.records] == ["ok", *["late"] * 5]
    slow = Trace.steps([(1.0, 41_000)])  # each answer comes just before the next but one frame
    capped = replay(points, np.full((6, 1), 1000), [0.0], slow, **arguments, max_in_flight=1)  # type: ignore[arg-type]
    assert [record.outcome for record in capped.records] == ["ok", "dropped"] * 3
    assert [record.bytes for record in capped.records] == [1000, 0] * 3


def test_local_on_a_slow_device_answers_two_of_three() -> None:
    """150 ms at 10 frames/s: the newest waiting frame is taken, so every third frame is passed over."""
    result = replay(
        [OperatingPoint(0, Kind.LOCAL, accuracy=1.0)], np.zeros((300, 1)), [0.149], DEMO,
        delay_s=DELAY, deadline_s=DEADLINE, fps=FPS, fixed=0,
    )  # fmt: skip
    assert result.score == pytest.approx(0.67, abs=0.01)
    assert result.outcomes["local"] + result.outcomes["dropped"] == 300
    assert {record.reason for record in result.records if record.outcome == "dropped"} == {"busy"}


def test_waiting_frame_is_replaced_by_the_newest() -> None:
    result = replay(
        [OperatingPoint(0, Kind.LOCAL, accuracy=1.0)], np.zeros((4, 1)), [0.35], DEMO,
        delay_s=0, deadline_s=1.0, fps=10, fixed=0,
    )  # fmt: skip
    assert [record.outcome for record in result.records] == ["local", "dropped", "dropped", "local"]
    assert result.records[3].latency_s == pytest.approx(0.4)


def test_agreement_scores_frames_one_by_one() -> None:
    agree = np.array([[1.0], [0.0], [1.0], [0.0]])
    result = replay(
        [OperatingPoint(0, Kind.LOCAL, accuracy=0.9)], np.zeros((4, 1)), [0.01], DEMO,
        delay_s=0, deadline_s=0.1, fps=10, fixed=0, agree=agree,
    )  # fmt: skip
    assert result.on_time == 1.0
    assert result.score == 0.5


def test_lost_connection_leaves_no_frame_without_an_outcome() -> None:
    sizes, compute = workload(100)
    result = replay(
        POINTS, sizes, compute, Trace.steps([(10, 1e6)]), delay_s=DELAY, deadline_s=DEADLINE, fps=FPS, server_s=SERVER,
        disconnected_s=[(3.0, 6.0)],
    )  # fmt: skip
    assert sum(result.outcomes.values()) == 100
    during = [record for record in result.records if 3.0 <= record.captured_s < 5.9]
    assert sum(record.bytes for record in during) == 0
    assert sum(record.outcome == "local" for record in during) > 0.6 * len(during)
    after = [record for record in result.records if record.captured_s >= 6.5]
    assert sum(record.outcome in {"ok", "local"} for record in after) / len(after) > 0.9


@pytest.mark.parametrize(
    ("sizes", "compute", "extra"),
    [
        (np.zeros(5), [0.1], {}),
        (np.zeros((5, 2)), [0.1], {}),
        (np.zeros((5, 1)), [0.1, 0.2], {}),
        (np.zeros((5, 1)), [0.1], {"fixed": 1}),
        (np.zeros((5, 1)), [0.1], {"allowed": [-1]}),
        (np.zeros((5, 1)), [0.1], {"agree": np.zeros((4, 1))}),
    ],
)
def test_shapes_that_do_not_fit_are_refused(sizes: Floats, compute: list[float], extra: dict[str, object]) -> None:
    points = [OperatingPoint(0, Kind.LOCAL, accuracy=1.0)]
    with pytest.raises(DataError):
        replay(points, sizes, compute, DEMO, delay_s=0, deadline_s=1, fps=1, **extra)  # type: ignore[arg-type]


# How well it does ----------------------------------------------------------------------------------------------------


def check_sums(result: Replay, frames: int) -> None:
    assert result.frames == frames == sum(result.outcomes.values())
    assert [record.frame for record in result.records] == list(range(frames))
    assert set(result.outcomes) == set(OUTCOMES)
    for record in result.records:
        assert record.outcome in OUTCOMES
        assert (record.bytes > 0) <= (record.outcome in {"ok", "late"} or record.reason == "fallback")
        assert (record.outcome in {"ok", "local"}) == (record.latency_s <= DEADLINE + 1e-9)
        assert record.score == 0 or record.outcome in {"ok", "local"}


def test_same_arguments_give_the_same_records() -> None:
    first, second = run(DEMO, 200), run(DEMO, 200)
    assert first.records == second.records
    check_sums(first, 200)


def test_demo_schedule_beats_every_fixed_point_and_both_references() -> None:
    frames = 520
    loop, webp, local = run(DEMO, frames), run(DEMO, frames, allowed=WEBP), run(DEMO, frames, fixed=LOCAL)
    for result in (loop, webp, local):
        check_sums(result, frames)
    assert loop.score > fixed_in_hindsight(DEMO, frames) + 0.05
    assert loop.score > webp.score + 0.15
    assert loop.score > local.score + 0.2
    assert loop.score > 0.9


def test_demo_outage_is_answered_locally_and_recovers() -> None:
    result = run(DEMO, 520)
    outage = [record for record in result.records if 32.4 <= record.captured_s < 36.0]
    assert {record.outcome for record in outage} <= {"local", "dropped", "late"}
    assert sum(record.outcome == "local" for record in outage) >= 0.6 * len(outage)
    assert sum(record.bytes for record in outage) < 3000
    recovered = [record for record in result.records if 36.6 <= record.captured_s < 44]
    assert sum(record.outcome in {"ok", "local"} for record in recovered) / len(recovered) > 0.95


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_markov_links(seed: int) -> None:
    trace = markov(seed, 60)
    result = run(trace, 600)
    check_sums(result, 600)
    assert result.score > fixed_in_hindsight(trace, 600) - 0.01
    assert result.score > run(trace, 600, allowed=WEBP).score


def test_square_wave_is_no_worse_than_the_best_fixed_point() -> None:
    assert run(SQUARE, 800).score > fixed_in_hindsight(SQUARE, 800) - 0.01


@pytest.mark.parametrize(
    ("rate", "floor"), [(8e6, 0.975), (1e6, 0.97), (0.4e6, 0.96), (0.1e6, 0.79), (0.03e6, 0.62), (0.003e6, 0.62)]
)
def test_steady_links_never_collapse(rate: float, floor: float) -> None:
    """However slow, it is never much worse than local answers alone (0.66)."""
    assert run(Trace.steps([(60, rate)]), 400).score > floor


def test_probing_a_dead_link_costs_little() -> None:
    alive_then_dead = Trace.steps([(5, 1e6), (3600, 0.0)])
    result = run(alive_then_dead, 600)
    dead = result.records[60:]
    assert sum(record.score for record in dead) / len(dead) > 0.63
    # Under 1 % of what the link carried while it lived.
    assert sum(record.bytes for record in dead) < 0.01 * 1e6 / 8 * 55


def test_fixed_points_run_at_thousands_of_frames_a_second() -> None:
    sizes, compute = workload(4000)
    began = time.process_time()
    replay(POINTS, sizes, compute, markov(1, 60), delay_s=DELAY, deadline_s=DEADLINE, fps=FPS, fixed=4)
    assert 4000 / (time.process_time() - began) > 2000


def test_decision_with_a_hundred_points_is_cheap() -> None:
    many = [
        OperatingPoint(
            index, Kind.FEATURE, f"cut{index % 8}", 1.0, index, "", 500.0 + 60 * index, 700.0 + 80 * index,
            0.5 + 0.004 * index, edge_share=0.3 + 0.05 * (index % 8),
        )
        for index in range(99)
    ]  # fmt: skip
    loop = ControlLoop(
        [*many, OperatingPoint(99, Kind.LOCAL, accuracy=1.0)], deadline_s=DEADLINE, frame_interval_s=0.1, uncut_s=UNCUT
    )
    for frame in range(3):
        loop.on_written(frame, 1500, 0.0)
    best = math.inf
    for _ in range(20):
        began = time.process_time()
        for _ in range(20):
            loop.choose(0.05, 0.04, compute_free_at=0.05)
        best = min(best, (time.process_time() - began) / 20)
    # About 0.1 ms on one core of a small server; the bound allows for a busy machine.
    assert best < 1e-3


def test_a_packet_that_came_out_too_large_is_coded_anew() -> None:
    """Every other picture's JPEG is twice as large as the table says; the link carries the usual ones in time."""
    fine = OperatingPoint(0, Kind.IMAGE, codec="jpeg", rate_level=50, bytes_median=3000, bytes_p95=3600, accuracy=0.9)
    coarse = OperatingPoint(1, Kind.IMAGE, codec="jpeg", rate_level=20, bytes_median=1500, bytes_p95=1800, accuracy=0.7)
    sizes = np.full((200, 2), (3000.0, 1500.0))
    sizes[np.random.default_rng(0).random(200) < 0.3] *= 2
    runs = [
        replay(
            [fine, coarse],
            sizes,
            0.005,
            Trace.steps([(60.0, 500e3)]),
            delay_s=DELAY,
            deadline_s=0.1,
            fps=FPS,
            coder_s=coder_s,
        )
        for coder_s in (0.0, 0.005)
    ]
    assert all(sum(each.outcomes.values()) == 200 for each in runs)
    without, with_it = runs
    assert with_it.on_time > without.on_time + 0.05
    assert with_it.score > without.score + 0.02
    again = [r for r in with_it.records if r.latency_s < 0.1 and sizes[r.frame, 0] > 3000]
    assert all(r.point == 1 for r in again) and len(again) > 30


SENT = OperatingPoint(0, Kind.FEATURE, "cut", bytes_median=1500, bytes_p95=1500, accuracy=0.9, edge_share=0.2)
EXIT = OperatingPoint(1, Kind.LOCAL, "small", accuracy=0.6, edge_share=0.3)


def stalling(fallback: bool) -> Replay:
    """A link that stops without warning for half of the time, and the loop."""
    stops = np.random.default_rng(0).exponential(0.3, 200)
    trace = Trace.steps([(float(seconds), 2e6 * (number % 2)) for number, seconds in enumerate(stops)])
    return replay(
        [SENT, EXIT],
        np.full((300, 2), 1500.0),
        [0.02, 0.03],
        trace,
        delay_s=DELAY,
        deadline_s=0.1,
        fps=FPS,
        uncut_s=0.1,
        settings=ControlSettings(fallback=fallback),
    )


def test_the_answer_in_reserve_is_given_where_the_link_stalls() -> None:
    without, with_it = stalling(False), stalling(True)
    for each in (without, with_it):
        assert sum(each.outcomes.values()) == 300
    fallen_back = [r for r in with_it.records if r.reason == "fallback"]
    assert len(fallen_back) > 10 and not any(r.reason == "fallback" for r in without.records)
    assert all((r.score, r.outcome, r.point) == (EXIT.accuracy, "local", 0) and r.latency_s <= 0.1 for r in fallen_back)
    assert with_it.score > without.score + 0.03
    assert with_it.on_time > without.on_time


def test_switches_are_counted() -> None:
    result = run(SQUARE, 300)
    chosen = [record.point for record in result.records if record.point >= 0]
    assert result.switches == sum(a != b for a, b in pairwise(chosen))


@pytest.mark.parametrize("name", ["TMobile-UMTS-driving.up", "ATT-LTE-driving.up", "Verizon-LTE-short.up"])
def test_recorded_cellular_links(name: str) -> None:
    folder = os.environ.get("HEADRACE_DATA")
    if not folder:
        pytest.skip("HEADRACE_DATA is not set: no recorded link was run; set it to the folder that holds traces/")
    trace = read_trace(Path(folder, "traces", "mahimahi", name)).window(0, 60)
    result = run(trace, 600)
    check_sums(result, 600)
    assert result.score > fixed_in_hindsight(trace, 600) - 0.02
    assert result.score > run(trace, 600, allowed=WEBP).score

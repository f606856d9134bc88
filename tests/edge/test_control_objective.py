"""Prices and accounts in exact numbers, and what they do to choices, alone and over a virtual link."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from headrace.bench.control.records import Replay
from headrace.bench.control.simulate import replay
from headrace.bench.links.traces import Trace
from headrace.edge.controller import ControlLoop, ControlSettings
from headrace.edge.objective import DAY_S, FLOOR_FRAMES, STEEPNESS, Objective, Prices
from headrace.models.exceptions import OperatingPointError
from headrace.models.operating_point import Kind, OperatingPoint

FINE = OperatingPoint(0, Kind.FEATURE, "a", 1.0, 0, "", 4000, 4000, 0.96, 0.5)
MIDDLE = OperatingPoint(1, Kind.FEATURE, "a", 1.0, 1, "", 2000, 2000, 0.9, 0.5)
COARSE = OperatingPoint(2, Kind.FEATURE, "a", 1.0, 2, "", 800, 800, 0.7, 0.5)
LIGHT = OperatingPoint(3, Kind.IMAGE, "", 1.0, 75, "webp", 7000, 7000, 0.9, 0.1)
LOCAL = OperatingPoint(4, Kind.LOCAL, accuracy=1.0, edge_share=1.0)
POINTS = (FINE, MIDDLE, COARSE, LIGHT, LOCAL)
FAST = Trace.steps([(60, 8e6)])
FRAMES, FPS = 600, 10.0


def run(settings: ControlSettings, trace: Trace = FAST, points: tuple[OperatingPoint, ...] = POINTS) -> Replay:
    sizes = np.tile([p.bytes_median for p in points], (FRAMES, 1))
    share = [p.edge_share for p in points]
    return replay(
        points, sizes, np.array(share) * 0.15, trace,
        delay_s=0.015, deadline_s=0.25, fps=FPS, server_s=0.01, settings=settings, uncut_s=0.15,
    )  # fmt: skip


def compute_s(result: Replay, points: tuple[OperatingPoint, ...] = POINTS) -> float:
    return sum(0.15 * points[r.point].edge_share for r in result.records if r.point >= 0)


# Accounts and prices ------------------------------------------------------------------------------------------------


def test_nothing_has_a_price_by_default() -> None:
    prices = Prices()
    assert prices.free
    assert (prices.per_byte, prices.per_second, prices.affordable_bytes) == (0.0, 0.0, math.inf)


def test_budget_fills_at_its_rate_and_empties_by_what_is_sent() -> None:
    """86,400 bytes a day are one a second; the account holds those of 100 seconds and begins full."""
    prices = Prices(bytes_per_day=DAY_S, budget_window_s=100.0, bytes_scale=10.0)
    assert prices.affordable_bytes == 100.0
    assert prices.per_byte == 0.0
    prices.captured(0.0, 1)
    prices.sent(70.0)
    assert prices.affordable_bytes == pytest.approx(30.0)
    assert prices.per_byte == pytest.approx(0.05 * math.expm1(STEEPNESS * 0.7) / 10)
    prices.captured(20.0, 1)
    assert prices.affordable_bytes == pytest.approx(50.0)
    prices.sent(60.0)
    assert prices.affordable_bytes == 0.0
    assert prices.per_byte == pytest.approx(0.05 * math.expm1(STEEPNESS) / 10)
    prices.captured(1000.0, 1)
    assert prices.affordable_bytes == 100.0


def test_price_of_what_is_saved_rises_with_answers_above_the_floor() -> None:
    prices = Prices(Objective.BYTES, accuracy_floor=0.8, bytes_scale=10.0)
    before = prices.per_byte
    assert before == pytest.approx(0.05 * math.expm1(STEEPNESS / 2) / 10)
    prices.captured(0.0, 1)
    prices.answered(1.0)
    share = (FLOOR_FRAMES / 2 + 0.2) / FLOOR_FRAMES
    assert prices.per_byte == pytest.approx(0.05 * math.expm1(STEEPNESS * share) / 10)
    assert prices.per_byte > before
    prices.captured(0.1, 100)  # that many frames were lost
    assert prices.per_byte == 0.0
    assert prices.per_second == 0.0
    assert Prices(Objective.COMPUTE, accuracy_floor=0.8, seconds_scale=0.1).per_second > 0
    assert Prices(Objective.COMPUTE, accuracy_floor=0.8).per_byte == 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"accuracy_floor": 0.8},
        {"objective": Objective.BYTES},
        {"objective": Objective.COMPUTE, "accuracy_floor": 1.0},
        {"bytes_per_day": -1.0},
    ],
)
def test_wishes_that_do_not_fit_together_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(OperatingPointError):
        Prices(**wrong)  # type: ignore[arg-type]


def test_packet_that_the_budget_does_not_hold_is_neither_chosen_nor_written() -> None:
    settings = ControlSettings(overhead_bytes=0, bytes_per_day=3000 * DAY_S, budget_window_s=1.0)
    loop = ControlLoop((FINE, MIDDLE), deadline_s=0.25, frame_interval_s=0.1, uncut_s=0.15, settings=settings)
    assert loop.choose(0.0, 0.0, compute_free_at=0.0).point == MIDDLE
    assert loop.worth_writing(0.08, 0.0, 2999)
    assert not loop.worth_writing(0.08, 0.0, 3001)
    loop.on_written(1, 2000, 0.08)
    # 1000 bytes are left and 0.1 s later 1300, of which not even the smaller packet can be paid.
    loop.on_result(1, 0.12, server_s=0.01, queue_depth=0)
    assert loop.choose(0.1, 0.1, compute_free_at=0.1).p_on_time == 0.0
    assert loop.choose(0.5, 0.5, compute_free_at=0.5).point == MIDDLE


# Over a virtual link ------------------------------------------------------------------------------------------------


def test_fewest_bytes_above_the_floor() -> None:
    most = run(ControlSettings())
    spent = [most.bytes]
    for floor in (0.9, 0.8, 0.7):
        result = run(ControlSettings(objective=Objective.BYTES, accuracy_floor=floor))
        assert floor - 0.01 <= result.score <= floor + 0.06
        spent.append(result.bytes)
    assert all(later < 0.8 * earlier for earlier, later in pairwise(spent))
    # Two of three frames can be answered locally: a floor below that costs no byte but probes.
    assert run(ControlSettings(objective=Objective.BYTES, accuracy_floor=0.5)).bytes < 0.02 * most.bytes


def test_least_compute_above_the_floor() -> None:
    most = run(ControlSettings())
    result = run(ControlSettings(objective=Objective.COMPUTE, accuracy_floor=0.85))
    assert result.score >= 0.84
    # WebP alone would do at a fifth of a head's compute.
    assert compute_s(result) < 0.4 * compute_s(most)
    assert result.bytes > most.bytes


def test_floor_that_cannot_be_kept_leaves_the_most_accuracy() -> None:
    slow = Trace.steps([(60, 40e3)])
    most = run(ControlSettings(), slow)
    result = run(ControlSettings(objective=Objective.BYTES, accuracy_floor=0.95), slow)
    assert result.score == pytest.approx(most.score, abs=0.03)


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
def test_budget_is_kept_and_used(share: float) -> None:
    free = run(ControlSettings())
    seconds = FRAMES / FPS
    window = 5.0
    rate = share * free.bytes / seconds
    result = run(ControlSettings(overhead_bytes=0, bytes_per_day=rate * DAY_S, budget_window_s=window))
    assert result.bytes <= rate * (seconds + window)
    assert result.bytes > 0.7 * rate * seconds
    assert result.score < free.score
    # Bytes go where they do the most: better than sending what was best until the money is gone, then nothing.
    local_alone = 2 / 3
    assert result.score > local_alone + share * (free.score - local_alone) + 0.03


def test_without_a_local_point_the_budget_is_spread_over_the_frames() -> None:
    points = tuple(replace(p, id=i) for i, p in enumerate(POINTS[:3]))
    rate = 800 * FPS * 1.3
    settings = ControlSettings(overhead_bytes=0, bytes_per_day=rate * DAY_S, budget_window_s=5.0)
    result = run(settings, points=points)
    assert result.bytes <= rate * (FRAMES / FPS + 5.0)
    assert result.score > 0.7

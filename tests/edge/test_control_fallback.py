"""A frame that is sent has the exit's answer in reserve: what that does to choices, in exact numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from headrace.edge.controller import ControlLoop, ControlSettings
from headrace.edge.fallback import Fallback
from headrace.edge.lookahead import Lookahead
from headrace.edge.steady import SteadyExperts
from headrace.models.operating_point import Kind, OperatingPoint

RTT, HOLD = 0.03, 0.01
SENT = OperatingPoint(0, Kind.FEATURE, "cut", bytes_median=1500, bytes_p95=1800, accuracy=0.9, edge_share=0.3)
ELSEWHERE = replace(SENT, id=1, split="later", edge_share=0.5)
EXIT = OperatingPoint(2, Kind.LOCAL, "cut", accuracy=0.6, edge_share=0.25)
POINTS = (SENT, ELSEWHERE, EXIT)


def trained(rates: list[float], **changes: object) -> tuple[ControlLoop, float]:
    """A loop that has seen a frame at each of these rates, each on an idle link; and the time after that."""
    settings = ControlSettings(overhead_bytes=0, rtt_s=RTT, server_s=HOLD, **changes)  # type: ignore[arg-type]
    loop = ControlLoop(POINTS, deadline_s=0.1, frame_interval_s=0.1, uncut_s=0.1, settings=settings)
    loop.on_round_trip(RTT, 0.0)
    now = 0.0
    for frame, rate in enumerate(rates):
        loop.on_written(frame, 1500, now + 0.03)
        done = now + 0.03 + 8 * 1500 / rate + RTT + HOLD
        loop.on_result(frame, done, server_s=HOLD, queue_depth=0)
        now = max(now + 0.1, done)
    return loop, now


BET = [2e6, 150e3] * 20
"""A link on which 1,500 bytes are in time in about one frame of two: they take 6 or 80 ms, and 30 are left."""


def test_a_bet_is_taken_where_nothing_is_lost_by_it() -> None:
    loop, now = trained(BET)
    choice = loop.choose(now, now, compute_free_at=now)
    assert choice.point is SENT
    assert choice.p_on_time == 1.0, "an answer there will be, the server's or the exit's"


def test_without_an_answer_in_reserve_the_sure_exit_is_better() -> None:
    loop, now = trained(BET, fallback=False)
    assert loop.choose(now, now, compute_free_at=now).point is EXIT


def test_an_exit_serves_its_own_split_point_alone() -> None:
    fallback = Fallback(POINTS, np.array([0, 1, 2]), seconds=0.003)
    assert fallback.accuracy.tolist() == [0.6, 0.0, 0.0]
    assert fallback.seconds_of().tolist() == [0.003, 0.0, 0.0]
    assert fallback.done(np.array([1.0, 2.0, 3.0])).tolist() == [1.003, 2.0, 3.0]
    assert not Fallback(POINTS[:2], np.array([0, 1]), seconds=0.003)
    assert not Fallback(POINTS, np.array([0, 1, 2]), seconds=0.003, active=False)


def test_what_it_takes_is_measured() -> None:
    fallback = Fallback(POINTS, np.array([0, 1, 2]), seconds=0.003)
    for _ in range(40):
        fallback.add(0.008)
    assert fallback.seconds == pytest.approx(0.008, rel=0.01)


def test_one_that_would_be_late_itself_is_none() -> None:
    loop, now = trained(BET)
    for _ in range(60):
        loop.on_reserve(0.08)  # 30 ms of head and 80 ms of exit are over the deadline of 100 ms
    choice = loop.choose(now, now, compute_free_at=now)
    assert choice.point is EXIT or choice.p_on_time < 1.0


def test_states_are_worth_more_with_it() -> None:
    def value(fallback: list[float]) -> float:
        ahead = Lookahead(
            np.array([0.9]), np.array([False]), np.array([0]), fallback=np.array(fallback), deadline_s=0.1,
            frame_interval_s=0.1,
        )  # fmt: skip
        ahead.solve(np.array([0.03]), np.array([12_000.0]), RTT + HOLD, 0.003)
        return float(ahead.after(np.zeros(1), np.array([0]), np.zeros((1, 1)), np.array([50e3]))[0])

    # At 50 kbit/s no packet is ever in time: 0.6 a frame from here on, discounted by 0.9 each.
    assert value([0.0]) == pytest.approx(0.0)
    assert value([0.6]) == pytest.approx(0.9 * 0.6 / (1 - 0.9), rel=0.02)


def test_a_point_without_one_is_not_beaten_away() -> None:
    """The same accuracy, bytes and compute, but no answer in reserve: that one is not needed; the other way it is."""
    for order in (POINTS[:2], POINTS[1::-1]):
        points = [replace(p, edge_share=0.3) for p in order]
        fallback = Fallback([*points, EXIT], np.array([0, 1, 2]), seconds=0.0).accuracy[:2]
        ahead = Lookahead(
            np.array([0.9, 0.9]),
            np.zeros(2, bool),
            np.array([0, 1]),
            fallback=fallback,
            deadline_s=0.1,
            frame_interval_s=0.1,
        )
        ahead.solve(np.array([0.03, 0.03]), np.array([12_000.0, 12_000.0]), RTT)
        assert [points[index].split for index in ahead.kept] == ["cut"]


def test_experts_have_it_too() -> None:
    for fallback, expected in ((None, 0.0), (np.array([0.6]), 0.6)):
        experts = SteadyExperts(
            np.array([0.9]), np.zeros(1, bool), fallback=fallback, deadline_s=0.1, frame_interval_s=0.1, memory=10
        )
        for frame in range(200):
            experts.frame(0.1 * frame, np.array([0.03]), np.array([12_000.0]), 10e3, RTT, np.array([0.003]))
        assert experts.scores[0] == pytest.approx(expected, abs=0.01)

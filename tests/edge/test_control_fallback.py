"""A frame that is sent may have an answer of the device in reserve: what that does to choices, in exact numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from headrace.edge.controller import ControlLoop, ControlSettings
from headrace.models.operating_point import Kind, OperatingPoint

RTT, HOLD = 0.03, 0.01
SENT = OperatingPoint(0, Kind.FEATURE, "cut", bytes_median=1500, bytes_p95=1800, accuracy=0.9, edge_share=0.2)
EXIT = OperatingPoint(1, Kind.LOCAL, "small", accuracy=0.6, edge_share=0.3)
SLOW = OperatingPoint(2, Kind.LOCAL, accuracy=1.0, edge_share=1.0)
POINTS = (SENT, EXIT, SLOW)
BET = [2e6, 150e3] * 20
"""A link on which 1,500 bytes are in time in about one frame of two: they take 6 or 80 ms, and 40 are left."""


def trained(
    rates: list[float], points: tuple[OperatingPoint, ...] = POINTS, uncut_s: float = 0.1, **changes: object
) -> tuple[ControlLoop, float]:
    """A loop that has seen a frame at each of these rates, each on an idle link; and the time after that."""
    settings = ControlSettings(overhead_bytes=0, rtt_s=RTT, server_s=HOLD, **changes)  # type: ignore[arg-type]
    loop = ControlLoop(points, deadline_s=0.1, frame_interval_s=0.1, uncut_s=uncut_s, settings=settings)
    loop.on_round_trip(RTT, 0.0)
    now = 0.0
    for frame, rate in enumerate(rates):
        loop.on_written(frame, 1500, now + 0.03)
        done = now + 0.03 + 8 * 1500 / rate + RTT + HOLD
        loop.on_result(frame, done, server_s=HOLD, queue_depth=0)
        now = max(now + 0.1, done)
    return loop, now


def test_a_bet_is_taken_where_nothing_is_lost_by_it() -> None:
    loop, now = trained(BET)
    choice = loop.choose(now, now, compute_free_at=now)
    assert (choice.point, choice.reserve) == (SENT, EXIT)
    assert choice.p_on_time == 1.0, "an answer there will be, the server's or the device's"


def test_without_an_answer_in_reserve_the_sure_one_is_better() -> None:
    loop, now = trained(BET, fallback=False)
    choice = loop.choose(now, now, compute_free_at=now)
    assert (choice.point, choice.reserve) == (EXIT, None)


def test_none_is_kept_on_a_link_that_needs_none() -> None:
    loop, now = trained([2e6] * 40)
    choice = loop.choose(now, now, compute_free_at=now)
    assert (choice.point, choice.reserve) == (SENT, None)


def test_one_that_would_be_late_itself_is_none() -> None:
    """Of a device on which the exit takes 90 ms, after 60 ms of head."""
    loop, now = trained(BET, uncut_s=0.3)
    choice = loop.choose(now, now, compute_free_at=now)
    assert choice.reserve is None


def test_the_most_accurate_that_fits_is_kept() -> None:
    better = replace(EXIT, id=3, split="middle", accuracy=0.7, edge_share=0.4)
    loop, now = trained(BET, (SENT, EXIT, better, SLOW))
    choice = loop.choose(now, now, compute_free_at=now)
    assert (choice.point, choice.reserve) == (SENT, better)


def test_what_it_takes_is_measured() -> None:
    loop, now = trained(BET)
    for _ in range(60):
        loop.on_reserve(EXIT, 0.09)  # 20 ms of head and 90 ms of exit are over the deadline
    assert loop.choose(now, now, compute_free_at=now).reserve is None


def test_in_an_outage_nothing_is_sent_for_the_sake_of_a_bet() -> None:
    loop, now = trained(BET)
    loop.on_written(99, 1500, now)
    late = now + 1.0
    choice = loop.choose(late, late, compute_free_at=late)
    assert loop.in_outage(late)
    assert choice.point is EXIT and choice.reserve is None


def test_a_frame_is_answered_once_though_the_server_comes_just_in_time_after_the_fallback() -> None:
    loop, now = trained(BET)
    loop.choose(now, now, compute_free_at=now)
    loop.on_written(99, 1500, now + 0.02)
    before = loop._steady._credit
    loop.on_fallback(EXIT, 99)
    loop.on_result(99, now + 0.097, server_s=HOLD, queue_depth=0)  # 3 ms before the deadline
    assert loop._steady._credit == pytest.approx(before + EXIT.accuracy)

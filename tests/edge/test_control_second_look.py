"""A packet that turns out too large is coded anew at another level of its split point, where that is worth it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from headrace.edge.controller import ControlLoop, ControlSettings
from headrace.edge.objective import Objective
from headrace.models.operating_point import Kind, OperatingPoint

FINE, MIDDLE, COARSE = (
    OperatingPoint(
        number, Kind.FEATURE, "cut", rate_level=number, bytes_median=size, bytes_p95=1.3 * size, accuracy=accuracy,
        edge_share=0.2,
    )
    for number, (size, accuracy) in enumerate(((2000, 0.95), (1200, 0.9), (600, 0.8)))
)  # fmt: skip
ELSEWHERE = OperatingPoint(3, Kind.FEATURE, "later cut", bytes_median=300, bytes_p95=330, accuracy=0.94, edge_share=0.6)
POINTS = (FINE, MIDDLE, COARSE, ELSEWHERE)
RTT, HOLD, RATE = 0.03, 0.01, 200e3


def trained(
    rate: float = RATE, settings: ControlSettings | None = None, deadline_s: float = 0.2
) -> tuple[ControlLoop, float]:
    """A loop that has seen thirty packets on an idle, steady link; and when the next frame is captured."""
    settings = settings or ControlSettings(overhead_bytes=0, rtt_s=RTT, server_s=HOLD)
    loop = ControlLoop(POINTS, deadline_s=deadline_s, frame_interval_s=0.1, uncut_s=0.15, settings=settings)
    loop.on_round_trip(RTT, 0.0)
    for frame in range(30):
        ready = 0.1 * frame + 0.03
        loop.on_written(frame, 1200, ready)
        loop.on_result(frame, ready + 8 * 1200 / rate + RTT + HOLD, server_s=HOLD, queue_depth=0)
    return loop, 3.0


def again(
    size: int, *, coder_s: float = 0.005, spent_s: float = 0.03, loop: ControlLoop | None = None
) -> OperatingPoint:
    """What a frame that was coded at the middle level is coded at now; it is due 0.13 s after that."""
    made, captured_at = trained()
    return (loop or made).look_again(captured_at + spent_s, captured_at, MIDDLE, size, coder_s)


def test_a_packet_of_the_expected_size_is_left_alone() -> None:
    assert again(1200) is MIDDLE


def test_one_that_cannot_be_in_time_is_coded_coarser() -> None:
    # 0.2 s less 0.03 s of compute and 0.04 s there and back leave 0.13 s, in which this link carries 3,250 bytes.
    assert again(3000) is MIDDLE
    assert again(4500) is COARSE


def test_not_where_the_coder_would_take_what_is_left() -> None:
    assert again(4500, coder_s=0.12) is MIDDLE


def test_only_levels_of_the_same_split_point_count() -> None:
    # The later cut would be small enough and more accurate, but its head has not been computed.
    assert again(4500).split == "cut"


def test_what_the_other_levels_would_take_is_seen_from_the_size() -> None:
    # 0.08 s are left, for 2,000 bytes: the coarse packet fits if it is of its usual size, and not if this frame's
    # packets are all ten times as large as others'.
    assert again(3000, spent_s=0.08) is COARSE
    assert again(12000, spent_s=0.08) is MIDDLE


def test_a_frame_that_is_lost_is_not_worth_the_coder() -> None:
    assert again(4500, spent_s=0.165) is MIDDLE


def test_a_probe_and_an_outage_are_left_alone() -> None:
    loop, captured_at = trained()
    loop.on_written(40, 1200, captured_at)
    late = captured_at + 1.0
    assert loop.in_outage(late)
    assert loop.look_again(late + 0.03, late, MIDDLE, 4500, 0.005) is MIDDLE


def test_where_bytes_are_counted_the_first_choice_stands() -> None:
    settings = ControlSettings(
        overhead_bytes=0, rtt_s=RTT, server_s=HOLD, objective=Objective.BYTES, accuracy_floor=0.5
    )
    loop, _ = trained(settings=settings)
    assert again(4500, loop=loop) is MIDDLE


def test_a_point_that_the_loop_does_not_know_is_left_alone() -> None:
    unknown = replace(MIDDLE, id=77)
    loop, captured_at = trained()
    assert loop.look_again(captured_at + 0.03, captured_at, unknown, 4500, 0.005) is unknown


@pytest.mark.parametrize("size", [1200, 4500])
def test_what_is_expected_of_the_frame_follows(size: int) -> None:
    """An answer in time counts with the accuracy of the level that was sent."""
    loop, captured_at = trained()
    loop.choose(captured_at, captured_at, compute_free_at=captured_at)
    chosen = loop.look_again(captured_at + 0.03, captured_at, MIDDLE, size, 0.005)
    loop.on_written(50, 700, captured_at + 0.04)
    before = loop._steady._credit
    loop.on_result(50, captured_at + 0.15, server_s=HOLD, queue_depth=0)
    assert loop._steady._credit == pytest.approx(before + chosen.accuracy)

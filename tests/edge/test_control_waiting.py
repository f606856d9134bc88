"""Frames that wait for the device, oldest first, and frames that are skipped: in exact numbers, and without waiting."""

from __future__ import annotations

import math

import numpy as np
import pytest
from headrace.bench.control.simulate import Replay, replay
from headrace.bench.links.traces import Trace
from headrace.edge.choice import ControlSettings
from headrace.edge.controller import ControlLoop
from headrace.edge.ledger import Outcome
from headrace.edge.lookahead import Lookahead
from headrace.models.operating_point import Kind, OperatingPoint

from .rig import FEATURE, LOCAL, PICTURE, Choice, Rig

DISCOUNT = 0.9
SLOW = OperatingPoint(
    0, Kind.FEATURE, "deep", bytes_median=600, bytes_p95=600, accuracy=0.95, edge_share=0.42
)  # two intervals and a little
QUICK = OperatingPoint(1, Kind.IMAGE, codec="jpeg", bytes_median=3000, bytes_p95=3000, accuracy=0.8, edge_share=0.02)


def solved(surprises: list[float], frames_wait: bool, seconds: float = 0.05, local: bool = True) -> Lookahead:
    lookahead = Lookahead(
        np.array([0.9]),
        np.array([local]),
        np.arange(1),
        deadline_s=0.25,
        frame_interval_s=0.1,
        discount=DISCOUNT,
        frames_wait=frames_wait,
    )
    lookahead.solve(np.array([seconds]), np.array([0.0 if local else 8000.0]), 0.04, np.array(surprises))
    return lookahead


def after(lookahead: Lookahead, core_left: float, rate: float = 1e6) -> float:
    return float(lookahead.after(np.array([core_left]), np.array([0]), np.zeros((1, 1)), np.array([rate]))[0])


def test_a_core_that_is_behind_loses_no_frame_that_waits_for_it() -> None:
    """0.9 a frame from the first on where they wait; else one interval behind is one frame lost."""
    everything = DISCOUNT * 0.9 / (1 - DISCOUNT)
    assert after(solved([0.0], frames_wait=True), 0.1) == pytest.approx(everything, rel=0.02)
    assert after(solved([0.0], frames_wait=False), 0.1) == pytest.approx(DISCOUNT * everything, rel=0.02)


def test_a_frame_too_late_is_skipped_and_the_next_is_not() -> None:
    """Three intervals behind with a deadline of 2.5: that frame is lost, the one after it is just made."""
    everything = DISCOUNT * 0.9 / (1 - DISCOUNT)
    assert after(solved([0.0], frames_wait=True), 0.3) == pytest.approx(DISCOUNT * everything, rel=0.02)


def test_chances_follow_the_scatter_of_the_rate() -> None:
    """Where the link has room for exactly what is expected, half of two equally likely rates are in time."""
    rate = 8000.0 / (0.25 - 0.04 - 0.05)  # the packet ends at the deadline
    nearest = float(np.exp(np.log(rate)))
    lookahead = solved([-1.0, 1.0], frames_wait=True, local=False)
    lookahead._rates[0] = nearest
    lookahead._solve_row(0, 200)
    free = lookahead.values[0, 0, 0]
    # 0.5 x 0.9 a frame where the link is free; it is not for each: more than for every other one.
    assert 0.5 * 0.9 / (1 - DISCOUNT**2) - 0.1 <= free <= 0.5 * 0.9 / (1 - DISCOUNT) + 1e-9
    assert lookahead._chances(np.array([1e-9, 1.0, 1e9])) == pytest.approx([0.25, 0.5, 0.75])
    assert solved([0.0], frames_wait=True)._chances(np.array([0.99, 1.0, 1.01])).tolist() == [0.0, 1.0, 1.0]


def make(points: tuple[OperatingPoint, ...], deadline_s: float = 0.4, **settings: int) -> ControlLoop:
    return ControlLoop(
        points,
        deadline_s=deadline_s,
        frame_interval_s=0.1,
        uncut_s=0.5,
        settings=ControlSettings(overhead_bytes=0, rtt_s=0.03, server_s=0.01, **settings),
    )


@pytest.mark.parametrize(
    ("deadline_s", "most", "waiting"), [(0.1, 4, 1), (0.2, 4, 2), (0.25, 4, 3), (1.0, 4, 4), (1.0, 1, 1)]
)
def test_as_many_wait_as_fit_into_a_deadline(deadline_s: float, most: int, waiting: int) -> None:
    assert make((SLOW, QUICK), deadline_s, most_waiting=most).most_waiting == waiting


def test_the_loop_skips_a_frame_that_only_keeps_the_next_ones_late() -> None:
    """A local answer takes one interval: in step it is in time for ever; more than three behind, not until one is
    skipped."""
    local = OperatingPoint(0, Kind.LOCAL, accuracy=1.0, edge_share=0.2)
    loop = make((local,))
    assert not loop.choose(10.0, 10.0, compute_free_at=10.0).skip
    late = loop.choose(10.31, 10.0, compute_free_at=10.31)
    assert late.skip
    assert late.p_on_time == 0.0
    assert math.isinf(late.expected_latency_s)
    following = loop.choose(10.31, 10.1, compute_free_at=10.31)
    assert not following.skip
    assert following.point == local
    assert following.p_on_time > 0.99


def test_without_a_stream_no_frame_is_skipped_for_what_the_link_would_carry() -> None:
    """A local answer takes the time of two frames that the link would have carried, if it were not down."""
    local = OperatingPoint(2, Kind.LOCAL, accuracy=0.9, edge_share=0.4)
    loop = make((QUICK, local))
    loop.on_disconnected(1.0)
    choice = loop.choose(1.0, 1.0, compute_free_at=1.0)
    assert choice.point == local
    assert not choice.skip
    assert choice.p_on_time > 0.99


def run(**settings: int) -> Replay:
    """Ten seconds of a link that carries both points' packets, on a device on which the better one takes 0.21 s."""
    points = (SLOW, QUICK)
    sizes = np.tile([600.0, 3000.0], (100, 1))
    return replay(
        points,
        sizes,
        [0.21, 0.01],
        Trace.steps([(10.0, 4e5)]),
        delay_s=0.015,
        deadline_s=0.4,
        fps=10.0,
        server_s=0.01,
        uncut_s=0.5,
        settings=ControlSettings(overhead_bytes=0, rtt_s=0.03, server_s=0.01, **settings),
    )


def test_a_quick_frame_takes_its_turn_behind_a_slow_one() -> None:
    """0.21 s for one frame and 0.01 s for the next fit two intervals but for 0.02 s: more than one in three has the
    better point, and nearly every one an answer. Where only the newest waits, each behind a slow one is lost."""
    both, newest = run(), run(most_waiting=1)
    used = [record.point for record in both.records if record.score]
    assert both.on_time >= 0.97
    assert used.count(0) >= 33
    assert both.score > newest.score + 0.02
    assert both.score >= 0.84


def test_frames_wait_for_the_device_oldest_first_and_the_oldest_makes_room() -> None:
    rig = Rig(deadline_s=0.4, most_waiting=2)
    rig.pipeline.captured(PICTURE, 0.0)
    work = rig.pipeline.take_up(0.0)
    for captured_at in (0.1, 0.2, 0.3):
        rig.pipeline.captured(PICTURE, captured_at)
    assert rig.outcomes() == [(1, Outcome.DROPPED, "busy")]
    rig.encode(work, 0.31)
    following = rig.pipeline.take_up(0.31)
    assert following.frame.id == 2
    rig.encode(following, 0.32)
    assert rig.pipeline.take_up(0.32).frame.id == 3


def test_a_frame_whose_deadline_has_come_makes_room_for_others() -> None:
    rig = Rig(deadline_s=0.25, most_waiting=4)
    rig.pipeline.captured(PICTURE, 0.0)
    work = rig.pipeline.take_up(0.0)
    rig.pipeline.captured(PICTURE, 0.1)
    rig.pipeline.captured(PICTURE, 0.35)
    assert rig.outcomes() == [(1, Outcome.DROPPED, "busy")]
    rig.pipeline.captured(PICTURE, 0.4)
    rig.encode(work, 0.62)
    assert rig.pipeline.take_up(0.62).frame.id == 3, "of those that wait, the first is too late by now"
    assert rig.outcomes()[-1] == (2, Outcome.DROPPED, "stale")


def test_a_skipped_frame_is_dropped_and_the_next_is_taken_up_at_once() -> None:
    rig = Rig(deadline_s=0.4, most_waiting=4)
    skipped = Choice(LOCAL, p_on_time=0.0, skip=True)  # though a local answer would be in time
    answers = iter([skipped, Choice(FEATURE)])
    rig.control.choose = lambda *_, **__: next(answers)  # type: ignore[method-assign]
    rig.pipeline.captured(PICTURE, 0.0)
    rig.pipeline.captured(PICTURE, 0.1)
    assert rig.pipeline.take_up(0.1).frame.id == 1
    assert rig.outcomes() == [(0, Outcome.DROPPED, "busy")]


def test_where_nothing_may_be_dropped_no_frame_is_skipped() -> None:
    rig = Rig(lossless=True)
    rig.control.choice = Choice(FEATURE, p_on_time=0.0, skip=True)
    rig.pipeline.captured(PICTURE, 0.0)
    assert rig.pipeline.take_up(0.0).frame.point == FEATURE
    assert rig.outcomes() == []

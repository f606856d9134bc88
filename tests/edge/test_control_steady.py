"""Every point as an expert: its replay in exact numbers, and when it is followed."""

from __future__ import annotations

import numpy as np
import pytest
from headrace.edge.steady import NOBODY, SteadyExperts

INTERVAL, DEADLINE, THERE_AND_BACK = 0.1, 0.25, 0.04
ACCURACY = np.array([0.9, 0.6, 1.0])
LOCAL = np.array([False, False, True])
SECONDS = np.array([0.05, 0.05, 0.15])
BITS = np.array([16_000.0, 4_000.0, 0.0])


def make(**changes: float) -> SteadyExperts:
    return SteadyExperts(ACCURACY, LOCAL, deadline_s=DEADLINE, frame_interval_s=INTERVAL, **changes)  # type: ignore[arg-type]


def frames(experts: SteadyExperts, rates: list[float], answered: float, begin: int = 0) -> int:
    for number, rate in enumerate(rates, start=begin):
        experts.answered(answered)
        experts.frame(number * INTERVAL, SECONDS, BITS, rate, THERE_AND_BACK)
    return begin + len(rates)


def test_each_point_has_its_own_core_and_link() -> None:
    """At 100 kbit/s the large packet takes 160 ms: 0.25 in all, just in time; the next waits 60 ms longer and is late,
    and so on. The small one is always in time. Local answers of 150 ms are two of three."""
    experts = make(memory=100_000)
    frames(experts, [100_000.0], 0.0)
    assert experts.scores == pytest.approx([0.9, 0.6, 1.0])
    frames(experts, [100_000.0], 0.0, begin=1)
    assert experts.scores == pytest.approx([0.45, 0.6, 1.0])
    frames(experts, [100_000.0] * 58, 0.0, begin=2)
    assert experts.scores[1] == pytest.approx(0.6)
    assert experts.scores[2] == pytest.approx(2 / 3, abs=0.02)


def test_outage_is_late_for_all_that_send_and_its_queue_holds_up_what_follows() -> None:
    experts = make(memory=100_000)
    frames(experts, [1.0], 0.0)
    assert experts.scores == pytest.approx([0.0, 0.0, 1.0])
    frames(experts, [8e6] * 9, 0.0, begin=1)
    assert experts.scores[:2] == pytest.approx([0.0, 0.0])


def test_nobody_is_followed_while_the_loop_does_as_well() -> None:
    experts = make()
    frames(experts, [8e6] * 1000, 0.9)
    assert experts.loop == pytest.approx(0.9)
    assert experts.leader == NOBODY


def test_better_point_is_followed_after_a_while_and_left_when_it_does_worse() -> None:
    experts = make(memory=100)
    at = frames(experts, [8e6] * 99, 0.8)
    assert experts.leader == NOBODY, "too few frames to tell"
    at = frames(experts, [8e6], 0.8, begin=at)
    assert experts.leader == 0
    assert experts.loop == pytest.approx(0.8)
    at = frames(experts, [8e6] * 50, 0.9, begin=at)
    assert experts.leader == 0
    # It goes on promising 0.9, and really half of its answers are late.
    for _ in range(100):
        at = frames(experts, [8e6], 0.45, begin=at)
        if experts.leader == NOBODY:
            break
    assert experts.leader == NOBODY


def test_difference_within_the_noise_is_none() -> None:
    """Three in a hundred, where one in two frames is right: half a standard deviation of such a mean."""
    experts = SteadyExperts(np.array([0.5]), LOCAL[:1], deadline_s=DEADLINE, frame_interval_s=INTERVAL, memory=100)
    for number in range(500):
        experts.answered(0.47)
        experts.frame(number * INTERVAL, SECONDS[:1], BITS[:1], 8e6, THERE_AND_BACK)
    assert experts.leader == NOBODY


def test_loop_is_tried_again_some_day() -> None:
    experts = make(memory=100, doubt=1e-3)
    at = frames(experts, [8e6] * 100, 0.8)
    assert experts.leader == 0
    left = []
    for _ in range(150):
        at = frames(experts, [8e6], 0.9, begin=at)
        left.append(experts.leader == NOBODY)
    assert not any(left[:90])
    assert any(left[90:]), "0.8 and 100 times 0.001 of doubt"


def test_a_replay_that_is_far_from_what_happens_is_left_at_once_and_not_taken_up_again() -> None:
    """The loop had a bad time, say on a core that stood still, so that its score is low and the leader's own would stay
    above it for long."""
    experts = make(memory=150)
    at = frames(experts, [8e6] * 150, 0.4)
    assert experts.leader == 0
    left = 0
    while experts.leader == 0:
        at = frames(experts, [8e6], 0.3, begin=at)
        left += 1
    assert left <= 15
    at = frames(experts, [8e6] * 30, 0.85, begin=at)
    assert experts.leader == NOBODY


def following(hoped: float, came_to: float) -> tuple[SteadyExperts, int]:
    """Experts that lead after a hundred frames of which the loop hoped for more than it came to."""
    experts = make(memory=100)
    for _ in range(100):
        experts.hoped(hoped)
    at = frames(experts, [8e6] * 100, came_to)
    assert experts.leader == 0
    return experts, at


@pytest.mark.parametrize(("hopes", "left"), [(0.93, True), (0.8, False)])
def test_a_leader_is_left_when_the_loop_would_do_better_on_the_link_as_it_is_now(hopes: float, left: bool) -> None:
    """The leader comes to 0.6. The loop came to three quarters of what it hoped for, and that of 0.93 is more."""
    experts, at = following(hoped=0.4, came_to=0.3)
    for _ in range(300):
        experts.hoped(hopes)
        at = frames(experts, [8e6], 0.6, begin=at)
        if experts.leader == NOBODY:
            break
    assert (experts.leader == NOBODY) is left
    if left:
        assert experts.loop == pytest.approx(0.75 * hopes, rel=0.15)

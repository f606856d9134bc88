"""The value of what a choice leaves behind: exact where it can be worked out by hand, monotone elsewhere."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from headrace.edge.lookahead import Lookahead

DISCOUNT = 0.9


def make(accuracy: list[float], local: list[bool], seconds: list[float], sizes: list[float]) -> Lookahead:
    count = len(accuracy)
    lookahead = Lookahead(
        np.array(accuracy),
        np.array(local),
        np.arange(count),
        deadline_s=0.25,
        frame_interval_s=0.1,
        discount=DISCOUNT,
    )
    lookahead.solve(np.array(seconds), 8 * np.array(sizes), 0.04)
    return lookahead


def after(lookahead: Lookahead, core_left: float, link_left: float, rate: float) -> float:
    row = np.array([0])
    return float(lookahead.after(np.array([core_left]), row, np.array([[link_left]]), np.array([rate]))[0])


def test_frames_that_cost_nothing_are_a_geometric_series() -> None:
    lookahead = make([0.9], [True], [0.05], [0.0])
    assert after(lookahead, 0.0, 0.0, 1e6) == pytest.approx(DISCOUNT * 0.9 / (1 - DISCOUNT), rel=0.02)


def test_local_answers_of_one_and_a_half_intervals() -> None:
    """Free, half behind, a whole interval behind (that frame is lost), free again: V = 1 + 0.9 + 0.9^3 V."""
    lookahead = make([1.0], [True], [0.15], [0.0])
    free = (1 + DISCOUNT) / (1 - DISCOUNT**3)
    assert after(lookahead, 0.0, 0.0, 1e6) == pytest.approx(DISCOUNT * free, rel=0.03)
    assert after(lookahead, 0.1, 0.0, 1e6) == pytest.approx(DISCOUNT * DISCOUNT * free, rel=0.03)


def test_backlog_costs_more_the_slower_the_link_and_never_pays() -> None:
    lookahead = make([0.98, 0.8, 1.0], [False, False, True], [0.08, 0.08, 0.15], [4000.0, 800.0, 0.0])
    for rate in (5e4, 2e5, 1e6, 8e6):
        link = [after(lookahead, 0.0, left, rate) for left in np.linspace(0, 0.3, 7)]
        core = [after(lookahead, left, 0.0, rate) for left in np.linspace(0, 0.3, 7)]
        assert all(b <= a + 1e-9 for a, b in pairwise(link))
        assert all(b <= a + 1e-9 for a, b in pairwise(core))
    values = [after(lookahead, 0.0, 0.0, rate) for rate in (2e4, 1e5, 1e6, 8e6)]
    assert all(b >= a - 1e-9 for a, b in pairwise(values))
    assert values[-1] > 1.1 * values[0]


def test_points_that_another_one_beats_make_no_difference() -> None:
    plain = make([0.9, 1.0], [False, True], [0.05, 0.15], [1000.0, 0.0])
    padded = make([0.9, 0.8, 0.9, 1.0], [False, False, False, True], [0.05, 0.06, 0.05, 0.15], [1000, 1200, 1000, 0])
    np.testing.assert_allclose(plain.values, padded.values)


def test_drift_is_followed_a_row_at_a_time() -> None:
    lookahead = make([0.9], [False], [0.05], [2000.0])
    before = lookahead.values.copy()
    lookahead.refresh(np.array([0.052]), 8 * np.array([2000.0]), 0.04)
    np.testing.assert_array_equal(lookahead.values, before)  # too little to care
    slower = np.array([0.2])
    lookahead.refresh(slower, 8 * np.array([2000.0]), 0.04)
    changed = np.any(lookahead.values != before, axis=(1, 2))
    assert changed.sum() == 1
    for _ in range(8 * len(before)):
        lookahead.refresh(slower, 8 * np.array([2000.0]), 0.04)
    # Now it answers every second frame.
    assert after(lookahead, 0.0, 0.0, 8e6) == pytest.approx(DISCOUNT * 0.9 / (1 - DISCOUNT**2), rel=0.1)


def test_a_point_that_others_beat_has_the_most_accurate_of_them_stand_in() -> None:
    lookahead = make([0.9, 0.9, 0.7, 0.8, 1.0], [False] * 4 + [True], [0.05] * 4 + [0.15], [1000, 1200, 1300, 900, 0])
    assert lookahead.kept.tolist() == [0, 3, 4]
    assert lookahead.stands_in.tolist() == [0, 0, 0, 3, 4]

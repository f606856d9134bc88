"""The cheapest point, the hull, the front and the rate difference of measured points, by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from headrace.models.evaluation import curves
from headrace.models.evaluation.curves import cheapest, cheapest_shared, front, rate_difference

BYTES, RELATIVE = np.array([100.0, 200.0, 400.0, 800.0]), np.array([0.80, 0.92, 0.91, 1.00])


def points(*pairs):
    return [SimpleNamespace(mean_bytes=b, relative=r) for b, r in pairs]


def test_the_cheapest_point_and_the_hull_by_hand():
    """0.96 lies half-way between 0.92 at 200 and 1.00 at 800 bytes; the point in between is above the hull."""
    assert cheapest(BYTES, RELATIVE, 0.96) == 800
    assert cheapest_shared(BYTES, RELATIVE, 0.96) == pytest.approx(500)
    assert cheapest_shared(BYTES, RELATIVE, 0.90) == pytest.approx(100 + 100 * 0.10 / 0.12)
    assert cheapest(BYTES, RELATIVE, 0.92) == cheapest_shared(BYTES, RELATIVE, 0.92) == 200
    assert cheapest_shared(BYTES, RELATIVE, 0.5) == 100, "nothing is cheaper than the cheapest point"
    assert np.isinf(cheapest(BYTES, RELATIVE, 1.01)) and np.isinf(cheapest_shared(BYTES, RELATIVE, 1.01))
    assert np.isinf(cheapest_shared(BYTES[:0], RELATIVE[:0], 0.9)), "no points reach nothing"


def test_resamples_are_handled_at_once():
    both = np.stack([BYTES, BYTES * 2]), np.stack([RELATIVE, RELATIVE - 0.05])
    found = cheapest_shared(*both, 0.93)
    assert found.shape == (2,)
    assert found.tolist() == [float(cheapest_shared(b, r, 0.93)) for b, r in zip(*both, strict=True)]


def test_the_hull_is_never_above_the_cheapest_point():
    rng = np.random.default_rng(1)
    for _ in range(50):
        bytes_, relative = rng.uniform(100, 1000, 12), rng.uniform(0.5, 1.0, 12)
        for ratio in curves.RATIOS:
            at, hull = cheapest(bytes_, relative, ratio), cheapest_shared(bytes_, relative, ratio)
            assert hull <= at and np.isinf(hull) == np.isinf(at) and hull >= bytes_.min()


def test_a_front_rises_strictly():
    chosen = points((400, 0.91), (100, 0.8), (200, 0.92), (200, 0.85), (800, 1.0), (900, 1.0))
    assert [chosen[i].mean_bytes for i in front(chosen)] == [100, 200, 800]


def test_half_the_bytes_are_a_rate_difference_of_minus_fifty_percent():
    anchor = points(*((1000 * 2**i, 0.7 + 0.1 * i) for i in range(4)))
    half = points(*((500 * 2**i, 0.7 + 0.1 * i) for i in range(4)))
    found = rate_difference(half, anchor)
    assert found.percent == pytest.approx(-50)
    assert (found.lowest, found.highest) == (0.7, pytest.approx(1.0))
    assert rate_difference(anchor, half).percent == pytest.approx(100)


def test_curves_that_have_no_accuracy_in_common_have_no_rate_difference():
    low, high = points((100, 0.5), (200, 0.6)), points((100, 0.7), (200, 0.9))
    assert rate_difference(low, high) is None
    assert rate_difference(points((100, 0.8)), high) is None, "a single point is no curve"
    assert rate_difference([], high) is None

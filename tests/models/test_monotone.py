"""Measured accuracies are made to fall with the bytes."""

from itertools import pairwise
from pathlib import Path

import headrace
import numpy as np
import pytest
from headrace.models.bundle import Bundle
from headrace.models.monotone import monotone
from headrace.models.operating_point import Kind, OperatingPoint
from hypothesis import given
from hypothesis import strategies as st


def _points(accuracies, first=0, **of):
    return [OperatingPoint(first + i, rate_level=i, accuracy=a, **of) for i, a in enumerate(accuracies)]


def test_a_coarser_level_that_was_luckier_is_put_level_with_the_finer_one():
    points = _points([0.95, 0.93, 0.95, 0.90], kind=Kind.FEATURE, split="a")
    assert [p.accuracy for p in monotone(points)] == pytest.approx([0.95, 0.94, 0.94, 0.90])


def test_qualities_rise_and_families_and_local_points_stay_apart():
    points = [
        *_points([0.5, 0.9, 0.7], kind=Kind.IMAGE, codec="webp"),
        *_points([0.8, 0.6], 3, kind=Kind.FEATURE, split="a"),
        *_points([0.9, 0.6], 5, kind=Kind.FEATURE, split="b"),
        OperatingPoint(7, Kind.LOCAL, accuracy=1.0),
        OperatingPoint(8, Kind.LOCAL, split="a", accuracy=0.7),
    ]
    found = monotone(points)
    assert [p.id for p in found] == list(range(9))
    assert [p.accuracy for p in found] == pytest.approx([0.5, 0.8, 0.8, 0.8, 0.6, 0.9, 0.6, 1.0, 0.7])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_the_mean_stays_and_what_falls_already_is_left_alone(accuracies):
    found = [p.accuracy for p in monotone(_points(accuracies, kind=Kind.FEATURE, split="a"))]
    assert all(a >= b for a, b in pairwise(found))
    assert np.mean(found) == pytest.approx(np.mean(accuracies), abs=1e-9)
    falling = sorted(accuracies, reverse=True)
    assert [p.accuracy for p in monotone(_points(falling, kind=Kind.FEATURE, split="a"))] == pytest.approx(falling)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "yolov2_tiny"])
def test_the_committed_bundles_accuracies_fall(name):
    points = Bundle.load(Path(headrace.__file__).parent / "models" / "bundles" / name).operating_points
    assert [p.accuracy for p in points] == pytest.approx([p.accuracy for p in monotone(points)], abs=1e-9)

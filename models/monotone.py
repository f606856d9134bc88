"""Measured accuracies of operating points, made to fall where fewer bytes are sent.

A few hundred photographs tell accuracies apart to a point or two, and neighbouring rate levels differ by less. Taken as
they are, the level that was luckiest would always be chosen before a finer one. That a finer level of the same split
point, or a higher quality of the same codec, is no worse is known beforehand; the nearest accuracies in which it is so
(isotonic regression: Barlow et al., "Statistical Inference under Order Restrictions", 1972) are the better estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from scipy.optimize import isotonic_regression

from .operating_point import Kind, OperatingPoint


def monotone(points: Sequence[OperatingPoint]) -> tuple[OperatingPoint, ...]:
    """The points in their order; those that are sent have the nearest accuracies that do not rise from a finer rate
    level of a split point to a coarser one, nor from a higher quality of a codec to a lower one. Local ones stay."""
    found: dict[int, float] = {}
    sent = sorted((p for p in points if p.kind is not Kind.LOCAL), key=_family)
    for _, family in groupby(sent, _family):
        ordered = sorted(family, key=_coarseness)
        fitted = isotonic_regression([p.accuracy for p in ordered], increasing=False).x
        found |= {p.id: float(accuracy) for p, accuracy in zip(ordered, fitted, strict=True)}
    return tuple(replace(p, accuracy=found.get(p.id, p.accuracy)) for p in points)


def _family(point: OperatingPoint) -> tuple[str, str, float]:
    return (point.split, point.codec, point.width)


def _coarseness(point: OperatingPoint) -> int:
    """Rate levels begin with the finest; a codec's quality is higher, the finer it is."""
    return point.rate_level if point.kind is Kind.FEATURE else -point.rate_level

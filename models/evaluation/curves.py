"""Bytes against accuracy: what a ratio of the uncut accuracy costs, fronts, Bjontegaard's mean rate difference.

Every function takes arrays whose last axis is points, so that resamples of a bootstrap are handled at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..exceptions import DataError
from ..extras import how_to_install

RATIOS = (0.98, 0.95, 0.90)
"""Shares of the uncut accuracy at which bytes are stated."""
LIMITS = {"deep": np.inf, "mid": 0.35, "light": 0.15}
"""Our families, each with the largest share of the uncut model's time that head and encoder may take. Each holds the
next one: a light point is a deep one, too."""

Floats = npt.NDArray[np.float64]


class Measurement(Protocol):
    """A point as the curves see it: mean bytes, and accuracy as a share of the uncut model's."""

    @property
    def mean_bytes(self) -> float: ...

    @property
    def relative(self) -> float: ...


def key(ratio: float) -> str:
    """How a ratio is written in JSON: `0.90`."""
    return f"{ratio:.2f}"


def cheapest(bytes_: Floats, relative: Floats, ratio: float) -> Floats:
    """Bytes of the cheapest point that reaches a ratio; infinite where none does.

    Args:
        bytes_, relative: float64 [..., points].
        ratio: of the uncut accuracy.

    Returns:
        float64 [...].
    """
    found: Floats = np.where(relative >= ratio, bytes_, np.inf).min(axis=-1, initial=np.inf)
    return found


def cheapest_shared(bytes_: Floats, relative: Floats, ratio: float) -> Floats:
    """The convex hull's bytes at a ratio: those of the cheapest pair of points between which frames are divided so
    that the ratio is just reached (or of one point, where that is cheaper). Arguments and result as of `cheapest`.

    Of frames a share s at one point and 1 - s at another, both mean bytes and mean accuracy are the points' own, in
    these proportions: whatever lies on the hull can be had.
    """
    best = cheapest(bytes_, relative, ratio)
    below = relative < ratio
    with np.errstate(divide="ignore", invalid="ignore"):
        for j in range(bytes_.shape[-1]):
            upper_bytes, upper = bytes_[..., j, None], relative[..., j, None]
            mixed = bytes_ + (upper_bytes - bytes_) * (ratio - relative) / (upper - relative)
            usable = below & (upper >= ratio) & (bytes_ < upper_bytes)
            best = np.minimum(best, np.where(usable, mixed, np.inf).min(axis=-1, initial=np.inf))
    return best


def stated(value: float) -> float | None:
    """Bytes as they are reported: to a tenth, None where they are infinite."""
    return round(float(value), 1) if np.isfinite(value) else None


def cheapest_of(points: Iterable[Measurement]) -> dict[str, float | None]:
    """Ratio -> bytes of the cheapest point that reaches it; None where none does."""
    bytes_, relative = _arrays(points)
    return {key(ratio): stated(float(cheapest(bytes_, relative, ratio))) for ratio in RATIOS}


def shared_of(points: Iterable[Measurement]) -> dict[str, float | None]:
    """Ratio -> bytes on the convex hull of the points; None where none reaches it."""
    bytes_, relative = _arrays(points)
    return {key(ratio): stated(float(cheapest_shared(bytes_, relative, ratio))) for ratio in RATIOS}


def front(points: Iterable[Measurement]) -> list[int]:
    """Indexes of the points that no other one beats, by rising bytes; accuracy rises strictly along them."""
    bytes_, relative = _arrays(points)
    kept: list[int] = []
    for i in np.lexsort((-relative, bytes_)).tolist():
        if not kept or relative[i] > relative[kept[-1]]:
            kept.append(i)
    return kept


@dataclass(frozen=True, slots=True)
class RateDifference:
    """Bjontegaard's rate difference.

    Attributes:
        percent: mean difference of the bytes for the same accuracy, in percent of the anchor's; negative is fewer.
        lowest, highest: relative accuracies between which both curves lie, and over which the mean is taken.
    """

    percent: float
    lowest: float
    highest: float


def rate_difference(points: Sequence[Measurement], anchor: Sequence[Measurement]) -> RateDifference | None:
    """BD-rate (Bjontegaard, VCEG-M33, 2001) of the front of `points` against that of `anchor`, with relative accuracy
    as the quality and monotone interpolation of log bytes (PCHIP: the fronts of accuracies are uneven).

    Returns:
        None where a front has fewer than two points or the two have no accuracy in common.

    Raises:
        DataError: the library is not installed.
    """
    ours, theirs = ([each[i] for i in front(each)] for each in (points, anchor))
    if len(ours) < 2 or len(theirs) < 2:
        return None
    lowest = max(each[0].relative for each in (ours, theirs))
    highest = min(each[-1].relative for each in (ours, theirs))
    if lowest >= highest:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        percent = bjontegaard()(
            *([p.mean_bytes for p in theirs], [p.relative for p in theirs]),
            *([p.mean_bytes for p in ours], [p.relative for p in ours]),
            method="pchip",
            require_matching_points=False,
            min_overlap=0,
        )
    return RateDifference(float(percent), lowest, highest) if np.isfinite(percent) else None


def bjontegaard() -> BdRate:
    """`bjontegaard.bd_rate`; what it imports is only wanted here.

    Raises:
        DataError: it is not installed.
    """
    try:
        from bjontegaard import bd_rate
    except ImportError as error:
        raise DataError(f"bjontegaard is missing for BD-rates; {how_to_install('bench')}") from error
    return bd_rate  # type: ignore[no-any-return]


class BdRate(Protocol):
    """(anchor's rates, qualities, rates, qualities) -> percent."""

    def __call__(
        self,
        rate_anchor: Sequence[float],
        dist_anchor: Sequence[float],
        rate_test: Sequence[float],
        dist_test: Sequence[float],
        method: str,
        require_matching_points: bool = True,
        interpolators: bool = False,
        min_overlap: float = 0.75,
    ) -> float: ...


def _arrays(points: Iterable[Measurement]) -> tuple[Floats, Floats]:
    pairs = np.array([(p.mean_bytes, p.relative) for p in points], np.float64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]

"""Bootstrap over photographs: how far a figure would move on other photographs of the same kind.

All points are resampled together, photograph by photograph (Efron and Tibshirani, *An Introduction to the Bootstrap*,
1993, paired): a hard photograph is hard for all of them and for the uncut model, so that ratios vary less than
accuracies do. Choosing the cheapest of many points is repeated within each resample, and so is part of the interval.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .curves import Floats, stated

RESAMPLES = 2000
LEVEL = 0.95

Interval = tuple[float | None, float | None]
"""Lower and upper end; None is "not reached" (of bytes, where that much of the resamples does not reach the ratio)."""


class Resampled:
    """Mean bytes and relative accuracy of every point in every resample, float64 [resamples, points]."""

    def __init__(
        self,
        packet_bytes: npt.NDArray[np.float64],
        right: npt.NDArray[np.bool_],
        uncut_right: npt.NDArray[np.bool_],
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> None:
        """Draw the resamples.

        Args:
            packet_bytes: float64 [photographs, points].
            right: bool of that shape, whether the answer is right.
            uncut_right: bool [photographs], the same of the uncut model.
            resamples: how many; those in which the uncut model is never right are left out.
            seed: of the draws.
        """
        photographs = len(uncut_right)
        counts = np.random.default_rng(seed).multinomial(photographs, np.full(photographs, 1 / photographs), resamples)
        weights = counts.astype(np.float64)
        uncut = weights @ uncut_right
        weights, uncut = weights[uncut > 0], uncut[uncut > 0]
        self.bytes = weights @ packet_bytes / photographs
        # Of whole numbers, so that what reaches a ratio exactly does.
        self.relative = (weights @ right) / uncut[:, None]


def interval(values: Floats) -> Interval:
    """The middle 95 % of resampled values float64 [resamples], some of them infinite; by order statistics, outwards."""
    if not len(values):
        return None, None
    ordered, outside = np.sort(values), (1 - LEVEL) / 2
    low, high = math.floor(outside * (len(values) - 1)), math.ceil((1 - outside) * (len(values) - 1))
    return tuple(float(ordered[i]) if np.isfinite(ordered[i]) else None for i in (low, high))  # type: ignore[return-value]


def bytes_interval(values: Floats) -> Interval:
    """`interval` of bytes, as they are reported."""
    low, high = interval(values)
    return (None if low is None else stated(low)), (None if high is None else stated(high))

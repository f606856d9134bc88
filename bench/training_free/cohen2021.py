"""Cohen, Choi and Bajić, "Lightweight Compression of Intermediate Neural Network Features for Collaborative
Intelligence", IEEE OJCAS 2021, arXiv 2105.07102, and its conference version (ICME 2020).

    features -> clip to [c_min, c_max] -> N levels -> truncated unary -> context-adaptive binary arithmetic coding

One clipping range and one quantiser serve the whole tensor. Two quantisers of the paper are run:

* uniform with N levels, the outer ones at c_min and c_max, where the range minimises clipping and quantisation error
  together. The paper takes that error from a fitted model of the features' distribution (asymmetric Laplace behind
  (leaky) ReLU); here it is the calibration features' own histogram, which has no model error;
* its modified entropy-constrained quantiser (Chou, Lookabaugh and Gray's iteration, with the outer levels pinned to
  c_min and c_max), with error + lambda x bits minimised over the range as well. lambda is in units of the features'
  variance.

In favour of the baseline: the paper's coder has a context for each bin of the unary code and adapts as it goes
through the tensor; here the contexts are static, from the calibration photographs, and there is one for each bin *and
channel*, so that a channel's own statistics cost no adaptation. The bits of its header (range, levels, size) are left
out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from .interface import Features
from .static_coder import StaticDecoder, StaticEncoder, StaticTables, Symbols, counted_tables

Floats = npt.NDArray[np.float64]

UNIFORM_LEVELS = (2, 3, 4, 5, 7)
"""N of the uniform quantisers."""
ENTROPY_CONSTRAINED = (
    *((3, trade) for trade in (0.3, 0.35, 0.4, 0.5)),
    *((4, trade) for trade in (0.1, 0.2, 0.3, 0.4)),
    *((5, 0.2), (7, 0.1)),
)
"""N and lambda of the entropy-constrained quantisers."""
RANGE_QUANTILES = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3)
"""Shares of the calibration features that a candidate range clips at one end."""
BINS = 1000
ITERATIONS = 40


@dataclass(frozen=True)
class Quantiser:
    """Levels, rising, the first c_min and the last c_max; what each costs besides squared error; the total cost."""

    levels: Floats
    price: Floats
    cost: float

    def __call__(self, features: npt.NDArray[Any]) -> Symbols:
        """Index of the cheapest level for every clipped feature, int32."""
        clipped = np.clip(features, self.levels[0], self.levels[-1])
        index: Symbols = np.zeros(clipped.shape, np.int32)
        least = (clipped - self.levels[0]) ** 2 + self.price[0]
        # A level at a time: an array with all of them is as slow as it is large.
        for n in range(1, len(self.levels)):
            cost = (clipped - self.levels[n]) ** 2 + self.price[n]
            index[cost < least] = n
            np.minimum(least, cost, out=least)
        return index


def uniform_quantiser(features: Features, levels: int) -> Quantiser:
    """N levels with the clipping range of least squared error on float32 features of any shape."""
    values, weights = _histogram(features)
    return min((_uniform(values, weights, np.linspace(*ends, levels)) for ends in _ranges(features)), key=_cost)


def entropy_constrained_quantiser(features: Features, levels: int, trade: float) -> Quantiser:
    """N levels of least squared error + trade x variance x bits a feature, the outer ones pinned to the range."""
    values, weights = _histogram(features)
    trade *= float(features.var(dtype=np.float64))
    return min((_iterate(values, weights, np.linspace(*ends, levels), trade) for ends in _ranges(features)), key=_cost)


def _cost(quantiser: Quantiser) -> float:
    return quantiser.cost


def _histogram(features: Features) -> tuple[Floats, Floats]:
    """Centres of bins and the shares of features in them."""
    counts, edges = np.histogram(features, BINS)
    return (edges[1:] + edges[:-1]) / 2, counts / counts.sum()


def _ranges(features: Features) -> Iterator[tuple[float, float]]:
    low = np.quantile(features, RANGE_QUANTILES)
    high = np.quantile(features, 1 - np.array(RANGE_QUANTILES))
    return ((float(a), float(b)) for a, b in product(low, high) if a < b)


def _uniform(values: Floats, weights: Floats, levels: Floats) -> Quantiser:
    quantiser = Quantiser(levels, np.zeros(len(levels)), 0.0)
    error = (values - levels[quantiser(values)]) ** 2
    return Quantiser(levels, quantiser.price, float(weights @ error))


def _iterate(values: Floats, weights: Floats, levels: Floats, trade: float) -> Quantiser:
    """Assign, take centroids of what is inside the range, take the shares' code lengths; until it stands."""
    clipped = np.clip(values, levels[0], levels[-1])
    quantiser = Quantiser(levels, np.zeros(len(levels)), np.inf)
    for _ in range(ITERATIONS):
        index = quantiser(values)
        share = np.bincount(index, weights, len(levels))
        centroid = np.bincount(index, weights * clipped, len(levels)) / np.maximum(share, 1e-12)
        levels = np.where(share > 0, centroid, quantiser.levels)
        levels[0], levels[-1] = quantiser.levels[0], quantiser.levels[-1]
        price = trade * -np.log2(np.maximum(share, 1e-9))
        cost = float(weights @ ((values - levels[index]) ** 2 + price[index]))
        settled = quantiser.cost - cost < 1e-5 * cost
        quantiser = Quantiser(levels, price, cost)
        if settled:
            break
    return quantiser


class Cohen2021:
    """One quantiser with its contexts."""

    def __init__(self, features: Features, quantiser: Quantiser, setting: str) -> None:
        """Count the bins of the calibration features, float32 [N, C, H, W]."""
        self.setting = setting
        self._quantiser = quantiser
        self._levels = quantiser.levels.astype(np.float32)
        self._bins = len(self._levels) - 1
        self._shape = features.shape[1:]
        index = quantiser(features)
        reached = np.stack([(index >= b).sum((0, 2, 3)) for b in range(self._bins + 1)], 1)  # [C, N]
        # Bin b of a unary code is sent if the index is at least b, and says whether it is more.
        ones, sent = reached[:, 1:].reshape(-1), reached[:, :-1].reshape(-1)
        self._tables = StaticTables.of(counted_tables(np.stack((sent - ones, ones), 1)))
        channel = np.arange(self._shape[0], dtype=np.int32)[:, None, None] * self._bins
        self._contexts = np.broadcast_to(channel, self._shape)

    def encode(self, features: Features) -> bytes:
        """Code float32 [C, H, W]."""
        index = self._quantiser(features)
        out = StaticEncoder(self._tables)
        # All elements' first bins, then the second bins of those that have one, and so on: with static contexts the
        # order of the bins changes no size, and in this one they decode by whole arrays.
        for b in range(self._bins):
            sent = index >= b
            out.put((index[sent] > b).astype(np.int32), self._contexts[sent] + b)
        return out.flush()

    def decode(self, data: bytes) -> Features:
        """float32 [C, H, W] from what `encode` gave."""
        source = StaticDecoder(self._tables, data)
        index = np.zeros(self._shape, np.int32)
        for b in range(self._bins):
            sent = index >= b
            index[sent] += source.take(self._contexts[sent] + np.int32(b))
        return self._levels[index]


def calibrate(features: Features) -> Sequence[Cohen2021]:
    """Uniform and entropy-constrained quantisers."""
    found = [Cohen2021(features, uniform_quantiser(features, n), f"uniform N={n}") for n in UNIFORM_LEVELS]
    for n, trade in ENTROPY_CONSTRAINED:
        quantiser = entropy_constrained_quantiser(features, n, trade)
        found.append(Cohen2021(features, quantiser, f"entropy-constrained N={n} lambda={trade:g}"))
    return found

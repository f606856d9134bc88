"""Entropy model: a prior over each latent channel's symbols, frozen to integer tables.

The prior of a channel is what the calibration photographs showed, mixed with a discrete Laplace distribution of the
same mean magnitude, which stands in for the values that they happen not to show. Learned priors (CompressAI's
`EntropyBottleneck`) freeze to the same tables and take the same place.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .entropy_coder import PRECISION, EntropyTables

LAPLACE_WEIGHT = 0.02
"""Share of the Laplace part in the mixture."""
TAIL_MASS = 2.0**-14
"""Mass left to the escape. Values rarer than that are cheaper to escape than to keep a table entry for."""
MAX_REACH = 2000
"""Largest magnitude with a table entry of its own; a finer gain on a wild channel escapes beyond it."""


def frozen_tables(symbols: npt.NDArray[np.int32]) -> EntropyTables:
    """Tables for the channels of calibration symbols.

    Args:
        symbols: int32 [N, K, H, W].

    Returns:
        K tables.
    """
    rows, sizes, offsets = [], [], []
    for channel in range(symbols.shape[1]):
        low, masses = _masses(symbols[:, channel].reshape(-1))
        rows.append(_cumulative(masses))
        sizes.append(len(rows[-1]))
        offsets.append(low)
    cdf = np.zeros((len(rows), max(sizes)), np.int32)
    for row, values in zip(cdf, rows, strict=True):
        row[: len(values)] = values
    return EntropyTables(cdf, np.array(sizes, np.int32), np.array(offsets, np.int32))


def _masses(values: npt.NDArray[np.int32]) -> tuple[int, npt.NDArray[np.float64]]:
    """Smallest value with an entry, and the masses from it on; the last one is the escape's."""
    magnitude = float(np.abs(values).mean()) + 0.5 / len(values)
    # Discrete Laplace p(v) ~ theta^|v| with mean magnitude 2 theta / (1 - theta^2).
    theta = (np.sqrt(1 + magnitude**2) - 1) / magnitude
    reach = int(np.ceil(np.log(TAIL_MASS / LAPLACE_WEIGHT) / np.log(theta))) if theta > 0 else 1
    reach = int(np.clip(max(reach, np.abs(values).max()), 1, MAX_REACH))
    grid = np.arange(-reach, reach + 1)
    laplace = theta ** np.abs(grid)
    inside = values[np.abs(values) <= reach]
    seen = np.bincount(inside + reach, minlength=len(grid)).astype(np.float64)
    masses = (1 - LAPLACE_WEIGHT) * seen / len(values) + LAPLACE_WEIGHT * laplace / laplace.sum()
    # Entries at both ends that are worth less than an escape only make the table longer.
    kept = np.flatnonzero(masses >= TAIL_MASS / 4)
    first, last = min(int(kept[0]), reach), max(int(kept[-1]), reach)
    outside = masses[:first].sum() + masses[last + 1 :].sum()
    return int(grid[first]), np.append(masses[first : last + 1], outside + TAIL_MASS)


def _cumulative(masses: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
    """Cumulative frequencies 0..65536 in which every entry has at least 1."""
    total = 1 << PRECISION
    frequency = np.maximum(1, np.round(masses / masses.sum() * total)).astype(np.int64)
    # What rounding added or lost is taken from, or given to, the likeliest entry, where it changes least.
    frequency[frequency.argmax()] += total - frequency.sum()
    return np.concatenate(([0], np.cumsum(frequency))).astype(np.int32)

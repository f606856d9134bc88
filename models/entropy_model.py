"""Entropy model: a prior over each component's symbols, frozen to integer tables that components share.

A map has thousands of components, most of them nearly always 0, and a calibration set of some hundred photographs says
little about the distribution of one. What it does say is how large a component's symbols are on the mean; components
of a like mean magnitude, of all rate levels, share a **class** and its table: what the calibration photographs showed
of all of them, made symmetric, mixed with a discrete Laplace distribution of the same mean magnitude, which stands in
for the values that they happen not to show. Which class a component has at a rate level is frozen in the bundle too,
so that nothing is estimated when a frame is coded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .entropy_coder import PRECISION, EntropyTables

CLASSES_AN_OCTAVE = 4
"""Classes between one mean magnitude and its double."""
SMALLEST = 2.0**-12
"""Mean magnitude of class 0 and of everything below it."""
MAX_CLASSES = 128
"""Mean magnitudes from 2**-12 to 2**20; a class's number fits a byte."""
LAPLACE_WEIGHT = 0.02
"""Share of the Laplace part in the mixture."""
TAIL_MASS = 2.0**-14
"""Mass left to the escape. Values rarer than that are cheaper to escape than to keep a table entry for."""
MAX_REACH = 2000
"""Largest magnitude with a table entry of its own; a finer gain on a wild component escapes beyond it."""


def scale_classes(symbols: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """Class of each component, from calibration symbols int32 [N, n]: uint8 [n], 0..MAX_CLASSES - 1.

    A component that was always 0 counts as a quarter of a symbol of magnitude 1 in N photographs.
    """
    magnitude = np.abs(symbols).mean(0) + 0.25 / len(symbols)
    octaves = np.log2(magnitude / SMALLEST)
    classes: npt.NDArray[np.uint8] = np.clip(np.rint(octaves * CLASSES_AN_OCTAVE), 0, MAX_CLASSES - 1).astype(np.uint8)
    return classes


class TableCounts:
    """Collects calibration symbols by class and freezes them."""

    def __init__(self) -> None:
        """Nothing collected yet."""
        self._seen: dict[int, npt.NDArray[np.float64]] = {}

    def add(self, symbols: npt.NDArray[np.int32], classes: npt.NDArray[np.uint8]) -> None:
        """Count symbols int32 [N, n] of components of classes uint8 [n]."""
        for each in np.unique(classes).tolist():
            magnitudes = np.minimum(np.abs(symbols[:, classes == each]).reshape(-1), MAX_REACH + 1)
            counts = np.bincount(magnitudes).astype(np.float64)
            known = self._seen.get(each, np.zeros(0))
            if len(known) < len(counts):
                known, counts = counts, known
            known[: len(counts)] += counts
            self._seen[each] = known

    def freeze(self) -> tuple[EntropyTables, npt.NDArray[np.uint8]]:
        """Tables of the classes that were seen, and uint8 [MAX_CLASSES]: a class's table.

        Raises:
            ValueError: nothing was counted.
        """
        if not self._seen:
            raise ValueError("no symbols were counted")
        where = np.zeros(MAX_CLASSES, np.uint8)
        rows: list[npt.NDArray[np.int32]] = []
        offsets: list[int] = []
        for each in sorted(self._seen):
            where[each] = len(rows)
            low, masses = _masses(self._seen[each])
            rows.append(cumulative(masses))
            offsets.append(low)
        return table_of_rows(rows, offsets), where


def table_of_rows(rows: Sequence[npt.NDArray[np.int32]], offsets: Sequence[int]) -> EntropyTables:
    """Tables of cumulative frequencies, each of its own length, and the values that their first entries stand for."""
    sizes = [len(row) for row in rows]
    cdf = np.zeros((len(rows), max(sizes)), np.int32)
    for row, values in zip(cdf, rows, strict=True):
        row[: len(values)] = values
    return EntropyTables(cdf, np.array(sizes, np.int32), np.array(offsets, np.int32))


def _masses(counts: npt.NDArray[np.float64]) -> tuple[int, npt.NDArray[np.float64]]:
    """Smallest value with an entry, and the masses from it on; the last one is the escape's.

    `counts[m]` is how often magnitude m was seen, m <= MAX_REACH + 1.
    """
    total = counts.sum()
    magnitude = float((counts * np.arange(len(counts))).sum() / total) + 0.5 / total
    # Discrete Laplace p(v) ~ theta^|v| with mean magnitude 2 theta / (1 - theta^2).
    theta = (np.sqrt(1 + magnitude**2) - 1) / magnitude
    reach = int(np.ceil(np.log(TAIL_MASS / LAPLACE_WEIGHT) / np.log(theta))) if theta > 0 else 1
    reach = int(np.clip(max(reach, len(counts) - 1), 1, MAX_REACH))
    grid = np.arange(-reach, reach + 1)
    laplace = theta ** np.abs(grid)
    half = np.zeros(reach + 1)
    half[: len(counts)] = counts[: reach + 1]
    half[1:] /= 2
    seen = np.concatenate((half[:0:-1], half))
    masses = (1 - LAPLACE_WEIGHT) * seen / total + LAPLACE_WEIGHT * laplace / laplace.sum()
    # Entries at both ends that are worth less than an escape only make the table longer.
    kept = np.flatnonzero(masses >= TAIL_MASS / 4)
    # Zero always has one; it is the only one where every symbol that was seen is far outside.
    first, last = (min(int(kept[0]), reach), max(int(kept[-1]), reach)) if len(kept) else (reach, reach)
    outside = masses[:first].sum() + masses[last + 1 :].sum() + counts[reach + 1 :].sum() / total
    return int(grid[first]), np.append(masses[first : last + 1], outside + TAIL_MASS)


def cumulative(masses: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
    """Cumulative frequencies 0..65536 in which every entry has at least 1."""
    spare = (1 << PRECISION) - len(masses)
    frequency = 1 + np.floor(masses / masses.sum() * spare).astype(np.int64)
    # What rounding left over is given to the likeliest entry, where it changes least.
    frequency[frequency.argmax()] += (1 << PRECISION) - frequency.sum()
    return np.concatenate(([0], np.cumsum(frequency))).astype(np.int32)

"""Sparse rANS: Sung, Im, Palakonda and Kang, "Range Asymmetric Numeral Systems-Based Lightweight Intermediate Feature
Compression for Split Computing of Deep Neural Networks", arXiv 2511.11664.

    features -> asymmetric integer quantisation -> reshape to N x K -> modified sparse rows -> rANS
                scale, zero point a tensor         N chosen for the      v: values not zero
                                                   least cost            c: their columns
                                                                         r: how many in each row (not cumulative)

In favour of the baseline: the paper quantises to Q bits; here the number of levels is any integer, so that its curve
has more points. It codes v, c and r joined into one sequence under that sequence's own frequencies, which the decoder
must be told; here the three have static tables of their own from the calibration photographs, which cost nothing. Its
approximate model of the cost over N is replaced by the cost itself, over all divisors, on the calibration photographs.
Scale and zero point travel as the tensor's float16 ends, 4 bytes. As in the paper there is one distribution for the
whole tensor: no probability model over channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .interface import Features
from .static_coder import StaticDecoder, StaticEncoder, StaticTables, Symbols, counted_tables

Counts = npt.NDArray[np.int64]

LEVELS = (3, 4, 5, 6, 7, 8, 10, 12)
"""Numbers of levels over a tensor's range; 2^Q in the paper."""
MAX_COLUMNS = 4096
"""Longest row tried; longer ones only make the columns dearer."""
ENDS = 4
"""Bytes of a tensor's ends, two float16."""


class SparseRans:
    """One number of levels, with the row length that is cheapest for it."""

    def __init__(self, features: Features, levels: int) -> None:
        """Choose the row length and count symbols on the calibration features, float32 [N, C, H, W]."""
        self._levels = levels
        self._shape = features.shape[1:]
        elements = int(np.prod(self._shape))
        quantised = np.stack([self._quantise(each)[0] for each in features])
        lengths = [k for k in range(1, min(elements, MAX_COLUMNS) + 1) if elements % k == 0]
        self._columns = min(lengths, key=lambda k: sum(map(_bits, self._counts(quantised, k))))
        self.setting = f"{levels} levels, rows of {self._columns}"
        self._tables = StaticTables([], [], [])
        for counts in self._counts(quantised, self._columns):
            self._tables += StaticTables.of(counted_tables(counts[None]))

    def encode(self, features: Features) -> bytes:
        """Code float32 [C, H, W]: the tensor's ends, then one rANS stream of r, c and v."""
        quantised, ends = self._quantise(features)
        sparse = quantised.reshape(-1, self._columns)
        places = np.nonzero(sparse)
        out = StaticEncoder(self._tables)
        for table, symbols in enumerate(((sparse != 0).sum(1), places[1], sparse[places] + self._levels - 1)):
            out.put(symbols.astype(np.int32), np.full(symbols.shape, table, np.int32))
        return ends.tobytes() + out.flush()

    def decode(self, data: bytes) -> Features:
        """float32 [C, H, W] from what `encode` gave."""
        source = StaticDecoder(self._tables, data[ENDS:])
        sparse = np.zeros((int(np.prod(self._shape)) // self._columns, self._columns), np.int32)
        rows = source.take(np.zeros(len(sparse), np.int32))
        count = int(rows.sum())
        columns = source.take(np.full(count, 1, np.int32))
        values = source.take(np.full(count, 2, np.int32)) - (self._levels - 1)
        sparse[np.repeat(np.arange(len(sparse)), rows), columns] = values
        scale, _ = self._scale(np.frombuffer(data, np.float16, 2))
        return (sparse.reshape(self._shape) * scale).astype(np.float32)

    def _scale(self, ends: npt.NDArray[np.float16]) -> tuple[float, int]:
        """Width of a level, and the zero point, from a tensor's smallest and largest value."""
        low, high = min(float(ends[0]), 0.0), max(float(ends[1]), 0.0)
        scale = max(high - low, 1e-6) / (self._levels - 1)
        return scale, round(-low / scale)

    def _quantise(self, features: Features) -> tuple[Symbols, npt.NDArray[np.float16]]:
        """Levels less the zero point, int32 [C, H, W], and the ends."""
        ends = np.array([features.min(), features.max()], np.float16)
        scale, zero = self._scale(ends)
        return np.clip(np.rint(features / scale), -zero, self._levels - 1 - zero).astype(np.int32), ends

    def _counts(self, quantised: Symbols, columns: int) -> tuple[Counts, Counts, Counts]:
        """How often each r = 0..K, c = 0..K-1 and v (from -levels + 1 on, never 0) occurs in rows of K columns."""
        sparse = quantised.reshape(-1, columns)
        filled = sparse != 0
        values = np.bincount(sparse[filled] + self._levels - 1, minlength=2 * self._levels - 1)
        return np.bincount(filled.sum(1), minlength=columns + 1), filled.sum(0), values


def _bits(counts: Counts) -> float:
    """Entropy of the symbols that were counted, all together."""
    used = counts[counts > 0].astype(np.float64)
    return float(-(used * np.log2(used / used.sum())).sum())


def calibrate(features: Features) -> Sequence[SparseRans]:
    """One codec for each of `LEVELS`."""
    return [SparseRans(features, levels) for levels in LEVELS]

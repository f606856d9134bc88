"""SLICER: Sung, Im, Bang, Kim, Yun and Kang, "Why Should the Server Do It All? ... Training-Free Intermediate Feature
Compression", arXiv 2511.11608.

    features -> asymmetric top-K filtering -> magnitude-splitting -> adaptive bit quantisation -> sparse code, rANS
                K largest stay, exactly      blocks of equal count   bits a block under a      positions, levels
                                             by magnitude            distortion budget

* Filtering keeps exactly K elements, those of largest magnitude, where a negative one's magnitude counts `asymmetry`
  times; the others become zero.
* Splitting sorts the kept ones by magnitude into M blocks of equal cardinality.
* Each block is quantised uniformly between its own smallest and largest magnitude with as few bits as keep its squared
  error within `budget` times its energy, tensor by tensor. (The paper guards the distortion in integers, which is
  cheaper to compute and says no more about the error.)

In favour of the baseline: the paper stores the blocks in compressed sparse rows; here each element's block and sign are
one symbol of 2 M + 1 under a static table for its channel, which takes fewer bytes than any list of indices. Levels
have static tables for each block and bit width. A block of 0 bits, for which one value stands, is allowed and is sent
as its mean. Neighbouring blocks' edges are stored once, as float16; K is part of the setting. The search over splits
and servers, which the paper adds, has no part in rate and distortion at a given cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .interface import Features
from .static_coder import StaticDecoder, StaticEncoder, StaticTables, Symbols, counted_tables

MAX_BITS = 6
"""More are never needed at the rates that matter here."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Share of elements that are kept, M, error allowed as a share of a block's energy, weight of negative ones."""

    kept: float
    blocks: int
    budget: float
    asymmetry: float = 1.0


SETTINGS = (
    *(Setting(kept, 1, 0.03) for kept in (0.7, 0.45)),
    *(Setting(kept, 1, 0.1) for kept in (0.55, 0.4, 0.3, 0.22, 0.15)),
    *(Setting(kept, 1, 0.3) for kept in (0.18, 0.12)),
    *(Setting(kept, 2, 0.15) for kept in (0.3, 0.2, 0.12)),
)
"""One block, which is filtering and quantisation without splitting, was cheaper for the same accuracy than two, and two
than four, in trials over budgets of 0.01 to 0.3; an asymmetry other than 1 lost accuracy either way."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A quantised tensor.

    Attributes:
        label: int32 [C, H, W], 0 filtered, b and M + b: in block b = 1..M, positive and negative.
        bits: of each block's levels, 0..MAX_BITS.
        edges: float16 [M + 1], magnitudes between which the blocks lie.
        levels: int32, a block's levels in the order of its elements; nothing for 0 bits.
    """

    label: Symbols
    bits: list[int]
    edges: npt.NDArray[np.float16]
    levels: list[Symbols]


class Slicer:
    """One setting."""

    def __init__(self, features: Features, setting: Setting) -> None:
        """Count symbols of the calibration features, float32 [N, C, H, W]."""
        self.setting = f"kept {setting.kept:g}, {setting.blocks} blocks, budget {setting.budget:g}"
        self._how = setting
        self._shape = features.shape[1:]
        self._kept = max(setting.blocks, round(setting.kept * int(np.prod(self._shape))))
        self._channel = np.broadcast_to(np.arange(self._shape[0], dtype=np.int32)[:, None, None], self._shape)
        # Where in its block a magnitude lies on average, for blocks of 0 bits; in their middle until it is known.
        self._centre = np.full(setting.blocks, 0.5)
        self._centre = np.mean([self._centres(each) for each in features], 0)
        seen = np.zeros((self._shape[0], 2 * setting.blocks + 1), np.int64)
        levels = np.zeros((setting.blocks, MAX_BITS + 1, 1 << MAX_BITS), np.int64)
        for each in features:
            tensor = self._quantise(each)
            np.add.at(seen, (self._channel, tensor.label), 1)
            for b, (bits, values) in enumerate(zip(tensor.bits, tensor.levels, strict=True)):
                levels[b, bits] += np.bincount(values, minlength=1 << MAX_BITS)
        self._tables = StaticTables.of(counted_tables(seen))
        for b in range(setting.blocks):
            for bits in range(1, MAX_BITS + 1):
                self._tables += StaticTables.of(counted_tables(levels[b, bits : bits + 1, : 1 << bits]))

    def encode(self, features: Features) -> bytes:
        """Code float32 [C, H, W]: edges as float16, bits as nibbles, then one rANS stream."""
        tensor = self._quantise(features)
        out = StaticEncoder(self._tables)
        out.put(tensor.label, self._channel)
        for b, (bits, values) in enumerate(zip(tensor.bits, tensor.levels, strict=True)):
            out.put(values, np.full(values.shape, self._table(b, bits), np.int32))
        padded = [*tensor.bits, 0]
        nibbles = bytes(low | high << 4 for low, high in zip(padded[:-1:2], padded[1::2], strict=True))
        return tensor.edges.tobytes() + nibbles + out.flush()

    def decode(self, data: bytes) -> Features:
        """float32 [C, H, W] from what `encode` gave."""
        m = self._how.blocks
        edges = np.frombuffer(data, np.float16, m + 1)
        start = edges.nbytes + (m + 1) // 2
        bits = [data[edges.nbytes + b // 2] >> 4 * (b % 2) & 15 for b in range(m)]
        source = StaticDecoder(self._tables, data[start:])
        label = source.take(self._channel)
        levels = []
        for b in range(m):
            count = int(np.isin(label, (b + 1, b + 1 + m)).sum()) if bits[b] else 0
            levels.append(source.take(np.full(count, self._table(b, bits[b]), np.int32)))
        return self._restore(_Tensor(label, bits, edges, levels))

    def _table(self, block: int, bits: int) -> int:
        return self._shape[0] + block * MAX_BITS + bits - 1

    def _split(self, features: Features) -> tuple[list[npt.NDArray[np.intp]], npt.NDArray[np.float32]]:
        """Flat positions of each block's elements, rising, and the magnitudes of all."""
        flat = features.reshape(-1)
        magnitude = np.abs(flat)
        order = np.argsort(np.where(flat < 0, self._how.asymmetry * magnitude, magnitude), kind="stable")
        kept = order[-self._kept :]
        kept = kept[np.argsort(magnitude[kept], kind="stable")]
        return [np.sort(part) for part in np.array_split(kept, self._how.blocks)], magnitude

    def _edges(self, parts: list[npt.NDArray[np.intp]], magnitude: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
        lows = [float(magnitude[part].min()) for part in parts]
        return np.array([*lows, float(magnitude[parts[-1]].max())], np.float16)

    def _centres(self, features: Features) -> npt.NDArray[np.float64]:
        parts, magnitude = self._split(features)
        edges = self._edges(parts, magnitude).astype(np.float64)
        means = np.array([magnitude[part].mean() for part in parts])
        centres: npt.NDArray[np.float64] = (means - edges[:-1]) / np.maximum(np.diff(edges), 1e-6)
        return centres

    def _quantise(self, features: Features) -> _Tensor:
        parts, magnitude = self._split(features)
        edges = self._edges(parts, magnitude)
        label = np.zeros(magnitude.shape, np.int32)
        all_bits, all_levels = [], []
        for b, part in enumerate(parts):
            label[part] = b + 1 + self._how.blocks * (features.reshape(-1)[part] < 0)
            exact = magnitude[part]
            allowed = self._how.budget * float((exact**2).sum())
            for bits in range(MAX_BITS + 1):
                width = np.maximum(float(edges[b + 1]) - float(edges[b]), 1e-6) / (1 << bits)
                levels = np.clip((exact - float(edges[b])) / width, 0, (1 << bits) - 1).astype(np.int32)
                if float(((exact - self._values(b, bits, levels, edges)) ** 2).sum()) <= allowed:
                    break
            all_bits.append(bits)
            all_levels.append(levels if bits else np.zeros(0, np.int32))
        return _Tensor(label.reshape(self._shape), all_bits, edges, all_levels)

    def _values(
        self, block: int, bits: int, levels: Symbols, edges: npt.NDArray[np.float16]
    ) -> npt.NDArray[np.float32]:
        """Magnitudes of a block's levels: the middle of each interval, or the block's centre for 0 bits."""
        low, width = float(edges[block]), float(edges[block + 1]) - float(edges[block])
        share = (levels + 0.5) / (1 << bits) if bits else np.full(levels.shape, self._centre[block])
        return (low + width * share).astype(np.float32)

    def _restore(self, tensor: _Tensor) -> Features:
        features = np.zeros(self._shape, np.float32)
        for b, (bits, levels) in enumerate(zip(tensor.bits, tensor.levels, strict=True)):
            inside = np.isin(tensor.label, (b + 1, b + 1 + self._how.blocks))
            index = levels if bits else np.zeros(int(inside.sum()), np.int32)
            sign = np.where(tensor.label[inside] > self._how.blocks, -1, 1).astype(np.float32)
            features[inside] = sign * self._values(b, bits, index, tensor.edges)
        return features


def calibrate(features: Features) -> Sequence[Slicer]:
    """One codec for each of `SETTINGS`."""
    return [Slicer(features, setting) for setting in SETTINGS]

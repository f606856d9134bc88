"""Predicted frames: a video's symbols coded under contexts from the frame before. The symbols stay the same.

    earlier frame: symbols p, running means m            (both sides hold them, all integers)
    this frame:    symbols q   --turned-->  v = sign x q - |p|   --table of (spread, context)-->  bytes

Three things choose a component's table, all of them known before it is decoded:

* its **spread**: how far its symbol is expected to move. That is the mean magnitude which its table for frames coded
  alone gives it, times the frame's **activity**, one byte in front of the first slice: the sum of all moves over the
  sum of those mean magnitudes. Both are counted in half octaves, so that their product is a sum, and one set of tables
  serves every split point, rate level and kind of motion.
* whether p is 0; else values are mirrored so that p is positive, since what moves mostly comes nearer to 0.
* where in its step the value probably lies, by a running mean of the symbols in 1/256: one that has just been on the
  other side of a rounding threshold is likely to go back.

The tables are fitted on calibration photographs that were moved (see `synthetic`), and frozen in the bundle.
A reference at another rate level is brought to this one's steps by integer ratios of the gains.
What was tried is in docs/video.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from .entropy_coder import (
    FILLERS,
    FILLERS_BITS,
    PRECISION,
    STATE_BYTES,
    STEP_BITS,
    WORD_BYTES,
    WORST_BYTES_A_SYMBOL,
    EntropyTables,
    escape_nibbles,
    load_rans,
    padded,
)
from .exceptions import BitstreamError, BundleError
from .quantiser import SYMBOL_LIMIT

UNIT = 256
"""Parts of a symbol in which means are kept."""
GAIN = 5
"""Sixteenths of its distance to a new symbol that a mean moves."""
FRACTIONS = (8, 40, 72, 104)
"""Bounds of the classes of a mean's distance from p, in `UNIT`; below 0 mirrored where p is not 0."""
CONTEXTS = len(FRACTIONS) + 1 + 2 * len(FRACTIONS) + 1
"""Those where p is 0, then those where it is not."""
ACTIVITIES = 18
"""Half octaves from 2**-6 to 2**2.5; more is coded alone."""
SPREADS = 26
"""Half octaves from 2**-9 to 2**3.5."""
_SCALE_BITS = 20
_ACTIVITY_ONE, _SPREAD_ONE = 12, 18
TABLES = SPREADS * CONTEXTS
RATIO_BITS = 16

Symbols = npt.NDArray[np.int32]
_HALF = UNIT // 2


def _classes() -> npt.NDArray[np.intp]:
    """Context by distance -`_HALF`..`_HALF` of a mean from p, where p is 0 and then where it is not."""
    bounds = [-b for b in reversed(FRACTIONS)] + list(FRACTIONS)
    found = np.searchsorted(bounds, np.arange(-_HALF, _HALF + 1), side="right")
    # Where p is 0 values are mirrored by that distance itself, which so is never below 0.
    return np.concatenate((np.maximum(found - len(FRACTIONS), 0), found + len(FRACTIONS) + 1))


_CLASSES = _classes()
_FILLER_CDF = [0, (1 << PRECISION) - 1, 1 << PRECISION]


@dataclass(frozen=True, slots=True)
class Reference:
    """What both sides keep of a frame, to predict later ones from.

    Attributes:
        split, rate_level: of its operating point.
        symbols: int16 [n'], those of its rate level, in order of importance.
        means: int32 [n'], running means in 1/`UNIT`.
    """

    split: str
    rate_level: int
    symbols: npt.NDArray[np.int16]
    means: npt.NDArray[np.int32]

    @classmethod
    def of(cls, split: str, rate_level: int, symbols: Symbols, before: Prediction | None) -> Reference:
        """A frame's, from its symbols int32 [n'] and what they were predicted from; None for a key frame."""
        means = symbols * UNIT
        if before is not None:
            means = before.means + ((means - before.means) * GAIN >> 4)
        return cls(split, rate_level, symbols.astype(np.int16), means.astype(np.int32))

    @property
    def nbytes(self) -> int:
        """What it takes in memory, in bytes."""
        return self.symbols.nbytes + self.means.nbytes


BYTES_A_COMPONENT = 6
"""Of a `Reference`."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A reference in the steps of the frame that is predicted: symbols and means int32 [n'], means in 1/`UNIT`."""

    symbols: Symbols
    means: npt.NDArray[np.int32]

    @classmethod
    def at(cls, reference: Reference, count: int, ratios: npt.NDArray[np.int64] | None) -> Prediction:
        """Bring a reference to a rate level of `count` components.

        Args:
            reference: of the same split point.
            count: n'.
            ratios: int64 [n'], this level's gains over the reference's in 2**-`RATIO_BITS`; None for the same level.
        """
        kept = min(count, len(reference.symbols))
        symbols, means = np.zeros(count, np.int32), np.zeros(count, np.int32)
        if ratios is None:
            symbols[:kept], means[:kept] = reference.symbols[:kept], reference.means[:kept]
            return cls(symbols, means)
        scaled = reference.means[:kept] * ratios[:kept] + (1 << RATIO_BITS - 1) >> RATIO_BITS
        limit = SYMBOL_LIMIT * UNIT
        means[:kept] = np.clip(scaled, -limit, limit)
        symbols[:kept] = means[:kept] + UNIT // 2 >> 8
        return cls(np.clip(symbols, -SYMBOL_LIMIT, SYMBOL_LIMIT), means)

    def contexts(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.intp]]:
        """Signs int32 [n'], by which values are mirrored, and contexts [n'], 0..`CONTEXTS` - 1."""
        off, moved = self.means - self.symbols * UNIT, self.symbols != 0
        signs = 1 - 2 * (np.where(moved, self.symbols, off) < 0).astype(np.int32)
        places = np.clip(signs * off, -_HALF, _HALF) + (_HALF + (2 * _HALF + 1) * moved)
        return signs, _CLASSES[places]


def ratios_of(to: npt.NDArray[np.float32], of: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Gains float32 [K] over others, int64 [K] in 2**-`RATIO_BITS`, by integers alone; at most 2**24."""
    pairs = list(zip(to.tolist(), of.tolist(), strict=True))
    exact = {(a, b): Fraction(a) / Fraction(b) * (1 << RATIO_BITS) for a, b in set(pairs)}
    rounded = {pair: min((2 * r.numerator // r.denominator + 1) // 2, 1 << 24) for pair, r in exact.items()}
    return np.array([rounded[pair] for pair in pairs], np.int64)


def half_octave(value: int) -> int:
    """2 log2 of a positive integer, rounded, by integers alone; -1 of 0."""
    return (2 * value**4).bit_length() - 1 >> 1 if value else -1


def scales_of(tables: EntropyTables) -> npt.NDArray[np.int64]:
    """Mean magnitude under each table, int64 [T] in 2**-20, at least 2**-12. A table's escape counts as the value
    behind its last."""
    found = []
    for row, size, offset in zip(tables.cdf, tables.sizes.tolist(), tables.offsets.tolist(), strict=True):
        frequency = np.diff(row[:size].astype(np.int64))
        values = np.abs(np.arange(offset, offset + size - 1, dtype=np.int64))
        found.append(max(int((frequency * values).sum()) << _SCALE_BITS - PRECISION, 1 << _SCALE_BITS - 12))
    return np.array(found, np.int64)


class Scales:
    """Of the components of a rate level: what they are expected to move by."""

    def __init__(self, tables: EntropyTables, indexes: npt.NDArray[np.integer[Any]]) -> None:
        """From the tables for frames coded alone, and each component's, [n']."""
        scales = scales_of(tables)
        octaves = np.array([half_octave(scale) for scale in scales.tolist()], np.intp)
        self._spreads = octaves[indexes] - 2 * _SCALE_BITS + _SPREAD_ONE - _ACTIVITY_ONE
        self._sum = int(scales[indexes].sum())

    def activity(self, moves: int) -> int:
        """0..`ACTIVITIES` - 1, of a frame whose symbols move by `moves` in all."""
        octaves = half_octave((moves << _SCALE_BITS + 8) // self._sum) - 16 + _ACTIVITY_ONE
        return min(max(octaves, 0), ACTIVITIES - 1)

    def spreads(self, activity: int) -> npt.NDArray[np.intp]:
        """[n'], 0..`SPREADS` - 1."""
        spreads: npt.NDArray[np.intp] = np.clip(self._spreads + activity, 0, SPREADS - 1)
        return spreads


class TemporalTables:
    """The tables of predicted frames, as the entropy coder takes them: `SPREADS` times `CONTEXTS` rows."""

    def __init__(self, tables: EntropyTables) -> None:
        """Lay them out.

        Raises:
            BundleError: there are more or fewer than `TABLES`.
        """
        if len(tables) != TABLES:
            raise BundleError(f"there are {len(tables)} tables for predicted frames, this version knows {TABLES}")
        self.sizes, self.offsets = tables.sizes, tables.offsets
        self.cdf = [row[:size].tolist() for row, size in zip(tables.cdf, tables.sizes.tolist(), strict=True)]
        costs = [PRECISION - np.log2(np.diff(row)) for row in self.cdf]
        self.costs = np.concatenate(costs)
        self.rows = np.concatenate(([0], np.cumsum([len(row) for row in costs])[:-1]))


class TemporalCoder:
    """Codes the symbols of a rate level's frames under contexts. Holds no state between calls."""

    def __init__(self, tables: TemporalTables, scales: Scales, ends: Sequence[int]) -> None:
        """For components of these scales; slices end at `ends`, as in `SymbolCoder`."""
        self._tables, self._scales, self.ends = tables, scales, tuple(ends)
        self._behind = WORST_BYTES_A_SYMBOL * ends[-1]

    def plan(self, symbols: Symbols, prediction: Prediction) -> Plan:
        """Everything about coding symbols int32 [n'] but the coding: what it would cost, for one."""
        signs, contexts = prediction.contexts()
        values = signs * symbols - np.abs(prediction.symbols)
        activity = self._scales.activity(int(np.abs(symbols - prediction.symbols).sum()))
        tables = self._scales.spreads(activity) * CONTEXTS + contexts
        entries = self._tables.sizes[tables] - 2
        shifted = values - self._tables.offsets[tables]
        outside = np.flatnonzero((shifted < 0) | (shifted >= entries))
        rows = self._tables.rows[tables]
        if len(outside):
            escaped = escape_nibbles(shifted[outside], entries[outside])
            shifted[outside] = entries[outside]
            costs = self._tables.costs[rows + shifted]
            costs[outside] += 4.0 * escaped
        else:
            costs = self._tables.costs[rows + shifted]
        return Plan(activity, values, tables, costs, len(outside))

    def encode(self, plan: Plan) -> tuple[bytes, ...]:
        """A section a slice, of which the first one begins with the activity."""
        first = bytes((plan.activity,))
        if not plan.values.any():
            return (first, *[b""] * (len(self.ends) - 1))
        indexes, cdf, sizes, offsets = self._compact(plan.tables)
        values = plan.values.tolist() + [0] * FILLERS
        encoder = load_rans().RansEncoder()

        def stream(begin: int) -> bytes:
            part = (values[begin:], indexes[begin:]) if begin else (values, indexes)
            coded: bytes = encoder.encode_with_indexes(*part, cdf, sizes, offsets)
            return coded

        whole = stream(0)
        cuts = []
        behind = np.cumsum(np.add.reduceat(plan.costs, self.ends[:-1])[::-1])[::-1].tolist() if self.ends[1:] else []
        # How many words lie behind a slice follows from what its symbols cost, but for rounding (see `SymbolCoder`).
        for end, bits in zip(self.ends[:-1], behind, strict=True):
            doubt = (len(values) - end + 8 * plan.escapes) * STEP_BITS + FILLERS_BITS
            words = (bits - doubt) // 32
            if words < 0 or words != (bits + doubt) // 32:
                words = (len(stream(end)) - STATE_BYTES) // WORD_BYTES
            cuts.append(len(whole) - WORD_BYTES * int(words))
        sections = [whole[a:b] for a, b in zip((0, *cuts), (*cuts, len(whole)), strict=True)]
        state = sections[0][:STATE_BYTES].rstrip(b"\0")
        sections[0] = first + state.ljust(STATE_BYTES - 3, b"\0") + sections[0][STATE_BYTES:]
        return tuple(sections)

    def decode(self, sections: Sequence[bytes], prediction: Prediction) -> Symbols:
        """Symbols int32 [n'] of a prefix of what `encode` gave; those of slices that are missing are as predicted.

        Raises:
            BitstreamError: there are no or too many sections, or they cannot be coded symbols.
        """
        if not 1 <= len(sections) <= len(self.ends):
            raise BitstreamError(f"{len(sections)} slices cannot be decoded, there are {len(self.ends)}")
        if not sections[0] or sections[0][0] >= ACTIVITIES:
            raise BitstreamError("a predicted frame's first slice does not begin with its activity")
        activity, count = sections[0][0], self.ends[len(sections) - 1]
        symbols = prediction.symbols.copy()
        first, rest = sections[0][1:], sections[1:]
        if not (first or any(rest)):
            return symbols
        missing = -len(first) % 4
        if len(first) + missing < STATE_BYTES:
            raise BitstreamError(f"a first slice of {len(first)} bytes is too short for an entropy-coded one")
        signs, contexts = prediction.contexts()
        tables = self._scales.spreads(activity)[:count] * CONTEXTS + contexts[:count]
        cut = STATE_BYTES - missing
        whole = padded((first[:cut], bytes(missing), first[cut:], *rest), self._behind)
        indexes, cdf, sizes, offsets = self._compact(tables)
        found = load_rans().RansDecoder().decode_with_indexes(whole, indexes[:count], cdf, sizes, offsets)
        if len(found) != count:
            raise BitstreamError(f"the slices decode to {len(found)} symbols of {count}")
        values = np.fromiter(found, np.int64, count)
        wide = (values + np.abs(symbols[:count])) * signs[:count]
        if (np.abs(wide) > SYMBOL_LIMIT).any():
            raise BitstreamError(f"the packet decodes to symbols beyond +-{SYMBOL_LIMIT}")
        symbols[:count] = wide
        return symbols

    def _compact(self, tables: npt.NDArray[np.intp]) -> tuple[list[int], list[list[int]], list[int], list[int]]:
        """Indexes among the tables that are used, and these; the extension copies all that it is given."""
        counts = np.bincount(tables, minlength=TABLES)
        used = np.flatnonzero(counts)
        where = np.zeros(TABLES, np.intp)
        where[used] = np.arange(len(used))
        known = self._tables
        return (
            where[tables].tolist() + [len(used)] * FILLERS,
            [*(known.cdf[t] for t in used.tolist()), _FILLER_CDF],
            [*known.sizes[used].tolist(), len(_FILLER_CDF)],
            [*known.offsets[used].tolist(), 0],
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """How symbols will be coded: values, tables and their costs in bits, each [n'], and how many values escape."""

    activity: int
    values: Symbols
    tables: npt.NDArray[np.intp]
    costs: npt.NDArray[np.float64]
    escapes: int

    @property
    def bits(self) -> float:
        """What they cost, the activity's byte included."""
        return float(self.costs.sum()) + 8.0

"""Entropy coder: symbols <-> bytes under frozen integer tables, by CompressAI's rANS.

Tables are in the form that CompressAI's `EntropyBottleneck` freezes to (Bégaint et al., arXiv 2011.03029): cumulative
frequencies of 16 bits, one offset a table, and a last entry that stands for every other value, which is then written
as an escape. The coder is `compressai.ans`, loaded from the extension file alone: importing the package would import
torch, which an edge need not have.

Four things are added around it:

* All slices of a frame are sections of one stream. rANS decodes from the front and takes a word when it needs one, so
  the first words are all that the first symbols need: cut where the decoder stands after a slice's last symbol, any
  prefix of sections decodes, and a frame pays for one final state instead of one a slice (4 to 5 bytes each).
* rANS ends with a state of 64 bits whose upper bytes are often zero. They are left out here and put back before
  decoding (the coder writes whole 32-bit words, so the length says how many are missing): 1.6 bytes on average.
* The extension gives its encoder one word of memory a symbol and writes two for the state: a stream of one symbol would
  overrun it. Every stream therefore ends with `FILLERS` symbols that cost nothing and are never decoded.
* The extension trusts its input and reads on where a damaged stream makes it. It is given zeros behind the data, as
  many as the symbols that were asked for can consume at the very worst, so that it never leaves its buffer.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
import struct
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from .exceptions import BitstreamError, BundleError, HeadraceError

PRECISION = 16
"""Cumulative frequencies end at 2**PRECISION."""

STATE_BYTES = 8
"""What an rANS stream begins with: the coder's final state, little endian; 32-bit words follow."""

MAX_ENTRIES = 2**24
"""Most numbers that tables take which are stored without padding."""

FILLERS = 2
"""Symbols at the end of a stream, under a table in which they are as good as certain."""
_FILLER_CDF = [0, (1 << PRECISION) - 1, 1 << PRECISION]
FILLERS_BITS = 1e-3
"""More than the fillers cost."""

WORD_BYTES = 4
"""What the coder writes and reads at a time."""
STEP_BITS = math.log2(1 + 2.0 ** (PRECISION - 31))
"""Most by which rounding makes a step cheaper or dearer."""

WORST_BYTES_A_SYMBOL = 132
"""A symbol takes at most 16 bits of the stream, and an escape from a damaged stream at most 16 count nibbles of value
15 (after that the zeros behind the data reach the state) and the 240 nibbles they announce: 2 + 8 + 120, rounded up."""


@cache
def load_rans() -> ModuleType:
    """Load `compressai.ans` from its extension file, without importing `compressai`.

    Raises:
        HeadraceError: the package is not installed, or has no extension for this Python.
    """
    spec = importlib.util.find_spec("compressai")  # does not import the package
    if spec is None or spec.origin is None:
        raise HeadraceError(
            "compressai is not installed; run `pip install --no-deps compressai` (its rANS coder needs nothing else)"
        )
    folder = Path(spec.origin).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"ans{suffix}"
        if path.exists():
            found = importlib.util.spec_from_file_location("compressai.ans", path)
            if found is None or found.loader is None:
                break
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
            return module
    raise HeadraceError(
        f"{folder} holds no rANS extension for this Python; "
        "reinstall with `pip install --no-deps --force-reinstall compressai`"
    )


class _Buffers(threading.local):
    """Of one thread, by size."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[bytearray, int]] = {}


_buffers = _Buffers()
MOST_BUFFERS = 8


def padded(parts: Sequence[bytes], behind: int) -> bytearray:
    """The parts one after another, and zeros behind them: `behind` of them, and 16 for each byte of the parts.

    What is returned is this thread's until its next call. Megabytes of zeros that are allocated for each frame are
    given back and faulted in again, page by page, which can take longer than decoding.
    """
    size = sum(map(len, parts))
    needed = 17 * size + behind
    step = 1 << max(needed.bit_length() - 4, 10)  # an eighth of it, so that like sizes share a buffer
    length = -(-needed // step) * step
    buffer, used = _buffers.kept.get(length) or (bytearray(length), 0)
    if length not in _buffers.kept and len(_buffers.kept) >= MOST_BUFFERS:
        _buffers.kept.clear()
    buffer[:size] = b"".join(parts)
    if used > size:
        buffer[size:used] = bytes(used - size)
    _buffers.kept[length] = buffer, size
    return buffer


class EntropyTables:
    """Frozen tables: one distribution over integers a row.

    Attributes:
        cdf: int32 [T, L], row t holds sizes[t] strictly increasing values from 0 to 65536, then padding.
        sizes: int32 [T], 3..L: number of values in the row, which is number of symbols with a frequency of their
            own, plus 2 (the escape's entry and the leading zero).
        offsets: int32 [T], the value that a row's first symbol stands for.
    """

    def __init__(
        self, cdf: npt.NDArray[np.int32], sizes: npt.NDArray[np.int32], offsets: npt.NDArray[np.int32]
    ) -> None:
        """Check and keep the tables.

        Raises:
            BundleError: shapes do not fit, or a row is not a cumulative distribution (the extension would crash).
        """
        if cdf.ndim != 2 or sizes.shape != (len(cdf),) or offsets.shape != (len(cdf),):
            raise BundleError(
                f"entropy tables do not fit together: cdf {cdf.shape}, sizes {sizes.shape}, offsets {offsets.shape}"
            )
        self.cdf, self.sizes, self.offsets = (a.astype(np.int32, copy=False) for a in (cdf, sizes, offsets))
        for t, (row, size) in enumerate(zip(self.cdf, self.sizes, strict=True)):
            if not 3 <= size <= self.cdf.shape[1]:
                raise BundleError(f"entropy table {t} declares {size} values, its row has {self.cdf.shape[1]}")
            used = row[:size]
            if used[0] != 0 or used[-1] != 1 << PRECISION or (np.diff(used) <= 0).any():
                raise BundleError(f"entropy table {t} is not a cumulative distribution from 0 to 65536")

    @classmethod
    def of_flat(
        cls, flat: npt.NDArray[np.int32], sizes: npt.NDArray[np.int32], offsets: npt.NDArray[np.int32]
    ) -> EntropyTables:
        """Tables whose rows lie one after another without padding, int32 [sum of the sizes].

        Raises:
            BundleError: as for the class, or they would take too much memory.
        """
        if sizes.ndim != 1 or len(sizes) == 0 or sizes.min() < 3 or flat.shape != (int(sizes.sum()),):
            raise BundleError(f"{len(sizes)} entropy tables do not lie in {flat.shape} numbers")
        if len(sizes) * int(sizes.max()) > MAX_ENTRIES:
            raise BundleError(
                f"{len(sizes)} entropy tables of up to {sizes.max()} values are over {MAX_ENTRIES} in all"
            )
        cdf = np.zeros((len(sizes), int(sizes.max())), np.int32)
        for row, begin, size in zip(cdf, np.cumsum(sizes) - sizes, sizes, strict=True):
            row[:size] = flat[begin : begin + size]
        return cls(cdf, sizes, offsets)

    def flat(self) -> npt.NDArray[np.int32]:
        """Rows one after another, int32 [sum of the sizes]; see `of_flat`."""
        return np.concatenate([row[:size] for row, size in zip(self.cdf, self.sizes.tolist(), strict=True)])

    def __len__(self) -> int:
        """Number of tables."""
        return len(self.cdf)

    def bits(self, symbols: npt.NDArray[np.int32], indexes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float64]:
        """Ideal code length in bits of each of `symbols`, float64 of their shape, under tables `indexes` (same shape);
        an escape costs 4 bits a nibble."""
        value = symbols - self.offsets[indexes]
        escape = self.sizes[indexes] - 2
        outside = (value < 0) | (value >= escape)
        entry = np.where(outside, escape, value)
        bits: npt.NDArray[np.float64] = PRECISION - np.log2(self.cdf[indexes, entry + 1] - self.cdf[indexes, entry])
        bits[outside] += 4.0 * escape_nibbles(value[outside], escape[outside])
        return bits


class SymbolCoder:
    """Codes the symbols of a frame, symbol i under table `indexes[i]`, into one section a slice.

    The tables are kept as the lists that the extension takes, so that a frame costs no conversion of tables.
    """

    def __init__(self, tables: EntropyTables, indexes: npt.NDArray[np.integer[Any]], ends: Sequence[int]) -> None:
        """Prepare the coder.

        Args:
            tables: any number.
            indexes: integers [n], each symbol's table.
            ends: number of symbols up to the end of each slice, rising, 1 to n.

        Raises:
            BundleError: an index names no table, or the ends do not rise to n.
        """
        if len(indexes) == 0 or int(indexes.min()) < 0 or int(indexes.max()) >= len(tables):
            raise BundleError(f"{len(indexes)} symbols are given tables that are not among the {len(tables)} there are")
        if list(ends) != sorted(set(ends)) or ends[0] < 1 or ends[-1] != len(indexes):
            raise BundleError(f"slices that end at {list(ends)} do not divide {len(indexes)} symbols")
        self.ends = tuple(int(end) for end in ends)
        # Only the tables that are used: the extension copies all that it is given, for every call.
        used, compact = np.unique(indexes, return_inverse=True)
        self._indexes = compact.astype(np.int32).tolist() + [len(used)] * FILLERS
        self._sizes = [*tables.sizes[used].tolist(), len(_FILLER_CDF)]
        self._offsets = [*tables.offsets[used].tolist(), 0]
        self._cdf = [tables.cdf[t, : tables.sizes[t]].tolist() for t in used.tolist()] + [_FILLER_CDF]
        self._behind = WORST_BYTES_A_SYMBOL * len(indexes)
        # For `_words_behind`: each symbol's row in a flat array of costs, and how many values have an entry there.
        self._entries = (tables.sizes[used] - 2)[compact]
        rows = [PRECISION - np.log2(np.diff(tables.cdf[t, : tables.sizes[t]])) for t in used.tolist()]
        self._costs = np.concatenate(rows)
        begins = np.concatenate(([0], np.cumsum([len(row) for row in rows])[:-1]))
        self._row = begins[compact]
        self._first = tables.offsets[used][compact]

    def encode(self, symbols: npt.NDArray[np.int32]) -> tuple[bytes, ...]:
        """Code int32 [n] into a section a slice; zeros alone give empty sections.

        Raises:
            ValueError: another number of symbols.
        """
        if symbols.shape != (self.ends[-1],):
            raise ValueError(f"{self.ends[-1]} symbols are coded, got {symbols.shape}")
        if not symbols.any():
            return (b"",) * len(self.ends)
        values = symbols.tolist() + [0] * FILLERS
        whole = self._stream(values, 0)
        cuts = [len(whole) - WORD_BYTES * words for words in self._words_behind(symbols, values)]
        sections = [whole[a:b] for a, b in zip((0, *cuts), (*cuts, len(whole)), strict=True)]
        state = sections[0][:STATE_BYTES].rstrip(b"\0")
        # Only three bytes at most may go: the length modulo 4 has to say how many.
        sections[0] = state.ljust(STATE_BYTES - 3, b"\0") + sections[0][STATE_BYTES:]
        return tuple(sections)

    def decode(self, sections: Sequence[bytes]) -> npt.NDArray[np.int32]:
        """Decode a prefix of what `encode` gave into int32 [m], m the symbols up to the last section's end.

        Raises:
            BitstreamError: there are no or too many sections, or they cannot be coded symbols.
        """
        if not 1 <= len(sections) <= len(self.ends):
            raise BitstreamError(f"{len(sections)} slices cannot be decoded, there are {len(self.ends)}")
        count = self.ends[len(sections) - 1]
        if not any(sections):
            return np.zeros(count, np.int32)
        missing = -len(sections[0]) % 4
        if len(sections[0]) + missing < STATE_BYTES:
            raise BitstreamError(f"a first slice of {len(sections[0])} bytes is too short for an entropy-coded one")
        cut = STATE_BYTES - missing
        whole = padded((sections[0][:cut], bytes(missing), sections[0][cut:], *sections[1:]), self._behind)
        symbols = (
            load_rans()
            .RansDecoder()
            .decode_with_indexes(whole, self._indexes[:count], self._cdf, self._sizes, self._offsets)
        )
        try:
            # A third of the time that NumPy takes for a list.
            return np.frombuffer(struct.pack(f"={len(symbols)}i", *symbols), np.int32).reshape(count)
        except (struct.error, ValueError) as error:
            raise BitstreamError(f"the slices decode to {len(symbols)} symbols of {count}: {error}") from error

    def bits(self, symbols: npt.NDArray[np.int32]) -> float:
        """What int32 [n] would take, ideally, in bits; escapes count by the entry of theirs alone."""
        value = symbols - self._first
        return float(
            self._costs[self._row + np.where((value < 0) | (value >= self._entries), self._entries, value)].sum()
        )

    def _words_behind(self, symbols: npt.NDArray[np.int32], values: list[int]) -> list[int]:
        """How many words of the stream the symbols behind each slice but the last have put there.

        rANS keeps what it has not yet written in a state of 31 to 63 bits. So the number of words follows from how many
        bits the symbols cost, unless these are so near to a multiple of 32 that the coder's rounding decides: then they
        are coded by themselves, and the words counted.
        """
        if len(self.ends) == 1:
            return []
        value = symbols - self._first
        outside = np.flatnonzero((value < 0) | (value >= self._entries))
        if len(outside):
            value[outside] = self._entries[outside]
        costs = self._costs[self._row + value]
        if len(outside):
            costs[outside] += 4.0 * escape_nibbles(symbols[outside] - self._first[outside], self._entries[outside])
        behind = np.cumsum(np.add.reduceat(costs, self.ends[:-1])[::-1])[::-1].tolist()
        words = []
        for end, bits in zip(self.ends[:-1], behind, strict=True):
            # A step moves the state by 2**16 of 2**31 at most, and by less where nibbles of escapes are put.
            doubt = (len(values) - end + 8 * len(outside)) * STEP_BITS + FILLERS_BITS
            least = (bits - doubt) // 32
            if least >= 0 and least == (bits + doubt) // 32:
                words.append(int(least))
            else:
                words.append((len(self._stream(values, end)) - STATE_BYTES) // WORD_BYTES)
        return words

    def _stream(self, values: list[int], first: int) -> bytes:
        """The extension's stream of the symbols, fillers and all, from `first` on."""
        coded: bytes = (
            load_rans()
            .RansEncoder()
            .encode_with_indexes(values[first:], self._indexes[first:], self._cdf, self._sizes, self._offsets)
        )
        return coded


def escape_nibbles(
    values: npt.NDArray[np.integer[Any]], entries: npt.NDArray[np.integer[Any]]
) -> npt.NDArray[np.int64]:
    """Nibbles that follow an escape: the value's distance from the entries that a table has, and how long that is.

    Args:
        values: integers [m], relative to the table's first value, each below 0 or not below its entry of `entries`.
        entries: integers [m], how many values the table has entries for.
    """
    found = []
    for v, e in zip(values.tolist(), entries.tolist(), strict=True):
        raw = -2 * v - 1 if v < 0 else 2 * (v - e)
        nibbles = (raw.bit_length() + 3) // 4
        found.append(nibbles + nibbles // 15 + 1)
    return np.array(found, np.int64)

"""rANS under static tables over small alphabets: what the training-free codecs write their symbols with.

Symbols can be decoded in steps, so that what comes later in a stream may depend on what was decoded before (how many
symbols there are, and under which tables).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...models.entropy_coder import PRECISION, STATE_BYTES, EntropyTables, load_rans

Symbols = npt.NDArray[np.int32]
ESCAPE = 1
"""Frequency of the escape entry, which the coder's format asks for and these alphabets hardly ever use."""


def counted_tables(counts: npt.NDArray[Any]) -> EntropyTables:
    """Tables from how often each symbol was seen.

    Args:
        counts: [T, A] numbers >= 0 of symbols 0..A-1, A < 30,000; half a count is added to each (Krichevsky and
            Trofimov), so that none is impossible.
    """
    masses = counts.astype(np.float64) + 0.5
    total = (1 << PRECISION) - ESCAPE
    frequency = np.maximum(1, np.rint(masses / masses.sum(1, keepdims=True) * total)).astype(np.int64)
    likeliest = frequency.argmax(1)[:, None]
    short = total - frequency.sum(1, keepdims=True)
    np.put_along_axis(frequency, likeliest, np.take_along_axis(frequency, likeliest, 1) + short, 1)
    whole = np.concatenate((frequency, np.full((len(counts), 1), ESCAPE)), 1)
    cdf = np.concatenate((np.zeros((len(counts), 1), np.int64), np.cumsum(whole, 1)), 1).astype(np.int32)
    return EntropyTables(cdf, np.full(len(cdf), cdf.shape[1], np.int32), np.zeros(len(cdf), np.int32))


def channel_tables(symbols: Symbols) -> EntropyTables:
    """A table a channel, counted in int32 [N, C, H, W]; values that were not seen there in any channel are escapes."""
    low = int(symbols.min())
    alphabet = int(symbols.max()) - low + 1
    flat = symbols.swapaxes(0, 1).reshape(symbols.shape[1], -1) - low
    tables = counted_tables(np.stack([np.bincount(channel, minlength=alphabet) for channel in flat]))
    return EntropyTables(tables.cdf, tables.sizes, np.full(len(tables), low, np.int32))


@dataclass(frozen=True)
class StaticTables:
    """Entropy tables as the lists that the extension takes."""

    cdf: list[list[int]]
    sizes: list[int]
    offsets: list[int]

    @classmethod
    def of(cls, tables: EntropyTables) -> StaticTables:
        """From arrays."""
        sizes = tables.sizes.tolist()
        return cls([r[:n].tolist() for r, n in zip(tables.cdf, sizes, strict=True)], sizes, tables.offsets.tolist())

    def __add__(self, other: StaticTables) -> StaticTables:
        """Both, the other's after these."""
        return StaticTables(self.cdf + other.cdf, self.sizes + other.sizes, self.offsets + other.offsets)


class StaticEncoder:
    """Collects symbols with their tables; `flush` codes them all."""

    def __init__(self, tables: StaticTables) -> None:
        self._tables = tables
        self._symbols: list[int] = []
        self._indexes: list[int] = []

    def put(self, symbols: Symbols, indexes: Symbols) -> None:
        """Append int32 symbols under the tables `indexes` (same shape)."""
        self._symbols += symbols.reshape(-1).tolist()
        self._indexes += indexes.reshape(-1).tolist()

    def flush(self) -> bytes:
        """The stream; empty without symbols. Upper zero bytes of the coder's state are left out, as in our slices."""
        if not self._symbols:
            return b""
        t = self._tables
        coded: bytes = (
            load_rans().RansEncoder().encode_with_indexes(self._symbols, self._indexes, t.cdf, t.sizes, t.offsets)
        )
        state = coded[:STATE_BYTES].rstrip(b"\0")
        # The coder writes words of four bytes, so the length says how many are missing if at most three are.
        return state.ljust(STATE_BYTES - 3, b"\0") + coded[STATE_BYTES:]


class StaticDecoder:
    """Decodes a stream in the order in which it was put."""

    def __init__(self, tables: StaticTables, data: bytes) -> None:
        self._tables = tables
        self._rans = load_rans().RansDecoder()
        if data:
            missing = -len(data) % 4
            cut = STATE_BYTES - missing
            self._rans.set_stream(data[:cut] + bytes(missing) + data[cut:] + bytes(64))

    def take(self, indexes: Symbols) -> Symbols:
        """The next symbols, int32 in the shape of `indexes`, which name their tables."""
        if not indexes.size:
            return np.zeros(indexes.shape, np.int32)
        t = self._tables
        found = self._rans.decode_stream(indexes.reshape(-1).tolist(), t.cdf, t.sizes, t.offsets)
        return np.array(found, np.int32).reshape(indexes.shape)

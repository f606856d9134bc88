"""Entropy coder: symbols <-> bytes under frozen integer tables, by CompressAI's rANS.

Tables are in the form that CompressAI's `EntropyBottleneck` freezes to (Bégaint et al., arXiv 2011.03029): cumulative
frequencies of 16 bits, one offset a table, and a last entry that stands for every other value, which is then written
as an escape. The coder is `compressai.ans`, loaded from the extension file alone: importing the package would import
torch, which an edge need not have.

Two things are added around it:

* rANS ends with a state of 64 bits whose upper bytes are often zero. They are left out here and put back before
  decoding (the coder writes whole 32-bit words, so the length says how many are missing): 1.6 bytes a slice on average.
* The extension trusts its input and reads on where a damaged stream makes it. It is given zeros behind the data, as
  many as the symbols that were asked for can consume at the very worst, so that it never leaves its buffer.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

from .exceptions import BitstreamError, BundleError, HeadraceError

PRECISION = 16
"""Cumulative frequencies end at 2**PRECISION."""

STATE_BYTES = 8
"""What an rANS stream begins with: the coder's final state, little endian."""

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

    def __len__(self) -> int:
        """Number of tables."""
        return len(self.cdf)

    def bits(self, symbols: npt.NDArray[np.int32], indexes: npt.NDArray[np.int32]) -> float:
        """Ideal code length in bits of `symbols` under tables `indexes` (same shape); escapes cost 4 bits a nibble."""
        flat, index = symbols.reshape(-1), indexes.reshape(-1)
        value = flat - self.offsets[index]
        escape = self.sizes[index] - 2
        outside = (value < 0) | (value >= escape)
        value = np.where(outside, escape, value)
        frequency = self.cdf[index, value + 1] - self.cdf[index, value]
        total = float(np.sum(PRECISION - np.log2(frequency)))
        for v, e in zip((flat - self.offsets[index])[outside], escape[outside], strict=True):
            raw = int(-2 * v - 1) if v < 0 else 2 * int(v - e)
            nibbles = (raw.bit_length() + 3) // 4
            total += 4 * (nibbles + nibbles // 15 + 1)
        return total


class SliceCoder:
    """Codes one slice: channels first..last-1 of a latent, channel k under table k.

    The tables are kept as the lists that the extension takes, so that a frame costs no conversion of tables.
    """

    def __init__(self, tables: EntropyTables, first: int, last: int, places: int) -> None:
        """Prepare the slice.

        Args:
            tables: at least `last` tables.
            first, last: channels of the slice, 0 <= first < last.
            places: H x W of the latent.

        Raises:
            BundleError: the tables do not reach `last`.
        """
        if not 0 <= first < last <= len(tables):
            raise BundleError(f"a slice of channels {first}..{last} does not fit {len(tables)} entropy tables")
        self.channels, self.places = last - first, places
        self._sizes = tables.sizes[first:last].tolist()
        self._offsets = tables.offsets[first:last].tolist()
        self._cdf = [row[:size].tolist() for row, size in zip(tables.cdf[first:last], self._sizes, strict=True)]
        self._indexes = np.repeat(np.arange(self.channels), places).tolist()
        self._padding = bytes(WORST_BYTES_A_SYMBOL * len(self._indexes))

    def encode(self, symbols: npt.NDArray[np.int32]) -> bytes:
        """Code int32 [channels, H, W]; a slice of zeros is the empty string."""
        if not symbols.any():
            return b""
        coded: bytes = (
            load_rans()
            .RansEncoder()
            .encode_with_indexes(symbols.reshape(-1).tolist(), self._indexes, self._cdf, self._sizes, self._offsets)
        )
        state = coded[:STATE_BYTES].rstrip(b"\0")
        # Only three bytes at most may go: the length modulo 4 has to say how many.
        return state.ljust(STATE_BYTES - 3, b"\0") + coded[STATE_BYTES:]

    def decode(self, data: bytes) -> npt.NDArray[np.int32]:
        """Decode what `encode` gave into int32 [channels, places].

        Raises:
            BitstreamError: the data cannot be a coded slice.
        """
        count = self.channels * self.places
        if not data:
            return np.zeros((self.channels, self.places), np.int32)
        missing = -len(data) % 4
        if len(data) + missing < STATE_BYTES:
            raise BitstreamError(f"a slice of {len(data)} bytes is too short for an entropy-coded one")
        cut = STATE_BYTES - missing
        whole = b"".join((data[:cut], bytes(missing), data[cut:], bytes(16 * len(data)), self._padding))
        symbols = (
            load_rans().RansDecoder().decode_with_indexes(whole, self._indexes, self._cdf, self._sizes, self._offsets)
        )
        try:
            return np.array(symbols, np.int32).reshape(self.channels, self.places)
        except (OverflowError, ValueError) as error:
            raise BitstreamError(f"a slice decodes to {len(symbols)} symbols of {count}: {error}") from error

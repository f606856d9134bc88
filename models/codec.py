"""Codec: latent <-> packet, for the operating points of one bundle. The same class on both sides, numpy only.

latent --quantise--> symbols --order of importance--> entropy coder --> slices --> Packet     compress, on the edge
Packet --> entropy coder --> symbols (those of slices that are missing stay 0)               decompress, on the server
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from .bitstream import Packet
from .bundle import Bundle
from .entropy_coder import SymbolCoder
from .exceptions import BitstreamError, OperatingPointError
from .operating_point import Kind, OperatingPoint
from .quantiser import quantise


class Codec:
    """Compresses and decompresses under a bundle's tables.

    Coders are made on first use of a rate level, or by `prepare`, and kept; after that, changing the operating point
    costs nothing. Safe to use from several threads: a coder holds no state between calls.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Keep the bundle; nothing is computed yet."""
        self.bundle = bundle
        self._coders: dict[tuple[str, int], tuple[SymbolCoder, npt.NDArray[np.int32]]] = {}

    def prepare(self, points: Iterable[OperatingPoint]) -> None:
        """Make the coders of those `points` that have one (about 5 ms and 1.5 MB each), so that no frame has to."""
        for point in points:
            if point.kind is Kind.FEATURE:
                self._coder(point)

    def compress(self, latent: npt.NDArray[np.float32], point: OperatingPoint, frame_id: int) -> Packet:
        """Quantise and code a latent.

        Args:
            latent: float32 [K, H, W] of `point`'s split.
            point: of kind `feature`.
            frame_id: 0..2**32-1.

        Raises:
            OperatingPointError: the point is of another kind, or the latent has another shape.
        """
        shape = self._latent_shape(point)
        if latent.shape != shape:
            raise OperatingPointError(f"{point.name} takes a latent of {shape}, got {latent.shape}")
        symbols = quantise(latent, self.bundle.gain(point.split, point.rate_level))
        return self.compress_symbols(symbols, point, frame_id)

    def compress_symbols(self, symbols: npt.NDArray[np.int32], point: OperatingPoint, frame_id: int) -> Packet:
        """Code symbols int32 [K, H, W]; components behind the last slice are not sent."""
        coder, order = self._coder(point)
        return Packet(point.id, frame_id, coder.encode(symbols.reshape(-1)[order]))

    def entropy_bits(self, symbols: npt.NDArray[np.int32], point: OperatingPoint) -> float:
        """Ideal code length in bits, under the bundle's tables, of what is sent of symbols int32 [K, H, W]."""
        tables, indexes = self.bundle.tables(point.split), self.bundle.indexes(point.split, point.rate_level)
        sent = symbols.reshape(-1)[self.bundle.order(point.split)[: len(indexes)]]
        return float(tables.bits(sent, indexes).sum())

    def decompress(self, packet: Packet) -> npt.NDArray[np.int32]:
        """Decode a packet of any prefix of slices into symbols int32 [K, H, W]; what is missing is 0.

        Raises:
            OperatingPointError: the packet's operating point is not in the bundle, or is no `feature` point.
            BitstreamError: a slice cannot be decoded, or there are more slices than the rate level has.
        """
        point = self.bundle.operating_point(packet.operating_point)
        shape = self._latent_shape(point)
        coder, order = self._coder(point)
        if len(packet.slices) > len(coder.ends):
            raise BitstreamError(f"{point.name} has {len(coder.ends)} slices, the packet {len(packet.slices)}")
        received = coder.decode(packet.slices)
        symbols = np.zeros(shape, np.int32)
        symbols.reshape(-1)[order[: len(received)]] = received
        return symbols

    def _latent_shape(self, point: OperatingPoint) -> tuple[int, int, int]:
        if point.kind is not Kind.FEATURE:
            raise OperatingPointError(f"{point.name} is of kind {point.kind}; only feature points have a latent")
        return self.bundle.split(point.split).latent_shape

    def _coder(self, point: OperatingPoint) -> tuple[SymbolCoder, npt.NDArray[np.int32]]:
        """The coder of a rate level, and the places of its components in [K, H, W] laid flat."""
        key = (point.split, point.rate_level)
        found = self._coders.get(key)
        if found is None:
            indexes = self.bundle.indexes(*key)
            ends = self.bundle.split(point.split).slices[point.rate_level]
            coder = SymbolCoder(self.bundle.tables(point.split), indexes, ends)
            found = self._coders[key] = (coder, self.bundle.order(point.split)[: len(indexes)])
        return found

"""Codec: latent <-> packet, for the operating points of one bundle. The same class on both sides, numpy only.

latent --quantise--> symbols --slices--> entropy coder --> Packet          compress, on the edge
Packet --> entropy coder --> symbols (slices that are missing stay 0)      decompress, on the server
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .bitstream import Packet
from .bundle import Bundle
from .entropy_coder import SliceCoder
from .exceptions import BitstreamError, OperatingPointError
from .operating_point import Kind, OperatingPoint
from .quantiser import quantise


class Codec:
    """Compresses and decompresses under a bundle's tables.

    Coders are made on first use of a rate level and kept; after that, changing the operating point costs nothing.
    Safe to use from several threads: a coder holds no state between calls.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Keep the bundle; nothing is computed yet."""
        self.bundle = bundle
        self._coders: dict[tuple[str, int], tuple[SliceCoder, ...]] = {}

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
        """Code symbols int32 [K, H, W]; channels behind the last slice are not sent."""
        coders = self._slice_coders(point)
        first, slices = 0, []
        for coder in coders:
            slices.append(coder.encode(symbols[first : first + coder.channels]))
            first += coder.channels
        return Packet(point.id, frame_id, tuple(slices))

    def decompress(self, packet: Packet) -> npt.NDArray[np.int32]:
        """Decode a packet of any prefix of slices into symbols int32 [K, H, W]; what is missing is 0.

        Raises:
            OperatingPointError: the packet's operating point is not in the bundle, or is no `feature` point.
            BitstreamError: a slice cannot be decoded, or there are more slices than the rate level has.
        """
        point = self.bundle.operating_point(packet.operating_point)
        shape = self._latent_shape(point)
        coders = self._slice_coders(point)
        if len(packet.slices) > len(coders):
            raise BitstreamError(f"{point.name} has {len(coders)} slices, the packet {len(packet.slices)}")
        symbols = np.zeros((shape[0], shape[1] * shape[2]), np.int32)
        first = 0
        for coder, data in zip(coders, packet.slices, strict=False):
            symbols[first : first + coder.channels] = coder.decode(data)
            first += coder.channels
        return symbols.reshape(shape)

    def _latent_shape(self, point: OperatingPoint) -> tuple[int, int, int]:
        if point.kind is not Kind.FEATURE:
            raise OperatingPointError(f"{point.name} is of kind {point.kind}; only feature points have a latent")
        return self.bundle.split(point.split).latent_shape

    def _slice_coders(self, point: OperatingPoint) -> tuple[SliceCoder, ...]:
        key = (point.split, point.rate_level)
        found = self._coders.get(key)
        if found is None:
            spec = self.bundle.split(point.split)
            tables = self.bundle.tables(*key)
            places = spec.features[1] * spec.features[2]
            ends = spec.slices[point.rate_level]
            found = tuple(
                SliceCoder(tables, first, last, places) for first, last in zip((0, *ends[:-1]), ends, strict=True)
            )
            self._coders[key] = found
        return found

"""Codec: latent <-> packet, for the operating points of one bundle. The same class on both sides, numpy only.

latent --quantise--> symbols --order of importance--> entropy coder --> slices --> Packet     compress, on the edge
Packet --> entropy coder --> symbols (those of slices that are missing stay 0)               decompress, on the server

A frame of a video may be predicted from an earlier one that both sides hold (see `temporal`): `compress_video` does so
where that takes fewer bytes, and gives with every packet what later frames can be predicted from; `decompress_video`
gives the same on the other side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .bitstream import MAX_BACK, Packet
from .bundle import Bundle
from .entropy_coder import SymbolCoder
from .exceptions import BitstreamError, OperatingPointError
from .operating_point import Kind, OperatingPoint
from .quantiser import quantise
from .temporal import BYTES_A_COMPONENT, Prediction, Reference, Scales, TemporalCoder, TemporalTables, ratios_of

HEADER_BYTES = 17
"""About what a packet has besides its slices; of use where two sizes are compared."""


@dataclass(frozen=True, slots=True)
class Coded:
    """A frame of a video.

    Attributes:
        packet: predicted, or a key frame.
        reference: what later frames can be predicted from once the server has it; None where the bundle cannot.
        alone_bytes: about what it would have taken as a key frame.
    """

    packet: Packet
    reference: Reference | None
    alone_bytes: float


class Codec:
    """Compresses and decompresses under a bundle's tables.

    Coders are made on first use of a rate level, or by `prepare`, and kept; after that, changing the operating point
    costs nothing. Safe to use from several threads: a coder holds no state between calls.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Keep the bundle; coders are computed later."""
        self.bundle = bundle
        self._coders: dict[tuple[str, int], tuple[SymbolCoder, npt.NDArray[np.int32]]] = {}
        self._temporal: dict[tuple[str, int], TemporalCoder] = {}
        self._ratios: dict[tuple[str, int, int], npt.NDArray[np.int64]] = {}
        self._channels: dict[str, npt.NDArray[np.intp]] = {}
        tables = bundle.temporal_tables()
        self._temporal_tables = None if tables is None else TemporalTables(tables)

    def prepare(self, points: Iterable[OperatingPoint]) -> None:
        """Make the coders of those `points` that have one (about 5 ms each), so that no frame has to."""
        features = [point for point in points if point.kind is Kind.FEATURE]
        for point in features:
            self._coder(point)
            if self.predicts:
                self._temporal_coder(point)
                for other in features:
                    if other.split == point.split:
                        self._level_ratios(point, other.rate_level)

    def compress(self, latent: npt.NDArray[np.float32], point: OperatingPoint, frame_id: int) -> Packet:
        """Quantise and code a latent.

        Args:
            latent: float32 [K, H, W] of `point`'s split.
            point: of kind `feature`.
            frame_id: 0..2**32-1.

        Raises:
            OperatingPointError: the point is of another kind, or the latent has another shape.
        """
        return self.compress_symbols(self.quantise(latent, point), point, frame_id)

    def quantise(self, latent: npt.NDArray[np.float32], point: OperatingPoint) -> npt.NDArray[np.int32]:
        """Symbols int32 [K, H, W] of a latent; raises as `compress` does."""
        shape = self._latent_shape(point)
        if latent.shape != shape:
            raise OperatingPointError(f"{point.name} takes a latent of {shape}, got {latent.shape}")
        return quantise(latent, self.bundle.gain(point.split, point.rate_level))

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

    # Video ----------------------------------------------------------------------------------------------------------

    @property
    def predicts(self) -> bool:
        """Whether the bundle has tables for predicted frames."""
        return self._temporal_tables is not None

    def compress_video(
        self,
        symbols: npt.NDArray[np.int32],
        point: OperatingPoint,
        frame_id: int,
        earlier: Reference | None = None,
        back: int = 0,
    ) -> Coded:
        """Code symbols int32 [K, H, W] as what is smaller, a predicted frame or a key frame.

        Args:
            symbols: int32 [K, H, W].
            point: of kind `feature`.
            frame_id: 0..2**32-1.
            earlier: a frame that both sides hold; None for a key frame. One of another split point is of no use.
            back: how many frame ids before this one it was.
        """
        coder, order = self._coder(point)
        sent = symbols.reshape(-1)[order]
        if not self.predicts:
            packet = Packet(point.id, frame_id, coder.encode(sent))
            return Coded(packet, None, float(len(packet.to_bytes())))
        if earlier is not None and earlier.split == point.split and 1 <= back <= MAX_BACK:
            prediction, temporal = self._prediction(point, earlier), self._temporal_coder(point)
            plan, alone = temporal.plan(sent, prediction), coder.bits(sent)
            if plan.bits < alone:
                packet = Packet(point.id, frame_id, temporal.encode(plan), back)
                reference = Reference.of(point.split, point.rate_level, sent, prediction)
                return Coded(packet, reference, HEADER_BYTES + alone / 8)
        packet = Packet(point.id, frame_id, coder.encode(sent))
        reference = Reference.of(point.split, point.rate_level, sent, None)
        return Coded(packet, reference, float(len(packet.to_bytes())))

    def hold(
        self,
        latent: npt.NDArray[np.float32],
        point: OperatingPoint,
        earlier: Reference,
        hysteresis: float,
    ) -> npt.NDArray[np.int32]:
        """Symbols int32 [K, H, W] of a latent, of which those stay as predicted that are hardly beyond a threshold.

        Args:
            latent: float32 [K, H, W] of `point`'s split.
            point: of kind `feature`.
            earlier: a frame of the same split point that both sides hold.
            hysteresis: by how much of a step a component may be beyond its rounding threshold, 0..0.5.

        Raises:
            OperatingPointError: as for `compress`.
        """
        symbols = self.quantise(latent, point)
        _, order = self._coder(point)
        predicted = self._prediction(point, earlier).symbols
        gain = self.bundle.gain(point.split, point.rate_level)
        scaled = (latent * gain[:, None, None]).reshape(-1)[order]
        held = np.abs(scaled - predicted) < 0.5 + hysteresis
        symbols.reshape(-1)[order[held]] = predicted[held]
        return symbols

    def compress_reference(self, reference: Reference, point: OperatingPoint, frame_id: int) -> Packet:
        """The key frame of a frame that was predicted, from what was kept of it."""
        coder, _ = self._coder(point)
        return Packet(point.id, frame_id, coder.encode(reference.symbols.astype(np.int32)))

    def decompress_video(
        self, packet: Packet, earlier: Reference | None
    ) -> tuple[npt.NDArray[np.int32], Reference | None]:
        """Decode a packet of any prefix of slices.

        Args:
            packet: a key frame, or a predicted one.
            earlier: what was kept of the frame `packet.reference_id`; not looked at for a key frame.

        Returns:
            Symbols int32 [K, H, W], and what later frames can be predicted from. Where slices are missing that is None,
            and so they are 0 in a key frame, and what they were predicted to be in a predicted one.

        Raises:
            OperatingPointError: as in `decompress`.
            BitstreamError: as in `decompress`, or the packet cannot have been predicted from that frame.
        """
        point = self.bundle.operating_point(packet.operating_point)
        shape = self._latent_shape(point)
        coder, order = self._coder(point)
        whole = len(packet.slices) == len(coder.ends)
        prediction = None
        if packet.back == 0:
            symbols = self.decompress(packet)
            received = symbols.reshape(-1)[order]
        else:
            if not self.predicts or earlier is None or earlier.split != point.split:
                raise BitstreamError(f"the frame that a packet of {point.name} is predicted from is not at hand")
            prediction = self._prediction(point, earlier)
            received = self._temporal_coder(point).decode(packet.slices, prediction)
            symbols = np.zeros(shape, np.int32)
            symbols.reshape(-1)[order] = received
        kept = Reference.of(point.split, point.rate_level, received, prediction) if whole and self.predicts else None
        return symbols, kept

    def reference_bytes(self) -> int:
        """Most that what is kept of a frame takes, in bytes; 0 where the bundle predicts nothing."""
        if not self.predicts:
            return 0
        return BYTES_A_COMPONENT * max(ends[-1] for split in self.bundle.splits for ends in split.slices)

    def _prediction(self, point: OperatingPoint, earlier: Reference) -> Prediction:
        count = len(self.bundle.indexes(point.split, point.rate_level))
        if earlier.rate_level == point.rate_level:
            return Prediction.at(earlier, count, None)
        ratios = self._level_ratios(point, earlier.rate_level)
        return Prediction.at(earlier, count, ratios[self._channels[point.split][:count]])

    def _level_ratios(self, point: OperatingPoint, level: int) -> npt.NDArray[np.int64]:
        """The gains of `point`'s rate level over another one's, int64 [K]; see `ratios_of`."""
        key = (point.split, point.rate_level, level)
        found = self._ratios.get(key)
        if found is None:
            _, height, width = self.bundle.split(point.split).features
            self._channels[point.split] = (self.bundle.order(point.split) // (height * width)).astype(np.intp)
            found = self._ratios[key] = ratios_of(*(self.bundle.gain(point.split, each) for each in key[1:]))
        return found

    def _temporal_coder(self, point: OperatingPoint) -> TemporalCoder:
        key = (point.split, point.rate_level)
        found = self._temporal.get(key)
        if found is None:
            if self._temporal_tables is None:
                raise BitstreamError(f"bundle {self.bundle.name} has no tables for predicted frames")
            scales = Scales(self.bundle.tables(point.split), self.bundle.indexes(*key))
            ends = self.bundle.split(point.split).slices[point.rate_level]
            found = self._temporal[key] = TemporalCoder(self._temporal_tables, scales, ends)
        return found

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

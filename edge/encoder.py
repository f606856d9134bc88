"""Encoder: what is sent for a frame. The encoder network is part of the head's graph; here numbers become bytes.

latent --codec--> packet of slices          kind `feature`; of video, predicted from an earlier frame
pixels --Pillow--> packet of one picture    kind `image`
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..models.bitstream import Packet
from ..models.bundle import Bundle
from ..models.codec import Codec, Coded
from ..models.exceptions import OperatingPointError
from ..models.image_codec import encode_image
from ..models.operating_point import Kind, OperatingPoint
from ..models.temporal import Reference
from .references import Earlier


@dataclass(frozen=True, slots=True)
class VideoPacket:
    """A frame of a stream whose frames the server keeps.

    Attributes:
        packet: its bytes.
        slices: how many it has.
        reference: what later frames can be predicted from when it is answered from all of them.
        alone_bytes: about what it would have taken as a key frame.
        alone: makes that key frame; None where it is one.
    """

    packet: bytes
    slices: int
    reference: Reference | None
    alone_bytes: float
    alone: Callable[[], VideoPacket] | None = None


class Encoder:
    """Makes packets' bytes under one bundle."""

    def __init__(self, bundle: Bundle, hysteresis: float = 0.0) -> None:
        """Prepare the codec; its coders are made on first use or by `warm_up`."""
        self._codec, self._hysteresis = Codec(bundle), hysteresis

    def warm_up(self, points: Iterable[OperatingPoint]) -> None:
        """Make the coders of `points`, so that changing between them allocates nothing."""
        self._codec.prepare(points)

    def feature(self, latent: npt.NDArray[np.float32], point: OperatingPoint, frame_id: int) -> bytes:
        """The packet of a latent float32 [K, H, W].

        Raises:
            OperatingPointError: the point is of another kind, or the latent has another shape.
        """
        return self._codec.compress(latent, point, frame_id).to_bytes()

    def video(
        self, latent: npt.NDArray[np.float32], point: OperatingPoint, frame_id: int, earlier: Earlier
    ) -> VideoPacket:
        """The packet of a latent float32 [K, H, W], predicted where that takes fewer bytes. See `feature`."""
        symbols, reference = self._codec.quantise(latent, point), earlier.reference
        sent = symbols
        if self._hysteresis and reference is not None and reference.split == point.split:
            sent = self._codec.hold(latent, point, reference, self._hysteresis)
        coded = self._codec.compress_video(sent, point, frame_id, reference, earlier.back)
        packet = coded.packet
        if not packet.back and sent is not symbols:  # where nothing is gained by it, nothing is held
            coded = self._codec.compress_video(symbols, point, frame_id)

        def alone() -> VideoPacket:
            return self._made(self._codec.compress_video(symbols, point, frame_id))

        return self._made(coded, alone if packet.back else None)

    def _made(self, coded: Coded, alone: Callable[[], VideoPacket] | None = None) -> VideoPacket:
        packet = coded.packet
        return VideoPacket(packet.to_bytes(), len(packet.slices), coded.reference, coded.alone_bytes, alone)

    def image(self, pixels: npt.NDArray[np.uint8], point: OperatingPoint, frame_id: int) -> bytes:
        """The packet of pixels uint8 [S, S, 3] as a picture file.

        Raises:
            OperatingPointError: the point is of another kind, or names a codec that is not there.
        """
        if point.kind is not Kind.IMAGE:
            raise OperatingPointError(f"{point.name} is of kind {point.kind}; only image points send a picture")
        return Packet(point.id, frame_id, (encode_image(pixels, point.codec, point.rate_level),)).to_bytes()

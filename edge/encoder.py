"""Encoder: what is sent for a frame. The encoder network is part of the head's graph; here numbers become bytes.

latent --codec--> packet of slices          kind `feature`
pixels --Pillow--> packet of one picture    kind `image`
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ..models.bitstream import Packet
from ..models.bundle import Bundle
from ..models.codec import Codec
from ..models.exceptions import OperatingPointError
from ..models.image_codec import encode_image
from ..models.operating_point import Kind, OperatingPoint


class Encoder:
    """Makes packets' bytes under one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        """Prepare the codec; its coders are made on first use or by `warm_up`."""
        self._codec = Codec(bundle)

    def warm_up(self, points: Iterable[OperatingPoint]) -> None:
        """Make the coders of `points`, so that changing between them allocates nothing."""
        self._codec.prepare(points)

    def feature(self, latent: npt.NDArray[np.float32], point: OperatingPoint, frame_id: int) -> bytes:
        """The packet of a latent float32 [K, H, W].

        Raises:
            OperatingPointError: the point is of another kind, or the latent has another shape.
        """
        return self._codec.compress(latent, point, frame_id).to_bytes()

    def image(self, pixels: npt.NDArray[np.uint8], point: OperatingPoint, frame_id: int) -> bytes:
        """The packet of pixels uint8 [S, S, 3] as a picture file.

        Raises:
            OperatingPointError: the point is of another kind, or names a codec that is not there.
        """
        if point.kind is not Kind.IMAGE:
            raise OperatingPointError(f"{point.name} is of kind {point.kind}; only image points send a picture")
        return Packet(point.id, frame_id, (encode_image(pixels, point.codec, point.rate_level),)).to_bytes()

"""JPEG and WebP, for operating points of kind `image`: prepared pixels <-> a file's bytes. Both sides use it."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from .exceptions import BitstreamError, OperatingPointError
from .preprocessing import UNREADABLE

FORMATS = {"jpeg": "JPEG", "webp": "WEBP"}
"""Codec names of operating points, and Pillow's names for them. Nothing else is decoded."""


def encode_image(pixels: npt.NDArray[np.uint8], codec: str, quality: int) -> bytes:
    """Code uint8 [S, S, 3] as JPEG or WebP of quality 0..100.

    Raises:
        OperatingPointError: no such codec.
    """
    if codec not in FORMATS:
        raise OperatingPointError(f"unknown image codec {codec!r}; known: {', '.join(FORMATS)}")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, FORMATS[codec], quality=quality)
    return file.getvalue()


def decode_image(data: bytes, size: int) -> npt.NDArray[np.uint8]:
    """Decode a JPEG or WebP of size x size pixels into uint8 [size, size, 3].

    Raises:
        BitstreamError: the data is no such picture. Its header is checked before its pixels are allocated.
    """
    try:
        with Image.open(io.BytesIO(data), formats=tuple(FORMATS.values())) as picture:
            if picture.size != (size, size):
                raise BitstreamError(f"the picture is {picture.size[0]}x{picture.size[1]}, expected {size}x{size}")
            return np.asarray(picture.convert("RGB"))
    except UNREADABLE as error:
        raise BitstreamError(f"{len(data)} bytes are not a JPEG or WebP picture: {error}") from error

"""Class maps on the wire: a class for every pixel, coded without loss as a PNG."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from .exceptions import BitstreamError, LimitError
from .preprocessing import UNREADABLE

MAX_CLASSES = 256
"""Classes that a map can tell apart."""
MAX_SIDE = 4096
MAX_BYTES = 4 * 2**20
"""Limits on what is decoded."""


def encode_class_map(classes: npt.NDArray[np.uint8]) -> bytes:
    """uint8 [H, W] -> PNG."""
    file = io.BytesIO()
    Image.fromarray(classes).save(file, "PNG")
    return file.getvalue()


def decode_class_map(data: bytes) -> npt.NDArray[np.uint8]:
    """PNG -> uint8 [H, W].

    Raises:
        LimitError: it is larger than the limits; nothing was allocated for it.
        BitstreamError: it is no such PNG.
    """
    if len(data) > MAX_BYTES:
        raise LimitError(f"a class map of {len(data)} bytes is over the limit of {MAX_BYTES}")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            if max(picture.size) > MAX_SIDE:
                raise LimitError(f"a class map of {picture.size} pixels is over the limit of {MAX_SIDE} a side")
            if picture.mode != "L":
                raise BitstreamError(f"a class map has one byte a pixel, this picture is {picture.mode}")
            return np.array(picture, np.uint8)
    except Image.DecompressionBombError as error:
        raise LimitError(f"a class map says that it is over the limit of {MAX_SIDE} pixels a side: {error}") from error
    except UNREADABLE as error:
        raise BitstreamError(f"{len(data)} bytes are not a class map: {error}") from error

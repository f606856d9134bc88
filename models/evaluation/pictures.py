"""Picture codecs at ten qualities each, as `headrace eval` measures them beside operating points.

JPEG and WebP are what operating points of kind `image` send; AVIF is there for comparison alone, no server decodes it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, features
from torch import Tensor

from ..backbones import Backbone
from ..bitstream import Packet
from ..image_codec import FORMATS, encode_image
from ..measure import BATCH, Measured, load_pixels

QUALITIES: Mapping[str, Sequence[int]] = {
    "jpeg": (10, 20, 30, 40, 50, 60, 70, 80, 90, 95),
    "webp": (1, 10, 20, 30, 40, 50, 60, 70, 80, 90),
    "avif": (5, 10, 20, 30, 40, 50, 60, 70, 80, 90),
}
"""Pillow's quality 0..100 by codec."""

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A codec at one quality."""

    codec: str
    quality: int

    @property
    def name(self) -> str:
        """As operating points have it: `webp@30`."""
        return f"{self.codec}@{self.quality}"


def settings(qualities: Mapping[str, Sequence[int]] = QUALITIES) -> list[Setting]:
    """Every quality of every codec that this Pillow has."""
    return [Setting(codec, q) for codec in qualities if available(codec) for q in qualities[codec]]


def available(codec: str) -> bool:
    """Whether this Pillow was built with it."""
    return codec not in ("webp", "avif") or bool(features.check(codec))


def encode_picture(pixels: Pixels, codec: str, quality: int) -> bytes:
    """Code uint8 [H, W, 3] by Pillow, 4:2:0, on one core.

    Raises:
        OperatingPointError: no such codec.
    """
    if codec in FORMATS or codec not in QUALITIES:
        return encode_image(pixels, codec, quality)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, codec.upper(), quality=quality, max_threads=1)
    return file.getvalue()


def through(pixels: Pixels, setting: Setting, box: Box | None = None) -> tuple[Pixels, bytes]:
    """Code a picture and decode it again.

    Args:
        pixels: uint8 [H, W, 3].
        setting: codec and quality.
        box: only what is inside is coded, the rest costs nothing and stays as it is; None for all of it.

    Returns:
        Pixels uint8 [H, W, 3] as a server would have them, and the file.
    """
    left, top, right, bottom = box or (0, 0, pixels.shape[1], pixels.shape[0])
    file = encode_picture(pixels[top:bottom, left:right], setting.codec, setting.quality)
    received = pixels.copy()
    with Image.open(io.BytesIO(file)) as coded:
        received[top:bottom, left:right] = np.asarray(coded.convert("RGB"))
    return received, file


def measure_pictures(
    backbone: Backbone,
    paths: Sequence[Path],
    chosen: Sequence[Setting],
    boxes: Sequence[Box] | None = None,
    note: Callable[[int], None] = lambda _: None,
    uncut: Callable[[Tensor], Sequence[Tensor]] | None = None,
) -> dict[Setting, Measured]:
    """Send every photograph as a picture at every setting; the uncut model answers to what comes out.

    Args:
        backbone: the uncut model, and how a photograph becomes its pixels.
        paths: photographs.
        chosen: settings.
        boxes: of each photograph, what of its pixels is coded; None for all.
        note: called with the number of photographs done, after each batch.
        uncut: the uncut model in another engine; the backbone's own by default.

    Returns:
        Bytes of whole packets and of the files in them, and answers, by setting.
    """
    found = {setting: Measured() for setting in chosen}
    uncut, task = uncut or backbone.uncut, backbone.task
    with torch.inference_mode():
        for at in range(0, len(paths), BATCH):
            batch = [load_pixels(path, backbone.preprocessing) for path in paths[at : at + BATCH]]
            for setting, into in found.items():
                received = []
                for i, pixels in enumerate(batch):
                    decoded, file = through(pixels, setting, boxes[at + i] if boxes else None)
                    into.packet_bytes.append(len(Packet(0, 0, (file,)).to_bytes()))
                    into.slice_bytes.append(len(file))
                    into.entropy_bits.append(0.0)
                    received.append(decoded)
                into.answers += task.answers(uncut(torch.from_numpy(np.stack(received))))
            note(len(batch))
    return found

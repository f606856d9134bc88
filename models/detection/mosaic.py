"""Mosaics: scenes for a detector, put together from four photographs (Bochkovskiy et al., "YOLOv4", 2020).

A camera's frame is scaled down to a detector's input and holds several things, small ones among them. Photographs from
the web are often smaller than that input, show one thing, and are scaled up: what is fitted to them alone expects less
detail than frames have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ..bundle import Preprocessing
from ..exceptions import DataError
from ..measure import BATCH, load_pixels
from ..preprocessing import UNREADABLE, prepare

SHAPES = ((4, 3), (4, 3), (3, 2), (3, 4), (1, 1))
"""Width to height of the scenes that are made; cameras and phones make such pictures."""
MIDDLE = (0.35, 0.65)
"""Where a scene is divided, as a share of its sides."""


def scene_batches(paths: Sequence[Path], how: Preprocessing, seed: int) -> Iterator[Tensor]:
    """Photographs as pixels uint8 [B, S, S, 3], B <= BATCH, every other one replaced by a mosaic of four of them.

    The same seed gives the same scenes at another size of the input.
    """
    for at in range(0, len(paths), BATCH):
        end = min(at + BATCH, len(paths))
        pixels = [mosaic(paths, how, seed, i) if i % 2 else load_pixels(paths[i], how) for i in range(at, end)]
        yield torch.from_numpy(np.stack(pixels))


def mosaic(paths: Sequence[Path], how: Preprocessing, seed: int, index: int) -> npt.NDArray[np.uint8]:
    """A scene of four photographs, preprocessed.

    Args:
        paths: photographs to choose from.
        how: from a picture to pixels.
        seed, index: scene `index` is drawn from them alone.

    Returns:
        uint8 [S, S, 3].

    Raises:
        DataError: a photograph cannot be read.
    """
    rng = np.random.default_rng((seed, 3, index))
    shape = SHAPES[rng.integers(len(SHAPES))]
    width, height = (round(how.size * side / max(shape)) for side in shape)
    x, y = (round(side * rng.uniform(*MIDDLE)) for side in (width, height))
    scene = Image.new("RGB", (width, height))
    for place in ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)):
        scene.paste(_filling(paths[rng.integers(len(paths))], place, rng), place)
    return prepare(scene, how)


def pair(paths: Sequence[Path], how: Preprocessing, seed: int, index: int) -> npt.NDArray[np.uint8]:
    """A scene of two photographs side by side, preprocessed: uint8 [S, S, 3]. Arguments and errors as of `mosaic`."""
    rng = np.random.default_rng((seed, 4, index))
    shape = SHAPES[rng.integers(len(SHAPES))]
    width, height = (round(how.size * side / max(shape)) for side in shape)
    x = round(width * rng.uniform(*MIDDLE))
    scene = Image.new("RGB", (width, height))
    for place in ((0, 0, x, height), (x, 0, width, height)):
        scene.paste(_filling(paths[rng.integers(len(paths))], place, rng), place)
    return prepare(scene, how)


def _filling(path: Path, place: tuple[int, int, int, int], rng: np.random.Generator) -> Image.Image:
    """A photograph scaled until it just covers a place, and cut somewhere to its size."""
    width, height = place[2] - place[0], place[3] - place[1]
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as a picture ({error}); remove it or save it anew") from error
    scale = max(width / picture.width, height / picture.height)
    sides = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    left, top = (int(rng.integers(0, a - b + 1)) for a, b in zip(sides, (width, height), strict=True))
    scaled = picture.resize(sides, Image.Resampling.BILINEAR)
    return scaled.crop((left, top, left + width, top + height))

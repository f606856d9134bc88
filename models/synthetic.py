"""Moving pictures made of photographs: what the tables of predicted frames are fitted on, so that no video is needed.

    photograph --camera that pans and zooms, a piece of another photograph that crosses it, light, noise--> frames

How fast a scene moves hardly matters, as long as every speed occurs: frames are sorted by how much they changed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

VIEW = 0.8
"""Side of what the camera sees at first, as a share of the photograph's short side."""
FASTEST = 8.0
"""Pixels of 224 that a frame moves at most."""
OCTAVES = 8.0
"""Speeds lie evenly, in octaves, from the fastest down to 2**-OCTAVES of it; a tenth of the cameras stand still."""
NOISE = (0.0, 0.5, 1.0, 2.0)
"""Standard deviations of a sensor's noise, in grey values."""


def moving(
    photograph: Image.Image, other: Image.Image, size: int, frames: int, seed: int
) -> Iterator[npt.NDArray[np.uint8]]:
    """Frames uint8 [size, size, 3] of a scene that moves.

    Args:
        photograph: what is seen.
        other: a piece of it crosses the scene, in most cases.
        size: side of the frames in pixels.
        frames: how many.
        seed: of motion, light and noise.
    """
    rng, noise_rng = random.Random(seed), np.random.default_rng(seed)
    scene, patch = photograph.convert("RGB"), other.convert("RGB")
    side = VIEW * min(scene.size)
    pixel = side / 224
    speed = 0.0 if rng.random() < 0.1 else pixel * FASTEST * 2.0 ** -rng.uniform(0, OCTAVES)
    camera, zoom = _direction(rng, speed), rng.gauss(0, 1) * speed / (400 * pixel)
    noise, light = rng.choice(NOISE), rng.gauss(0, 1) * rng.choice((0.0, 0.5))
    crosses, step = rng.random() < 0.7, _direction(rng, pixel * rng.uniform(0, FASTEST))
    width = rng.uniform(0.1, 0.5) * side
    patch = patch.resize((int(width) + 1, int(width * rng.uniform(0.7, 1.5)) + 1), Image.Resampling.BICUBIC)
    start = (rng.uniform(0, scene.width - width / 2), rng.uniform(0, scene.height - width / 2))
    for t in range(frames):
        seen = scene
        if crosses:
            seen = scene.copy()
            seen.paste(patch, (int(start[0] + step[0] * t), int(start[1] + step[1] * t)))
        box = _box(scene.size, side * (1 + zoom * t), (camera[0] * t, camera[1] * t))
        pixels = np.asarray(seen.resize((size, size), Image.Resampling.BICUBIC, box=box), np.float32) + light * t
        if noise:
            pixels = pixels + noise_rng.normal(0, noise, pixels.shape)
        yield np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _direction(rng: random.Random, length: float) -> tuple[float, float]:
    angle = rng.uniform(0, 2 * math.pi)
    return length * math.cos(angle), length * math.sin(angle)


def _box(size: tuple[int, int], side: float, moved: tuple[float, float]) -> tuple[float, float, float, float]:
    """A square of that side around the middle, moved, and held within the picture."""
    half = min(side, *size) / 2
    across, down = (min(max(s / 2 + m, half), s - half) for s, m in zip(size, moved, strict=True))
    return max(across - half, 0.0), max(down - half, 0.0), min(across + half, size[0]), min(down + half, size[1])

"""Collages: scenes for a filter, drawn by the thousand a second where the photographs are, in the memory of a GPU.

A scene is a rectangle on the letterbox's grey, with one photograph, two or four in it. Every pixel finds its place in
its photograph, and is interpolated there between four, all views at once:

photographs [N, L, L], and at half the size --tile, place, brightness of every pixel--> pixels uint8 [B, S, S, 3]

The kinds are those of `scenes.views`, which draws the same with a CPU's means, and more: a photograph smaller than its
scene, other shapes, colours, and two scenes blended into one (Zhang et al., "mixup", 2018), about which the detector is
asked as about any other (Beyer et al., "Knowledge distillation: A good teacher is patient and consistent", 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..learning.album import LONG, read_photograph

WHOLE, CROP, PAIR, MOSAIC = range(4)
KINDS = (0.25, 0.25, 0.15, 0.35)
"""Shares of a whole photograph, a part of one, two and four."""
TILES = 4
SHAPES = (3 / 4, 16 / 9)
"""Least and greatest width to height of a scene of several, or of a part of one."""
MIDDLE = (0.3, 0.7)
"""Where a scene is divided, as a share of its sides."""
ZOOM = (1.0, 2.0)
"""Over the scale at which a photograph just covers its tile."""
HALVED = 0.7
"""Scale below which the photograph at half its size is looked at, so that fine patterns do not fold over."""
BLENDED = 0.08
"""Share of the views that another one shines through."""


@dataclass(frozen=True)
class Layouts:
    """What is drawn, in shares of the side of the input; float32, on the collage's device.

    Attributes:
        scene: left, top, right and bottom, [B, 4].
        middle: where it is divided, across and down, [B, 2]; beyond it where it is not.
        photograph: index, int64 [B, 4], by tile: left above, right above, left below, right below.
        scale: pixels of a photograph that a whole side would show, [B, 4].
        corner: of the photograph, pixels across and down at the tile's own corner, [B, 4, 2].
        mirrored: [B, 4] bool.
        colours: gain and offset, [B, 3, 2].
        blend: index of the view that shines through, int64 [B], and how much, [B].
    """

    scene: Tensor
    middle: Tensor
    photograph: Tensor
    scale: Tensor
    corner: Tensor
    mirrored: Tensor
    colours: Tensor
    blend: tuple[Tensor, Tensor]


class Collage:
    """Photographs, and scenes of them."""

    def __init__(self, paths: Sequence[Path], fill: tuple[int, int, int], device: torch.device) -> None:
        """Read all photographs.

        Args:
            paths: of them.
            fill: colour of what no scene covers.
            device: where they are kept, 0.75 MB each.

        Raises:
            DataError: one cannot be read.
        """
        with ThreadPoolExecutor() as pool:
            pictures = list(pool.map(read_photograph, paths))
        self.device, self._fill = device, torch.tensor(fill, dtype=torch.float32, device=device)
        # Height and width of each, [N, 2].
        self._extent = np.array([p.shape[:2] for p in pictures], np.float32)
        self._extent_there = send(self._extent, device)
        packed = torch.zeros(len(pictures), LONG * LONG + (LONG // 2) ** 2, dtype=torch.int32, device=device)
        for at, picture in enumerate(pictures):
            packed[at] = _packed(torch.from_numpy(picture).to(device))
        self._packed = packed.flatten()
        self._stride = packed.shape[1]

    def __len__(self) -> int:
        """Number of photographs."""
        return len(self._extent)

    def layouts(self, rng: np.random.Generator, number: int, kinds: Sequence[float] = KINDS) -> Layouts:
        """Draw what will be seen: kinds by their shares, all else at random."""

        def uniform(low: float, high: float, *shape: int) -> npt.NDArray[np.float64]:
            return rng.uniform(low, high, (number, *shape))

        kind = rng.choice(len(kinds), number, p=kinds)
        which = rng.integers(0, len(self), (number, TILES))
        extent = self._extent[which]
        shape = np.exp(uniform(*np.log(SHAPES)))
        own = (kind == WHOLE) | ((kind == CROP) & (rng.random(number) < 0.5))
        shape = np.where(own, extent[:, 0, 1] / extent[:, 0, 0], shape)
        sides = np.stack([np.minimum(1, shape), np.minimum(1, 1 / shape)], 1)
        corner = (1 - sides) / 2
        middle = corner + sides * uniform(*MIDDLE, 2)
        # A pair stands side by side in a wide scene, one above the other in a tall one.
        across = (kind == MOSAIC) | ((kind == PAIR) & (shape >= 1))
        down = (kind == MOSAIC) | ((kind == PAIR) & (shape < 1))
        middle = np.where(np.stack([across, down], 1), middle, 2.0)
        end = np.minimum(middle, corner + sides)
        # Left and right half, upper and lower: their sides.
        first, second = end - corner, np.maximum(corner + sides - middle, 0)
        tiles = np.stack([np.stack([(first, second)[x][:, 0], (first, second)[y][:, 1]], 1) for y, x in _TILES], 1)
        zoom = np.exp(uniform(*np.log(ZOOM), TILES) * rng.random((number, TILES)))
        zoom = np.where((kind == WHOLE)[:, None], 1.0, zoom)
        # Pixels of the photograph to a whole side of the input, so that it covers its tile.
        scale = np.min(extent[..., ::-1] / np.maximum(tiles, 1e-6), 2) / zoom
        spare = np.maximum(extent[..., ::-1] - tiles * scale[..., None], 0)
        gain = np.exp(rng.normal(0, 0.15, (number, 1)) + rng.normal(0, 0.05, (number, 3)))
        offset = rng.normal(0, 10, (number, 1)) + 127 * (1 - gain)
        share = np.where(rng.random(number) < BLENDED, uniform(0.15, 0.5), 0.0)

        def to(values: npt.NDArray[Any]) -> Tensor:
            return send(values.astype(np.float32), self.device)

        return Layouts(
            to(np.concatenate([corner, corner + sides], 1)),
            to(middle),
            send(which, self.device),
            to(scale),
            to(rng.random(spare.shape) * spare),
            send(rng.random((number, TILES)) < 0.5, self.device),
            to(np.stack([gain, offset], 2)),
            (send(rng.permutation(number), self.device), to(share)),
        )

    def draw(self, layouts: Layouts, size: int) -> Tensor:
        """Pixels uint8 [B, S, S, 3] of an input of `size`; the same scenes at any."""
        at = (torch.arange(size, device=self.device) + 0.5) / size
        left, top, right, bottom = (side[:, None] for side in layouts.scene.T)
        x_middle, y_middle = (m[:, None] for m in layouts.middle.T)
        # Where a tile begins, and where it ends, across and down.
        after_x, after_y = at >= x_middle, at >= y_middle
        inside = ((at >= top) & (at < bottom))[:, :, None] & ((at >= left) & (at < right))[:, None]
        extent = self._extent_there[layouts.photograph]
        coarse = layouts.scale > size / HALVED
        sides = torch.where(coarse, LONG // 2, LONG)
        start = layouts.photograph * self._stride + torch.where(coarse, LONG * LONG, 0)
        shrink = torch.where(coarse, 0.5, 1.0)
        columns, rows = [], []
        for tile, (below, beside) in enumerate(_TILES):
            shown = extent[:, tile] * shrink[:, tile, None]
            scale, corner = (layouts.scale * shrink)[:, tile, None], layouts.corner[:, tile] * shrink[:, tile, None]
            x = corner[:, :1] + (at - (x_middle if beside else left)) * scale
            x = torch.where(layouts.mirrored[:, tile, None], shown[:, 1:] - x, x) - 0.5
            y = corner[:, 1:] + (at - (y_middle if below else top)) * scale - 0.5
            columns.append(x.clamp_min(0).minimum(shown[:, 1:].floor() - 1))
            rows.append(y.clamp_min(0).minimum(shown[:, :1].floor() - 1))
        x = _spread([c[:, None] for c in columns], after_x, after_y)
        y = _spread([r[:, :, None] for r in rows], after_x, after_y)
        side = _spread([s[:, None, None] for s in sides.T], after_x, after_y)
        begin = _spread([s[:, None, None] for s in start.T], after_x, after_y)
        x_floor, y_floor = x.long(), y.long()
        x_part, y_part = (x - x_floor)[..., None], (y - y_floor)[..., None]
        first = begin + y_floor * side + x_floor
        # The last column and row are interpolated with themselves: their part of the next one is 0.
        limit = len(self._packed) - 1
        upper = torch.lerp(self._colours(first), self._colours((first + 1).clamp_max(limit)), x_part)
        lower, beneath = (first + side).clamp_max(limit), (first + side + 1).clamp_max(limit)
        pixels = torch.lerp(upper, torch.lerp(self._colours(lower), self._colours(beneath), x_part), y_part)
        gain, offset = layouts.colours[:, None, None, :, 0], layouts.colours[:, None, None, :, 1]
        pixels = torch.where(inside[..., None], (pixels * gain + offset).clamp(0, 255), self._fill)
        other, share = layouts.blend
        return torch.lerp(pixels, pixels[other], share[:, None, None, None]).round().to(torch.uint8)

    def _colours(self, index: Tensor) -> Tensor:
        """Pixels at indexes [...], float32 [..., 3]."""
        found = self._packed[index]
        return torch.stack([found & 255, (found >> 8) & 255, (found >> 16) & 255], -1).float()


def send(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device; to a GPU without waiting for what it is doing."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


_TILES = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Below and beside the middle."""


def _spread(values: Sequence[Tensor], after_x: Tensor, after_y: Tensor) -> Tensor:
    """Of the four tiles' values, [B, S or 1, S or 1] each, that of the tile that a pixel lies in, [B, S, S]."""
    after_x, after_y = after_x[:, None], after_y[:, :, None]
    above, below = (torch.where(after_x, values[2 * i + 1], values[2 * i]) for i in range(2))
    return torch.where(after_y, below, above)


def _packed(picture: Tensor) -> Tensor:
    """uint8 [H, W, 3] -> int32 [L * L + (L/2) * (L/2)], red lowest: the picture, and at half its size."""
    parts = []
    halved = torch.nn.functional.avg_pool2d(picture.permute(2, 0, 1)[None].float(), 2)[0].round()
    for values, side in ((picture.permute(2, 0, 1).int(), LONG), (halved.int(), LONG // 2)):
        square = torch.zeros(side, side, dtype=torch.int32, device=picture.device)
        square[: values.shape[1], : values.shape[2]] = values[0] | values[1] << 8 | values[2] << 16
        parts.append(square.flatten())
    return torch.cat(parts)

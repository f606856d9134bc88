"""Album: all photographs in the memory of a GPU, where views are cut out of them and shown to the uncut model.

Every view is new: a GPU makes them and their targets in a fraction of the time that learning from them takes, whereas a
CPU is better off with the ring on disk (`views`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from ..backbones import Backbone
from ..exceptions import DataError
from ..preprocessing import UNREADABLE
from ..tasks import DETECTION

SHORT, LONG = 256, 384
"""Pixels; larger photographs are made smaller until neither side is above its limit."""
AREA = (0.3, 0.85)
"""Share of a photograph that a view covers; nothing is cut off its middle afterwards."""
ASPECT = (4 / 5, 5 / 4)
SUPERSAMPLED = 2
"""A view is drawn at so many times its size and averaged, so that fine patterns do not fold over."""
CHUNK = 128


class Album:
    """Photographs, and views of them."""

    def __init__(
        self,
        paths: Sequence[Path],
        backbone: Backbone,
        anchor: str,
        device: torch.device,
        later: Sequence[str] = (),
    ) -> None:
        """Read all photographs.

        Args:
            paths: their files.
            backbone: what answers them.
            anchor: split point whose features are kept.
            device: to hold photographs and the uncut model.
            later: split points behind the anchor whose maps are given behind the outputs.

        Raises:
            DataError: one cannot be read.
            BackboneError: no such split point.
        """
        with ThreadPoolExecutor() as pool:
            pictures = list(pool.map(read_photograph, paths))
        self.sizes = torch.tensor([p.shape[:2] for p in pictures], dtype=torch.float32, device=device)
        self._pictures = torch.zeros(len(pictures), 3, LONG, LONG, dtype=torch.uint8, device=device)
        for at, picture in enumerate(pictures):
            height, width = picture.shape[:2]
            self._pictures[at, :, :height, :width] = torch.from_numpy(picture).to(device).permute(2, 0, 1)
        self._size, self._device = backbone.preprocessing.size, device
        self._mosaics = backbone.task.name == DETECTION
        parts = backbone.head(anchor), backbone.tail_beside(anchor, later)
        self._head, self._tail = (copy.deepcopy(m).to(device) for m in parts)
        self.count = self.made = len(pictures)

    def fill(self, note: Callable[[int], None] = lambda _: None) -> None:
        """Nothing has to be made beforehand."""
        note(self.made)

    def add(self, number: int, mix: float = 0.0) -> None:
        """Views are always new."""

    def batch(
        self, rng: np.random.Generator, number: int, mix: float = 0.0
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """New views: pixels uint8 [B, S, S, 3], features float32 [B, C, H, W], outputs float32 [B, ...] and the maps
        behind them. A share `mix` of the views is laid over one of the others, evenly from not at all to half and
        half."""
        pixels = self._views(rng, number, self._size)
        if self._mosaics:
            half = number // 2
            quarters = self._views(rng, 4 * half, self._size // 2)
            quarters = quarters.reshape(half, 4, *quarters.shape[1:])
            top, bottom = torch.cat([quarters[:, 0], quarters[:, 1]], 2), torch.cat([quarters[:, 2], quarters[:, 3]], 2)
            # Every other one, for what learns takes the parts of a batch apart.
            pixels[: 2 * half : 2, : 2 * (self._size // 2), : 2 * (self._size // 2)] = torch.cat([top, bottom], 1)
        if mix:
            share = np.where(rng.random(number) < mix, rng.uniform(0, 0.5, number), 0).astype(np.float32)
            over = torch.from_numpy(share).to(self._device)[:, None, None, None]
            mixed = torch.lerp(pixels.float(), pixels.roll(1, 0).float(), over)
            pixels = mixed.round().to(torch.uint8)
        return pixels, *looked_at(self._head, self._tail, pixels)

    def _views(self, rng: np.random.Generator, number: int, size: int) -> Tensor:
        which = torch.from_numpy(rng.choice(self.count, number, replace=number > self.count)).to(self._device)
        drawn = torch.from_numpy(rng.random((5, number)).astype(np.float32)).to(self._device)
        extent = self.sizes[which]
        area = AREA[0] + (AREA[1] - AREA[0]) * drawn[0]
        aspect = torch.exp(np.log(ASPECT[0]) + (np.log(ASPECT[1]) - np.log(ASPECT[0])) * drawn[1])
        side = (area * extent.prod(1)).sqrt()
        box = torch.stack([side / aspect.sqrt(), side * aspect.sqrt()], 1).minimum(extent)
        corner = drawn[2:4].T * (extent - box)
        flipped = torch.where(drawn[4] < 0.5, -1.0, 1.0)
        # In coordinates of -1..1 over the padded picture.
        scale, middle = box / LONG, (2 * corner + box) / LONG - 1
        theta = torch.zeros(number, 2, 3, device=self._device)
        theta[:, 0, 0], theta[:, 0, 2] = scale[:, 1] * flipped, middle[:, 1]
        theta[:, 1, 1], theta[:, 1, 2] = scale[:, 0], middle[:, 0]
        views = []
        for at in range(0, number, CHUNK):
            part = slice(at, at + CHUNK)
            chosen = self._pictures[which[part]].float()
            fine = size * SUPERSAMPLED
            grid = functional.affine_grid(theta[part], [len(chosen), 3, fine, fine], align_corners=False)
            view = functional.grid_sample(chosen, grid, padding_mode="border", align_corners=False)
            views.append(functional.avg_pool2d(view, SUPERSAMPLED).round().clamp(0, 255).to(torch.uint8))
        return torch.cat(views).permute(0, 2, 3, 1).contiguous()


def looked_at(head: nn.Module, tail: nn.Module, pixels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What the uncut model has of pixels uint8 [B, S, S, 3]: features float32 [B, C, H, W] behind its head, and float32
    [B, ...] each tensor that its tail gives. On the pixels' device, in bfloat16 until then."""
    features, outputs = [], []
    with torch.inference_mode(), torch.autocast(pixels.device.type, torch.bfloat16):
        for part in torch.split(pixels, CHUNK):
            (found,) = head(part)
            features.append(found.float())
            outputs.append(tuple(t.float() for t in tail(found)))
    joined = tuple(torch.cat(each) for each in zip(*outputs, strict=True))
    # Tensors that were made in inference mode cannot take part in a graph.
    return torch.cat(features).clone(), tuple(each.clone() for each in joined)


def read_photograph(path: Path) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3], made smaller until neither side is above its limit.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as a photograph: {error}; take it out of the folder") from error
    short, long = min(picture.size), max(picture.size)
    scale = min(1.0, SHORT / short, LONG / long)
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    return np.array(picture)  # a picture cannot be written to

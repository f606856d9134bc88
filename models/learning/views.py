"""Views: random crops of photographs as pixels, with the uncut model's features at the anchor and its outputs.

Of a detector's views every other one is a mosaic of four photographs, as when it is cut.

A ring on disk holds the last so many; every step replaces a few of them by new ones, so that training sees many crops
and pays the uncut model for few. View i is drawn from (seed, i) and the share of views that are mixed when it is made.
On a GPU `album` takes its place.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..backbones import Backbone
from ..chain import Chain
from ..detection.mosaic import mosaic
from ..export import write_onnx
from ..measure import random_crop
from ..onnx_session import open_session
from ..tasks import CLASSIFICATION, DETECTION

Array = npt.NDArray[np.float16]
PROGRESS = "views.json"
NOTE_EVERY = 64


class Teacher:
    """The uncut model: pixels uint8 [S, S, 3] -> features float16 [C, H, W] at the anchor, outputs float16 [...], which
    are scores [classes] of a classifier, and maps float16 [C, H, W] at split points behind the anchor."""

    def __init__(
        self, backbone: Backbone, anchor: str, folder: Path, device: torch.device, later: Sequence[str] = ()
    ) -> None:
        """On a CPU a classifier runs in ONNX Runtime, which takes a third of the time; what makes boxes cannot."""
        module = _Both(backbone.head(anchor), backbone.tail_beside(anchor, later))
        self._names = ("features", "scores", *(f"map-{i}" for i in range(len(later))))
        self._module, self._session, self._device = copy.deepcopy(module).to(device), None, device
        if device.type == "cpu" and backbone.task.name == CLASSIFICATION:
            path = folder / "teacher.onnx"
            folder.mkdir(parents=True, exist_ok=True)
            write_onnx(backbone, module, self._names, path)
            self._session = open_session(path)

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> tuple[Array, ...]:
        if self._session is not None:
            found = self._session.run(self._names, {"pixels": pixels[None]})
        else:
            with torch.inference_mode():
                tensors = self._module(torch.from_numpy(pixels[None]).to(self._device))
                found = [t.float().cpu().numpy() for t in tensors]
        return tuple(each[0].astype(np.float16) for each in found)


class Views:
    """The ring."""

    def __init__(
        self,
        paths: Sequence[Path],
        teacher: Teacher,
        backbone: Backbone,
        count: int,
        seed: int,
        folder: Path,
    ):
        """Take up what an earlier run left in `folder`; `fill` makes the rest.

        Raises:
            DataError: a photograph cannot be read.
        """
        self._paths, self._teacher, self._how, self._seed = paths, teacher, backbone.preprocessing, seed
        self._folder, self.count, self._mosaics = folder, count, backbone.task.name == DETECTION
        folder.mkdir(parents=True, exist_ok=True)
        first = self._make(0)
        shapes = [(count, *a.shape) for a in first]
        self.made = _made(folder / PROGRESS, shapes)
        names = ("pixels", "features", "scores", *(f"output-{i}" for i in range(1, len(first) - 2)))
        self._arrays = [
            np.lib.format.open_memmap(folder / f"{name}.npy", "r+" if self.made else "w+", a.dtype, shape)  # type: ignore[no-untyped-call]
            for name, a, shape in zip(names, first, shapes, strict=True)
        ]

    def fill(self, note: Callable[[int], None] = lambda _: None) -> None:
        """Make views until the ring is full."""
        while self.made < self.count:
            self.add(min(NOTE_EVERY, self.count - self.made))
            note(self.made)

    def add(self, number: int, mix: float = 0.0) -> None:
        """Make new views in place of the oldest; a share `mix` of them is two photographs laid over each other."""
        for _ in range(number):
            for array, value in zip(self._arrays, self._make(self.made, mix), strict=True):
                array[self.made % self.count] = value
            self.made += 1
        if self.made % NOTE_EVERY < number:
            shapes = [list(a.shape) for a in self._arrays]
            (self._folder / PROGRESS).write_text(json.dumps({"made": self.made, "shapes": shapes}))

    def batch(
        self,
        rng: np.random.Generator,
        number: int,
        mix: float = 0.0,  # noqa: ARG002 - what is mixed was so when it was made
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Any of the views: pixels uint8 [B, S, S, 3], features float32 [B, C, H, W], outputs float32 [B, ...]."""
        indexes = rng.choice(self.count, number, replace=False)
        pixels, features, *outputs = (torch.from_numpy(a[indexes]) for a in self._arrays)
        return pixels, features.float(), tuple(o.float() for o in outputs)

    def _make(self, index: int, mix: float = 0.0) -> tuple[npt.NDArray[Any], ...]:
        pixels = self._drawn(index)
        rng = np.random.default_rng((self._seed, 3, index))
        if rng.random() < mix:
            share, other = rng.uniform(0, 0.5), self._drawn(int(rng.integers(2**31)))
            pixels = ((1 - share) * pixels + share * other).round().astype(np.uint8)
        return pixels, *self._teacher(pixels)

    def _drawn(self, index: int) -> npt.NDArray[np.uint8]:
        if self._mosaics and index % 2:
            drawn = mosaic(self._paths, self._how, self._seed, index)
        else:
            drawn = random_crop(self._paths[index % len(self._paths)], self._how, self._seed, index)
        return np.array(drawn)  # a picture cannot be written to


class _Both(nn.Module):
    def __init__(self, head: nn.Module, tail: nn.Module) -> None:
        super().__init__()
        self.head, self.tail = Chain(head), Chain(tail)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        (features,) = self.head(pixels)
        return features, *self.tail(features)


def _made(file: Path, shapes: Sequence[Sequence[int]]) -> int:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return 0
    return int(found["made"]) if found.get("shapes") == [list(s) for s in shapes] else 0

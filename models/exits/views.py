"""What an exit is learned from: views of photographs, as features at the cuts and the uncut model's pooled features.

photographs -> one crop, two blended, or one with a box of another --head--> features at every split point
                                                                   --rest of the backbone--> last map, pooled vector

Blends and boxes are nothing that a camera sees, but the uncut model has an answer to each, and an exit that agrees with
it on them too has learned its function from few photographs (Beyer et al., "Knowledge Distillation: A Good Teacher Is
Patient and Consistent", CVPR 2022; Zhang et al., "mixup", ICLR 2018; Yun et al., "CutMix", ICCV 2019).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from ..backbones import SIZED, Backbone
from ..bundle import Preprocessing
from ..exceptions import BackboneError, DataError
from ..export import write_onnx
from ..onnx_time import one_core_session
from ..preprocessing import prepare

AREA = (0.3, 1.0)
"""Share of a photograph that a crop covers, before preprocessing cuts the middle out of it."""
ASPECT = (3 / 4, 4 / 3)
BLENDED, BOXED = 0.25, 0.25
"""Shares of the views that are a blend of two crops, or one crop with a box of another one."""
POOLED, LAST = "pooled", "last"
"""Names of the uncut model's pooled vector and of its last map, beside those of the split points."""
KEPT_EVERY = 512


@dataclass(frozen=True)
class Views:
    """Float16 arrays by name: [N, C, H, W] of split points and of `LAST`, [N, C] of `POOLED`."""

    arrays: Mapping[str, npt.NDArray[np.float16]]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def batch(self, name: str, indexes: npt.NDArray[np.int64]) -> Tensor:
        """float32 [B, ...] of the views of these indexes."""
        return torch.from_numpy(self.arrays[name][indexes]).float()


def pooled_cut(backbone: Backbone) -> str:
    """The cut in front of the classifier: a single vector [C, 1, 1], and only a linear layer behind it.

    Raises:
        BackboneError: the backbone has none.
    """
    cut = backbone.cuts[-1]
    if len(cut.shapes) != 1 or cut.shapes[0][1:] != (1, 1):
        raise BackboneError(
            f"{backbone.spec.name} has no vector in front of its classifier that an exit could be taught; the last cut "
            f"is {cut.name} with {', '.join(str(list(s)) for s in cut.shapes)}"
        )
    return cut.name


def last_map(backbone: Backbone) -> str:
    """The last cut with places, whose features are told to an exit place by place."""
    return next(c.name for c in reversed(backbone.cuts) if len(c.shapes) == 1 and c.shapes[0][1:] != (1, 1))


class _Stages(nn.Module):
    """pixels -> maps at cuts in the order of execution."""

    def __init__(self, backbone: Backbone, names: Sequence[str]) -> None:
        super().__init__()
        befores = ["", *names[:-1]]
        self.stages = nn.ModuleList(
            [backbone.between(b, n) if b else backbone.head(n) for b, n in zip(befores, names, strict=True)]
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        reached: tuple[Tensor, ...] = (pixels,)
        found = []
        for stage in self.stages:
            reached = stage(*reached)
            found.append(reached[0])
        return tuple(found)


class Looker:
    """Runs the backbone in ONNX Runtime, a third of PyTorch's time for single frames: pixels by size -> arrays."""

    def __init__(self, backbone: Backbone, splits: Sequence[str]) -> None:
        """Make and load the graphs, which takes some seconds.

        Raises:
            BackboneError: the backbone has no vector in front of its classifier.
        """
        self._graphs = []
        self.hows: dict[int, Preprocessing] = {}
        by_size: dict[int, list[str]] = {backbone.preprocessing.size: []}
        for name in splits:
            by_size.setdefault(backbone.at(name)[0].preprocessing.size, []).append(name)
        with TemporaryDirectory() as folder:
            for size, names in by_size.items():
                sized = backbone if size == backbone.preprocessing.size else backbone.at(names[0])[0]
                cuts = {name: SIZED.sub(r"\1", name) if sized is not backbone else name for name in names}
                if sized is backbone:
                    cuts |= {LAST: last_map(backbone), POOLED: pooled_cut(backbone)}
                ordered = sorted(cuts, key=lambda n: sized.cut(cuts[n]).index)
                path = Path(folder) / f"{size}.onnx"
                write_onnx(sized, _Stages(sized, [cuts[n] for n in ordered]).eval(), tuple(ordered), path)
                self._graphs.append((size, ordered, one_core_session(path)))
                self.hows[size] = sized.preprocessing

    def __call__(self, pixels: Mapping[int, npt.NDArray[np.uint8]]) -> dict[str, npt.NDArray[np.float16]]:
        found = {}
        limit = float(np.finfo(np.float16).max)
        for size, names, session in self._graphs:
            for name, values in zip(names, session.run(None, {"pixels": pixels[size][None]}), strict=True):
                shape = values.shape[1:2] if name == POOLED else values.shape[1:]
                found[name] = np.clip(values.reshape(shape), -limit, limit).astype(np.float16)
        return found


def make_views(
    backbone: Backbone,
    splits: Sequence[str],
    paths: Sequence[Path],
    count: int,
    seed: int,
    folder: Path,
    note: Callable[[int, int], None] = lambda *_: None,
    plain: bool = False,
    look: Looker | None = None,
) -> Views:
    """Make views, or read those that an earlier call with the same arguments left in `folder`, and make the rest.

    Args:
        backbone: a classifier.
        splits: split points, at any size.
        paths: photographs; each is the first one of about as many views.
        count: views.
        seed: view i is drawn from (seed, i) alone.
        folder: for the files; made if need be.
        note: called with views done and in all.
        plain: each photograph as it is, without cropping; `count` is then at most their number.
        look: made from the same backbone and split points before.

    Raises:
        BackboneError: the backbone has no vector in front of its classifier.
        DataError: a photograph cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    look = look or Looker(backbone, splits)

    def run(index: int) -> dict[str, npt.NDArray[np.float16]]:
        how_of = look.hows
        if plain:
            picture = opened(paths[index])
            return look({size: prepare(picture, how) for size, how in how_of.items()})
        return look(view(paths, how_of, seed, index))

    first = run(0)
    shapes = {name: [count, *values.shape] for name, values in first.items()}
    state = folder / "views.json"
    done = _done(state, shapes)
    arrays = {
        name: np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
            folder / f"{name}.npy", "r+" if done else "w+", np.float16, tuple(shape)
        )
        for name, shape in shapes.items()
    }
    while done < count:
        for name, values in run(done).items():
            arrays[name][done] = values
        done += 1
        if done % KEPT_EVERY == 0 or done == count:
            _note_done(state, done, shapes, arrays)
            note(done, count)
    return Views(arrays)


def view(
    paths: Sequence[Path], hows: Mapping[int, Preprocessing], seed: int, index: int
) -> dict[int, npt.NDArray[np.uint8]]:
    """Pixels uint8 [S, S, 3] of one view at every size S."""
    rng = np.random.default_rng((seed, index))
    kind = rng.random()
    mixed = kind < BLENDED + BOXED
    # Every photograph once a round, in an order of the round's own.
    order = _order(len(paths), seed, index // len(paths))
    chosen = [int(order[index % len(paths)]), *([int(rng.integers(len(paths)))] if mixed else [])]
    crops = [random_crop(opened(paths[i]), rng) for i in chosen]
    share = float(rng.uniform(0.1, 0.9))
    corner = rng.random(2)
    return {size: _mixed([prepare(c, how) for c in crops], kind, share, corner) for size, how in hows.items()}


def _mixed(
    pixels: Sequence[npt.NDArray[np.uint8]], kind: float, share: float, corner: npt.NDArray[np.float64]
) -> npt.NDArray[np.uint8]:
    """One or two crops uint8 [S, S, 3] -> one picture."""
    if len(pixels) == 1:
        return pixels[0]
    first, second = pixels
    if kind < BLENDED:
        blend = first.astype(np.float32) * (1 - share / 2) + second.astype(np.float32) * (share / 2)
        return np.clip(np.rint(blend), 0, 255).astype(np.uint8)
    size = len(first)
    side = round(size * share**0.5)
    top, left = (int(c * (size - side)) for c in corner)
    joined = first.copy()
    joined[top : top + side, left : left + side] = second[top : top + side, left : left + side]
    return joined


@lru_cache(maxsize=2)
def _order(count: int, seed: int, which: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, 3, which)).permutation(count)


def opened(path: Path) -> Image.Image:
    """A photograph in memory, RGB.

    Raises:
        DataError: the file cannot be read as one.
    """
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path} cannot be read as a photograph: {error}; take it out of the folder") from error


def random_crop(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random box of a picture, flipped half of the time."""
    area = picture.width * picture.height * rng.uniform(*AREA)
    aspect = np.exp(rng.uniform(*np.log(ASPECT)))
    width = int(np.clip(round((area * aspect) ** 0.5), 1, picture.width))
    height = int(np.clip(round((area / aspect) ** 0.5), 1, picture.height))
    left = int(rng.integers(0, picture.width - width + 1))
    top = int(rng.integers(0, picture.height - height + 1))
    cropped = picture.crop((left, top, left + width, top + height))
    return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else cropped


def _note_done(state: Path, done: int, shapes: Mapping[str, list[int]], arrays: Mapping[str, Any]) -> None:
    for array in arrays.values():
        array.flush()
    state.write_text(json.dumps({"done": done, "shapes": shapes}))


def _done(state: Path, shapes: Mapping[str, list[int]]) -> int:
    try:
        found: dict[str, Any] = json.loads(state.read_text())
    except (OSError, ValueError):
        return 0
    return int(found["done"]) if found.get("shapes") == shapes else 0

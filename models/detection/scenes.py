"""What a filter learns from: many views of photographs, as features at the cuts and the uncut detector's own scores.

photograph --itself, mosaics, a pair, a crop, mirrored--> views --heads--> features, pooled: what a filter looks at
                                                                --uncut--> the best score of a candidate of interest
                                                                           whose centre each place holds

A photograph from the web shows one thing, large. A camera's frame shows several, smaller ones. Hence the views.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..backbones import Backbone
from ..bundle import Preprocessing
from ..bundle_files import replace_files
from ..measure import BATCH, load_pixels, random_crop
from ..tasks import Detection
from .mosaic import mosaic, pair

SAVE = 400
"""Frames after which what has been looked at so far counts as done."""

Pooled = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Part:
    """Photographs that belong together: a mosaic of one part shows nothing of another.

    Attributes:
        paths: photographs.
        views: of each of them; 1 for the photographs alone, 2 for a mosaic beside each, 4 for all kinds.
        mirrored: whether half of them are mirrored.
    """

    paths: Sequence[Path]
    views: int = 1
    mirrored: bool = False

    def __len__(self) -> int:
        """Number of views."""
        return len(self.paths) * self.views


@dataclass(frozen=True)
class Seen:
    """Views as a filter sees them, and what the uncut detector says of them.

    Attributes:
        pooled: by split point, features as the filter looks at them, float16 [N, C, h, w].
        places: by split point, the best score of interest at each place, float32 [N, h, w].
        best: that of the whole view, float32 [N].
        holds: whether that counts as an object, bool [N].
    """

    pooled: Mapping[str, npt.NDArray[np.float16]]
    places: Mapping[str, npt.NDArray[np.float32]]
    best: npt.NDArray[np.float32]
    holds: npt.NDArray[np.bool_]


def look(
    backbone: Backbone,
    pooled: Mapping[str, Pooled],
    parts: Sequence[Part],
    interest: Sequence[int],
    seed: int,
    work: Path | None = None,
    note: Callable[[int], None] = lambda _: None,
    device: torch.device | None = None,
) -> Seen:
    """Run the heads and the uncut detector over the views of all parts, in order.

    Args:
        backbone: of a detector.
        pooled: by split point, features [B, C, H, W] -> what a filter looks at of them [B, c, h, w].
        parts: photographs.
        interest: indexes of the classes of interest.
        seed: of the views.
        work: folder for what has been seen; a run that was killed goes on from there. None keeps it in memory.
        note: called with the number of views looked at.
        device: where the detector runs; None for a CPU.
    """
    task = backbone.task
    assert isinstance(task, Detection)
    total, watcher = sum(len(p) for p in parts), Watcher(backbone, pooled, interest, device)

    def run(pixels: Sequence[npt.NDArray[np.uint8]]) -> dict[str, npt.NDArray[Any]]:
        there = [torch.from_numpy(each).to(watcher.device) for each in pixels]
        return {key: value.cpu().numpy() for key, value in watcher(there).items()}

    first = run([np.stack([next(views(parts[0], how, seed))]) for how in watcher.sizes])
    if work is not None:
        whole = [[[str(p) for p in part.paths], part.views, part.mirrored] for part in parts]
        said = [backbone.spec.sha256, sorted(pooled), list(interest), seed, whole]
        work = work / hashlib.sha256(msgpack.packb(said)).hexdigest()[:16]
    arrays, done = _arrays(total, first, work)
    frames = zip(*(islice(_all(parts, how, seed), done, None) for how in watcher.sizes), strict=True)
    while batch := list(islice(frames, BATCH)):
        found = run([np.stack(each) for each in zip(*batch, strict=True)])
        for key, array in arrays.items():
            array[done : done + len(batch)] = found[key]
        done += len(batch)
        if work is not None and (done % SAVE < BATCH or done == total):
            replace_files(work, {"done.json": json.dumps(done).encode()})
        note(done)
    names = list(pooled)
    places = {name: arrays[f"{name}/places"] for name in names}
    best = arrays["best"]
    return Seen({name: arrays[name] for name in names}, places, best, best >= task.confident)


def views(part: Part, how: Preprocessing, seed: int) -> Iterator[npt.NDArray[np.uint8]]:
    """The views of a part, preprocessed, uint8 [S, S, 3] each; the same scenes at another size of the input."""
    for i in range(len(part)):
        path, kind = part.paths[i // part.views], i % part.views
        if kind == 0:
            pixels = load_pixels(path, how)
        elif kind == 3:
            pixels = random_crop(path, how, seed, i)
        else:
            pixels = (mosaic if kind == 1 else pair)(part.paths, how, seed, i)
        mirrored = part.mirrored and np.random.default_rng((seed, 5, i)).random() < 0.5
        yield pixels[:, ::-1].copy() if mirrored else pixels


def _all(parts: Sequence[Part], how: Preprocessing, seed: int) -> Iterator[npt.NDArray[np.uint8]]:
    for number, part in enumerate(parts):
        yield from views(part, how, seed + number)


class Watcher:
    """Pixels at every size that split points ask for -> what a filter sees of a batch of views, and what it is told."""

    def __init__(
        self,
        backbone: Backbone,
        pooled: Mapping[str, Pooled],
        interest: Sequence[int],
        device: torch.device | None = None,
    ) -> None:
        """Arguments as of `look`; `device`: where pixels will be. On a GPU all is computed in half precision."""
        self.device = device or torch.device("cpu")
        sizes: dict[Preprocessing, list[str]] = {backbone.preprocessing: []}
        for name in pooled:
            sizes.setdefault(backbone.at(name)[0].preprocessing, []).append(name)
        self.sizes = tuple(sizes)
        # Parts in a row where the head is the backbone's own; one that was learned, or is light, is run by itself.
        heads = {
            how: backbone.at(names[0])[0].head_parts([name for name in names if not backbone.has_head(name)])
            for how, names in sizes.items()
            if names
        }
        own = heads.get(backbone.preprocessing, [])
        tail = backbone.tail(own[-1][0]) if own else backbone.uncut
        self._heads = {how: [(name, self._there(part)) for name, part in parts] for how, parts in heads.items()}
        self._apart = {
            how: [(name, self._there(backbone.head(name))) for name in names if backbone.has_head(name)]
            for how, names in sizes.items()
        }
        self._tail = self._there(tail)
        self._task, self._pooled, self._interest = backbone.task, pooled, list(interest)

    def __call__(self, pixels: Sequence[Tensor]) -> dict[str, Tensor]:
        """By split point what is looked at, float16 [B, C, h, w], `NAME/places`, float32 [B, h, w]; `best` [B].

        Args:
            pixels: uint8 [B, S, S, 3] of each of `sizes`.
        """
        found: dict[str, Tensor] = {}
        ends = []
        half = self.device.type == "cuda"
        with torch.inference_mode(), torch.autocast(self.device.type, torch.float16, enabled=half):
            for how, each in zip(self.sizes, pixels, strict=True):
                reached: tuple[Tensor, ...] = (each,)
                for name, part in self._heads.get(how, ()):
                    reached = part(*reached)
                    found[name] = self._pooled[name](reached[0]).half()
                for name, head in self._apart[how]:
                    found[name] = self._pooled[name](head(each)[0]).half()
                ends.append(reached)
            scores, corners, *_ = (t.float() for t in self._tail(*ends[0]))
            for name in self._pooled:
                found[f"{name}/places"] = self._places(scores, corners, found[name].shape[2:])
            found["best"] = scores[..., self._interest].flatten(1).amax(1)
        return found

    def _there(self, module: nn.Module) -> nn.Module:
        """The module on the device; a copy, if that is another one."""
        if self.device.type == "cpu":
            return module
        there: nn.Module = copy.deepcopy(module).to(self.device)
        return there.to(memory_format=torch.channels_last)

    def _places(self, scores: Tensor, corners: Tensor, shape: Sequence[int]) -> Tensor:
        """The best score of a candidate whose centre a place holds, float32 [B, h, w]; before suppression, for a place
        beside the best one sees as much of the object."""
        assert isinstance(self._task, Detection)
        best, which = scores[..., self._interest].max(2)
        if corners.ndim == 4:
            classes = torch.tensor(self._interest, device=which.device)[which]
            corners = corners.gather(2, classes[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
        centre = (corners[..., :2] + corners[..., 2:]) / 2 / self._task.size
        rows, columns = shape
        x = (centre[..., 0] * columns).long().clamp(0, columns - 1)
        y = (centre[..., 1] * rows).long().clamp(0, rows - 1)
        places = torch.zeros(len(scores), rows * columns, device=scores.device)
        return places.scatter_reduce(1, y * columns + x, best, "amax").view(-1, rows, columns)


def _arrays(
    total: int, one: Mapping[str, npt.NDArray[Any]], work: Path | None
) -> tuple[dict[str, npt.NDArray[Any]], int]:
    """Arrays for `total` of what there is `one` of, in files of `work` where it is given, and how many are done."""
    if work is None:
        return {key: np.zeros((total, *value.shape[1:]), value.dtype) for key, value in one.items()}, 0
    work.mkdir(parents=True, exist_ok=True)
    said = work / "done.json"
    done = int(json.loads(said.read_text())) if said.is_file() else 0
    arrays = {
        key: np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
            work / f"{key.replace('/', '-')}.npy", "r+" if done else "w+", value.dtype, (total, *value.shape[1:])
        )
        for key, value in one.items()
    }
    return arrays, done

"""What a repair is learned from: random crops of photographs, as features at the cut and the uncut model's outputs.

photograph -> random box -> preprocessing -> flip -> head -> features --tail--> outputs
                                                     both kept on disk as float16, so that a step costs decoder and tail
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..backbones import Backbone
from ..bottleneck import Encoder
from ..bundle import Bundle, Preprocessing
from ..codec import Codec
from ..detection.mosaic import mosaic
from ..measure import random_crop
from ..quantiser import quantise
from ..tasks import DETECTION

COARSE = 2.0
"""How much more often the coarsest rate level is trained than the finest; those between go evenly."""
PREFIXES = 0.1
"""Share of the frames of which only a random prefix of the slices arrives."""
BATCH = 16
MAX_BYTES = 2 * 2**30
"""Most that is kept on disk for one split point; where features are large there are fewer crops."""


class Crops:
    """Features and outputs of many crops, in memory-mapped files of one folder. Reading gives float32 tensors."""

    def __init__(self, features: npt.NDArray[np.float16], outputs: Sequence[npt.NDArray[np.float16]]) -> None:
        """features [N, C, H, W]; outputs one array [N, ...] for each tensor that the tail gives."""
        self._features, self._outputs = features, tuple(outputs)

    def __len__(self) -> int:
        return len(self._features)

    def batch(self, indexes: npt.NDArray[np.int64]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Features [B, C, H, W] and the uncut model's outputs for the crops of these indexes, in rising order."""
        indexes = np.sort(indexes)
        return _float(self._features[indexes]), tuple(_float(o[indexes]) for o in self._outputs)


def make_crops(
    backbone: Backbone,
    split: str,
    paths: Sequence[Path],
    count: int,
    seed: int,
    folder: Path,
    device: torch.device,
    note: Callable[[int, int], None] = lambda *_: None,
    until: float = float("inf"),
    resampled: bool = False,
) -> Crops:
    """Make crops, or read those that an earlier call with the same arguments left in `folder`, and make the rest.

    Args:
        backbone: any; its head and tail at `split` are run on `device`.
        split: split point.
        paths: photographs; each gives the same number of crops, give or take one. Of a detector's crops every other
            one is a mosaic of four photographs.
        count: crops; fewer are made where they would take more than `MAX_BYTES`.
        seed: crop i is drawn from (seed, i) alone.
        folder: for the files; made if need be.
        device: of head and tail.
        note: called with crops done and crops in all, after each batch.
        until: time on the monotonic clock, in seconds, after which no more are made.
        resampled: whether the tail will be the one at the backbone's own size, also of a detector.

    Raises:
        DataError: a photograph cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head, tail = backbone.head(split).to(device), backbone.tail(split).to(device)
    sized = backbone.at(split)[0]
    # A detector's candidates lie on a grid: those of fewer pixels have no counterparts among the uncut model's.
    elsewhere = sized is not backbone and (resampled or backbone.task.name != DETECTION)
    uncut = backbone.uncut.to(device) if elsewhere or backbone.has_head(split) else None

    def picture(index: int, how: Preprocessing) -> npt.NDArray[np.uint8]:
        if backbone.task.name == DETECTION and index % 2:
            return mosaic(paths, how, seed, index)
        return random_crop(paths[index % len(paths)], how, seed, index)

    def pixels(begin: int, end: int, how: Preprocessing) -> Tensor:
        return torch.from_numpy(np.stack([picture(i, how) for i in range(begin, end)])).to(device)

    def run(begin: int, end: int) -> list[npt.NDArray[np.float16]]:
        with torch.inference_mode():
            (features,) = head(pixels(begin, end, sized.preprocessing))
            # Where the tail does not end in the uncut model's answer, that one looks at the same crop itself.
            outputs = tail(features) if uncut is None else uncut(pixels(begin, end, backbone.preprocessing))
            return [_half(t) for t in (features, *outputs)]

    first = run(0, 1)
    count = max(BATCH, min(count, MAX_BYTES // sum(a[0].nbytes for a in first)))
    progress = folder / "crops.json"
    shapes = [[count, *a.shape[1:]] for a in first]
    done = _done(progress, shapes)
    arrays = [
        np.lib.format.open_memmap(folder / f"crops-{i}.npy", "r+" if done else "w+", np.float16, tuple(shape))  # type: ignore[no-untyped-call]
        for i, shape in enumerate(shapes)
    ]
    note(done, count)
    while done < count and not (done and time.monotonic() > until):
        end = min(done + BATCH, count)
        for array, values in zip(arrays, run(done, end), strict=True):
            array[done:end] = values
        done = end
        if done % (BATCH * 16) == 0:
            _note_done(progress, done, arrays)
        note(done, count)
    _note_done(progress, done, arrays)
    return Crops(arrays[0][:done], [a[:done] for a in arrays[1:]])


class RandomSymbols:
    """Features -> hard-quantised symbols as a server receives them, each frame at a rate level of its own."""

    def __init__(self, bundle: Bundle, split: str, seed: int, device: torch.device) -> None:
        """Take encoder, gains and slices from the bundle."""
        self._encoder = Encoder.of(bundle, split).to(device)
        self._seed, self._device = seed, device
        self._gains = np.stack([bundle.gain(split, level) for level in range(bundle.split(split).rate_levels)])
        self._arriving = [arriving(bundle, split, level) for level in range(len(self._gains))]
        odds = np.linspace(1.0, COARSE, len(self._gains))
        self._odds = odds / odds.sum()

    def __call__(self, features: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Features float32 [B, C, H, W] and the step's number -> symbols int32 [B, K, H, W], gain float32 [B, K]."""
        rng = np.random.default_rng((self._seed, 1, step))
        levels = rng.choice(len(self._gains), len(features), p=self._odds)
        with torch.inference_mode():
            latents = self._encoder(features.to(self._device)).cpu().numpy()
        symbols = np.zeros(latents.shape, np.int32)
        for i, level in enumerate(levels):
            prefixes = self._arriving[level]
            arrived = prefixes[rng.integers(len(prefixes))] if rng.random() < PREFIXES else prefixes[-1]
            symbols[i] = quantise(latents[i], self._gains[level]) * arrived
        gain = torch.from_numpy(self._gains[levels])
        return torch.from_numpy(symbols).to(self._device), gain.to(self._device)


def arriving(bundle: Bundle, split: str, level: int) -> list[npt.NDArray[np.int32]]:
    """For each prefix of the slices, 1 where a symbol arrives, int32 [K, H, W]; the codec itself is asked."""
    codec = Codec(bundle)
    point = bundle.feature_point(split, level)
    packet = codec.compress_symbols(np.ones(bundle.split(split).latent_shape, np.int32), point, 0)
    slices = packet.slices
    return [codec.decompress(replace(packet, slices=slices[: n + 1])) for n in range(len(slices))]


def _note_done(progress: Path, done: int, arrays: Sequence[Any]) -> None:
    for array in arrays:
        array.flush()
    progress.write_text(json.dumps({"done": done, "shapes": [list(a.shape) for a in arrays]}))


def _done(progress: Path, shapes: list[list[int]]) -> int:
    try:
        found: dict[str, Any] = json.loads(progress.read_text())
    except (OSError, ValueError):
        return 0
    return int(found["done"]) if found.get("shapes") == shapes else 0


def _half(tensor: Tensor) -> npt.NDArray[np.float16]:
    limit = float(np.finfo(np.float16).max)
    half: npt.NDArray[np.float16] = tensor.float().clamp(-limit, limit).half().cpu().numpy()
    return half


def _float(values: npt.NDArray[np.float16]) -> Tensor:
    return torch.from_numpy(np.asarray(values)).float()

"""Runs the training-free codecs over the photographs of `headrace eval rd`, at the same cuts, through the real tail."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import nn

from ...models.backbones import Backbone
from ...models.bundle import Bundle
from ...models.evaluate import OtherCodec
from ...models.evaluation.kept import pictures_identity
from ...models.measure import find_pictures, pixel_batches
from . import cohen2021, quantise_only, slicer, sparse_rans
from .interface import Calibrate, FeatureCodec

FAMILIES: Mapping[str, Calibrate] = {
    "cohen2021": cohen2021.calibrate,
    "slicer": slicer.calibrate,
    "sparse_rans": sparse_rans.calibrate,
    "quantise_only": quantise_only.calibrate,
}


@dataclass(frozen=True, slots=True)
class TrainingFree:
    """What to run.

    Attributes:
        calibration: folder of photographs; the codecs are calibrated on those that `headrace split` takes from the
            same folder with the same number and the bundle's seed.
        photographs: how many; all where the folder holds fewer.
        at: split points; empty for the bundle's own.
    """

    calibration: Path
    photographs: int = 300
    at: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """See `Others`; by the photographs' names and sizes, not by the folder's."""
        return f"training-free, {self.photographs} of {pictures_identity(find_pictures(self.calibration))}"

    def splits(self, bundle: Bundle) -> tuple[str, ...]:
        """Where it cuts."""
        return self.at or tuple(s.name for s in bundle.splits)

    def measure(
        self, backbone: Backbone, bundle: Bundle, split: str, paths: Sequence[Path], progress: Progress
    ) -> list[OtherCodec]:
        """Every rate setting of every codec at a split point, on the photographs `paths`.

        Raises:
            DataError: no photographs to calibrate on.
            BackboneError: unknown split point.
        """
        chosen = find_pictures(self.calibration)
        random.Random(int(bundle.provenance.get("seed", 0))).shuffle(chosen)
        chosen = chosen[: self.photographs]
        head, tail = backbone.head(split), backbone.tail(split)
        bar = progress.add_task(f"{split}: calibration", total=len(chosen) + len(FAMILIES))
        batches = []
        for batch in _features(head, backbone.at(split)[0], chosen):
            batches.append(batch)
            progress.advance(bar, len(batch))
        features = np.concatenate(batches)
        codecs: list[tuple[str, FeatureCodec]] = []
        for family, calibrate in FAMILIES.items():
            codecs += [(family, codec) for codec in calibrate(features)]
            progress.advance(bar)
        return self._measured(split, codecs, head, tail, backbone, paths, progress)

    def _measured(
        self,
        split: str,
        codecs: Sequence[tuple[str, FeatureCodec]],
        head: nn.Module,
        tail: nn.Module,
        backbone: Backbone,
        paths: Sequence[Path],
        progress: Progress,
    ) -> list[OtherCodec]:
        bar = progress.add_task(f"{split}: {len(codecs)} codecs", total=len(paths))
        found = [OtherCodec(f"{f} {split} {c.setting}", f, split) for f, c in codecs]
        for batch in _features(head, backbone.at(split)[0], paths):
            for (_, codec), into in zip(codecs, found, strict=True):
                coded = [codec.encode(each) for each in batch]
                received = np.stack([codec.decode(data) for data in coded])
                into.coded_bytes += [len(data) for data in coded]
                with torch.inference_mode():
                    into.answers += tail(torch.from_numpy(received))[0].argmax(1).tolist()
            progress.advance(bar, len(batch))
        return found


def _features(
    head: nn.Module, backbone: Backbone, paths: Sequence[Path]
) -> Iterator[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """Features float32 [B, C, H, W] in C order."""
    with torch.inference_mode():
        for pixels in pixel_batches(paths, backbone.preprocessing):
            (features,) = head(pixels)
            yield np.ascontiguousarray(features.numpy())

"""Tail: what is left of the backbone, on the server. The mirror of the edge's head and encoder.

symbols, gain ──► Decoder ──► features ──► Backbone.tail ──► scores ──► five best labels
pixels ──────────────────────────────────► Backbone.uncut ─► scores ──► five best labels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from ..models.backbones import load_backbone
from ..models.bottleneck import Decoder
from ..models.bundle import Bundle
from ..models.repaired import repaired
from ..protos.messages import Label, TailOutput
from .engine import FeatureInput, ImageInput, Tail, TailInput, TailKey
from .exceptions import StartError

CLASSIFICATION = "classification"
BEST = 5
"""Labels in an answer."""


class FeatureTail:
    """Decoder and tail of one split point."""

    def __init__(self, bundle: Bundle, split: str, tail: nn.Module, device: torch.device) -> None:
        """`tail` takes features float32 [B, C, H, W] and gives scores float32 [B, classes]; it is repaired."""
        decoder, tail = repaired(bundle, split, Decoder.of(bundle, split), tail)
        self._decoder, self._tail = decoder.to(device), tail.to(device)
        self._device = device
        self._latent_shape = bundle.split(split).latent_shape

    def __call__(self, inputs: Sequence[TailInput], /) -> list[tuple[TailOutput, ...]]:
        """Answer a batch of `FeatureInput`."""
        frames = cast(Sequence[FeatureInput], inputs)
        with torch.inference_mode():
            symbols = torch.from_numpy(np.stack([f.symbols for f in frames])).to(self._device)
            gain = torch.from_numpy(np.stack([f.gain for f in frames])).to(self._device)
            return best_labels(self._tail(self._decoder(symbols, gain)))

    def warm_up(self) -> None:
        """Answer a batch of one, all zeros."""
        channels = self._latent_shape[0]
        self([FeatureInput(np.zeros(self._latent_shape, np.int32), np.ones(channels, np.float32))])


class UncutTail:
    """The whole backbone, for image packets."""

    def __init__(self, size: int, uncut: nn.Module, device: torch.device) -> None:
        """`uncut` takes pixels uint8 [B, size, size, 3] and gives scores float32 [B, classes]."""
        self._size, self._uncut, self._device = size, uncut.to(device), device

    def __call__(self, inputs: Sequence[TailInput], /) -> list[tuple[TailOutput, ...]]:
        """Answer a batch of `ImageInput`."""
        frames = cast(Sequence[ImageInput], inputs)
        with torch.inference_mode():
            pixels = torch.from_numpy(np.stack([f.pixels for f in frames])).to(self._device)
            return best_labels(self._uncut(pixels))

    def warm_up(self) -> None:
        """Answer a batch of one black picture."""
        self([ImageInput(np.zeros((self._size, self._size, 3), np.uint8))])


def best_labels(scores: Tensor) -> list[tuple[TailOutput, ...]]:
    """The five best classes a frame, best first, from scores float32 [B, classes]."""
    values, indexes = scores.topk(min(BEST, scores.shape[1]), dim=1)
    return [
        (TailOutput(CLASSIFICATION, tuple(Label(i, s) for i, s in zip(row, best, strict=True))),)
        for row, best in zip(indexes.tolist(), values.tolist(), strict=True)
    ]


def load_tails(bundles: Sequence[Bundle], device: str, threads: int) -> Mapping[TailKey, Tail]:
    """Build the tails of every bundle.

    Args:
        bundles: any number; each one's backbone must be installed.
        device: "cpu" or "cuda".
        threads: PyTorch's threads on the CPU; 0 leaves its default of one a core.

    Raises:
        BackboneError: a backbone's weights are missing or are not the bundle's.
        StartError: there is no such device, or a bundle has a task that this version cannot answer.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise StartError("there is no CUDA device here; use --device cpu, or check the driver with nvidia-smi")
    if threads:
        torch.set_num_threads(threads)
    where = torch.device(device)
    tails: dict[TailKey, Tail] = {}
    for bundle in bundles:
        if bundle.task != CLASSIFICATION:
            raise StartError(f"bundle {bundle.name} is for {bundle.task!r}; this version answers {CLASSIFICATION!r}")
        backbone = load_backbone(bundle.backbone.name)
        backbone.verify(bundle.backbone)
        for spec in bundle.splits:
            tails[TailKey(bundle.fingerprint, spec.name)] = FeatureTail(
                bundle, spec.name, backbone.tail(spec.name), where
            )
        tails[TailKey(bundle.fingerprint)] = UncutTail(bundle.preprocessing.size, backbone.uncut, where)
    return tails

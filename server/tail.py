"""Tail: what is left of the backbone, on the server. The mirror of the edge's head and encoder.

symbols, gain ──► Decoder ──► features ──► Backbone.tail ──► outputs ──► Task ──► labels, boxes or a class map
pixels ──────────────────────────────────► Backbone.uncut ─► outputs ──► Task ──► labels, boxes or a class map
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from ..models.backbones import Backbone
from ..models.bottleneck import Decoder
from ..models.bundle import Bundle
from ..models.chain import Chain
from ..models.class_map import encode_class_map
from ..models.repair.tail import repaired, tail_of
from ..models.tasks import Answer, Answers, Boxes, Labels, Several, Task
from ..models.tasks import ClassMap as Classes
from ..models.zoo.catalogue import backbone_of
from ..protos.messages import Box, ClassMap, Label, TailOutput
from .engine import FeatureInput, ImageInput, Runtime, Tail, TailInput, TailKey
from .exceptions import StartError
from .onnx_network import Lower, as_it_is, give_memory_back, onnx_runtime


class FeatureTail:
    """Decoder and tail of one split point."""

    def __init__(
        self, bundle: Bundle, split: str, backbone: Backbone, device: torch.device, lower: Lower = as_it_is
    ) -> None:
        """Put decoder and tail on the device, repaired where the bundle has learned how; `lower` says what runs them.

        Raises:
            StartError: the backbone's cut has another shape than the bundle says.
        """
        spec = bundle.split(split)
        if backbone.shape(split) != spec.features:
            raise StartError(
                f"{backbone.spec.name} has {backbone.shape(split)} after {split}, the bundle {spec.features}; "
                "the installed package's version differs, split anew"
            )
        decoder, tail = repaired(bundle, split, Decoder.of(bundle, split), tail_of(bundle, split, backbone))
        self._task = backbone.task
        self._device = device
        self._latent_shape = spec.latent_shape
        gains = torch.from_numpy(bundle.tensors[f"{split}/gains"].copy()).float()

        def frames(count: int) -> tuple[Tensor, Tensor]:
            random = torch.Generator().manual_seed(count)
            symbols = torch.randint(-2, 3, (count, *spec.latent_shape), generator=random, dtype=torch.int32)
            levels = torch.randint(len(gains), (count,), generator=random)
            return symbols, gains[levels]

        self._network = lower(split, Chain(decoder, tail).eval().to(device), frames)

    def __call__(self, inputs: Sequence[TailInput], /) -> list[tuple[TailOutput, ...]]:
        """Answer a batch of `FeatureInput`."""
        frames = cast(Sequence[FeatureInput], inputs)
        with torch.inference_mode():
            symbols = torch.from_numpy(np.stack([f.symbols for f in frames])).to(self._device)
            gain = torch.from_numpy(np.stack([f.gain for f in frames])).to(self._device)
            return outputs_of(self._task, self._task.answers(self._network(symbols, gain)))

    def example(self) -> FeatureInput:
        """All zeros."""
        return FeatureInput(np.zeros(self._latent_shape, np.int32), np.ones(self._latent_shape[0], np.float32))


class UncutTail:
    """The whole backbone, for image packets."""

    def __init__(self, size: int, uncut: nn.Module, task: Task, device: torch.device, lower: Lower = as_it_is) -> None:
        """`uncut` takes pixels uint8 [B, size, size, 3] and gives the task's outputs; `lower` says what runs it."""
        self._size, self._task, self._device = size, task, device

        def frames(count: int) -> tuple[Tensor]:
            random = torch.Generator().manual_seed(count)
            return (torch.randint(0, 256, (count, size, size, 3), generator=random, dtype=torch.uint8),)

        self._network = lower("uncut", Chain(uncut).eval().to(device), frames)

    def __call__(self, inputs: Sequence[TailInput], /) -> list[tuple[TailOutput, ...]]:
        """Answer a batch of `ImageInput`."""
        frames = cast(Sequence[ImageInput], inputs)
        with torch.inference_mode():
            pixels = torch.from_numpy(np.stack([f.pixels for f in frames])).to(self._device)
            return outputs_of(self._task, self._task.answers(self._network(pixels)))

    def example(self) -> ImageInput:
        """A black picture."""
        return ImageInput(np.zeros((self._size, self._size, 3), np.uint8))


def outputs_of(task: Task, answers: Sequence[Answer]) -> list[tuple[TailOutput, ...]]:
    """Answers as the stream carries them, one tuple a frame."""
    if isinstance(task, Several):
        names = [each.name for each in task.tasks]
        together = [cast(Answers, answer).parts for answer in answers]
        return [tuple(_output(name, part) for name, part in zip(names, parts, strict=True)) for parts in together]
    return [(_output(task.name, answer),) for answer in answers]


def _output(tail: str, answer: Answer) -> TailOutput:
    if isinstance(answer, Labels):
        return TailOutput(tail, tuple(Label(i, s) for i, s in zip(answer.indexes, answer.scores, strict=True)))
    if isinstance(answer, Boxes):
        found = zip(answer.indexes, answer.scores, answer.corners, strict=True)
        return TailOutput(tail, boxes=tuple(Box(i, s, *corners) for i, s, corners in found))
    assert isinstance(answer, Classes)
    height, width = answer.classes.shape
    return TailOutput(tail, class_map=ClassMap(width, height, encode_class_map(answer.classes)))


def load_tails(
    bundles: Sequence[Bundle], device: str, threads: int, runtime: Runtime = "torch"
) -> Mapping[TailKey, Tail]:
    """Build the tails of every bundle.

    Args:
        bundles: any number; what each one's backbone is built from must be installed.
        device: "cpu" or "cuda".
        threads: see `set_up_torch`, which is called first.
        runtime: see `tails_of`.

    Raises:
        BackboneError: a backbone's weights are missing or are not the bundle's.
        StartError: there is no such device, or a backbone's cut differs from the bundle's.
    """
    set_up_torch(device, threads)
    return {key: tail for bundle in bundles for key, tail in tails_of(bundle, device, runtime, threads).items()}


def set_up_torch(device: str, threads: int) -> None:
    """Make PyTorch's settings of the calling thread.

    Args:
        device: "cpu" or "cuda".
        threads: PyTorch's threads on the CPU; 0 leaves its default of one a core.

    Raises:
        StartError: there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise StartError("there is no CUDA device here; use --device cpu, or check the driver with nvidia-smi")
    if threads:
        torch.set_num_threads(threads)


def tails_of(bundle: Bundle, device: str, runtime: Runtime = "torch", threads: int = 0) -> dict[TailKey, Tail]:
    """Build the tails of one bundle: one a split point, and the uncut model.

    Args:
        bundle: what its backbone is built from must be installed.
        device: "cpu" or "cuda", where PyTorch runs them whatever `runtime` says.
        runtime: what runs them on the CPU. Which tails stay with PyTorch is logged.
        threads: of ONNX Runtime, for a batch; 0 for one a core.

    Raises:
        BackboneError, StartError: as `load_tails`.
    """
    backbone, where = backbone_of(bundle), torch.device(device)
    lower = onnx_runtime(threads) if runtime == "onnx" and device == "cpu" else as_it_is
    tails: dict[TailKey, Tail] = {
        TailKey(bundle.fingerprint, spec.name): FeatureTail(bundle, spec.name, backbone, where, lower)
        for spec in bundle.splits
    }
    uncut = UncutTail(bundle.preprocessing.size, backbone.uncut, backbone.task, where, lower)
    tails[TailKey(bundle.fingerprint)] = uncut
    if lower is not as_it_is:
        del backbone
        gc.collect()  # modules refer to each other
        give_memory_back()
    return tails

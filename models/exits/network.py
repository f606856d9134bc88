"""The exit's network: features at a split point -> logits of all classes, at about 2 % of the uncut model's compute.

features [B, C, H, W] --2x2 / 2, where the map is large--> --1x1--> --depthwise 5x5 to about 7x7 places-->
    --1x1, linear--> [B, P, 7, 7] --1x1--> --mean--> [B, D] --linear--> [B, R] --linear--> logits [B, classes]

One inverted residual (Sandler et al., "MobileNetV2", CVPR 2018) in place of the rest of the backbone, and then what the
backbone ends with: a wide layer, its mean, and a classifier, here of rank R. Convolutions but the linear one are
followed by a ReLU, which ONNX Runtime computes with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..bundle import Bundle
from ..bundle_specs import ExitSpec
from ..exceptions import BundleError

PLACES = 7
"""Rows and columns that are pooled, about."""
LARGE = 20
"""Rows from which the first layer halves them."""
LAYERS = ("reduce", "expand", "places", "project", "mix", "narrow", "classes")


@dataclass(frozen=True, slots=True)
class Width:
    """Channels of the layers: behind `reduce`, `expand`, `project`, `mix` and `narrow`."""

    reduced: int = 64
    expanded: int = 240
    projected: int = 96
    mixed: int = 384
    rank: int = 160


class ExitNetwork(nn.Module):
    """features float32 [B, C, H, W] -> logits float32 [B, classes]; built from the tensors of `Lesson.tensors`."""

    def __init__(self, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """Tensors: `LAYER/weight` int8 [out, ...], `LAYER/scale` float16 [out] and `LAYER/bias` float16 [out];
        `stride` int8 [1] of `places`."""
        super().__init__()
        stride = int(tensors["stride"][0])
        self.layers = nn.ModuleList()
        for name in LAYERS:
            if f"{name}/weight" not in tensors:
                continue
            weight = dequantised(tensors[f"{name}/weight"], tensors[f"{name}/scale"])
            bias = torch.from_numpy(tensors[f"{name}/bias"].astype(np.float32))
            self.layers.append(_layer(name, weight, bias, stride))
        self.requires_grad_(False).eval()

    def forward(self, features: Tensor) -> Tensor:
        values = features
        for layer in self.layers:
            values = layer(values)
        return values


def _layer(name: str, weight: Tensor, bias: Tensor, stride: int) -> nn.Module:
    out, into = weight.shape[:2]
    made: nn.Linear | nn.Conv2d
    if name in ("narrow", "classes"):
        made = nn.Linear(into, out)
    elif name == "places":
        side = weight.shape[2]
        made = nn.Conv2d(out, out, side, stride, side // 2, groups=out)
    else:
        side = weight.shape[2]
        made = nn.Conv2d(into, out, side, side)
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias = nn.Parameter(bias.clone())
    if name in ("project", "narrow", "classes"):
        return made
    # ONNX Runtime keeps the mean in the layout of its convolutions only in this form.
    return nn.Sequential(made, nn.ReLU(), *([nn.AdaptiveAvgPool2d(1), nn.Flatten()] if name == "mix" else []))


def quantised(weight: Tensor) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """A weight float32 [out, ...] as int8 and a scale float16 [out] for each output."""
    most = weight.flatten(1).abs().amax(1).clamp_min(1e-6)
    # A scale rounded down would clip the largest weight.
    scale = (most / 127).half()
    scale = torch.where(scale.float() * 127 < most, torch.nextafter(scale, torch.tensor(torch.inf).half()), scale)
    steps = weight / scale.float().reshape(-1, *[1] * (weight.ndim - 1))
    return steps.round().clamp(-127, 127).to(torch.int8).numpy(), scale.numpy()


def dequantised(weight: npt.NDArray[np.int8], scale: npt.NDArray[np.float16]) -> Tensor:
    """float32 of the shape of `weight`."""
    values = weight.astype(np.float32) * scale.astype(np.float32).reshape(-1, *[1] * (weight.ndim - 1))
    return torch.from_numpy(values)


class Learner(nn.Module):
    """The network as it is trained: with normalisations, and with the backbone's classifier at its end.

    features [B, C, H, W] -> predicted pooled features [B, V] and, for the loss alone, of the last map [B, L, h, w].
    """

    def __init__(self, shape: tuple[int, int, int], pooled: int, last: int, width: Width) -> None:
        """Shape (C, H, W) of the features, V, L, and the layers' channels."""
        super().__init__()
        channels, rows = shape[0], shape[1]
        self.normalise = nn.BatchNorm2d(channels, affine=False)
        halved = rows > LARGE
        self.reduce = _block(channels, width.reduced, 2, 2) if halved else None
        channels = width.reduced if halved else channels
        rows = rows // 2 if halved else rows
        self.stride = max(1, round(rows / PLACES))
        self.expand = _block(channels, width.expanded, 1)
        self.places = _block(width.expanded, width.expanded, 5, self.stride, width.expanded)
        self.project = _block(width.expanded, width.projected, 1, relu=False)
        self.mix = _block(width.projected, width.mixed, 1)
        self.narrow = nn.Linear(width.mixed, width.rank)
        self.widen = nn.Linear(width.rank, pooled)
        self.last = nn.Conv2d(width.projected, last, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        values = self.normalise(features)
        if self.reduce is not None:
            values = self.reduce(values)
        values = self.project(self.places(self.expand(values)))
        pooled = self.mix(values).mean((2, 3))
        return self.widen(self.narrow(pooled)), self.last(values)

    def tensors(self, classifier: Tensor, offset: Tensor) -> dict[str, npt.NDArray[Any]]:
        """What `ExitNetwork` is built from, with the backbone's classifier [classes, V] and its offset [classes] in it.

        Normalisations are folded into the convolutions.
        """
        found: dict[str, npt.NDArray[Any]] = {"stride": np.array([self.stride], np.int8)}
        before = self.normalise
        assert before.running_var is not None and before.running_mean is not None
        scale = (before.running_var + before.eps).rsqrt()
        shift = -before.running_mean * scale
        first = True
        parts: dict[str, tuple[Tensor, Tensor]] = {}
        for name in LAYERS[:5]:
            block = getattr(self, name)
            if block is None:
                continue
            weight, bias = _folded(block)
            if first:
                bias = bias + (weight * shift[None, :, None, None]).sum((1, 2, 3))
                weight = weight * scale[None, :, None, None]
                first = False
            parts[name] = (weight, bias)
        parts["narrow"] = (self.narrow.weight, self.narrow.bias)
        parts["classes"] = (classifier @ self.widen.weight, classifier @ self.widen.bias + offset)
        for name, (weight, bias) in parts.items():
            steps, scales = quantised(weight.detach().float())
            found |= {f"{name}/weight": steps, f"{name}/scale": scales, f"{name}/bias": bias.detach().half().numpy()}
        return found


def _block(into: int, out: int, side: int, stride: int = 1, groups: int = 1, relu: bool = True) -> nn.Sequential:
    padding = side // 2 if side > 2 else 0
    layers: list[nn.Module] = [nn.Conv2d(into, out, side, stride, padding, groups=groups, bias=False)]
    layers.append(nn.BatchNorm2d(out))
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []))


def _folded(block: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with its normalisation in it."""
    convolution, norm = block[0], block[1]
    assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None and norm.running_mean is not None
    factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return convolution.weight * factor[:, None, None, None], norm.bias - norm.running_mean * factor


class ScoredExit(nn.Module):
    """features float32 [B, C, H, W] -> scores float32 [B, classes] that sum to 1."""

    def __init__(self, network: ExitNetwork, temperature: float) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature

    def forward(self, features: Tensor) -> Tensor:
        return functional.softmax(self.network(features) / self.temperature, 1)


def exit_of(bundle: Bundle, spec: ExitSpec) -> ScoredExit:
    """The network of a bundle's exit.

    Raises:
        BundleError: the bundle lacks its tensors, as an edge half does.
    """
    start = f"{spec.split}/"
    tensors = {k.removeprefix(start): v for k, v in bundle.exits.items() if k.startswith(start)}
    try:
        return ScoredExit(ExitNetwork(tensors), spec.temperature).eval()
    except (KeyError, RuntimeError) as error:
        raise BundleError(
            f"bundle {bundle.name} lacks a sound exit at {spec.split} ({error!r}); learn it anew with `headrace exit`"
        ) from error

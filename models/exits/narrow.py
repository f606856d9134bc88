"""A narrow exit: the rest of the backbone with few hidden channels, whose last layer looks at a few windows.

features [B, C, H, W] -> 1x1 -> depthwise -> mean of each window -> 1x1 -> 1x1 -> mean over windows -> pooled [B, V]
                              hidden channels                                          what the classifier takes

Behind a deep cut the rest of a mobile network is one bottleneck and one 1x1. Most of its hidden channels can go, and a
mean that is taken early spares the layers behind it most places. Weights are the backbone's with little added, so that
a bundle holds little: which hidden channels stay, the layer that makes up for the others (by least squares, as in
`learning.narrow`), and a product of low rank for each other layer (`repair.deltas`).

In a bundle, by `SPLIT/...`: `kept` int32 [K], `windows` int32 [1], windows a side; `project` int8 [P, K] with its
`project/step`, in full; all else float16 as `Deltas` names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backbones import Backbone
from ..cutting.cuts import Head
from ..cutting.own_head import OwnHead
from ..exceptions import BackboneError, BundleError, DataError
from ..learning.eight_bits import as_floats, in_eight_bits
from ..learning.narrow import narrow
from ..repair.deltas import with_deltas
from .classifier import pooled_cut

WINDOWS = 2
"""Windows a side."""
KEPT, SIDE, PROJECT = "kept", "windows", "project"
ALIKE = 1e-3
"""Most that the layers may differ from what the backbone computes, relative to its largest output."""
_LAYERS = ("expand", "depthwise", PROJECT, "last")
_CONVOLUTION: Any = torch.ops.aten.conv2d.default
"""The operation that `Deltas` knows."""

Arrays = Mapping[str, npt.NDArray[Any]]


class NarrowRest(nn.Module):
    """Features float32 [B, C, H, W] -> tuple of pooled float32 [B, V]."""

    expand_weight: Tensor
    expand_bias: Tensor
    depthwise_weight: Tensor
    depthwise_bias: Tensor
    project_weight: Tensor
    project_bias: Tensor
    last_weight: Tensor
    last_bias: Tensor

    def __init__(self, weights: Sequence[Tensor], windows: int) -> None:
        """Kernels and biases of the four layers in turn; windows a side, 0 for every place its own."""
        super().__init__()
        self.windows = windows
        for name, kernel, bias in zip(_LAYERS, weights[::2], weights[1::2], strict=True):
            self.register_buffer(f"{name}_weight", kernel.clone())
            self.register_buffer(f"{name}_bias", bias.clone())

    def hidden(self, features: Tensor) -> Tensor:
        """What the windows hold, float32 [B, K, windows, windows]."""
        kernel = self.depthwise_weight.shape[-1]
        inside = functional.relu6(_CONVOLUTION(features, self.expand_weight, self.expand_bias))
        inside = functional.relu6(
            functional.conv2d(
                inside,
                self.depthwise_weight,
                self.depthwise_bias,
                padding=kernel // 2,
                groups=len(self.depthwise_weight),
            )
        )
        return self.pooled(inside)

    def pooled(self, maps: Tensor) -> Tensor:
        """The mean of each window of maps float32 [B, K, H, W], float32 [B, K, windows, windows]."""
        if not self.windows:
            return maps
        side = min(maps.shape[2:])
        step = side // self.windows
        return functional.avg_pool2d(maps, side - step * (self.windows - 1), step)

    def forward(self, features: Tensor) -> tuple[Tensor]:
        projected = _CONVOLUTION(self.hidden(features), self.project_weight, self.project_bias)
        return (functional.relu6(_CONVOLUTION(projected, self.last_weight, self.last_bias)).mean((2, 3)),)

    def tensors(self, kept: Tensor, deltas: Arrays) -> dict[str, npt.NDArray[Any]]:
        """What a bundle holds of it, without the split point's name: `deltas` are of all layers but the third."""
        project = {PROJECT: self.project_weight[:, :, 0, 0].half().numpy()}
        return {
            KEPT: kept.to(torch.int32).numpy(),
            SIDE: np.array([self.windows], np.int32),
            **in_eight_bits(project),
            f"{PROJECT}_bias": self.project_bias.half().numpy(),
            **{name: value for name, value in deltas.items() if not name.startswith(PROJECT)},
        }


class Answering(nn.Module):
    """Features float32 [B, C, H, W] -> tuple of scores float32 [B, classes]."""

    def __init__(self, rest: NarrowRest, weight: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.rest = rest
        self._last = (weight, offset)  # neither a parameter nor a buffer: it does not learn

    def forward(self, features: Tensor) -> tuple[Tensor]:
        return (functional.linear(self.rest(features)[0], *self._last).softmax(1),)


def begun(backbone: Backbone, split: str, hidden: int, features: Tensor) -> tuple[NarrowRest, Tensor]:
    """A narrow exit as it begins, nothing learned, and which hidden channels stay.

    Args:
        backbone: any.
        split: split point of its own.
        hidden: channels that stay.
        features: float32 [B, C, H, W] there, by which they are chosen.

    Raises:
        BackboneError: what is behind the split point is not one bottleneck, one 1x1 and the mean.
        DataError: there are not as many hidden channels.
    """
    rest = _rest(backbone, split)
    whole = NarrowRest(list(rest.weights().values()), 0)
    with torch.inference_mode():
        wanted = rest(features[:8])[0].flatten(1)
        error = float((whole(features[:8])[0] - wanted).abs().max() / wanted.abs().max())
    if not error <= ALIKE:
        raise _unfit(backbone, split)
    (bottleneck,) = rest.bottlenecks()
    if not 1 <= hidden <= bottleneck.hidden:
        raise DataError(
            f"a narrow exit behind {split} keeps 1 to {bottleneck.hidden} hidden channels, not {hidden}; change "
            "--hidden"
        )
    light = OwnHead(rest.head)
    with torch.no_grad():
        (kept,) = narrow(light, OwnHead(rest.head), (hidden,), features)
    return NarrowRest(list(light.weights().values()), WINDOWS), kept


def narrow_rest(backbone: Backbone, split: str, tensors: Arrays) -> NarrowRest:
    """The narrow exit of a bundle, from its tensors without the split point's name.

    Raises:
        BackboneError: as `begun`.
        BundleError: they do not fit.
    """
    try:
        kept = torch.from_numpy(tensors[KEPT].astype(np.int64))
        expand, expand_bias, depthwise, depthwise_bias, *_, last, last_bias = _rest(backbone, split).weights().values()
        found = as_floats({k: v for k, v in tensors.items() if k not in (KEPT, SIDE)})
        floats = {name: torch.from_numpy(value) for name, value in found.items()}
        project, project_bias = floats.pop(PROJECT)[:, :, None, None], floats.pop(f"{PROJECT}_bias")
        layers = (expand[kept], expand_bias[kept], depthwise[kept], depthwise_bias[kept], project, project_bias)
        made: NarrowRest = with_deltas(NarrowRest((*layers, last, last_bias), int(tensors[SIDE][0])), floats)  # type: ignore[assignment]
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise BundleError(f"the narrow exit at {split} does not fit its backbone: {error}; learn it anew") from error
    return made


def _rest(backbone: Backbone, split: str) -> OwnHead:
    """From a split point of the backbone's own to the vector in front of the classifier."""
    sized, cut = backbone.at(split)
    if split in backbone.learned:
        raise _unfit(backbone, split)
    rest = OwnHead(Head(sized.traced, sized.cut(pooled_cut(sized)), sized.cut(cut)))
    weights = list(rest.weights().values())
    if len(rest.bottlenecks()) != 1 or len(weights) != 2 * len(_LAYERS) or any(w.ndim != 4 for w in weights[::2]):
        raise _unfit(backbone, split)
    return rest


def _unfit(backbone: Backbone, split: str) -> BackboneError:
    return BackboneError(
        f"a narrow exit needs one bottleneck, one 1x1 and a mean with ReLU6 behind it, which {backbone.spec.name} has "
        f"not behind {split}; take a later split point, or leave --hidden out for an exit that is the whole rest"
    )

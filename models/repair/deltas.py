"""Deltas: what is added to a fixed network's weights, small enough for a bundle.

Vectors are changed in full, matrices and kernels by products of low rank (Hu et al., "LoRA: Low-Rank Adaptation of
Large Language Models", ICLR 2022). In a bundle, float16, by the network's own names:

    NAME                          what is added to the tensor NAME, in full, or
    NAME/left, NAME/right         the same as a product [out, r] [r, rest]

They are added once, when the network is loaded (`with_deltas`), and cost no time afterwards.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LEFT, RIGHT = "/left", "/right"
_CONVOLUTION: Any = torch.ops.aten.conv2d.default


class Deltas(nn.Module):
    """A network with deltas that learn: what it takes -> what it gives; the network itself stays as it is.

    A delta is in units of the tensor that it changes, each output channel's own for matrices, so that one learning
    rate suits all.
    """

    def __init__(self, network: nn.Module, rank: int, seed: int) -> None:
        """Begin as the network; a rank of 0 changes nothing. On the network's device."""
        super().__init__()
        self._fixed = (network,)  # in a tuple, so that it is not a submodule
        self._names = {name: name.replace(".", "/") for name, w in weights(network).items() if rank and _pays(w, rank)}
        self._units: dict[str, Tensor] = {}
        self.deltas = nn.ParameterDict()
        generator = torch.Generator().manual_seed(seed)
        for name in self._names:
            weight = weights(network)[name]
            self._units[name] = _unit(weight)
            if weight.ndim >= 2:
                rows, columns = len(weight), weight[0].numel()
                right = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
                self.deltas[self._names[name] + LEFT] = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
                self.deltas[self._names[name] + RIGHT] = nn.Parameter(right.to(weight.device))
            else:
                self.deltas[self._names[name]] = nn.Parameter(torch.zeros_like(weight))

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """What the changed network gives."""
        (network,) = self._fixed
        beside, changed = {}, {}
        for name, weight in weights(network).items():
            # On a GPU two more passes over the features take longer than the gradient of a kernel.
            if name in self._names and weight.ndim == 4 and weight.device.type == "cpu":
                beside[weight.data_ptr()] = self._factors(name, weight)
            elif name in self._names:
                changed[name] = weight + self._delta(name, weight)
        with _Beside(beside):
            outputs: tuple[Tensor, ...] = functional_call(network, changed, given)
        return outputs

    def tensors(self) -> dict[str, npt.NDArray[np.float16]]:
        """What a bundle holds of it."""
        found: dict[str, Tensor] = {}
        for name, short in self._names.items():
            unit = self._units[name]
            if short in self.deltas:
                found[name] = self.deltas[short] * unit
            else:
                found[name + LEFT] = self.deltas[short + LEFT] * unit.reshape(-1, 1)
                found[name + RIGHT] = self.deltas[short + RIGHT]
        return {key: value.detach().half().cpu().contiguous().numpy() for key, value in found.items()}

    def take_up(self, tensors: Mapping[str, Tensor]) -> None:
        """Set what a bundle holds; where its rank is lower, the other directions stay as they were, without effect.

        Raises:
            KeyError, RuntimeError: it is of another network, or of a higher rank.
        """
        if other := {key.removesuffix(LEFT).removesuffix(RIGHT) for key in tensors} - set(self._names):
            raise KeyError(f"{min(other)} is not changed at this rank")
        with torch.no_grad():
            for name, short in self._names.items():
                unit = self._units[name]
                if short in self.deltas:
                    self.deltas[short].copy_(tensors[name].to(unit.device) / unit)
                    continue
                left = tensors[name + LEFT].to(unit.device) / unit.reshape(-1, 1)
                right = tensors[name + RIGHT].to(unit.device)
                # As long as those that begin at random, so that one learning rate suits both.
                length = right.norm(dim=1).clamp_min(1e-12)
                self.deltas[short + LEFT].zero_()[:, : len(right)].copy_(left * length)
                self.deltas[short + RIGHT][: len(right)].copy_(right / length[:, None])

    def _factors(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A kernel's product as two kernels, [rank, in, h, w] and then [out, rank, 1, 1]."""
        short, unit = self._names[name], self._units[name].reshape(-1, 1)
        left, right = self.deltas[short + LEFT] * unit, self.deltas[short + RIGHT]
        return right.reshape(-1, *weight.shape[1:]), left[:, :, None, None]

    def _delta(self, name: str, weight: Tensor) -> Tensor:
        short = self._names[name]
        if short in self.deltas:
            delta: Tensor = self.deltas[short]
        else:
            delta = (self.deltas[short + LEFT] @ self.deltas[short + RIGHT]).reshape(weight.shape)
        return delta * self._units[name]


class _Beside(TorchFunctionMode):
    """Convolutions go through the product beside their kernel, too. The sum is the same as with a changed kernel, but
    no gradient of the kernel is computed, which would take a third of a step's time."""

    def __init__(self, factors: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """`factors` by the address of the kernel that they change."""
        super().__init__()
        self._factors = factors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        factors = self._factors.get(args[1].data_ptr()) if func is _CONVOLUTION else None
        if factors is None:
            return func(*args, **kwargs)
        narrow, wide = factors
        features, kernel, *rest = args
        bias, how = (rest[0], rest[1:]) if rest else (None, [])
        # The gradient of a bias that goes with the large kernel would bring that kernel's with it.
        beside = functional.conv2d(func(features, narrow, None, *how, **kwargs), wide, bias)
        return func(features, kernel, None, *how, **kwargs) + beside


def weights(module: nn.Module) -> dict[str, Tensor]:
    """What of a module can be changed, by name: its parameters, and buffers that hold a folded weight or bias."""
    buffers = {k: v for k, v in module.named_buffers() if k.endswith(("weight", "bias")) and v.is_floating_point()}
    return {**dict(module.named_parameters()), **buffers}


def with_deltas(module: nn.Module, deltas: Mapping[str, Tensor]) -> nn.Module:
    """A changed copy of a module.

    Raises:
        KeyError, RuntimeError: they do not fit it.
    """
    module = copy.deepcopy(module)
    changed = weights(module)
    with torch.no_grad():
        for name in sorted({key.removesuffix(LEFT).removesuffix(RIGHT) for key in deltas}):
            delta = deltas[name] if name in deltas else deltas[name + LEFT] @ deltas[name + RIGHT]
            changed[name] += delta.reshape(changed[name].shape)
    return module


def _pays(weight: Tensor, rank: int) -> bool:
    """Whether a tensor is changed: vectors are, and matrices and kernels far larger than a product of that rank.

    Kernels of depthwise convolutions are not: their gradients take an eighth of the time, for few numbers.
    """
    if weight.ndim < 2:
        return weight.ndim == 1
    depthwise = weight.ndim > 2 and weight.shape[1] == 1
    return not depthwise and min(len(weight), weight[0].numel()) > 2 * rank


def _unit(weight: Tensor) -> Tensor:
    """Root mean square of a tensor, for matrices and kernels that of each output channel, in a shape that broadcasts.

    Where batch normalisations were folded in, channels differ by orders of magnitude.
    """
    whole = weight.detach().square().mean().sqrt().clamp_min(1e-6)
    if weight.ndim < 2:
        return whole
    rows = weight.detach().flatten(1).square().mean(1).sqrt().maximum(1e-2 * whole)
    return rows.reshape(-1, *[1] * (weight.ndim - 1))

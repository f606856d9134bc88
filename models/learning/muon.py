"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al., "Muon: An optimizer for
hidden layers in neural networks", 2024, with the step's size of Liu et al., "Muon is Scalable for LLM Training", 2025).

PyTorch has one for matrices; here kernels of convolutions are matrices [out, in x h x w], and those of one shape are
worked on at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
POLYNOMIAL = (3.4445, -4.775, 2.0315)
"""Of Newton and Schulz, as Jordan has it: singular values come near 1 within `ROUNDS`, not to it."""
ROUNDS = 5
ADAM = 0.2
"""Root mean square of an entry's step over the learning rate, about as Adam has it."""


class Muon(torch.optim.Optimizer):
    """For kernels and matrices alone; `lr` is as for Adam."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """One step against the gradients; `closure` is not used."""
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
            for (rows, columns), parameters in alike.items():
                moved = orthogonal(torch.stack([self._momentum(p).reshape(rows, columns) for p in parameters]))
                size = ADAM * max(rows, columns) ** 0.5
                for parameter, each in zip(parameters, moved, strict=True):
                    parameter.sub_(each.reshape(parameter.shape).to(parameter.dtype), alpha=group["lr"] * size)

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        """Nesterov's."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        return parameter.grad.lerp(momentum, MOMENTUM)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [N, R, C] -> the same with singular values near 1."""
    a, b, c = POLYNOMIAL
    x = matrices.bfloat16() if matrices.device.type == "cuda" else matrices.float()
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    found: Tensor = x.mT if tall else x
    return found

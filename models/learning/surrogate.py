"""What quantiser and entropy coder will do to a latent, in a form that gradients pass.

latent [B, K, h, w] --cosine transform of rows and columns, x gain--> v --rounding or noise, / gain, back--> latent'
                                                                       --Laplace of running scales--> bits

In a bundle the closed form takes the place of the cosine transform (it finds nearly that for rows and columns, and
also decorrelates channels), and counted integer tables that of the Laplace distributions. Noise stands for rounding as
in Balle et al., "End-to-end Optimized Image Compression" (ICLR 2017); later in training values are rounded and the
gradient passes straight through.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MOMENTUM = 0.02
LEAST = 1e-3
"""Smallest scale of a component, in quantiser steps."""


def cosine_matrix(size: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II), float32 [size, size]; row i gives component i."""
    at = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi * (at[None] + 0.5) * at[:, None] / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


class Surrogate(nn.Module):
    """latent float32 [B, K, h, w], gain [B], a width's index -> the latent as decoded, bits float32 [B]."""

    def __init__(self, widths: int, latent: int, side: int) -> None:
        """Scales begin at 1 for every width and component."""
        super().__init__()
        self.transform = nn.Buffer(cosine_matrix(side), persistent=False)
        self.scales = nn.Buffer(torch.ones(widths, latent, side, side))

    def forward(self, latent: Tensor, gain: Tensor, width: int, noise: Tensor, rounded: bool) -> tuple[Tensor, Tensor]:
        """Noise, uniform on -0.5..0.5 of the latent's shape, takes the place of rounding in the rate, and everywhere
        unless `rounded`."""
        gain = gain[:, None, None, None]
        values = self.transform @ latent @ self.transform.T
        if self.training:
            with torch.no_grad():
                self.scales[width].mul_(1 - MOMENTUM).add_(values.abs().mean(0), alpha=MOMENTUM)
        values = values * gain
        bits = laplace_bits(values + noise, self.scales[width] * gain).flatten(1).sum(1)
        coded = values + (values.round() - values).detach() if rounded else values + noise
        return self.transform.T @ (coded / gain) @ self.transform, bits


def laplace_bits(values: Tensor, scale: Tensor) -> Tensor:
    """Bits of values rounded to integers under Laplace distributions of mean 0 and mean magnitude `scale`; gradients
    pass."""
    scale = scale.clamp_min(LEAST)
    size = values.abs()
    near = torch.exp((size - 0.5).clamp_max(0.0) / scale)
    middle = 1 - 0.5 * torch.exp(-(size + 0.5) / scale) - 0.5 * near
    outer = 0.5 * torch.exp(-(size - 0.5).clamp_min(0.0) / scale) * (1 - torch.exp(-1 / scale))
    # Far out a probability underflows; there the bits grow along the exponential by themselves.
    outer_bits = (size - 0.5).clamp_min(0.0) / (scale * math.log(2)) - torch.log2(0.5 * (1 - torch.exp(-1 / scale)))
    inner_bits = -torch.log2(torch.where(size > 0.5, outer.clamp_min(1e-9), middle.clamp_min(1e-9)))
    return torch.where(size > 0.5, outer_bits, inner_bits)

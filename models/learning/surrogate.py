"""What quantiser and entropy coder will do to a latent, in a form that gradients pass.

latent [B, K, h, w] --cosine transform of rows and columns, x gain--> v --rounding or noise, / gain, back--> latent'
                                                              --Gaussians of running scales (CompressAI)--> bits

In a bundle the closed form takes the place of the cosine transform (it finds nearly that for rows and columns, and
also decorrelates channels), and counted integer tables that of the Gaussians, which take as many bits as Laplace
distributions. Noise stands for rounding as in Balle et al., "End-to-end Optimized Image Compression" (ICLR 2017); later
in training values are rounded and the gradient passes straight through.
"""

from __future__ import annotations

import math

import torch
from compressai.entropy_models import GaussianConditional
from torch import Tensor, nn

MOMENTUM = 0.02
DEVIATION = math.sqrt(math.pi / 2)
"""Of a Gaussian, over its mean magnitude, of which a running mean is kept: far values sway it less than squares."""


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
        self.prior = GaussianConditional(None)

    def observe(self, latent: Tensor, width: int, share: float) -> None:
        """Move a width's scales towards those of latents [B, K, h, w], all the way at a share of 1."""
        self._observe(self.transform @ latent @ self.transform.T, width, share)

    def _observe(self, values: Tensor, width: int, share: float) -> None:
        with torch.no_grad():
            self.scales[width].mul_(1 - share).add_(values.abs().mean(0), alpha=share)

    def forward(self, latent: Tensor, gain: Tensor, width: int, rounded: bool) -> tuple[Tensor, Tensor]:
        """While it is trained, noise of PyTorch's own generator, uniform on -0.5..0.5, takes the place of rounding in
        the rate, and everywhere unless `rounded`."""
        gain = gain[:, None, None, None]
        values = self.transform @ latent @ self.transform.T
        if self.training:
            self._observe(values, width, MOMENTUM)
        values = values * gain
        noisy, likelihood = self.prior(values, self.scales[width] * DEVIATION * gain)
        bits = -likelihood.log2().flatten(1).sum(1)
        coded = values + (values.round() - values).detach() if rounded else noisy
        return self.transform.T @ (coded / gain) @ self.transform, bits

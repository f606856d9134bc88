"""A factorised prior: one learned density a channel, its symbols coded under frozen integer tables.

The density of appendix 6.1 of Balle et al., "Variational image compression with a scale hyperprior" (ICLR 2018): a
cumulative distribution is a small monotone network of one input and one output, matrices made positive by softplus,
gates between -1 and 1. Shapes and names of the parameters are those of CompressAI's `EntropyBottleneck` (Begaint et
al., arXiv 2011.03029), so that its state is one of this.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..entropy_coder import EntropyTables
from ..entropy_model import cumulative, table_of_rows

HIDDEN = (3, 3, 3, 3)
SPREAD = 10.0
"""Width of the densities at first."""
TAIL = 1e-9
"""Mass outside what has entries of its own."""
FARTHEST = 1e5
HALVINGS = 60
LEAST = 1e-9
"""Smallest likelihood that is told apart."""
MAX_REACH = 2000
"""Most entries on either side of a median."""


class FactorisedPrior(nn.Module):
    """Densities of the channels of a latent float32 [B, K, h, w]."""

    def __init__(self, channels: int, spread: float = SPREAD) -> None:
        """Densities about `spread` wide, medians 0."""
        super().__init__()
        sizes = (1, *HIDDEN, 1)
        scale = spread ** (1 / (len(HIDDEN) + 1))
        self.matrices, self.biases, self.factors = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for before, after in pairwise(sizes):
            value = math.log(math.expm1(1 / scale / after))
            self.matrices.append(nn.Parameter(torch.full((channels, after, before), value)))
            self.biases.append(nn.Parameter(torch.rand(channels, after, 1) - 0.5))
        for after in HIDDEN:
            self.factors.append(nn.Parameter(torch.zeros(channels, after, 1)))
        ends = torch.tensor([-spread, 0.0, spread]).repeat(channels, 1, 1)
        self.quantiles = nn.Parameter(ends, requires_grad=False)

    def bits(self, latent: Tensor) -> Tensor:
        """Bits of each value, noisy or rounded about its median: float32 of the latent's shape; gradients pass."""
        flat = latent.float().transpose(0, 1).flatten(1)[:, None]
        count = flat.shape[2]
        # Both ends at once: half as many small kernels.
        ends = self._logits(torch.cat([flat - 0.5, flat + 0.5], 2))
        lower, upper = ends[..., :count], ends[..., count:]
        # Of two numbers near 1 the difference is lost; of the same two near 0 it is not.
        sign = torch.where(lower + upper > 0, -1.0, 1.0)
        likelihood = (torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower)).abs()
        bits = -torch.log2(likelihood.clamp_min(LEAST))
        return bits.reshape(latent.shape[1], latent.shape[0], *latent.shape[2:]).transpose(0, 1)

    @property
    def medians(self) -> Tensor:
        """float32 [K, 1, 1]."""
        return self.quantiles[:, :, 1:2]

    @torch.no_grad()
    def find_quantiles(self) -> None:
        """Medians, and where the tails begin, by bisection."""
        edge = math.log(2 / TAIL - 1)
        target = torch.tensor([-edge, 0.0, edge], device=self.quantiles.device).expand_as(self.quantiles)
        low, high = torch.full_like(target, -FARTHEST), torch.full_like(target, FARTHEST)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            below = self._logits(middle) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        self.quantiles.copy_((low + high) / 2)

    @torch.no_grad()
    def tables(self) -> EntropyTables:
        """One table a channel, of whole numbers relative to its median. `find_quantiles` comes first."""
        rows, offsets = [], []
        for channel, (low, median, high) in enumerate(self.quantiles[:, 0].double().tolist()):
            least = -min(max(math.ceil(median - low), 1), MAX_REACH)
            most = min(max(math.ceil(high - median), 1), MAX_REACH)
            at = torch.zeros(1, len(self.quantiles), 1, most - least + 1)
            at[0, channel, 0] = median + torch.arange(least, most + 1)
            masses = torch.exp2(-self.bits(at.to(self.quantiles.device)))[0, channel, 0].double().cpu().numpy()
            rows.append(cumulative(np.append(masses, max(1 - masses.sum(), 0.0))))
            offsets.append(least)
        return table_of_rows(rows, offsets)

    def _logits(self, values: Tensor) -> Tensor:
        """[K, 1, N] -> logits of the cumulative distribution."""
        for i, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            values = functional.softplus(matrix) @ values + bias
            if i < len(self.factors):
                values = values + torch.tanh(self.factors[i]) * torch.tanh(values)
        return values

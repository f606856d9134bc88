"""Entropic Student: the encoder that is learned for one rate, as published, to be measured beside ours.

pixels --5x5/2--> 96 --GDN--> --5x5/2--> 48 --GDN--> --2x2--> latent [24, S/4 - 1, S/4 - 1] --rounded--> symbols
symbols --2x2--> 512 --inverse GDN--> --2x2--> 256 --inverse GDN--> --2x2--> the backbone's features at S/4

Matsubara, Yang, Levorato and Mandt, "Supervised Compression for Resource-Constrained Edge Computing Systems" (WACV
2022); the same authors, "SC2 Benchmark: Supervised Compression for Split Computing" (TMLR 2023), whose code has the
paddings, the simplified normalisation of Johnston et al. (arXiv 1912.08771) and no biases. There the features are those
of the first stage of a ResNet-50, 256 channels; here they are the backbone's own map of that size. Symbols go through
our packets, under integer tables that the learned prior is frozen to.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from .factorised import FactorisedPrior

ANCHOR = "blocks.1"
"""Of the EfficientNet-Lite models: the first stage of a quarter of the input's size."""
LATENT = 24
ENCODER = (96, 48)
DECODER = (512, 256)
SPREAD = 2.0
"""Of the prior's densities at first; latents begin far below 1, and CompressAI's 10 takes hundreds of steps to shrink.
"""
_PEDESTAL = 2.0**-36
_SMALLEST = 2.0**-18
_LEAST_BETA = 1e-6


class _AtLeast(torch.autograd.Function):
    """Values, but for those below a bound; these are moved by gradients that lead up again."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(values)
        ctx.bound = bound  # type: ignore[attr-defined]
        return values.clamp_min(bound)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        (values,) = ctx.saved_tensors  # type: ignore[attr-defined]
        passed = (values >= ctx.bound) | (gradients[0] < 0)  # type: ignore[attr-defined]
        return gradients[0] * passed, None


class Gdn(nn.Module):
    """Simplified divisive normalisation, float [B, C, H, W] -> the same: x / (beta + gamma |x|), or times that."""

    def __init__(self, channels: int, inverse: bool = False) -> None:
        """Beta 1, gamma a tenth of the identity."""
        super().__init__()
        self.inverse = inverse
        self.beta = nn.Parameter((torch.ones(channels) + _PEDESTAL).sqrt())
        self.gamma = nn.Parameter((0.1 * torch.eye(channels) + _PEDESTAL).sqrt())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Gamma [C, C, 1, 1] and beta [C], which their roots stand for, so that neither is negative."""
        gamma = _AtLeast.apply(self.gamma, _SMALLEST) ** 2 - _PEDESTAL
        beta = _AtLeast.apply(self.beta, (_LEAST_BETA + _PEDESTAL) ** 0.5) ** 2 - _PEDESTAL
        return gamma[:, :, None, None], beta

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        norm = functional.conv2d(x.abs(), *self.factors())
        return x * norm if self.inverse else x / norm


class FrozenGdn(nn.Module):
    """`Gdn` of given factors, for what does not learn."""

    def __init__(self, learned: Gdn) -> None:
        super().__init__()
        gamma, beta = (each.detach().clone() for each in learned.factors())
        self.gamma, self.beta, self.inverse = nn.Buffer(gamma), nn.Buffer(beta), learned.inverse

    def forward(self, x: Tensor) -> Tensor:
        """See `Gdn`."""
        norm = functional.conv2d(x.abs(), self.gamma, self.beta)
        return x * norm if self.inverse else x / norm


class StudentEncoder(nn.Module):
    """float32 [B, 3, S, S] -> latent float32 [B, 24, S/4 - 1, S/4 - 1]."""

    def __init__(self) -> None:
        super().__init__()
        wide, narrow = ENCODER
        self.layers = nn.Sequential(
            nn.Conv2d(3, wide, 5, 2, 2, bias=False),
            Gdn(wide),
            nn.Conv2d(wide, narrow, 5, 2, 2, bias=False),
            Gdn(narrow),
        )
        self.last = nn.Conv2d(narrow, LATENT, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        hidden = self.layers(x)
        # Numbers of half precision would themselves be rounded, and not as whole numbers are.
        with torch.autocast(hidden.device.type, enabled=False):
            latent: Tensor = self.last(hidden.float())
        return latent


class StudentDecoder(nn.Module):
    """latent float32 [B, 24, S/4 - 1, S/4 - 1] -> features float [B, C, S/4, S/4].

    What the layers give is in units of each channel's deviation, about its mean. The published one has no such units
    and no biases, and would have to learn first that channels here are far from 0 and vary by tens.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean, self.deviation = nn.Buffer(torch.zeros(channels, 1, 1)), nn.Buffer(torch.ones(channels, 1, 1))
        wide, narrow = DECODER
        self.layers = nn.Sequential(
            nn.Conv2d(LATENT, wide, 2, padding=1, bias=False),
            Gdn(wide, inverse=True),
            nn.Conv2d(wide, narrow, 2, bias=False),
            Gdn(narrow, inverse=True),
            nn.Conv2d(narrow, channels, 2, padding=1, bias=False),
        )

    def forward(self, latent: Tensor) -> Tensor:
        """See the class."""
        features: Tensor = self.layers(latent).float() * self.deviation + self.mean
        return features


class Student(nn.Module):
    """What is learned for one rate, but for the change of the tail."""

    def __init__(self, channels: int) -> None:
        """`channels` of the features."""
        super().__init__()
        self.encoder, self.decoder = StudentEncoder(), StudentDecoder(channels)
        self.prior = FactorisedPrior(LATENT, SPREAD)


def frozen(module: nn.Module) -> nn.Module:
    """Put `FrozenGdn` in place of every `Gdn` of a module, which is changed and returned."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Gdn):
                setattr(parent, name, FrozenGdn(child))
    return module.requires_grad_(False).eval()

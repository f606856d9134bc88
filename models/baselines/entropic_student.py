"""Entropic Student: the encoder that is learned for one rate, as published, to be measured beside ours.

pixels --5x5/2--> 96 --GDN--> --5x5/2--> 48 --GDN--> --2x2--> latent [24, S/4 - 1, S/4 - 1] --rounded--> symbols
symbols --2x2--> 512 --inverse GDN--> --2x2--> 256 --inverse GDN--> --2x2--> the backbone's features at S/4

Matsubara, Yang, Levorato and Mandt, "Supervised Compression for Resource-Constrained Edge Computing Systems" (WACV
2022); the same authors, "SC2 Benchmark: Supervised Compression for Split Computing" (TMLR 2023), whose code has the
paddings, the simplified normalisation of Johnston et al. (arXiv 1912.08771) and no biases. There the features are those
of the first stage of a ResNet-50, 256 channels; here they are the backbone's own map of that size. Normalisation and
factorised prior are CompressAI's, as there. Symbols go through our packets, under the integer tables that CompressAI
freezes the prior to.
"""

from __future__ import annotations

import numpy as np
import torch
from compressai.entropy_models import EntropyBottleneck
from compressai.layers import GDN1
from torch import Tensor, nn

from ..entropy_coder import EntropyTables

ANCHOR = "blocks.1"
"""Of the EfficientNet-Lite models: the first stage of a quarter of the input's size."""
LATENT = 24
ENCODER = (96, 48)
DECODER = (512, 256)
SPREAD = 2.0
"""Of the prior's densities at first; latents begin far below 1, and CompressAI's 10 takes hundreds of steps to shrink.
"""


class StudentEncoder(nn.Module):
    """float32 [B, 3, S, S] -> latent float32 [B, 24, S/4 - 1, S/4 - 1]."""

    def __init__(self) -> None:
        super().__init__()
        wide, narrow = ENCODER
        self.layers = nn.Sequential(
            nn.Conv2d(3, wide, 5, 2, 2, bias=False),
            GDN1(wide),
            nn.Conv2d(wide, narrow, 5, 2, 2, bias=False),
            GDN1(narrow),
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
            GDN1(wide, inverse=True),
            nn.Conv2d(wide, narrow, 2, bias=False),
            GDN1(narrow, inverse=True),
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
        self.prior = EntropyBottleneck(LATENT, init_scale=SPREAD)
        self.prior.quantiles.requires_grad_(False)  # found by bisection (`freeze_prior`), not by a loss of their own

    @property
    def medians(self) -> Tensor:
        """float32 [24, 1, 1], about which latents are rounded; those of the last `freeze_prior`."""
        medians: Tensor = self.prior.quantiles[:, :, 1:2].detach()
        return medians

    def rounded(self, latent: Tensor) -> Tensor:
        """A latent rounded about its channels' medians."""
        whole: Tensor = self.prior.quantize(latent, "dequantize", self.medians)
        return whole

    def freeze_prior(self) -> None:
        """Find medians and ends of the densities as they now are, and the integer tables of them."""
        self.prior.update(force=True, update_quantiles=True)

    def tables(self) -> EntropyTables:
        """One a channel, of whole numbers relative to its median. `freeze_prior` comes first."""
        cdf, sizes, offsets = (
            values.cpu().numpy().astype(np.int32)
            for values in (self.prior.quantized_cdf, self.prior.cdf_length, self.prior.offset)
        )
        return EntropyTables(cdf, sizes, offsets)

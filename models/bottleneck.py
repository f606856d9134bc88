"""The two networks around the latent, as the closed form makes them: 1x1 convolutions with a mean.

features [B, C, H, W] --Encoder--> latent [B, K, H, W] --quantiser, entropy coder--> ... --Decoder--> features
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .bundle import Bundle


class Encoder(nn.Module):
    """features float32 [B, C, H, W] -> latent float32 [B, K, H, W]: subtract the mean, project."""

    def __init__(self, weight: Tensor, mean: Tensor) -> None:
        """weight float32 [K, C], mean float32 [C]."""
        super().__init__()
        self.project = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
        with torch.no_grad():
            self.project.weight.copy_(weight[:, :, None, None])
            self.project.bias.copy_(-weight @ mean)  # type: ignore[union-attr]
        self.requires_grad_(False).eval()

    def forward(self, features: Tensor) -> Tensor:
        latent: Tensor = self.project(features)
        return latent

    @classmethod
    def of(cls, bundle: Bundle, split: str) -> Encoder:
        """The bundle's encoder at a split point."""
        return cls(
            torch.from_numpy(bundle.tensors[f"{split}/encoder"].copy()),
            torch.from_numpy(bundle.tensors[f"{split}/mean"].copy()),
        )


class Decoder(nn.Module):
    """symbols [B, K, H, W] and each frame's gain [B, K] -> features float32 [B, C, H, W].

    Frames of different rate levels and prefixes share a batch: what was not received is 0, its mean.
    """

    def __init__(self, weight: Tensor, mean: Tensor) -> None:
        """weight float32 [C, K], mean float32 [C]."""
        super().__init__()
        self.restore = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
        with torch.no_grad():
            self.restore.weight.copy_(weight[:, :, None, None])
            self.restore.bias.copy_(mean)  # type: ignore[union-attr]
        self.requires_grad_(False).eval()

    def forward(self, symbols: Tensor, gain: Tensor) -> Tensor:
        features: Tensor = self.restore(symbols.float() / gain[:, :, None, None])
        return features

    @classmethod
    def of(cls, bundle: Bundle, split: str) -> Decoder:
        """The bundle's decoder at a split point."""
        return cls(
            torch.from_numpy(bundle.tensors[f"{split}/decoder"].copy()),
            torch.from_numpy(bundle.tensors[f"{split}/mean"].copy()),
        )

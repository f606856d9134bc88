"""The two networks around the latent, as the closed form makes them: a separable transform with a mean.

features [B, C, H, W] --Encoder--> latent [B, K, H, W] --quantiser, entropy coder--> ... --Decoder--> features

Channels are transformed by a 1x1 convolution, rows and columns by one matrix each: a latent's "places" are components
over the whole map, as those of a cosine transform are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .bundle import Bundle


class Encoder(nn.Module):
    """features float32 [B, C, H, W] -> latent float32 [B, K, H, W]: transform, weigh, subtract the mean."""

    weights: Tensor
    shift: Tensor

    def __init__(self, weight: Tensor, mean: Tensor, rows: Tensor, columns: Tensor, weights: Tensor) -> None:
        """All float32: weight [K, C], mean [C, H, W], rows [H, H], columns [W, W], weights [K, H, W]."""
        super().__init__()
        self.project = _pointwise(weight)
        self.places = _Places(rows, columns)
        self.register_buffer("weights", weights)
        with torch.no_grad():
            self.register_buffer("shift", self.places(self.project(mean[None]))[0] * weights)
        self.requires_grad_(False).eval()

    def forward(self, features: Tensor) -> Tensor:
        latent: Tensor = self.places(self.project(features)) * self.weights - self.shift
        return latent

    @classmethod
    def of(cls, bundle: Bundle, split: str) -> Encoder:
        """The bundle's encoder at a split point."""
        part = _parts(bundle, split)
        return cls(part("encoder"), part("mean"), part("rows")[0], part("columns")[0], part("weights"))


class Decoder(nn.Module):
    """symbols [B, K, H, W] and each frame's gain [B, K] -> features float32 [B, C, H, W].

    Frames of different rate levels and prefixes share a batch: what was not received is 0, its mean.
    """

    weights: Tensor
    mean: Tensor

    def __init__(self, weight: Tensor, mean: Tensor, rows: Tensor, columns: Tensor, weights: Tensor) -> None:
        """All float32: weight [C, K], mean [C, H, W], rows [H, H], columns [W, W], weights [K, H, W]."""
        super().__init__()
        self.restore = _pointwise(weight)
        self.places = _Places(rows, columns)
        self.register_buffer("weights", weights)
        self.register_buffer("mean", mean)
        self.requires_grad_(False).eval()

    def forward(self, symbols: Tensor, gain: Tensor) -> Tensor:
        latent = symbols / (gain[:, :, None, None] * self.weights)
        features: Tensor = self.restore(self.places(latent)) + self.mean
        return features

    @classmethod
    def of(cls, bundle: Bundle, split: str) -> Decoder:
        """The bundle's decoder at a split point."""
        part = _parts(bundle, split)
        return cls(part("decoder"), part("mean"), part("rows")[1], part("columns")[1], part("weights"))


def _pointwise(weight: Tensor) -> nn.Conv2d:
    """A 1x1 convolution with the weight [out, in]."""
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight[:, :, None, None])
    return layer


class _Places(nn.Module):
    """Multiplies maps float32 [B, K, H, W] by a matrix [H, H] from the left and one [W, W] from the right."""

    rows: Tensor
    columns: Tensor

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns.T.contiguous())
        # A matrix that does nothing costs the graph nothing: vectors, tokens, sides too long to be transformed.
        self.along = tuple(not torch.equal(m, torch.eye(len(m))) for m in (rows, columns))

    def forward(self, maps: Tensor) -> Tensor:
        if self.along[1]:
            maps = maps @ self.columns
        if self.along[0]:
            maps = self.rows @ maps
        return maps


def _parts(bundle: Bundle, split: str) -> Callable[[str], Tensor]:
    return lambda name: torch.from_numpy(bundle.tensors[f"{split}/{name}"].copy())

"""The synthesis: the learned decoder on the server, from a latent to the backbone's features behind one of its stages.

latent [B, K, h, w] --1x1, blocks--> [1x1, sub-pixel shuffle, blocks] for each finer level --1x1, shuffle--> features
                    --1x1, shuffle: a first guess, linear in the latent-------------------------------------> added

It may be far larger than the encoder, for it runs on the server. Each level has twice the places a side of the one
before; the shuffles are those of Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient
Sub-Pixel Convolutional Neural Network" (CVPR 2016).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class SynthesisShape:
    """Size of a synthesis.

    Attributes:
        latent: K, channels it takes.
        features: (C, H, W) it gives.
        scale: H over the latent's height, a multiple of 2 to the power of levels less one.
        levels: of each (channels, hidden channels of its blocks, number of blocks), coarsest first.
    """

    latent: int
    features: tuple[int, int, int]
    scale: int
    levels: tuple[tuple[int, int, int], ...]

    @property
    def last(self) -> int:
        """Factor of the last shuffle, behind all levels."""
        factor: int = self.scale >> (len(self.levels) - 1)
        return factor


class Synthesis(nn.Module):
    """latent float32 [B, K, h, w] -> features float32 [B, C, H, W], as `colour`s of mean 0 and covariance 1 say.

    What the layers give is multiplied by `spread`, a root of the features' covariance over channels, and `mean` is
    added: every channel is then equally hard to learn.
    """

    def __init__(self, shape: SynthesisShape, mean: Tensor, spread: Tensor, normalised: bool = True) -> None:
        """Make it with random weights.

        Args:
            shape: its size.
            mean: float32 [C] of the features.
            spread: float32 [C, C], its product with its transpose is their covariance.
            normalised: with normalisations, to be trained; without them, to be run.
        """
        super().__init__()
        self.shape = shape
        layers: list[nn.Module] = []
        before = shape.latent
        for at, (channels, hidden, blocks) in enumerate(shape.levels):
            if at == 0:
                layers += [_conv(before, channels, 1, normalised), nn.ReLU()]
            else:
                layers += [nn.Conv2d(before, channels * 4, 1), _Shuffle(2)]
            layers += [_Block(channels, hidden, normalised) for _ in range(blocks)]
            before = channels
        self.layers = nn.Sequential(*layers)
        self.last = nn.Conv2d(before, shape.features[0] * shape.last**2, 1)
        self.guess = nn.Conv2d(shape.latent, shape.features[0] * shape.scale**2, 1)
        if normalised:
            nn.init.zeros_(self.guess.weight)
            assert self.guess.bias is not None
            nn.init.zeros_(self.guess.bias)
        self.mean, self.spread = nn.Buffer(mean), nn.Buffer(spread)
        self.to(memory_format=torch.channels_last)

    def forward(self, latent: Tensor) -> Tensor:
        """The features."""
        features: Tensor = functional.pixel_shuffle(self.last(self.layers(latent)), self.shape.last)
        guess = functional.pixel_shuffle(self.guess(latent), self.shape.scale).float()
        return torch.einsum("dc,bchw->bdhw", self.spread, features.float()) + self.mean[:, None, None] + guess

    def blocks_beyond(self, shape: SynthesisShape) -> list[nn.Module]:
        """The blocks that one of another shape, with fewer at some levels, does not have."""
        found: list[nn.Module] = []
        at = 2
        for (_, _, mine), (_, _, theirs) in zip(self.shape.levels, shape.levels, strict=True):
            found += [self.layers[i] for i in range(at + theirs, at + mine)]
            at += mine + 2
        return found

    def folded(self) -> Synthesis:
        """The same for running: normalisations and the last layer's colouring folded into convolutions."""
        plain = Synthesis(self.shape, torch.zeros_like(self.mean), torch.eye(len(self.mean)), normalised=False)
        with torch.no_grad():
            for mine, theirs in zip(_convolutions(self), _convolutions(plain), strict=True):
                weight, bias = mine
                theirs[0].copy_(weight)
                theirs[1].copy_(bias)
            # Of every C outputs those of one place of the shuffle lie apart: channel c has c * last^2 and what follows.
            last, offset, spots = plain.last.weight, plain.last.bias, self.shape.last**2
            assert offset is not None
            coloured = torch.einsum("dc,csi->dsi", self.spread, last.reshape(-1, spots, last.shape[1]))
            last.copy_(coloured.reshape(last.shape))
            offset.copy_((self.spread @ offset.reshape(-1, spots) + self.mean[:, None]).flatten())
        return plain.requires_grad_(False).eval()

    @classmethod
    def of(cls, shape: SynthesisShape, tensors: Mapping[str, Tensor]) -> Synthesis:
        """A folded synthesis from its `state` tensors.

        Raises:
            KeyError, RuntimeError: they do not fit the shape.
        """
        channels = shape.features[0]
        plain = cls(shape, torch.zeros(channels), torch.eye(channels), normalised=False)
        plain.load_state_dict({**plain.state_dict(), **tensors})
        return plain.requires_grad_(False).eval()

    def state(self) -> dict[str, Tensor]:
        """Its convolutions' weights and biases, by name."""
        return {k: v for k, v in self.state_dict().items() if k not in ("mean", "spread")}


class _Shuffle(nn.PixelShuffle):
    """A shuffle after which channels still lie together, as convolutions on a GPU want them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous(memory_format=torch.channels_last)


class _Block(nn.Module):
    """x + 1x1(relu(3x3(relu(1x1(x)))))."""

    def __init__(self, channels: int, hidden: int, normalised: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            _conv(channels, hidden, 1, normalised),
            nn.ReLU(),
            _conv(hidden, hidden, 3, normalised),
            nn.ReLU(),
            _conv(hidden, channels, 1, normalised),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(x)
        return out


def _conv(given: int, made: int, kernel: int, normalised: bool) -> nn.Module:
    if not normalised:
        return nn.Conv2d(given, made, kernel, padding=kernel // 2)
    return nn.Sequential(nn.Conv2d(given, made, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(made))


def _convolutions(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each convolution in order, with the normalisation behind it folded in; plain ones as they
    are, so that they can be written to."""
    found: list[tuple[Tensor, Tensor]] = []
    modules = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    for at, each in enumerate(modules):
        if not isinstance(each, nn.Conv2d):
            continue
        after = modules[at + 1] if at + 1 < len(modules) else None
        if isinstance(after, nn.BatchNorm2d):
            assert after.running_mean is not None and after.running_var is not None
            scale = after.weight / (after.running_var + after.eps).sqrt()
            found.append((each.weight * scale[:, None, None, None], after.bias - after.running_mean * scale))
        else:
            assert each.bias is not None
            found.append((each.weight, each.bias))
    return found

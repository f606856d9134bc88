"""The slimmable encoder: one set of weights, of which every width executes the first channels of each layer.

pixels, normalised [B, 3, S, S] --5x5, stride 4--> c1 --3x3, stride 2--> c2 --block--> --3x3, stride 2--> c3 --blocks-->
    --1x1--> latent [B, K, S/16, S/16]

As in Yu et al., "Slimmable Neural Networks" (ICLR 2019), every width has normalisation statistics of its own; they are
folded into its convolutions when it is taken out (`PlainEncoder`), so that on a device a width is a plain small network
and changing it changes which one is run. The latent has K channels at every width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

STRIDE = 16
"""Pixels of the input along a side for one place of the latent."""
CHANNELS = 5
"""Numbers that describe a width: c1, c2, hidden channels of its block, c3, hidden channels of its blocks."""
BLOCKS = 2

Layer = tuple[tuple[int, ...], tuple[int, ...], int, int, bool]


class SlimmableEncoder(nn.Module):
    """pixels float32 [B, 3, S, S], normalised as the backbone's, and a width's name -> latent [B, K, S/16, S/16]."""

    def __init__(self, widths: Mapping[str, Sequence[int]], latent: int) -> None:
        """Make it with random weights.

        Args:
            widths: by name, narrowest first, `CHANNELS` numbers each, none smaller than in the width before.
            latent: K.
        """
        super().__init__()
        self.widths = {name: tuple(channels) for name, channels in widths.items()}
        self.latent = latent
        self.layers = nn.ModuleList(
            _SlimConv(given, made, kernel, stride, list(self.widths), activated)
            for given, made, kernel, stride, activated in _plan(list(self.widths.values()), latent)
        )

    def forward(self, pixels: Tensor, width: str) -> Tensor:
        """The latent at one width."""
        latent: Tensor = _run([lambda x, layer=layer: layer(x, width) for layer in self.layers], pixels)
        return latent

    def parts(self) -> dict[str, Tensor]:
        """What it is made of: `LAYER/weight`, and `LAYER/WIDTH/scale` and `.../bias`, its normalisation at a width."""
        found: dict[str, Tensor] = {}
        for at, layer in enumerate(self.layers):
            assert isinstance(layer, _SlimConv)
            found[f"{at}/weight"] = layer.weight
            for width in self.widths:
                found[f"{at}/{width}/scale"], found[f"{at}/{width}/bias"] = layer.normalisation(width)
        return found


class PlainEncoder(nn.Module):
    """One width, as it is run: pixels float32 [B, 3, S, S], normalised -> latent float32 [B, K, S/16, S/16]."""

    def __init__(self, channels: Sequence[int], latent: int) -> None:
        """Channels as `SlimmableEncoder` takes them for a width."""
        super().__init__()
        self.activated = []
        self.layers = nn.ModuleList()
        for given, made, kernel, stride, activated in _plan([tuple(channels)], latent):
            self.layers.append(nn.Conv2d(given[0], made[0], kernel, stride, kernel // 2))
            self.activated.append(activated)
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def undivided(self, std: float | Sequence[float]) -> PlainEncoder:
        """The same for pixels that were not divided by `std`, which the first layer's weights then do."""
        copied = copy.deepcopy(self)
        first = copied.layers[0]
        assert isinstance(first, nn.Conv2d)
        with torch.no_grad():
            first.weight.div_(torch.as_tensor(std, dtype=torch.float32).reshape(-1, 1, 1))
        return copied

    def forward(self, pixels: Tensor) -> Tensor:
        """The latent."""
        steps = [
            (lambda x, layer=layer: functional.relu(layer(x))) if activated else layer
            for layer, activated in zip(self.layers, self.activated, strict=True)
        ]
        latent: Tensor = _run(steps, pixels)
        return latent


def _plan(widths: Sequence[Sequence[int]], latent: int) -> list[Layer]:
    """Each layer's channels in and out, per width, its kernel, its stride and whether an activation follows."""
    c1, c2, h2, c3, h3 = (tuple(w[i] for w in widths) for i in range(CHANNELS))
    rgb, out = (3,) * len(widths), (latent,) * len(widths)

    def block(channels: tuple[int, ...], hidden: tuple[int, ...]) -> list[Layer]:
        return [(channels, hidden, 1, 1, True), (hidden, hidden, 3, 1, True), (hidden, channels, 1, 1, False)]

    deep = [layer for _ in range(BLOCKS) for layer in block(c3, h3)]
    return [
        (rgb, c1, 5, 4, True),
        (c1, c2, 3, 2, True),
        *block(c2, h2),
        (c2, c3, 3, 2, True),
        *deep,
        (c3, out, 1, 1, False),
    ]


def _run(layers: Sequence[object], x: Tensor) -> Tensor:
    """Layers in the order of `_plan`, with the blocks' shortcuts."""
    steps = iter(layers)

    def step(value: Tensor) -> Tensor:
        return next(steps)(value)  # type: ignore[operator, no-any-return]

    def block(value: Tensor) -> Tensor:
        return value + step(step(step(value)))

    x = block(step(step(x)))
    x = step(x)
    for _ in range(BLOCKS):
        x = block(x)
    return step(x)


class _SlimConv(nn.Module):
    """A convolution of which a width executes the first channels, with a normalisation for every width."""

    def __init__(
        self,
        given: Sequence[int],
        made: Sequence[int],
        kernel: int,
        stride: int,
        names: Sequence[str],
        activated: bool,
    ) -> None:
        super().__init__()
        self.channels = {name: (i, o) for name, i, o in zip(names, given, made, strict=True)}
        self.stride, self.activated, self.padding = stride, activated, kernel // 2
        self.weight = nn.Parameter(torch.empty(max(made), max(given), kernel, kernel))
        nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="relu" if activated else "linear")
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(out) for name, out in zip(names, made, strict=True)})

    def forward(self, x: Tensor, width: str) -> Tensor:
        given, made = self.channels[width]
        weight = self.weight[:made, :given]
        x = self.norms[width](functional.conv2d(x, weight, stride=self.stride, padding=self.padding))
        return functional.relu(x) if self.activated else x

    def normalisation(self, width: str) -> tuple[Tensor, Tensor]:
        """What one width multiplies its channels by, and what it then adds."""
        norm = self.norms[width]
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        return scale, norm.bias - norm.running_mean * scale

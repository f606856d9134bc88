"""Where a slimmable encoder and its synthesis start: the backbone's own first stages, narrowed, and the closed form.

Of every layer the channels that matter most come first, by how strong they are times how much the next layer makes of
them (magnitude pruning: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017). The last layer and the first
guess of the synthesis are the principal components of 2x2 places of the features, whitened by the metric of the
channels. So a width begins as a rough form of what it is to become, and not as noise. That is the mobile form; of
Darknet's every layer is fitted anew (`refit`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backbones import Backbone
from ..exceptions import BackboneError
from .metric import Nats
from .refit import Darknet, Weights, convolutions
from .slimmable import CHANNELS, Layer, SlimConv, SlimmableEncoder, family, plan_layers, run
from .synthesis import Synthesis

LATENT_KERNEL = 2
UNIFORM = 12.0
"""A uniform quantiser of step 1 errs by 1/12 in the mean square."""

ALIKE = (
    ((0, 1), 1, (2,)),
    ((2,), 2, (3,)),
    ((3, 4), 4, (5,)),
    ((5, 8), 8, (6, 9)),
    ((6, 7), 7, (8,)),
    ((9, 10), 10, (11,)),
)
"""Layers whose outputs are one set of channels, the one at which these are measured, and the layers that read them."""


@dataclass(frozen=True, eq=False)
class Narrowing:
    """A backbone's first stages as layers of the encoder.

    Attributes:
        weights: weight and bias of every layer but the last one's, at all of the backbone's channels.
        channels: the backbone's, as those of a width with a stem of stride 2.
    """

    weights: tuple[Weights, ...]
    channels: tuple[int, ...]

    @classmethod
    def of(cls, backbone: Backbone, anchor: str) -> Narrowing | Darknet | None:
        """The stages before `anchor`; None where they are of neither of the encoder's forms."""
        if found := Darknet.of(backbone, anchor):
            return found
        try:
            weights = convolutions(backbone, anchor)
        except BackboneError:
            return None
        if len(weights) != len(plan_layers([(2, *(1,) * (CHANNELS - 1))], 1)) - 1:
            return None
        made = [len(weight) for weight, _ in weights]
        channels = (2, made[0], made[2], made[3], made[5], made[6], made[9], made[11])
        fits = all(
            tuple(weight.shape) == (each.made[0], 1 if each.depthwise else each.given[0], each.kernel, each.kernel)
            for (weight, _), each in zip(weights, plan_layers([channels], 1)[:-1], strict=True)
        )
        return cls(tuple(weights), channels) if fits else None

    def covers(self, encoder: SlimmableEncoder) -> bool:
        """Whether every width is no wider than the backbone, and ends with as many channels."""
        return all(
            len(channels) == CHANNELS
            and all(a <= b for a, b in zip(channels[1:], self.channels[1:], strict=True))
            and channels[-1] == self.channels[-1]
            for channels in encoder.widths.values()
        )

    def ordered(self, pixels: Tensor) -> tuple[tuple[Weights, Weights], ...]:
        """Every layer's weight and bias, and deviation and mean of what it gives, with its channels in falling order of
        importance; the last layer's stay where they are.

        Args:
            pixels: float32 [B, 3, S, S], normalised.
        """
        strong: list[Tensor] = []
        given: list[Weights] = []
        layers = plan_layers([self.channels], 1)[:-1]
        steps = [partial(_apply, each, weights, given) for each, weights in zip(layers, self.weights, strict=True)]
        with torch.inference_mode():
            run(layers, steps, pixels, lambda x: strong.append(x.square().mean((0, 2, 3)).sqrt()))
        reach = [weight.flatten(2).square().sum((0, 2)).sqrt() for weight, _ in self.weights]
        made = [torch.arange(len(weight)) for weight, _ in self.weights]
        for writers, measured, readers in ALIKE:
            importance = strong[measured] * sum(reach[i] for i in readers)
            order = importance.argsort(descending=True).cpu()
            for i in writers:
                made[i] = order
        found: list[tuple[Weights, Weights]] = []
        for i, (weight, bias) in enumerate(self.weights):
            rows = weight[made[i]]
            chosen = rows[:, made[i - 1]] if i and weight.shape[1] > 1 else rows
            found.append(((chosen, bias[made[i]]), (given[i][0][made[i]], given[i][1][made[i]])))
        return tuple(found)


def start(
    encoder: SlimmableEncoder,
    synthesis: Synthesis,
    narrowing: Narrowing | Darknet,
    pixels: Tensor,
    features: Tensor,
    metric: Nats,
    price: float,
) -> None:
    """Set the networks' weights.

    Args:
        encoder, synthesis: changed in place.
        narrowing: of the synthesis's anchor; it must cover the encoder.
        pixels: float32 [B, 3, S, S], normalised, to take statistics from.
        features: float32 [N, C, 2h, 2w] at the anchor.
        metric: there.
        price: bits that a nat is worth, from which the latent's scale follows: at gain 1 a quantiser's step of 1 is
            the one at which a bit more would be worth as much as it costs.
    """
    analysis, guess, offset = principal(features, metric, encoder.latent, price)
    if isinstance(narrowing, Darknet):
        narrowing.fill(encoder, pixels, (analysis, offset), metric.channels[0].cpu())
    else:
        _narrow(encoder, narrowing, pixels, features, (analysis, offset))
    with torch.no_grad():
        assert synthesis.guess.bias is not None
        synthesis.guess.weight.copy_(guess[:, :, None, None])
        synthesis.guess.bias.zero_()
        synthesis.last.weight.zero_()
        assert synthesis.last.bias is not None
        synthesis.last.bias.zero_()


def _narrow(
    encoder: SlimmableEncoder, narrowing: Narrowing, pixels: Tensor, features: Tensor, last: tuple[Tensor, Tensor]
) -> None:
    """Set the weights of an encoder of the mobile form; `last` are those of its last layer."""
    variance, mean = torch.var_mean(functional.conv2d(features, *last, LATENT_KERNEL), (0, 2, 3))
    layers = [*narrowing.ordered(pixels), (last, (variance.sqrt(), mean))]
    with torch.no_grad():
        for stem in encoder.stems:
            widths = [name for name, channels in encoder.widths.items() if family(channels) == stem]
            for ((weight, _), _), layer in zip(layers, encoder.layers(widths[0]), strict=True):
                made, given = layer.weight.shape[:2]
                scale = layer.layer.kernel // weight.shape[-1]  # 2 where the same is done to pixels averaged two by two
                larger = weight.repeat_interleave(scale, 2).repeat_interleave(scale, 3) / scale**2
                layer.weight.copy_(larger[:made, :given])
            for width in widths:
                mine = encoder.layers(width)
                steps = [partial(_normalise, m, wanted, width) for m, (_, wanted) in zip(mine, layers, strict=True)]
                run([m.layer for m in mine], steps, pixels)


def principal(features: Tensor, metric: Nats, latent: int, price: float) -> tuple[Tensor, Tensor, Tensor]:
    """Analysis [K, C, 2, 2] of features, the synthesis's first guess [C * 4, K], and the analysis's offset [K]."""
    root, scale = metric.channels[0].double().cpu(), 0.5 * metric.scales[1]
    mean = features.mean((0, 2, 3)).double()
    whitened = torch.einsum("dc,nchw->ndhw", root, features.double() - mean[:, None, None])
    places = functional.pixel_unshuffle(whitened, LATENT_KERNEL).movedim(1, 0).flatten(1)
    _, vectors = torch.linalg.eigh(places @ places.T / places.shape[1])
    vectors = vectors.flip(1)[:, :latent]
    # Bits per component fall by 1/ln 2 for every e-fold of the step; there d(nats)/d(bits) = -1 / price.
    unit = (scale * price * 2 * 0.6931 / UNIFORM) ** 0.5
    by_place = vectors.reshape(len(root), LATENT_KERNEL, LATENT_KERNEL, latent)
    analysis = unit * torch.einsum("dabk,dc->kcab", by_place, root)
    guess = torch.einsum("cd,dabk->cabk", torch.linalg.inv(root), by_place).reshape(-1, latent) / unit
    return analysis.float(), guess.float(), -(analysis.sum((2, 3)) @ mean).float()


def _apply(layer: Layer, weights: Weights, given: list[Weights], x: Tensor) -> Tensor:
    x = layer.convolve(x, weights[0].to(x.device), weights[1].to(x.device))
    variance, mean = torch.var_mean(x, (0, 2, 3))
    given.append((variance.sqrt().cpu(), mean.cpu()))
    return layer.finish(x)


def _normalise(layer: SlimConv, wanted: Weights, width: str, x: Tensor) -> Tensor:
    """Let a width's normalisation give these deviations and means for these values; then apply the layer."""
    norm = layer.norms[width]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    variance, mean = torch.var_mean(layer.convolved(x, width), (0, 2, 3), correction=0)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_(wanted[0][: len(mean)])
    norm.bias.copy_(wanted[1][: len(mean)])
    norm.eval()
    found: Tensor = layer(x, width)
    norm.train()
    return found

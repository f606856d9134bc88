"""Where a slimmable encoder of Darknet's form starts: the detector's own first layers, narrowed, each fitted anew.

Layer by layer, on some views: what a narrowed layer gives is to be what the whole one gives before its activation (or,
where a stride takes a maximum's place, the maximum), predicted by least squares from what the narrowed layers before it
do give. So each layer makes up for what those before it left out (channel pruning with reconstruction: He et al.,
"Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017). Widths of one stem share the weights, so their
squared errors are added up; a scale and an offset a channel are each width's own.

Which channels come first: they are taken out one at a time, always the one without which the others predict the next
layer best (the Schur complements of Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain
Surgeon", NIPS 1992, for a channel's whole block of weights).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from ..backbones import Backbone
from ..cutting.cuts import Head
from ..cutting.graph_passes import attribute
from ..exceptions import BackboneError
from .slimmable import DARKNET_CHANNELS, Layer, SlimConv, SlimmableEncoder, family, plan_layers

CHUNK = 4
"""Views at a time."""
PLACES = 300_000
"""So many are enough to fit a layer on; of larger maps fewer views are taken."""
RIDGE = 1e-5
"""Of the mean variance of what is predicted from."""
NARROWER = 0.3
"""Weight of the squared errors of a stem's narrower widths, of the widest's."""
SAME = 1e-3
"""Most that the layers may differ from the backbone, relative to the largest feature."""

Weights = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Darknet:
    """A backbone's first layers as those of the encoder, at all of the backbone's channels.

    Attributes:
        weights: weight and bias of every layer but the last one's.
    """

    weights: tuple[Weights, ...]

    @property
    def channels(self) -> tuple[int, ...]:
        """As those of a width."""
        return (1, *(len(weight) for weight, _ in self.weights))

    @classmethod
    def of(cls, backbone: Backbone, anchor: str) -> Darknet | None:
        """The layers before `anchor`; None where they are not of this form."""
        try:
            found = cls(tuple(convolutions(backbone, anchor)))
            if len(found.weights) != DARKNET_CHANNELS - 1:
                return None
            layers = plan_layers([found.channels], 1)[:-1]
            shapes = [(each.made[0], each.given[0], each.kernel, each.kernel) for each in layers]
            if [tuple(weight.shape) for weight, _ in found.weights] != shapes:
                return None
            x = backbone.example(1)
            with torch.inference_mode():
                (wanted,) = Head(backbone.traced, backbone.cut(anchor))(x)
                for layer, weights in zip(layers, found.weights, strict=True):
                    x = layer.finish(layer.convolve(x, *weights))
        except (BackboneError, ValueError):
            return None
        alike = x.shape == wanted.shape and float((x - wanted).abs().max()) <= SAME * float(wanted.abs().max())
        return found if alike else None

    def covers(self, encoder: SlimmableEncoder) -> bool:
        """Whether every width is of this form and no wider than the backbone."""
        return all(
            len(channels) in (DARKNET_CHANNELS, DARKNET_CHANNELS + 1)
            and all(a <= b for a, b in zip(channels[1:DARKNET_CHANNELS], self.channels[1:], strict=True))
            for channels in encoder.widths.values()
        )

    def fill(self, encoder: SlimmableEncoder, pixels: Tensor, last: Weights, metric: Tensor) -> None:
        """Set the encoder's weights and normalisations.

        Args:
            encoder: changed in place.
            pixels: float32 [B, 3, S, S], normalised, on the CPU.
            last: weight and bias of the last layer, for all of the backbone's channels.
            metric: a root of the metric of the features' channels [C, C], by which the errors of what gives them count.
        """
        weights = [*self.weights, last]
        layers = plan_layers([self.channels], len(last[0]))
        with torch.inference_mode():
            given = [pixels]
            for layer, each in zip(layers[:-1], weights[:-1], strict=True):
                given.append(_by_chunk(partial(_whole, layer, each), given[-1]))
            orders = self._orders(encoder, layers, weights, given, metric)
        with torch.no_grad():
            for stem in encoder.stems:
                widths = [name for name, channels in encoder.widths.items() if family(channels) == stem]
                reached = dict.fromkeys(widths, pixels)
                narrowed = []
                for narrow in encoder.layers(widths[0]):
                    if narrow.layer.residual:  # begins as nothing but its shortcut
                        for norm in narrow.norms.values():
                            assert isinstance(norm, nn.BatchNorm2d)
                            nn.init.zeros_(norm.weight)
                    else:
                        narrowed.append(narrow)
                for at, (full, narrow) in enumerate(zip(layers, narrowed, strict=True)):
                    weight, bias = (each[orders[at]] for each in weights[at])
                    wanted = _Wanted(full, weight, bias, pooled=full.pooled and not narrow.layer.pooled)
                    _fit(narrow, reached, given[at], wanted)
                    narrow.eval()
                    for width in widths:
                        reached[width] = _by_chunk(partial(narrow, width=width), reached[width])
                    narrow.train()

    def _orders(
        self,
        encoder: SlimmableEncoder,
        layers: Sequence[Layer],
        weights: Sequence[Weights],
        given: Sequence[Tensor],
        metric: Tensor,
    ) -> list[Tensor]:
        """Each layer's channels, the most important first; as they are where no width leaves any out, and the last
        layer's."""
        orders = []
        for at, layer in enumerate(layers[:-1]):
            least = min(channels[at + 1] for channels in encoder.widths.values())
            if least == layer.made[0]:
                orders.append(torch.arange(least))
                continue
            behind = layers[at + 1]
            sums = _Sums.over(behind, given[at + 1], given[at + 1], _Wanted(behind, *weights[at + 1], pooled=False))
            root = metric.double() if at + 2 == len(layers) - 1 else torch.diag(sums.deviations.reciprocal())
            orders.append(_order(sums.gram, sums.cross @ root.T, behind.kernel**2))
        return [*orders, torch.arange(len(weights[-1][0]))]


@dataclass(frozen=True)
class _Wanted:
    """What a layer is to give: that of the whole network's layer, before its activation."""

    layer: Layer
    weight: Tensor
    bias: Tensor
    pooled: bool

    def __call__(self, x: Tensor) -> Tensor:
        x = self.layer.convolve(x, self.weight, self.bias)
        return functional.max_pool2d(x, 2) if self.pooled else x


@dataclass(frozen=True)
class _Sums:
    """Second moments about the means, float64, of a layer's patches [P] and of what is wanted [T]."""

    gram: Tensor
    cross: Tensor
    means: Tensor
    wanted: Tensor
    deviations: Tensor

    @classmethod
    def over(cls, layer: Layer, given: Tensor, whole: Tensor, wanted: Callable[[Tensor], Tensor]) -> _Sums:
        """Of the patches that `layer` sees of `given`, and of what is wanted of `whole`."""
        total: Tensor | None = None
        before, behind = layer.padding
        views = max(CHUNK, PLACES * layer.stride**2 // (given.shape[-2] * given.shape[-1]))
        given, whole = given[:views], whole[:views]
        for mine, theirs in zip(torch.split(given, CHUNK), torch.split(whole, CHUNK), strict=True):
            padded = functional.pad(mine, (before, behind, before, behind))
            patches = functional.unfold(padded, layer.kernel, stride=layer.stride).movedim(1, 0).flatten(1)
            target = wanted(theirs).movedim(1, 0).flatten(1)
            rows = torch.cat([patches, target, torch.ones(1, patches.shape[1])])
            product = (rows @ rows.T).double()
            total = product if total is None else total + product
        assert total is not None
        number, sizes = float(total[-1, -1]), len(patches)
        means = total[-1, :-1] / number
        moments = total[:-1, :-1] / number - means[:, None] * means
        deviations = moments.diagonal()[sizes:].clamp_min(1e-12).sqrt()
        return cls(moments[:sizes, :sizes], moments[:sizes, sizes:], means[:sizes], means[sizes:], deviations)


def convolutions(backbone: Backbone, anchor: str) -> list[Weights]:
    """Weight and bias of every convolution before a split point, in the order of execution.

    Raises:
        BackboneError: no such split point.
    """
    traced, cut = backbone.traced, backbone.cut(anchor)
    found: list[Weights] = []
    for node in traced.data[: cut.index + 1]:
        if node.target is not torch.ops.aten.conv2d.default:
            continue
        given = [each for each in node.args[1:3] if isinstance(each, fx.Node)]
        if len(given) == 2:
            weight, bias = (attribute(traced.module, each) for each in given)
            found.append((weight.detach(), bias.detach()))
    return found


def _fit(narrow: SlimConv, reached: Mapping[str, Tensor], whole: Tensor, wanted: _Wanted) -> None:
    """Least squares for a layer's weights, shared by its widths, and then for each width's scale and offset."""
    layer, kernel = narrow.layer, narrow.layer.kernel
    sums = {width: _Sums.over(layer, x, whole, wanted) for width, x in reached.items()}
    sizes = {width: (i * kernel**2, o) for width, (i, o) in narrow.channels.items()}
    widest = max(sizes.values())
    fitted = torch.zeros(widest[0], widest[1], dtype=torch.float64)
    ends = sorted({o for _, o in sizes.values()})
    for begin, end in zip([0, *ends], ends, strict=False):  # channels that the same widths have
        gram = torch.zeros(widest[0], widest[0], dtype=torch.float64)
        cross = torch.zeros(widest[0], end - begin, dtype=torch.float64)
        for width, (size, made) in sizes.items():
            if made >= end:
                share = 1.0 if (size, made) == widest else NARROWER
                gram[:size, :size] += share * sums[width].gram
                cross[:size] += share * sums[width].cross[:, begin:end]
        ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-12)
        fitted[:, begin:end] = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), cross)
    narrow.weight.copy_(fitted.T.reshape(narrow.weight.shape))
    for width, (size, made) in sizes.items():
        norm, found, each = narrow.norms[width], sums[width], fitted[:size, :made]
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        variance = torch.einsum("po,pq,qo->o", each, found.gram, each).clamp_min(1e-12)
        norm.running_mean.copy_(found.means @ each)
        norm.running_var.copy_(variance)
        scale = torch.einsum("po,po->o", each, found.cross[:, :made]) / variance
        norm.weight.copy_(scale * (variance + norm.eps).sqrt())
        norm.bias.copy_(found.wanted[:made])


def _order(gram: Tensor, cross: Tensor, block: int) -> Tensor:
    """Indexes of channels, each a block of so many rows of what is predicted from, the last to be taken out first."""
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-12)
    inverse = torch.linalg.inv(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    fitted, left, taken = inverse @ cross, list(range(len(gram) // block)), []
    while left:
        blocks = [slice(i * block, (i + 1) * block) for i in range(len(left))]
        lost = [float((fitted[b] * torch.linalg.solve(inverse[b, b], fitted[b])).sum()) for b in blocks]
        at = lost.index(min(lost))
        gone = blocks[at]
        rest = torch.ones(len(inverse), dtype=torch.bool)
        rest[gone] = False
        moved = torch.linalg.solve(inverse[gone, gone], inverse[gone][:, rest]).T
        fitted = fitted[rest] - moved @ fitted[gone]
        inverse = inverse[rest][:, rest] - moved @ inverse[gone][:, rest]
        taken.append(left.pop(at))
    return torch.tensor(taken[::-1])


def _whole(layer: Layer, weights: Weights, x: Tensor) -> Tensor:
    return layer.finish(layer.convolve(x, *weights))


def _by_chunk(step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([step(part) for part in torch.split(x, CHUNK)])

"""The slimmable encoder: one set of weights, of which every width executes the first channels of each layer.

The mobile form, a width of which is 8 numbers:

pixels, normalised [B, 3, S, S] --stem, stride 2 or 4--> c0 --depthwise, 1x1--> c1 --bottleneck h1, stride 2--> c2
    --bottleneck h2--> c2 --bottleneck h3, to a stride of 8 in all--> c3 --2x2, stride 2--> latent [B, K, S/16, S/16]

The layers are those of a mobile backbone's first stages (inverted bottlenecks: Sandler et al., "MobileNetV2", CVPR
2018), narrowed, so that they can start from that backbone's weights (`start`). A stem of stride 4 sees pixels at half
the resolution; its layers run at a quarter of the places, and their weights are a set of their own.

Darknet's form, 4 or 5 numbers, for YOLO's smaller networks (Redmon and Farhadi, "YOLO9000", CVPR 2017):

pixels, normalised [B, 3, S, S] --3x3, down by 2--> c1 --3x3, down by 2--> c2 --3x3, down by 2--> c3
    --2x2, stride 2--> latent [B, K, S/16, S/16]

A fifth number is a number of residual layers, x + 3x3(x), of c3 channels before the last one: what goes down by strides
early has time left for depth where there are few places.

"Down by 2" is by the maximum of 2x2 places, as in Darknet, or, in as many layers from the first one on as the stem says
(stem 1, 2, 4, 8: in 0, 1, 2, 3), by a stride of the convolution: a quarter of the places to compute, and no maximum.

As in Yu et al., "Slimmable Neural Networks" (ICLR 2019), every width has normalisation statistics of its own; they are
folded into its convolutions when it is taken out (`PlainEncoder`), so that on a device a width is a plain small network
and changing it changes which one is run. The latent has K channels at every width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

STRIDE = 16
"""Pixels of the input along a side for one place of the latent."""
CHANNELS = 8
"""Numbers that describe a width of the mobile form: the stem's stride, then channels c0, c1, h1, c2, h2, h3, c3."""
STEMS = {2: 3, 4: 6}
"""Kernel of a stem, by its stride: the second one is the first one on pixels averaged two by two."""
DARKNET_CHANNELS = 4
"""Numbers that describe a width of Darknet's form: stem, c1, c2, c3; one more may follow, of residual layers."""
DARKNET_STEMS = (1, 2, 4, 8)
SLOPE = 0.1
"""Of Darknet's activation for what is negative."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One convolution of the encoder.

    Attributes:
        given, made: channels in and out, of each width.
        kernel, stride: along both sides.
        depthwise: every channel for itself.
        activated: a ReLU follows, or
        clipped: a ReLU6, as in the mobile backbones; or
        leaky: a ReLU that leaves a tenth of what is negative, as in Darknet.
        pooled: before that, the maximum of 2x2 places. (Darknet takes it after: the same, at four times the cost.)
        residual: what goes in is added to what comes out.
        kept: what comes out is added to what the next layer that is `joined` gives.
        joined: see there.
    """

    given: tuple[int, ...]
    made: tuple[int, ...]
    kernel: int
    stride: int = 1
    depthwise: bool = False
    activated: bool = True
    clipped: bool = True
    leaky: bool = False
    pooled: bool = False
    residual: bool = False
    kept: bool = False
    joined: bool = False

    @property
    def padding(self) -> tuple[int, int]:
        """Places of zeros before and behind a side, as TensorFlow's "SAME" has them, with which the mobile backbones
        were trained: what is left over of an even side goes behind. In Darknet it is as much on both sides."""
        if self.leaky:
            return (self.kernel - 1) // 2, (self.kernel - 1) // 2
        both = max(self.kernel - self.stride, 0)
        return both // 2, both - both // 2

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution with these weights, [made, given or 1, kernel, kernel]."""
        before, behind = self.padding
        groups = len(weight) if self.depthwise else 1
        if before == behind:
            return functional.conv2d(x, weight, bias, self.stride, before, 1, groups)
        padded = functional.pad(x, (before, behind, before, behind))
        return functional.conv2d(padded, weight, bias, self.stride, 0, 1, groups)

    def finish(self, x: Tensor) -> Tensor:
        """What follows convolution and normalisation."""
        if self.pooled:
            x = functional.max_pool2d(x, 2)
        if self.leaky:
            return functional.leaky_relu(x, SLOPE)
        if not self.activated:
            return x
        return functional.relu6(x) if self.clipped else functional.relu(x)


class SlimmableEncoder(nn.Module):
    """pixels float32 [B, 3, S, S], normalised as the backbone's, and a width's name -> latent [B, K, S/16, S/16]."""

    def __init__(self, widths: Mapping[str, Sequence[int]], latent: int, clips: Collection[int] | None = None) -> None:
        """Make it with random weights.

        Args:
            widths: by name, narrowest first, `CHANNELS` or `DARKNET_CHANNELS` numbers each; of those with the same
                stem none smaller than in the width before.
            latent: K.
            clips: layers, from 0 on, whose ReLU6 keeps its upper end; None for all.
        """
        super().__init__()
        self.widths = {name: tuple(channels) for name, channels in widths.items()}
        self.latent = latent
        self.stems = nn.ModuleDict()
        for stem in sorted({family(channels) for channels in self.widths.values()}):
            alike = {name: channels for name, channels in self.widths.items() if family(channels) == stem}
            layers = [SlimConv(layer, list(alike)) for layer in plan_layers(list(alike.values()), latent, clips)]
            self.stems[stem] = nn.ModuleList(layers)

    def layers(self, width: str) -> list[SlimConv]:
        """The layers that a width runs, in order."""
        stem = self.stems[family(self.widths[width])]
        return [layer for layer in stem.children() if isinstance(layer, SlimConv)]

    def forward(self, pixels: Tensor, width: str) -> Tensor:
        """The latent at one width."""
        *inner, last = self.layers(width)
        x = run([layer.layer for layer in inner], [partial(layer, width=width) for layer in inner], pixels)
        with torch.autocast(x.device.type, enabled=False):  # what is quantised next has more than 8 bits to say
            return last(x.float(), width)  # type: ignore[no-any-return]

    def parts(self) -> dict[str, Tensor]:
        """What it is made of: `STEM/LAYER/weight`, and `STEM/LAYER/WIDTH/scale` and `.../bias`, its normalisation at a
        width."""
        found: dict[str, Tensor] = {}
        for width, channels in self.widths.items():
            for at, layer in enumerate(self.layers(width)):
                place = f"{family(channels)}/{at}"
                found[f"{place}/weight"] = layer.weight
                found[f"{place}/{width}/scale"], found[f"{place}/{width}/bias"] = layer.normalisation(width)
        return found


class PlainEncoder(nn.Module):
    """One width, as it is run: pixels float32 [B, 3, S, S], normalised -> latent float32 [B, K, S/16, S/16]."""

    def __init__(self, channels: Sequence[int], latent: int, clips: Collection[int] | None = None) -> None:
        """Channels and clips as `SlimmableEncoder` takes them for a width."""
        super().__init__()
        self.plan = plan_layers([tuple(channels)], latent, clips)
        self.layers = nn.ModuleList(
            nn.Conv2d(each.given[0], each.made[0], each.kernel, groups=each.given[0] if each.depthwise else 1)
            for each in self.plan
        )
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def merged(self) -> PlainEncoder:
        """The same with fewer layers: a 1x1 that nothing follows but the next layer is multiplied into that one, where
        this makes no more multiply-accumulates. At half of the resolution a map less to write and to read is worth
        more than what it saves of those."""
        merged = copy.deepcopy(self)
        plan, layers = list(self.plan), [m for m in merged.layers if isinstance(m, nn.Conv2d)]
        at = 0
        while at + 1 < len(plan):
            if _merges(plan[at], plan[at + 1]):
                layers[at : at + 2] = [_product(layers[at], layers[at + 1])]
                plan[at : at + 2] = [replace(plan[at + 1], given=plan[at].given)]
            else:
                at += 1
        merged.plan, merged.layers = plan, nn.ModuleList(layers)
        return merged.requires_grad_(False).eval().to(memory_format=torch.channels_last)

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
        steps = [partial(_apply, each, layer) for layer, each in zip(self.layers, self.plan, strict=True)]
        return run(self.plan, steps, pixels)


class SlimConv(nn.Module):
    """A convolution of which a width executes the first channels, with a normalisation for every width."""

    def __init__(self, layer: Layer, names: Sequence[str]) -> None:
        """Random weights; `names` are those of the widths that `layer` has channels of."""
        super().__init__()
        self.layer = layer
        self.channels = {name: (i, o) for name, i, o in zip(names, layer.given, layer.made, strict=True)}
        given = 1 if layer.depthwise else max(layer.given)
        self.weight = nn.Parameter(torch.empty(max(layer.made), given, layer.kernel, layer.kernel))
        nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="relu" if layer.activated else "linear")
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(o) for name, (_, o) in self.channels.items()})

    def forward(self, x: Tensor, width: str) -> Tensor:
        """What follows the normalisation, and the activation if there is one."""
        made = self.layer.finish(self.norms[width](self.convolved(x, width)))
        return x + made if self.layer.residual else made

    def convolved(self, x: Tensor, width: str) -> Tensor:
        """The convolution alone."""
        given, made = self.channels[width]
        return self.layer.convolve(x, self.weight[:made] if self.layer.depthwise else self.weight[:made, :given])

    def normalisation(self, width: str) -> tuple[Tensor, Tensor]:
        """What one width multiplies its channels by, and what it then adds."""
        norm = self.norms[width]
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        return scale, norm.bias - norm.running_mean * scale


def plan_layers(widths: Sequence[Sequence[int]], latent: int, clips: Collection[int] | None = None) -> list[Layer]:
    """The layers of widths that share a stem; of the ReLU6s those of `clips` keep their upper end, None for all."""
    if len(widths[0]) <= DARKNET_CHANNELS + 1:
        return _darknet_layers(widths, latent)
    layers = _mobile_layers(widths, latent)
    return [replace(each, clipped=clips is None or at in clips) for at, each in enumerate(layers)]


def _mobile_layers(widths: Sequence[Sequence[int]], latent: int) -> list[Layer]:
    stem = widths[0][0]
    c0, c1, h1, c2, h2, h3, c3 = (tuple(w[i] for w in widths) for i in range(1, CHANNELS))

    def bottleneck(
        given: tuple[int, ...], hidden: tuple[int, ...], made: tuple[int, ...], kernel: int, stride: int
    ) -> list[Layer]:
        return [
            Layer(given, hidden, 1),
            Layer(hidden, hidden, kernel, stride, depthwise=True),
            Layer(hidden, made, 1, activated=False),
        ]

    *first, kept = bottleneck(c1, h1, c2, 3, 2)
    *second, joined = bottleneck(c2, h2, c2, 3, 1)
    return [
        Layer((3,) * len(widths), c0, STEMS[stem], stem),
        Layer(c0, c0, 3, depthwise=True),
        Layer(c0, c1, 1, activated=False),
        *first,
        replace(kept, kept=True),
        *second,
        replace(joined, joined=True),
        *bottleneck(c2, h3, c3, 5, 4 // stem),
        Layer(c3, (latent,) * len(widths), 2, 2, activated=False),
    ]


def family(channels: Sequence[int]) -> str:
    """Of a width; those of one family share their weights: its stem and, where it has some, its residual layers."""
    residual = f"x{channels[DARKNET_CHANNELS]}" if len(channels) == DARKNET_CHANNELS + 1 else ""
    return f"{channels[0]}{residual}"


def fault(channels: Sequence[int]) -> str:
    """What is wrong with a width's numbers; nothing for those of a form."""
    if len(channels) not in (CHANNELS, DARKNET_CHANNELS, DARKNET_CHANNELS + 1) or min(channels) < 1:
        return (
            f"needs its stem's stride and {CHANNELS - 1} channels, or in Darknet's form {DARKNET_CHANNELS - 1} and, "
            "where there are some, its number of residual layers"
        )
    stems = tuple(STEMS) if len(channels) == CHANNELS else DARKNET_STEMS
    return "" if channels[0] in stems else f"has a stem of stride {channels[0]}; there are {', '.join(map(str, stems))}"


def _darknet_layers(widths: Sequence[Sequence[int]], latent: int) -> list[Layer]:
    layers, given = [], (3,) * len(widths)
    for at in range(1, DARKNET_CHANNELS):
        made = tuple(w[at] for w in widths)
        strided = widths[0][0] >= 2**at
        # A kernel of 4 sees all that the maximum over four of 3 sees; for three channels of pixels that is cheap.
        kernel = 4 if strided and at == 1 else 3
        layers.append(Layer(given, made, kernel, 2 if strided else 1, leaky=True, pooled=not strided))
        given = made
    layers += [Layer(given, given, 3, leaky=True, residual=True)] * sum(widths[0][DARKNET_CHANNELS:])
    return [*layers, Layer(given, (latent,) * len(widths), 2, 2, activated=False)]


def run(
    plan: Sequence[Layer],
    steps: Sequence[Callable[[Tensor], Tensor]],
    x: Tensor,
    note: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Layers in the order of `plan_layers`, each by its step, with the one shortcut; what each gives goes to `note`
    too."""
    kept = x
    for layer, step in zip(plan, steps, strict=True):
        x = step(x)
        if layer.joined:
            x = x + kept
        if layer.kept:
            kept = x
        if note:
            note(x)
    return x


def _apply(layer: Layer, convolution: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(convolution, nn.Conv2d)
    made = layer.finish(layer.convolve(x, convolution.weight, convolution.bias))
    return x + made if layer.residual else made


def _merges(first: Layer, second: Layer) -> bool:
    """Whether a layer can be multiplied into the next one at no cost; of a width of its own."""
    linear = not (first.activated or first.leaky or first.pooled or first.depthwise)
    alone = not (first.residual or first.kept or first.joined or second.residual)
    # With zeros around it, a layer would see them where the bias of the one before it was.
    if not linear or not alone or first.kernel > 1 or second.depthwise or second.padding != (0, 0):
        return False
    (given,), (between,), (made,) = first.given, first.made, second.made
    places, seen = second.stride**2, second.kernel**2
    return seen * given * made <= places * given * between + seen * between * made


def _product(first: nn.Conv2d, second: nn.Conv2d) -> nn.Conv2d:
    """A 1x1 convolution and then another one, as one."""
    assert first.bias is not None and second.bias is not None
    found = nn.Conv2d(first.in_channels, second.out_channels, second.kernel_size)  # type: ignore[arg-type]
    assert found.bias is not None
    with torch.no_grad():
        inner = first.weight[:, :, 0, 0].double()
        found.weight.copy_(torch.einsum("ojhw,ji->oihw", second.weight.double(), inner))
        found.bias.copy_(second.weight.double().sum((2, 3)) @ first.bias.double() + second.bias.double())
    return found

"""A head with weights of its own: narrower inside than the backbone's, and with a ReLU in place of most of a ReLU6.

ONNX Runtime computes a ReLU with the convolution before it, on what is in the registers; a ReLU6 is a pass of its own
over the finished map. So a head without the upper ends is a quarter cheaper. Its weights have to learn to do without
(`learning.lighten`).

Bottlenecks are where channels can go: hidden ones that nobody outside sees.

    x -> convolution -> hidden -> depthwise convolution -> hidden -> 1x1 -> y
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .cuts import Head
from .graph_passes import attribute, operation_name

SIX = 6.0
WEIGHT = "own_weight_"
_aten: Any = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """One of a head: numbers of its convolutions' weights, and what the last one gives.

    Attributes:
        first, middle, last: weights as `OwnHead.weights` names them; biases are the next numbers.
        hidden: number of hidden channels.
        middle_node, last_node: of the graph; the former's value is hidden, behind its activation.
    """

    first: int
    middle: int
    last: int
    hidden: int
    middle_node: str
    last_node: str


class OwnHead(nn.Module):
    """As the `Head` that it is made from: input -> tuple of maps float32 [B, C, H, W]."""

    def __init__(self, head: Head, clips: Collection[int] | None = None) -> None:
        """Copy a head.

        Args:
            head: of one tensor that is a module's input.
            clips: of its ReLU6s, numbered in the order of execution, those that keep their upper end; None for all.
        """
        super().__init__()
        self.head = copy.deepcopy(head)
        (self._segment,) = (m for m in self.head.modules() if isinstance(m, fx.GraphModule))
        self._name_weights()
        found = list(_clipped(self._segment.graph))
        self.clips = len(found)
        for at, node in enumerate(found):
            if clips is not None and at not in clips:
                node.target, node.args, node.kwargs = _aten.relu.default, node.args[:1], {}
        self._segment.recompile()

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        maps: tuple[Tensor, ...] = self.head(pixels)
        return maps

    def values(self, pixels: Tensor, nodes: Collection[str]) -> dict[str, Tensor]:
        """What some nodes of the graph give, by their names."""
        found: dict[str, Tensor] = {}

        class Reader(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if n.name in nodes:
                    found[n.name] = value.clone()
                return value

        Reader(self._segment).run(pixels)
        return found

    def weights(self) -> dict[str, Tensor]:
        """Its weights by `NUMBER`, in the order in which they are first used; the module's own."""
        return {str(at): getattr(self._segment, name) for at, name in enumerate(self._names())}

    def learnable(self) -> dict[str, nn.Parameter]:
        """Make parameters of them."""
        found = {}
        for at, name in enumerate(self._names()):
            value = self._segment._buffers.pop(name)
            assert value is not None
            found[str(at)] = nn.Parameter(value.clone())
            self._segment.register_parameter(name, found[str(at)])
        return found

    def take(self, weights: Mapping[str, Tensor]) -> OwnHead:
        """Set them; hidden channels may be fewer.

        Raises:
            KeyError: one is missing.
        """
        names = self._names()
        for at, name in enumerate(names):
            self._segment.register_buffer(name, weights[str(at)].clone())
        for node in self._segment.graph.nodes:
            # Of a depthwise convolution the number of groups is that of its channels.
            if _grouped(node):
                node.args = (*node.args[:6], len(self._weight(node)))
        self._segment.recompile()
        return self

    def bottlenecks(self) -> list[Bottleneck]:
        """Its bottlenecks, in the order of execution; those that share a hidden map with anything else are left out."""
        numbers = {name: at for at, name in enumerate(self._names())}
        found = []
        for first in self._segment.graph.nodes:
            middle = _behind(first)
            last = None if middle is None else _behind(middle[-1])
            if operation_name(first) != "conv2d" or middle is None or last is None:
                continue
            one, two, three = (self._weight(n) for n in (first, middle[-1], last[-1]))
            depthwise = two.shape[1] == 1 and len(two) == len(one)
            if _grouped(first) or _grouped(last[-1]) or not depthwise or three.shape[2:] != (1, 1):
                continue
            if not all(len(n.args) > 2 and isinstance(n.args[2], fx.Node) for n in (first, middle[-1], last[-1])):
                continue  # without a bias there is none to keep
            a, b, c = (numbers[_name(n)] for n in (first, middle[-1], last[-1]))
            found.append(Bottleneck(a, b, c, len(one), last[-2].name, last[-1].name))
        return found

    def _weight(self, node: fx.Node) -> Tensor:
        """Of a convolution."""
        found: Tensor = getattr(self._segment, _name(node))
        return found

    def _name_weights(self) -> None:
        """Give each weight a plain name, and make a buffer of it that is this module's own."""
        named: dict[str, str] = {}
        for node in self._segment.graph.nodes:
            if node.op != "get_attr" or not attribute(self._segment, node).is_floating_point():
                continue
            if node.target not in named:
                name = named[str(node.target)] = f"{WEIGHT}{len(named)}"
                self._segment.register_buffer(name, attribute(self._segment, node).detach().clone())
            node.target = named[str(node.target)]

    def _names(self) -> list[str]:
        """Names of the segment's weights."""
        used = (str(n.target) for n in self._segment.graph.nodes if n.op == "get_attr")
        return list(dict.fromkeys(name for name in used if name.startswith(WEIGHT)))


def _behind(node: fx.Node) -> list[fx.Node] | None:
    """The nodes that follow one by one, each the only user of the one before, up to the next convolution."""
    found: list[fx.Node] = []
    while len(node.users) == 1:
        (node,) = node.users
        found.append(node)
        name = operation_name(node)
        if name == "conv2d":
            return found if len(found) > 1 else None
        if name not in ("hardtanh", "hardtanh_", "clamp", "clamp_", "relu", "relu_", "relu6", "relu6_", "pad"):
            return None
    return None


def _name(convolution: fx.Node) -> str:
    weight = convolution.args[1]
    assert isinstance(weight, fx.Node)
    return str(weight.target)


def _grouped(node: fx.Node) -> bool:
    return operation_name(node) == "conv2d" and len(node.args) > 6 and bool(node.args[6] != 1)


def _clipped(graph: fx.Graph) -> Iterator[fx.Node]:
    """The ReLU6s of a graph, in the order of execution."""
    for node in graph.nodes:
        name = operation_name(node)
        bounds = [float(x) for x in node.args[1:3] if isinstance(x, int | float)]
        if name in ("relu6", "relu6_") or (
            name in ("hardtanh", "hardtanh_", "clamp", "clamp_") and bounds == [0.0, SIX]
        ):
            yield node

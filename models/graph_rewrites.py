"""What is done to an exported graph so that ONNX Runtime takes less time for the same numbers (but for rounding).

    pixels -> Transpose -> Cast -> Sub -> Div -> Conv 3x3 of 3 channels, stride 2
    becomes
    pixels -> DequantizeLinear -> Reshape -> Conv 3x9 of 1 channel, stride 2x6

Rows of interleaved RGB are seen as one map that is three times as wide, so that no bytes change places, and taking off
the mean and dividing is the conversion itself. On a narrow encoder that is a quarter of its time.

    Conv -> Conv 1x1 becomes Conv, where that makes no more multiply-accumulates: such as the last layer of a
    bottleneck, which is linear, and the transform of the latent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

COLOURS = 3
_BYTES = 255


class _Graph:
    """A model's graph, and who uses what."""

    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        self.constants = {i.name: i for i in self.graph.initializer}
        self.given = {i.name for i in self.graph.input}
        self.asked = {o.name for o in self.graph.output}

    def constant(self, name: str) -> npt.NDArray[Any] | None:
        """An initialiser's value."""
        found = self.constants.get(name)
        return None if found is None else numpy_helper.to_array(found)

    def only_user(self, name: str) -> Any | None:
        """The node that alone uses a value, and nobody outside does."""
        users = [node for node in self.graph.node if name in node.input]
        if len(users) != 1 or name in self.asked or list(users[0].input).count(name) != 1:
            return None
        return users[0]

    def add(self, name: str, value: npt.NDArray[Any]) -> str:
        """A new initialiser, under a name that no other has."""
        while name in self.constants:
            name = f"{name}_"
        made = numpy_helper.from_array(np.ascontiguousarray(value), name)
        self.graph.initializer.append(made)
        self.constants[name] = made
        return name

    def drop_unused(self) -> None:
        """Take out initialisers that no node uses, and the shapes of values that are no longer there."""
        used = Counter(name for node in self.graph.node for name in node.input)
        made = {name for node in self.graph.node for name in node.output}
        for initialiser in [i for i in self.graph.initializer if not used[i.name]]:
            self.graph.initializer.remove(initialiser)
        for value in [v for v in self.graph.value_info if v.name not in made]:
            self.graph.value_info.remove(value)


def rewrite(model: Any) -> None:
    """Change a model in place; what fits none of the patterns stays as it is."""
    graph = _Graph(model)
    _interleave(graph)
    while _merge_one(graph):
        pass
    graph.drop_unused()


def _interleave(graph: _Graph) -> None:
    """Let the first convolution read interleaved bytes as they come."""
    for name in sorted(graph.given):
        found = _normalised(graph, name)
        if found is None:
            continue
        nodes, convolution, mean, std = found
        side = _side(graph, name)
        weight = graph.constant(convolution.input[1])
        attributes = {a.name: helper.get_attribute_value(a) for a in convolution.attribute}
        simple = attributes.get("group", 1) == 1 and set(attributes.get("dilations", [1])) == {1}
        if side is None or weight is None or weight.ndim != 4 or not simple or "pads" not in attributes:
            continue
        at = list(graph.graph.node).index(nodes[0])
        for node in nodes:
            graph.graph.node.remove(node)
        new = list(_floats(graph, name, mean, std, side))
        for place, node in enumerate(new):
            graph.graph.node.insert(at + place, node)
        scaled = weight if _by_conversion(mean, std) else weight / np.reshape(std, (1, -1, 1, 1)).astype(np.float32)
        made, _, height, width = weight.shape
        flat = scaled.transpose(0, 2, 3, 1).reshape(made, 1, height, width * COLOURS)
        convolution.input[0] = new[-1].output[0]
        convolution.input[1] = graph.add(f"{convolution.input[1]}_interleaved", flat)
        top, left, bottom, right = attributes["pads"]
        down, across = attributes.get("strides", [1, 1])
        del convolution.attribute[:]
        attributes |= {
            "kernel_shape": [height, width * COLOURS],
            "strides": [down, across * COLOURS],
            "pads": [top, left * COLOURS, bottom, right * COLOURS],
        }
        convolution.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())


def _normalised(graph: _Graph, name: str) -> tuple[list[Any], Any, npt.NDArray[Any], npt.NDArray[Any]] | None:
    """From bytes [B, S, S, 3] to the convolution that takes (pixel - mean) / std: the nodes between, that convolution,
    mean and deviation [1] or [3]."""
    nodes: list[Any] = []
    mean, std = np.zeros(1, np.float32), np.ones(1, np.float32)
    value = name
    while (node := graph.only_user(value)) is not None and len(nodes) < 5:
        if node.op_type == "Conv" and node.input[0] == value:
            begun = [n.op_type for n in nodes[:2]] == ["Transpose", "Cast"]
            return (nodes, node, mean, std) if begun else None
        if node.op_type == "Transpose":
            if list(helper.get_attribute_value(node.attribute[0])) != [0, 3, 1, 2]:
                return None
        elif node.op_type in ("Sub", "Div") and node.input[0] == value:
            by = graph.constant(node.input[1])
            if by is None or by.size not in (1, COLOURS) or (by.size > 1 and by.shape[-2:] != (1, 1)):
                return None
            if node.op_type == "Sub":
                mean = by.reshape(-1)
            else:
                std = by.reshape(-1)
        elif node.op_type != "Cast":
            return None
        nodes.append(node)
        value = node.output[0]
    return None


def _floats(graph: _Graph, name: str, mean: Any, std: Any, side: int) -> Iterator[Any]:
    """Nodes from bytes [B, S, S, 3] to floats [B, 1, S, 3 S] with zeros where the mean is."""
    wide = graph.add("interleaved_shape", np.array([-1, 1, side, side * COLOURS], np.int64))
    if _by_conversion(mean, std):
        scale = graph.add("pixel_scale", np.float32(1 / std[0]).reshape(()))
        middle = graph.add("pixel_middle", np.array(mean[0], np.uint8))
        yield helper.make_node("DequantizeLinear", [name, scale, middle], ["pixels_converted"])
        yield helper.make_node("Reshape", ["pixels_converted", wide], ["pixels_interleaved"])
        return
    yield helper.make_node("Cast", [name], ["pixels_converted"], to=TensorProto.FLOAT)
    means = graph.add("pixel_mean", np.broadcast_to(mean, COLOURS).astype(np.float32))
    yield helper.make_node("Sub", ["pixels_converted", means], ["pixels_centred"])
    yield helper.make_node("Reshape", ["pixels_centred", wide], ["pixels_interleaved"])


def _by_conversion(mean: Any, std: Any) -> bool:
    """Whether one whole number is the mean of all channels, and they have one deviation."""
    whole = mean.size == 1 and float(mean[0]).is_integer() and 0 <= mean[0] <= _BYTES
    return bool(whole and std.size == 1)


def _side(graph: _Graph, name: str) -> int | None:
    """S of an input uint8 [B, S, S, 3]."""
    (given,) = (i for i in graph.graph.input if i.name == name)
    kind = given.type.tensor_type
    sizes = [d.dim_value for d in kind.shape.dim]
    if kind.elem_type != TensorProto.UINT8 or len(sizes) != 4 or sizes[3] != COLOURS or sizes[1] != sizes[2]:
        return None
    return int(sizes[1])


def _merge_one(graph: _Graph) -> bool:
    """Multiply one 1x1 convolution into the one before it, if there is a pair."""
    for first in graph.graph.node:
        if first.op_type != "Conv":
            continue
        second = graph.only_user(first.output[0])
        if second is None or not _pointwise(graph, second) or second.input[0] != first.output[0]:
            continue
        one, two = graph.constant(first.input[1]), graph.constant(second.input[1])
        grouped = any(a.name == "group" and a.i != 1 for a in first.attribute)
        if one is None or two is None or grouped:
            continue
        made, given = two.shape[:2]
        if made * one[0].size > given * one[0].size + made * given:
            continue
        matrix = two[:, :, 0, 0].astype(np.float64)
        weight = np.einsum("oi,ijhw->ojhw", matrix, one.astype(np.float64)).astype(np.float32)
        offset = np.zeros(given) if len(first.input) < 3 else graph.constant(first.input[2])
        own = np.zeros(made) if len(second.input) < 3 else graph.constant(second.input[2])
        if offset is None or own is None:
            continue
        bias = (matrix @ offset.astype(np.float64) + own).astype(np.float32)
        weights = [graph.add(f"{first.input[1]}_merged", weight), graph.add(f"{first.input[1]}_bias_merged", bias)]
        given_to = first.input[0]
        del first.input[:]
        first.input.extend([given_to, *weights])
        first.output[0] = second.output[0]
        graph.graph.node.remove(second)
        return True
    return False


def _pointwise(graph: _Graph, node: Any) -> bool:
    """Whether a node is a convolution that takes every place for itself."""
    weight = graph.constant(node.input[1]) if node.op_type == "Conv" else None
    plain = {"group": [1], "strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1]}
    return (
        weight is not None
        and weight.shape[2:] == (1, 1)
        and all(
            set(np.ravel(helper.get_attribute_value(a)).tolist()) == set(plain[a.name])
            for a in node.attribute
            if a.name in plain
        )
    )

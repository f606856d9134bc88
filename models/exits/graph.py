"""What an exit is on the device: a graph behind a head, from its features to scores.

features float32 [1, C, H, W] --rest of the backbone--> pooled [1, V] --classifier: uint8 x int8, int32 sums--> logits
    logits / temperature --softmax--> scores float32 [1, classes]

A narrow exit (`narrow`) has the mean of a few windows in place of the pooled vector, and two more layers in eight bits:

features --narrow rest--> windows [n, K] --project, last: uint8 x int8--> [n, V] --mean--> pooled [1, V] ...

Behind a head that runs on few pixels the rest of the backbone is cheap, too. Weights are the backbone's own, so a
bundle holds nothing of an exit but a few numbers. The classifier is in eight bits: on few pixels it would be a large
share of the time otherwise, for it reads 5 MB of float32 weights and uses each once. Weights have one scale a class;
activations are quantised as they come (`DynamicQuantizeLinear`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from ..backbones import Backbone
from ..bundle import FEATURES
from ..bundle_specs import ExitSpec
from ..export import Only, write_graph
from .classifier import classifier, pooled_cut
from .narrow import NarrowRest, narrow_rest

POOLED, WINDOWS, SCORES = "pooled", "windows", "scores"
OPSET = 18
NARROWEST = 1e-12

Floats = npt.NDArray[np.float32]


def write_exit(backbone: Backbone, spec: ExitSpec, path: Path) -> None:
    """Write an exit's graph, features at its split point -> scores.

    Args:
        backbone: the bundle's.
        spec: which exit.
        path: where to.

    Raises:
        BackboneError: the backbone has no linear classifier behind one vector.
    """
    weight, offset = classifier(backbone)
    last = _Layers().dense("exit", weight / spec.temperature, offset / spec.temperature, "exit_vector", "exit_logits")
    last.add("Softmax", ["exit_logits"], [SCORES], axis=1)
    sized, cut = backbone.at(spec.split)
    example = torch.zeros(1, *sized.shape(cut))
    if spec.split in backbone.narrow_exits:
        rest = narrow_rest(backbone, spec.split, backbone.narrow_exits[spec.split])
        write_graph(Windows(rest), example, FEATURES, WINDOWS, path)
        added = _narrow_layers(rest)
    else:
        write_graph(Only(sized.between(cut, pooled_cut(sized))), example, FEATURES, POOLED, path)
        added = _Layers().add("Flatten", [POOLED], ["exit_vector"])
    model = onnx.load(path)
    for layers in (added, last):
        model.graph.node.extend(layers.nodes)
        model.graph.initializer.extend(layers.weights)
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(SCORES, TensorProto.FLOAT, [1, len(offset)]))
    onnx.save(model, path)


class Windows(nn.Module):
    """Features float32 [1, C, H, W] -> what the windows of a narrow exit hold, float32 [windows, K]."""

    def __init__(self, rest: NarrowRest) -> None:
        super().__init__()
        self.rest = rest

    def forward(self, features: Tensor) -> Tensor:
        return self.rest.hidden(features)[0].flatten(1).T


class _Layers:
    """Nodes and weights of a graph, in the order of execution."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def add(self, operation: str, given: list[str], made: list[str], **how: Any) -> _Layers:
        self.nodes.append(helper.make_node(operation, given, made, **how))
        return self

    def weight(self, name: str, value: npt.NDArray[Any]) -> _Layers:
        self.weights.append(numpy_helper.from_array(value, name))
        return self

    def dense(self, name: str, weight: Floats, offset: Floats, given: str, made: str) -> _Layers:
        """[n, in] -> [n, out] by weight float32 [out, in] in eight bits, one scale a row, and offset float32 [out]."""
        scale = np.maximum(np.abs(weight).max(1), NARROWEST) / 127
        steps = np.rint(weight / scale[:, None]).astype(np.int8)
        n = f"{name}_{{}}".format
        self.weight(n("weight"), np.ascontiguousarray(steps.T)).weight(n("scale"), scale.astype(np.float32))
        self.weight(n("offset"), offset.astype(np.float32)).weight(n("zero"), np.zeros((), np.int8))
        self.add("DynamicQuantizeLinear", [given], [n("steps"), n("step"), n("middle")])
        self.add("MatMulInteger", [n("steps"), n("weight"), n("middle"), n("zero")], [n("sums")])
        self.add("Cast", [n("sums")], [n("floats")], to=TensorProto.FLOAT)
        self.add("Mul", [n("step"), n("scale")], [n("scales")])
        self.add("Mul", [n("floats"), n("scales")], [n("products")])
        return self.add("Add", [n("products"), n("offset")], [made])


def _narrow_layers(rest: NarrowRest) -> _Layers:
    """From `WINDOWS` to the vector that the classifier takes."""
    layers, windows = _Layers(), rest.windows**2
    parts = (rest.project_weight, rest.project_bias, rest.last_weight, rest.last_bias)
    project, project_offset, last, offset = (
        np.ascontiguousarray(p.flatten(1).numpy() if p.ndim > 1 else p) for p in parts
    )
    layers.dense("project", project, project_offset, WINDOWS, "projected")
    layers.dense("last", last, offset, "projected", "last_made")
    layers.weight("least", np.zeros((), np.float32)).weight("most", np.full((), 6, np.float32))
    layers.add("Clip", ["last_made", "least", "most"], ["last_clipped"])
    # A product of a row and a matrix: `ReduceMean` over so few rows takes four times as long.
    layers.weight("mean", np.full((1, windows), 1 / windows, np.float32))
    return layers.add("MatMul", ["mean", "last_clipped"], ["exit_vector"])

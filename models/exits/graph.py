"""What an exit is on the device: one graph from few pixels to scores.

pixels uint8 [1, S, S, 3] --backbone--> pooled float32 [1, V] --classifier: uint8 x int8, int32 sums--> logits
    logits / temperature --softmax--> scores float32 [1, classes]

Weights are the backbone's own, so a bundle holds nothing of an exit but a few numbers. The classifier is in eight bits:
on few pixels it would be a large share of the time otherwise, for it reads 5 MB of float32 weights and uses each once.
Weights have one scale a class; activations are quantised as they come (`DynamicQuantizeLinear`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional

from ..backbones import Backbone
from ..bundle_specs import ExitSpec
from ..cutting.cuts import Tail
from ..cutting.maps import Unpack
from ..exceptions import BackboneError
from ..export import Only, write_onnx

POOLED, SCORES = "pooled", "scores"
OPSET = 18
AFFINE = 1e-3
"""Most that the classifier may differ from a linear layer, relative to its largest output."""
NARROWEST = 1e-12

Floats = npt.NDArray[np.float32]


def pooled_cut(backbone: Backbone) -> str:
    """Name of the cut in front of the classifier, where one vector [V, 1, 1] crosses.

    Raises:
        BackboneError: the backbone has none.
    """
    cut = backbone.cuts[-1]
    if len(cut.shapes) != 1 or cut.shapes[0][1:] != (1, 1):
        raise BackboneError(
            f"{backbone.spec.name} has no vector in front of its classifier that an exit could read; its last cut is "
            f"{cut.name} with {', '.join(str(list(s)) for s in cut.shapes)}"
        )
    return cut.name


def exit_name(backbone: Backbone, size: int) -> str:
    """Name of an exit's split point: that cut of the backbone at another size.

    Raises:
        BackboneError: there is no such cut, or the backbone cannot be run at that size.
    """
    name = f"{pooled_cut(backbone)}-{size}px"
    sized, _ = backbone.at(name)
    if sized is backbone:
        raise BackboneError(f"{backbone.spec.name} takes {size} pixels; an exit has to take fewer to be any quicker")
    return name


def classifier(backbone: Backbone) -> tuple[Floats, Floats]:
    """The backbone's last layer: weight float32 [classes, V] and offset float32 [classes].

    Raises:
        BackboneError: what is behind the pooled vector is not linear.
    """
    name = pooled_cut(backbone)
    unpack, operations = Unpack(backbone.packing(name)), Tail(backbone.traced, backbone.cut(name)).eval()
    (count, _, _) = backbone.shape(name)

    def logits(vectors: Tensor) -> Tensor:
        unpacked = unpack(vectors[:, :, None, None])
        found: Tensor = operations(*(unpacked if isinstance(unpacked, tuple) else (unpacked,)))[0]
        return found

    with torch.inference_mode():
        offset = logits(torch.zeros(1, count))[0]
        weight = torch.cat([logits(part) for part in torch.split(torch.eye(count), 64)]).T - offset[:, None]
        probe = torch.randn(8, count, generator=torch.Generator().manual_seed(0))
        found = logits(probe)
        error = (functional.linear(probe, weight, offset) - found).abs().max() / found.abs().max()
    if not float(error) <= AFFINE:
        raise BackboneError(
            f"{backbone.spec.name} does not end in a linear classifier behind {name}; it cannot have an exit"
        )
    return np.ascontiguousarray(weight.numpy()), offset.numpy()


def write_exit(backbone: Backbone, spec: ExitSpec, path: Path) -> None:
    """Write an exit's graph, pixels -> scores.

    Args:
        backbone: the bundle's.
        spec: which exit.
        path: where to.

    Raises:
        BackboneError: the backbone has no linear classifier behind one vector.
    """
    write_onnx(backbone.at(spec.split)[0], Only(backbone.head(spec.split)), POOLED, path)
    model = onnx.load(path)
    nodes, weights = _classifier(*classifier(backbone), spec.temperature)
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(weights)
    del model.graph.output[:]
    model.graph.output.append(_scores(weights))
    onnx.save(model, path)


def write_classifier(backbone: Backbone, path: Path) -> None:
    """Write the classifier alone, pooled float32 [1, V, 1, 1] -> scores float32 [1, classes], to time it."""
    weight, offset = classifier(backbone)
    nodes, weights = _classifier(weight, offset, 1.0)
    given = helper.make_tensor_value_info(POOLED, TensorProto.FLOAT, [1, weight.shape[1], 1, 1])
    graph = helper.make_graph(nodes, "classifier", [given], [_scores(weights)], initializer=weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _classifier(weight: Floats, offset: Floats, temperature: float) -> tuple[list[Any], list[Any]]:
    """Nodes and weights from `POOLED` to `SCORES`."""
    scale = np.maximum(np.abs(weight).max(1), NARROWEST) / 127
    steps = np.rint(weight / scale[:, None]).astype(np.int8)
    weights = {
        "exit_weight": np.ascontiguousarray(steps.T),
        "exit_scale": (scale / temperature).astype(np.float32),
        "exit_offset": (offset / temperature).astype(np.float32),
        "exit_zero": np.zeros((), np.int8),
    }
    nodes = [
        helper.make_node("Flatten", [POOLED], ["exit_vector"]),
        helper.make_node("DynamicQuantizeLinear", ["exit_vector"], ["exit_steps", "exit_step", "exit_middle"]),
        helper.make_node("MatMulInteger", ["exit_steps", "exit_weight", "exit_middle", "exit_zero"], ["exit_sums"]),
        helper.make_node("Cast", ["exit_sums"], ["exit_floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["exit_step", "exit_scale"], ["exit_scales"]),
        helper.make_node("Mul", ["exit_floats", "exit_scales"], ["exit_products"]),
        helper.make_node("Add", ["exit_products", "exit_offset"], ["exit_logits"]),
        helper.make_node("Softmax", ["exit_logits"], [SCORES], axis=1),
    ]
    return nodes, [numpy_helper.from_array(value, name) for name, value in weights.items()]


def _scores(weights: list[Any]) -> Any:
    classes = next(w.dims[0] for w in weights if w.name == "exit_offset")
    return helper.make_tensor_value_info(SCORES, TensorProto.FLOAT, [1, classes])

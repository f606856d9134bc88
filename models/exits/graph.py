"""What an exit is on the device: a graph behind a head, from its features to scores.

features float32 [1, C, H, W] --rest of the backbone--> pooled [1, V] --classifier: uint8 x int8, int32 sums--> logits
    logits / temperature --softmax--> scores float32 [1, classes]

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
from torch import Tensor
from torch.nn import functional

from ..backbones import Backbone
from ..bundle import FEATURES
from ..bundle_specs import ExitSpec
from ..cutting.cuts import Tail
from ..cutting.maps import Unpack
from ..exceptions import BackboneError
from ..export import Only, write_graph

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
    """Write an exit's graph, features at its split point -> scores.

    Args:
        backbone: the bundle's.
        spec: which exit.
        path: where to.

    Raises:
        BackboneError: the backbone has no linear classifier behind one vector.
    """
    sized, cut = backbone.at(spec.split)
    rest = Only(sized.between(cut, pooled_cut(sized)))
    write_graph(rest, torch.zeros(1, *sized.shape(cut)), FEATURES, POOLED, path)
    model = onnx.load(path)
    nodes, weights = _classifier(*classifier(backbone), spec.temperature)
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(weights)
    del model.graph.output[:]
    model.graph.output.append(_scores(weights))
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

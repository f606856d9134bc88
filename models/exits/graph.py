"""What an exit is on the device: a graph behind a head, from its features to scores.

features float32 [1, C, H, W] --rest of the backbone--> pooled [1, V] --classifier: uint8 x int8, int32 sums--> logits
    logits / temperature --softmax--> scores float32 [1, classes]

A narrow exit (`narrow`) has the mean of a few windows in place of the pooled vector, and two more layers in eight bits:

features --narrow rest--> windows [n, K] --project, last: uint8 x int8--> [n, V] --mean--> pooled [1, V] ...

Behind a head that runs on few pixels the rest of the backbone is cheap, too. Weights are the backbone's own, so a
bundle holds nothing of an exit but a few numbers. The classifier is in eight bits: on few pixels it would be a large
share of the time otherwise, for it reads 5 MB of float32 weights and uses each once. Behind a narrow rest it is more
than half of all that is read even so, and is in four (`layers`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional

from ..backbones import Backbone
from ..bundle import FEATURES
from ..bundle_specs import ExitSpec
from ..export import Only, write_graph
from .classifier import classifier, pooled_cut
from .layers import Layers
from .narrow import NarrowRest, narrow_rest

POOLED, WINDOWS, SCORES = "pooled", "windows", "scores"


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
    weight, offset = weight / spec.temperature, offset / spec.temperature
    sized, cut = backbone.at(spec.split)
    example, last = torch.zeros(1, *sized.shape(cut)), Layers()
    if spec.split in backbone.narrow_exits:
        rest = narrow_rest(backbone, spec.split, backbone.narrow_exits[spec.split])
        write_graph(Windows(rest, (example.shape[2], example.shape[3])), example, FEATURES, WINDOWS, path)
        added = _narrow_layers(rest)
        last.blocked("exit", weight, offset, "exit_vector", "exit_logits")
    else:
        write_graph(Only(sized.between(cut, pooled_cut(sized))), example, FEATURES, POOLED, path)
        added = Layers().add("Flatten", [POOLED], ["exit_vector"])
        last.dense("exit", weight, offset, "exit_vector", "exit_logits")
    last.add("Softmax", ["exit_logits"], [SCORES], axis=1)
    model = onnx.load(path)
    for layers in (added, last):
        layers.end(model)
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(SCORES, TensorProto.FLOAT, [1, len(offset)]))
    onnx.save(model, path)


class Windows(nn.Module):
    """Features float32 [1, C, H, W] -> what the windows of a narrow exit hold, float32 [windows, K].

    A product of matrices is done sooner than a mean over places with all that it takes to bring channels behind it.
    """

    means: Tensor

    def __init__(self, rest: NarrowRest, size: tuple[int, int]) -> None:
        """Rows and columns of the map."""
        super().__init__()
        self.rest = rest
        each = torch.eye(size[0] * size[1]).reshape(-1, 1, *size)
        self.register_buffer("means", rest.averaged(each).flatten(1).T.contiguous())

    def forward(self, features: Tensor) -> Tensor:
        return functional.linear(self.means, self.rest.inside(features).reshape(-1, self.means.shape[1]))


def _narrow_layers(rest: NarrowRest) -> Layers:
    """From `WINDOWS` to the vector that the classifier takes."""
    layers, windows = Layers(), rest.windows**2
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

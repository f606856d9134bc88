"""What an exit is on the device: a graph behind a head, from its features to scores.

features float32 [1, C, H, W] --rest of the backbone--> pooled [1, V] --classifier: uint8 x int8, int32 sums--> logits
    logits / temperature --softmax--> scores float32 [1, classes]

Behind a head that runs on few pixels the rest of the backbone is cheap, too. Weights are the backbone's own, so a
bundle holds nothing of an exit but a few numbers. The classifier is in eight bits: on few pixels it would be a large
share of the time otherwise, for it reads 5 MB of float32 weights and uses each once. Weights have one scale a class;
activations are quantised as they come (`DynamicQuantizeLinear`).

A narrow exit (`narrow`) has few hidden channels, the mean of a few windows in place of the pooled vector, and its
classifier in four bits:

features --expand: as above, in eight bits--> [places, K] --depthwise--> [1, K, H, W] --windows--> [n, K]
    --project and last as one: in eight bits--> [n, V] --mean--> pooled [1, V] --classifier: in four bits--> logits

It is so small that calling it costs a quarter of it. So the head's graph has it, too, where it runs when the head's
optional input `ask` is true (`let_ask`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from ..backbones import Backbone
from ..bundle import FEATURES
from ..bundle_specs import ExitSpec
from ..edge_half import ASK, SCORES
from ..export import Only, write_graph
from .classifier import classifier, pooled_cut
from .layers import Floats, Layers
from .narrow import NarrowRest, narrow_rest

POOLED, VECTOR, LOGITS, ANSWER = "pooled", "exit_vector", "exit_logits", "exit_scores"
OPSET, IR_VERSION = 20, 10
CONTRIBUTED = "com.microsoft"


def write_exit(backbone: Backbone, spec: ExitSpec, path: Path) -> None:
    """Write an exit's graph, features at its split point -> scores.

    Args:
        backbone: the bundle's.
        spec: which exit.
        path: where to.

    Raises:
        BackboneError: the backbone has no linear classifier behind one vector.
        BundleError: what a narrow exit learned does not fit it.
    """
    sized, cut = backbone.at(spec.split)
    shape = (1, *sized.shape(cut))
    if spec.split in backbone.narrow_exits:
        layers = narrow_layers(backbone, spec, SCORES)
        given = [helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, shape)]
        graph = helper.make_graph(layers.nodes, "exit", given, [_scores(SCORES)], layers.weights)
        onnx.save(helper.make_model(graph, opset_imports=_opsets(), ir_version=IR_VERSION), path)
        return
    weight, offset = classifier(backbone)
    layers = Layers().add("Flatten", [POOLED], [VECTOR])
    layers.dense("exit", weight / spec.temperature, offset / spec.temperature, VECTOR, LOGITS)
    layers.add("Softmax", [LOGITS], [SCORES], axis=1)
    write_graph(Only(sized.between(cut, pooled_cut(sized))), torch.zeros(shape), FEATURES, POOLED, path)
    model = onnx.load(path)
    model.graph.node.extend(layers.nodes)
    model.graph.initializer.extend(layers.weights)
    del model.graph.output[:]
    model.graph.output.append(_scores(SCORES))
    onnx.save(model, path)


def let_ask(backbone: Backbone, spec: ExitSpec, path: Path) -> None:
    """Give a head's graph, which gives `features`, an optional input `ask`, bool [], and an output `scores`: the narrow
    exit's, or float32 [1, 0] where `ask` is false, as it is unless it is given. Raises as `write_exit`."""
    layers = narrow_layers(backbone, spec, ANSWER)
    model = onnx.load(path)
    graph = model.graph
    asked = helper.make_graph(layers.nodes, "asked", [], [_scores(ANSWER)], layers.weights)
    nothing = numpy_helper.from_array(np.zeros((1, 0), np.float32))
    not_asked = helper.make_graph(
        [helper.make_node("Constant", [], ["exit_nothing"], value=nothing)],
        "not_asked",
        [],
        [helper.make_tensor_value_info("exit_nothing", TensorProto.FLOAT, (1, 0))],
    )
    graph.node.append(helper.make_node("If", [ASK], [SCORES], then_branch=asked, else_branch=not_asked))
    # An input that has an initializer is one that need not be given: older edges give none.
    graph.input.append(helper.make_tensor_value_info(ASK, TensorProto.BOOL, ()))
    graph.initializer.append(numpy_helper.from_array(np.zeros((), np.bool_), ASK))
    graph.output.append(_scores(SCORES))
    if not any(each.domain == CONTRIBUTED for each in model.opset_import):
        model.opset_import.append(helper.make_opsetid(CONTRIBUTED, 1))
    onnx.save(model, path)


def narrow_layers(backbone: Backbone, spec: ExitSpec, made: str) -> Layers:
    """A narrow exit from `features` to scores of that name. Raises as `write_exit`."""
    rest = narrow_rest(backbone, spec.split, backbone.narrow_exits[spec.split])
    sized, cut = backbone.at(spec.split)
    channels, height, width = sized.shape(cut)
    layers = _windows(rest, channels, height, width)
    count = _pooling(rest, height, width).shape[1]
    # The two layers behind the windows have nothing between them. As one they hold fewer weights, too.
    project, last = rest.project_weight.flatten(1), rest.last_weight.flatten(1)
    offset = last @ rest.project_bias + rest.last_bias
    layers.dense("exit_last", (last @ project).numpy(), offset.numpy(), "exit_windows", "exit_last_made")
    layers.clip("exit_last_made", "exit_last_clipped")
    # A product of a row and a matrix: `ReduceMean` over so few rows takes four times as long.
    layers.weight("exit_mean", np.full((1, count), 1 / count, np.float32))
    layers.add("MatMul", ["exit_mean", "exit_last_clipped"], [VECTOR])
    weight, shift = classifier(backbone)
    layers.dense4("exit", weight / spec.temperature, shift / spec.temperature, VECTOR, LOGITS)
    return layers.add("Softmax", [LOGITS], [made], axis=1)


def _windows(rest: NarrowRest, channels: int, height: int, width: int) -> Layers:
    """From `features` to what the windows hold, float32 [n, K], as `NarrowRest.hidden` computes it."""
    hidden, places, kernel = len(rest.expand_weight), height * width, rest.depthwise_weight.shape[-1]
    layers = Layers().reshape(FEATURES, "exit_rows", channels, places)
    layers.add("Transpose", ["exit_rows"], ["exit_places"], perm=[1, 0])
    expand = rest.expand_weight.flatten(1).numpy()
    layers.dense("exit_expand", expand, rest.expand_bias.numpy(), "exit_places", "exit_expanded")
    layers.clip("exit_expanded", "exit_expanded_clipped")
    layers.add("Transpose", ["exit_expanded_clipped"], ["exit_channels"], perm=[1, 0])
    layers.reshape("exit_channels", "exit_maps", 1, hidden, height, width)
    layers.weight("exit_depthwise_weight", rest.depthwise_weight.numpy())
    layers.weight("exit_depthwise_offset", rest.depthwise_bias.numpy())
    given = ["exit_maps", "exit_depthwise_weight", "exit_depthwise_offset"]
    layers.add("Conv", given, ["exit_depthwise"], group=hidden, pads=[kernel // 2] * 4)
    layers.clip("exit_depthwise", "exit_depthwise_clipped")
    layers.reshape("exit_depthwise_clipped", "exit_hidden", hidden, places)
    # As a product of matrices windows take one operation instead of four.
    layers.weight("exit_pooling", _pooling(rest, height, width))
    layers.add("MatMul", ["exit_hidden", "exit_pooling"], ["exit_pooled"])
    return layers.add("Transpose", ["exit_pooled"], ["exit_windows"], perm=[1, 0])


def _pooling(rest: NarrowRest, height: int, width: int) -> Floats:
    """What each place adds to each window, float32 [places, n]."""
    each_place = torch.eye(height * width).reshape(-1, 1, height, width)
    found: Floats = rest.pooled(each_place).flatten(1).numpy()
    return found


def _scores(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, None))


def _opsets() -> list[onnx.OperatorSetIdProto]:
    return [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIBUTED, 1)]

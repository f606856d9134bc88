"""Layers of an exit's graph, as ONNX Runtime computes them."""

from __future__ import annotations

import numpy as np
import pytest
from headrace.models.exits.layers import BLOCK, Layers, in_four_bits
from headrace.models.onnx_session import open_session
from onnx import TensorProto, helper, save

RNG = np.random.default_rng(5)


def run(layers: Layers, given, path):
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, given.shape)]
    graph = helper.make_graph(
        layers.nodes, "layers", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], layers.weights
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return open_session(path).run(None, {"x": given})[0]


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 10), (4, 50, 7), (49, 192, 384)])
def test_dense_layers_multiply(rows, inputs, outputs, tmp_path):
    weight = RNG.normal(size=(outputs, inputs)).astype(np.float32)
    offset = RNG.normal(size=outputs).astype(np.float32)
    given = RNG.normal(size=(rows, inputs)).astype(np.float32)
    wanted = given @ weight.T + offset
    eight = run(Layers().dense("a", weight, offset, "x", "y"), given, tmp_path / "8.onnx")
    assert np.abs(eight - wanted).std() < 0.01 * wanted.std()
    four = run(Layers().dense4("a", weight, offset, "x", "y"), given, tmp_path / "4.onnx")
    assert 0.02 * wanted.std() < np.abs(four - wanted).std() < 0.1 * wanted.std()
    steps, scales = in_four_bits(weight)
    rounded = ((steps - 8.0) * scales[..., None]).reshape(outputs, -1)[:, :inputs]
    assert np.abs(four - (given @ rounded.T + offset)).std() < 0.01 * wanted.std(), (
        "only activations are rounded besides"
    )


def test_four_bits_use_the_end_that_has_one_number_more():
    weight = np.zeros((3, BLOCK), np.float32)
    weight[0, 3], weight[1, 5] = -4, 4
    weight[0, 7], weight[1, 9] = 2, -2
    steps, scales = in_four_bits(weight)
    assert steps.dtype == np.uint8 and steps.max() <= 15 and (steps[2] == 8).all()
    np.testing.assert_allclose((steps - 8.0)[:, 0] * scales, weight, atol=1e-6)
    assert scales[0] > 0 > scales[1], "the largest weight is at -8 either way"


def test_clip_and_reshape(tmp_path):
    given = RNG.normal(scale=6, size=(2, 6)).astype(np.float32)
    layers = Layers().clip("x", "c").reshape("c", "y", 3, 4)
    np.testing.assert_array_equal(run(layers, given, tmp_path / "a.onnx"), np.clip(given, 0, 6).reshape(3, 4))

"""Layers of an exit in few bits compute what their weights say, in ONNX Runtime."""

import numpy as np
import onnxruntime
import pytest
from headrace.models.exits.layers import Layers, in_blocks, packed
from onnx import TensorProto, helper


def _run(layers: Layers, given: np.ndarray, out: int) -> np.ndarray:
    names = [(helper.make_tensor_value_info(n, TensorProto.FLOAT, [len(given), c])) for n, c in
             (("given", given.shape[1]), ("made", out))]  # fmt: skip
    graph = helper.make_graph([], "layers", names[:1], names[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    layers.end(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"given": given})[0]


@pytest.fixture
def numbers() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.mark.parametrize("columns", [128, 50])  # the latter fills no block
def test_blocks_are_a_product(numbers, columns):
    weight, offset, given = (numbers.normal(size=s).astype(np.float32) for s in ((40, columns), (40,), (3, columns)))
    found = _run(Layers().blocked("one", weight, offset, "given", "made"), given, 40)
    wanted = given @ weight.T + offset
    assert np.sqrt(np.mean((found - wanted) ** 2)) < 0.11 * wanted.std()
    # What is left is the rounding of the weights, and of activations to eight bits.
    steps, scales = in_blocks(weight)
    rounded = (steps * scales[..., None]).reshape(40, -1)[:, :columns]
    assert np.sqrt(np.mean((found - given @ rounded.T - offset) ** 2)) < 0.01 * wanted.std()


def test_two_layers_behind_each_other(numbers):
    first, second, given = (numbers.normal(size=s).astype(np.float32) for s in ((64, 64), (10, 64), (2, 64)))
    layers = Layers().blocked("one", first, np.zeros(64, np.float32), "given", "between")
    found = _run(layers.dense("two", second, np.zeros(10, np.float32), "between", "made"), given, 10)
    wanted = given @ first.T @ second.T
    assert np.sqrt(np.mean((found - wanted) ** 2)) < 0.12 * wanted.std()


def test_a_block_may_clip_where_that_is_nearer(numbers):
    """One number far out would make all others of its block coarse."""
    weight = numbers.normal(size=(16, 64)).astype(np.float32)
    steps, scales = in_blocks(weight)
    assert steps.shape == (16, 2, 32) and steps.min() >= -8 and steps.max() <= 7
    error = np.square(steps * scales[..., None] - weight.reshape(16, 2, 32)).sum()
    widest = np.abs(weight.reshape(16, 2, 32)).max(2, keepdims=True) / 7
    assert (
        error < 0.95 * np.square(np.rint(weight.reshape(16, 2, 32) / widest) * widest - weight.reshape(16, 2, 32)).sum()
    )
    assert not in_blocks(np.zeros((2, 32), np.float32))[0].any()


def test_two_of_four_bits_share_a_byte():
    steps = np.array([[[-8, 7, 0, 1]]], np.int8)
    assert packed(steps).tolist() == [[[0xF0, 0x98]]]

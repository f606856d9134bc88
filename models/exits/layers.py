"""Layers of an exit's graph: ONNX nodes and their weights, in the order of execution."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

NARROWEST = 1e-12
BLOCK = 128
"""Weights of a row that share a scale, in four bits."""
_HALF = 8
"""What stands for 0 among the sixteen numbers of four bits."""
_SPANS = (6.5, 7.0, 7.5, 8.0)
"""A block's largest weight in steps: which is best hangs on the others."""

Floats = npt.NDArray[np.float32]


class Layers:
    """Nodes and weights. What is called `scores`, say, has that name in every graph that takes them."""

    def __init__(self) -> None:
        """None yet."""
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def add(self, operation: str, given: list[str], made: list[str], **how: Any) -> Layers:
        """One node."""
        self.nodes.append(helper.make_node(operation, given, made, **how))
        return self

    def weight(self, name: str, value: npt.NDArray[Any]) -> Layers:
        """One constant."""
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return self

    def reshape(self, given: str, made: str, *shape: int) -> Layers:
        """The same numbers in another shape."""
        self.weight(f"{made}_shape", np.array(shape, np.int64))
        return self.add("Reshape", [given, f"{made}_shape"], [made])

    def clip(self, given: str, made: str) -> Layers:
        """ReLU6."""
        self.weight(f"{made}_least", np.zeros((), np.float32)).weight(f"{made}_most", np.full((), 6, np.float32))
        return self.add("Clip", [given, f"{made}_least", f"{made}_most"], [made])

    def dense(self, name: str, weight: Floats, offset: Floats, given: str, made: str) -> Layers:
        """[n, in] -> [n, out] by weight float32 [out, in] in eight bits, one scale a row, and offset float32 [out]."""
        scale = np.maximum(np.abs(weight).max(1), NARROWEST) / 127
        steps = np.rint(weight / scale[:, None]).astype(np.int8)
        n = f"{name}_{{}}".format
        self.weight(n("weight"), steps.T).weight(n("scale"), scale.astype(np.float32))
        self.weight(n("offset"), offset.astype(np.float32)).weight(n("zero"), np.zeros((), np.int8))
        self.add("DynamicQuantizeLinear", [given], [n("steps"), n("step"), n("middle")])
        self.add("MatMulInteger", [n("steps"), n("weight"), n("middle"), n("zero")], [n("sums")])
        self.add("Cast", [n("sums")], [n("floats")], to=TensorProto.FLOAT)
        self.add("Mul", [n("step"), n("scale")], [n("scales")])
        self.add("Mul", [n("floats"), n("scales")], [n("products")])
        return self.add("Add", [n("products"), n("offset")], [made])

    def dense4(self, name: str, weight: Floats, offset: Floats, given: str, made: str) -> Layers:
        """The same in four bits, one scale for every `BLOCK` weights of a row (ONNX Runtime's `MatMulNBits`)."""
        outputs, inputs = weight.shape
        steps, scales = in_four_bits(weight)
        n = f"{name}_{{}}".format
        self.weight(n("weight"), steps[..., 0::2] | steps[..., 1::2] << 4).weight(n("scale"), scales.reshape(-1))
        self.weight(n("offset"), offset.astype(np.float32))
        # The fourth level is sums of eight-bit products: activations are quantised as they come, block by block.
        return self.add(
            "MatMulNBits",
            [given, n("weight"), n("scale"), "", "", n("offset")],
            [made],
            domain="com.microsoft",
            K=inputs,
            N=outputs,
            bits=4,
            block_size=BLOCK,
            accuracy_level=4,
        )


def in_four_bits(weight: Floats) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Weights float32 [out, in] as numbers 0..15 uint8 [out, blocks, BLOCK], 8 standing for 0, and scales float32 [out,
    blocks]: of a few the one that is off by the least squares."""
    outputs, inputs = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -inputs % BLOCK))).reshape(outputs, -1, BLOCK)
    largest = np.take_along_axis(padded, np.abs(padded).argmax(2)[..., None], 2)[..., 0]
    # Towards the end that has one number more.
    scales = -np.where(np.abs(largest) < NARROWEST, NARROWEST, largest) / np.array(_SPANS, np.float32)[:, None, None]
    steps = np.clip(np.rint(padded / scales[..., None]), -_HALF, _HALF - 1)
    best = np.square(steps * scales[..., None] - padded).sum(3).argmin(0)[None]
    nearest = np.take_along_axis(steps, best[..., None], 0)[0]
    return (nearest + _HALF).astype(np.uint8), np.take_along_axis(scales, best, 0)[0].astype(np.float32)

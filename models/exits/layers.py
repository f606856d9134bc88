"""Layers of an exit's graph, whose weights are read from memory once a frame: the fewer bytes, the sooner it is done.

In eight bits a row of the weights has one scale and activations are quantised as they come (`DynamicQuantizeLinear`).
In four bits (`MatMulNBits`, an operator of ONNX Runtime's own) each `BLOCK` numbers of a row have one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, helper, numpy_helper

DOMAIN = "com.microsoft"
EIGHT_BIT_SUMS = 4
"""`accuracy_level` of `MatMulNBits`: activations in eight bits, too."""
BLOCK = 32
"""Numbers that share a scale. Of larger blocks there are fewer scales to read, of smaller ones each says more."""
TOP = 8
"""Four bits are -8 to 7."""
NARROWEST = 1e-12
NARROWED = np.linspace(0.5, 1.0, 21)
"""Scales that are tried, as shares of the one that clips nothing."""

Floats = npt.NDArray[np.float32]


class Layers:
    """Nodes and weights of a graph, in the order of execution."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def add(self, operation: str, given: list[str], made: list[str], domain: str = "", **how: Any) -> Layers:
        """An operation."""
        self.nodes.append(helper.make_node(operation, given, made, domain=domain, **how))
        return self

    def weight(self, name: str, value: npt.NDArray[Any]) -> Layers:
        """A constant."""
        self.weights.append(numpy_helper.from_array(value, name))
        return self

    def dense(self, name: str, weight: Floats, offset: Floats, given: str, made: str) -> Layers:
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

    def blocked(self, name: str, weight: Floats, offset: Floats, given: str, made: str) -> Layers:
        """The same in four bits, one scale a block."""
        rows, columns = weight.shape
        steps, scales = in_blocks(weight)
        n = f"{name}_{{}}".format
        self.weight(n("weight"), packed(steps)).weight(n("scale"), scales.reshape(-1))
        self.weight(n("offset"), offset.astype(np.float32))
        inputs = [given, n("weight"), n("scale"), "", "", n("offset")]
        how = {"K": columns, "N": rows, "bits": 4, "block_size": BLOCK, "accuracy_level": EIGHT_BIT_SUMS}
        return self.add("MatMulNBits", inputs, [made], DOMAIN, **how)

    def end(self, model: ModelProto) -> None:
        """Put them at the end of a model."""
        model.graph.node.extend(self.nodes)
        model.graph.initializer.extend(self.weights)
        if DOMAIN in {node.domain for node in self.nodes} - {each.domain for each in model.opset_import}:
            model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def in_blocks(weight: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """Steps int8 [out, blocks, BLOCK] of -8..7, and scales float32 [out, blocks], of weights float32 [out, in].

    A scale is the one of `NARROWED` with the least squared error; a last block that is not full ends in zeros.
    """
    blocks = np.pad(weight, ((0, 0), (0, -weight.shape[1] % BLOCK))).reshape(len(weight), -1, BLOCK)
    widest = np.maximum(np.abs(blocks).max(2), NARROWEST) / (TOP - 1)
    scales, least = widest, np.full(widest.shape, np.inf)
    for share in NARROWED:
        error = np.square(_steps(blocks, share * widest) * (share * widest)[..., None] - blocks).sum(2)
        scales, least = np.where(error < least, share * widest, scales), np.minimum(error, least)
    scales = scales.astype(np.float32)
    return _steps(blocks, scales).astype(np.int8), scales


def _steps(blocks: npt.NDArray[Any], scales: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.clip(np.rint(blocks / scales[..., None]), -TOP, TOP - 1)


def packed(steps: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """As `MatMulNBits` reads them: from 0 on, two in a byte, the former in its lower half."""
    values = (steps + TOP).astype(np.uint8)
    return values[..., 0::2] | (values[..., 1::2] << 4)

"""Costs: what every operation of a traced module takes, in multiply-accumulates and in seconds as measured here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from .graph import Traced
from .graph_passes import operation_name

_LAYERS = ("conv1d", "conv2d", "conv3d", "conv_transpose2d", "convolution", "linear", "matmul", "bmm", "mm", "addmm",
           "baddbmm", "einsum", "scaled_dot_product_attention")  # fmt: skip
"""Operations that multiply."""


class Place(Protocol):
    """A place behind an operation."""

    @property
    def index(self) -> int:
        """Of the operation in `Traced.data`."""
        ...


def macs_of(node: fx.Node) -> int:
    """Multiply-accumulates of one operation for one frame (a free batch counts as 1); 0 for what does not multiply."""
    name = operation_name(node)
    if name not in _LAYERS or not isinstance(value := node.meta.get("val"), Tensor):
        return 0
    out = prod(_sizes(value))
    if name.startswith("conv"):
        weight = _sizes(_value(node.args[1]))
        return out * (prod(weight[1:]) if name != "conv_transpose2d" else prod(weight) // max(weight[1], 1))
    if name == "linear":
        return out * _sizes(_value(node.args[1]))[-1]
    if name == "scaled_dot_product_attention":
        query, key = _sizes(_value(node.args[0])), _sizes(_value(node.args[1]))
        return prod(query) * key[-2] + out * key[-2]
    if name == "einsum":
        return _einsum(node)
    left = node.args[1] if name in ("addmm", "baddbmm") else node.args[0]
    return out * _sizes(_value(left))[-1]


def _einsum(node: fx.Node) -> int:
    equation, operands = str(node.args[0]), node.args[1]
    sizes: dict[str, int] = {}
    for letters, operand in zip(equation.replace(" ", "").partition("->")[0].split(","), operands, strict=True):  # type: ignore[arg-type]
        sizes |= dict(zip(letters, _sizes(_value(operand)), strict=False))
    return prod(sizes.values())


def _value(argument: Any) -> Any:
    return argument.meta.get("val") if isinstance(argument, fx.Node) else argument


def _sizes(value: Any) -> tuple[int, ...]:
    """A tensor's shape for a batch of one."""
    if not isinstance(value, Tensor):
        return (1,)
    sizes = []
    shape: Any = value.shape
    for n in shape:
        if isinstance(n, torch.SymInt):
            expression: Any = n.node.expr
            sizes.append(int(expression.subs(dict.fromkeys(expression.free_symbols, 1))))
        else:
            sizes.append(int(n))
    return tuple(sizes)


@dataclass(frozen=True, slots=True)
class Costs:
    """What a frame costs before each place: sums over the operations up to it, and over all with what follows them."""

    macs: tuple[int, ...]
    seconds: tuple[float, ...]
    all_macs: int
    all_seconds: float

    @property
    def traced_share(self) -> float:
        """Share of the uncut model's time that the traced part takes, 0..1."""
        return self.seconds[-1] / max(self.all_seconds, 1e-9)

    def macs_share(self, cut: Place) -> float:
        """Share of the uncut model's multiply-accumulates before a cut, 0..1."""
        return self.macs[cut.index] / max(self.all_macs, 1)

    def time_share(self, cut: Place) -> float:
        """Share of the uncut model's time before a cut as it was measured, 0..1."""
        return self.seconds[cut.index] / max(self.all_seconds, 1e-9)


def measure_costs(traced: Traced, example: Tensor, rest: nn.Module | None = None, rounds: int = 2) -> Costs:
    """MACs, and seconds as they are measured here in PyTorch, operation by operation, the fastest of `rounds`.

    Args:
        traced: the module.
        example: one frame as it takes it, float32 [1, ...].
        rest: what follows the traced part, if it has layers; takes the traced outputs.
        rounds: measured runs, after one that is not counted.
    """
    timer = _Timer(traced.module)
    rest_macs, rest_seconds = 0, 0.0
    with torch.inference_mode():
        for i in range(rounds + 1):
            outputs = timer.run(example)
            if i == 0:
                timer.seconds.clear()
        if rest is not None:
            rest_macs = count_macs(rest, *outputs)
            rest_seconds = min(_seconds(lambda: rest(*outputs)) for _ in range(rounds))
    macs = tuple(accumulate(macs_of(n) for n in traced.data))
    seconds = tuple(accumulate(timer.seconds.get(n, 0.0) for n in traced.data))
    return Costs(macs, seconds, macs[-1] + rest_macs, seconds[-1] + rest_seconds)


def count_macs(module: nn.Module, *inputs: Tensor) -> int:
    """Multiply-accumulates of one run of a module, as PyTorch's own counter has them."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return int(counter.get_total_flops()) // 2


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


class _Timer(fx.Interpreter):
    """Runs a graph and keeps the fastest time of each operation."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seconds: dict[fx.Node, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        began = time.perf_counter()
        result = super().run_node(n)
        taken = time.perf_counter() - began
        self.seconds[n] = min(taken, self.seconds.get(n, taken))
        return result

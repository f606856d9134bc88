"""Graph: a module's whole computation as a list of tensor operations, made fit to be cut anywhere.

module --torch.export--> operations in the order of execution, each with its shape and the path of its module
       --clean---------> no in-place writes, no strided views, constants computed once, batch norms folded
       --segment-------> the operations between two sets of tensors, as a module of its own

The batch stays free: sizes that come from it are one operation on the input, which a segment replaces by the size of
its own first input. Where a module fixes its batch (or does not trace with a free one), it is traced for one frame and
run frame by frame.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..exceptions import BackboneError
from .graph_passes import (
    attribute,
    drop_idle,
    fold_constants,
    fold_norms,
    is_batch_size,
    one_batch_size,
    plain_size,
    undo_writes,
    without_strides,
    write_where_it_is_safe,
    writes_can_be_undone,
)

_aten: Any = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Traced:
    """A module as a graph.

    Attributes:
        module: holds the graph and its weights; takes the input, gives a tuple of the outputs.
        input: the node of the input.
        outputs: nodes of the outputs.
        data: nodes whose value depends on the input's values, in the order of execution. All others are constants or
            sizes, which every segment computes for itself.
        frame_by_frame: whether it was traced for a batch of one and has to be run so.
    """

    module: fx.GraphModule
    input: fx.Node
    outputs: tuple[fx.Node, ...]
    data: tuple[fx.Node, ...]
    frame_by_frame: bool = False
    _batch: Any = field(default=None, repr=False)

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """Shape of one frame's tensor at a node, without the batch; None where its first axis is not the batch."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.ndim < 1:
            return None
        batch, *rest = value.shape
        if not all(isinstance(n, int) for n in rest) or plain_size(batch) != self._batch:
            return None
        return tuple(int(n) for n in rest)

    def segment(self, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> nn.Module:
        """The operations between two sets of tensors, as a module that shares the weights.

        Args:
            inputs: nodes whose values are given, in the order of the module's arguments.
            outputs: nodes whose values are asked for.

        Returns:
            Takes the inputs, gives a tuple of the outputs, for any batch size.

        Raises:
            BackboneError: `outputs` cannot be computed from `inputs` alone.
        """
        needed = _needed(inputs, outputs)
        if self.input in needed and self.input not in inputs:
            raise BackboneError(f"{', '.join(n.name for n in outputs)} depends on more than what crosses the cut")
        graph, copies = fx.Graph(), {}
        for node in inputs:
            copies[node] = graph.placeholder(node.name)
        for node in self.module.graph.nodes:
            if node not in needed or node in copies:
                continue
            if is_batch_size(node):
                copies[node] = graph.call_function(_aten.sym_size.int, (copies[inputs[0]], 0))
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[n] for n in outputs))
        write_where_it_is_safe(graph)
        module = fx.GraphModule(self.module, graph, "Segment").eval()
        return FrameByFrame(module) if self.frame_by_frame else module


class FrameByFrame(nn.Module):
    """Runs a module that only takes a batch of one on every frame of a batch in turn."""

    def __init__(self, module: nn.Module) -> None:
        """`module`: tensors [1, ...] -> tuple of tensors [1, ...]."""
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if len(inputs[0]) == 1:
            alone: tuple[Tensor, ...] = self.module(*inputs)
            return alone
        frames = [self.module(*(x[i : i + 1] for x in inputs)) for i in range(len(inputs[0]))]
        return tuple(torch.cat(each) for each in zip(*frames, strict=True))


def trace(module: nn.Module, example: Tensor) -> Traced:
    """Trace a module in eval mode.

    Args:
        module: takes one tensor, gives tensors in any nesting of tuples, lists and dictionaries.
        example: float32 [B, 3, H, W] with B >= 2.

    Raises:
        BackboneError: it cannot be traced; the text says why and where.
    """
    module = module.eval()
    known = getattr(module, "program", None)
    if isinstance(known, torch.export.ExportedProgram):
        return clean(known)
    try:
        program = _export(module, example, torch.export.Dim.AUTO)
        if isinstance(_input_value(program).shape[0], torch.SymInt):
            return clean(program)
        reason: Exception | None = None
    except Exception as error:  # the tracer's errors share no base
        reason = error
    try:
        return clean(_export(module, example[:1], None), frame_by_frame=True)
    except Exception as error:
        raise BackboneError(
            f"{type(module).__name__} cannot be traced, so it cannot be cut: {_first_line(reason or error)}; write "
            "branches on a tensor's values with torch.where, and keep NumPy and .item() out of forward"
        ) from error


def clean(program: torch.export.ExportedProgram, frame_by_frame: bool = False) -> Traced:
    """Make an exported program fit to be cut.

    Raises:
        BackboneError: it does not take one tensor, or fixes a batch of more than one.
    """
    if not writes_can_be_undone(_unlifted(program).graph):
        program = program.run_decompositions({})
    module = _unlifted(program)
    graph = module.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    if len(placeholders) != 1:
        raise BackboneError(f"a backbone takes one tensor, this one {len(placeholders)}; wrap it in a module that does")
    source = placeholders[0]
    batch = plain_size(source.meta["val"].shape[0])
    if isinstance(batch, int):
        if batch != 1:
            raise BackboneError(f"it is fixed to batches of {batch}; export it with a dynamic batch, or with one frame")
        frame_by_frame = True
    drop_idle(graph)
    undo_writes(graph)
    without_strides(graph)
    one_batch_size(graph, source, batch)
    graph.eliminate_dead_code()
    fold_constants(module)
    fold_norms(module)
    for node in graph.nodes:
        if node.op == "get_attr":
            node.meta["val"] = attribute(module, node)
    graph.lint()
    module.recompile()
    output = next(n for n in graph.nodes if n.op == "output")
    outputs = tuple(n for n in _flat(output.args[0]) if isinstance(n, fx.Node))
    return Traced(module, source, outputs, _data(graph, source), frame_by_frame, batch)


def _export(module: nn.Module, example: Tensor, batch: Any) -> torch.export.ExportedProgram:
    shapes = ({0: batch},) if batch is not None else None
    # What the tracer prints about a module that it cannot trace goes into one line of ours.
    with warnings.catch_warnings(), torch.no_grad(), redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        return torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)


def _input_value(program: torch.export.ExportedProgram) -> Any:
    names = set(program.graph_signature.user_inputs)
    return next(n for n in program.graph.nodes if n.op == "placeholder" and n.name in names).meta["val"]


def _unlifted(program: torch.export.ExportedProgram) -> fx.GraphModule:
    module: Any = copy.copy(program).module(check_guards=False)
    module.graph.set_codegen(fx.graph.CodeGen())
    return module  # type: ignore[no-any-return]


def _data(graph: fx.Graph, source: fx.Node) -> tuple[fx.Node, ...]:
    """Nodes that depend on the input's values. A size is none of them."""
    found = {source: None}
    for node in graph.nodes:
        if node.op == "call_function" and not is_batch_size(node) and any(n in found for n in node.all_input_nodes):
            found[node] = None
    return tuple(found)


def _needed(inputs: Iterable[fx.Node], outputs: Iterable[fx.Node]) -> set[fx.Node]:
    given, found, stack = set(inputs), set(), list(outputs)
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        if node not in given and not is_batch_size(node):
            stack.extend(node.all_input_nodes)
    return found


def _flat(values: Any) -> list[Any]:
    if isinstance(values, tuple | list):
        return [x for v in values for x in _flat(v)]
    return [values]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__

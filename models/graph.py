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
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from .exceptions import BackboneError

FOLD_LIMIT = 2**24
"""Constants of more elements than that are computed on every run instead of being kept."""

_aten: Any = torch.ops.aten
_VIEWS = {
    "view", "reshape", "flatten", "permute", "transpose", "t", "slice", "select", "unsqueeze", "squeeze", "expand",
    "expand_as", "view_as", "unbind", "split", "chunk", "narrow", "alias", "detach", "as_strided", "unflatten",
    "contiguous", "to", "movedim", "swapaxes", "numpy_T", "split_with_sizes", "unfold", "diagonal", "dropout",
    "_unsafe_view", "lift_fresh", "type_as",
}  # fmt: skip
_FILLED = {"arange", "zeros", "ones", "full", "scalar_tensor", "linspace", "eye"}
_NORMS = ("batch_norm", "_native_batch_norm_legit_no_training")


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
        if not all(isinstance(n, int) for n in rest) or _plain(batch) != self._batch:
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
            if _is_batch_size(node):
                copies[node] = graph.call_function(_aten.sym_size.int, (copies[inputs[0]], 0))
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[n] for n in outputs))
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
    if not _writes_can_be_undone(_unlifted(program).graph):
        program = program.run_decompositions({})
    module = _unlifted(program)
    graph = module.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    if len(placeholders) != 1:
        raise BackboneError(f"a backbone takes one tensor, this one {len(placeholders)}; wrap it in a module that does")
    source = placeholders[0]
    batch = _plain(source.meta["val"].shape[0])
    if isinstance(batch, int):
        if batch != 1:
            raise BackboneError(f"it is fixed to batches of {batch}; export it with a dynamic batch, or with one frame")
        frame_by_frame = True
    _drop_idle(graph)
    _undo_writes(graph)
    _without_strides(graph)
    _one_batch_size(graph, source, batch)
    graph.eliminate_dead_code()
    _fold_constants(module)
    fold_norms(module)
    for node in graph.nodes:
        if node.op == "get_attr":
            node.meta["val"] = _attribute(module, node)
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


def _drop_idle(graph: fx.Graph) -> None:
    """Remove what does nothing in inference: dropout, checks of shapes, guards."""
    for node in list(graph.nodes):
        name = _name(node)
        if node.op == "call_module" and not node.users:
            graph.erase_node(node)
        elif name in ("dropout", "feature_dropout", "alpha_dropout", "lift_fresh_copy", "detach", "alias"):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif name.startswith(("_assert", "sym_constrain")) and not node.users:
            graph.erase_node(node)


def _writes_can_be_undone(graph: fx.Graph) -> bool:
    """Whether every in-place operation has an equal that does not write, and nobody reads what it wrote by a view."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    return all(_without_writing(n) is not None and not _is_seen(n, order) for n in graph.nodes if _writes(n))


def _is_seen(writer: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether somebody reads the written memory under another name after the write."""
    target: Any = writer.args[0]
    names, stack = {target}, [target]
    while stack:
        node = stack.pop()
        near = [u for u in node.users if _name(u) in _VIEWS]
        near += [a for a in node.all_input_nodes if _name(node) in _VIEWS]
        for each in near:
            if each not in names:
                names.add(each)
                stack.append(each)
    aliases = names - {target}
    return any(order[u] > order[writer] for alias in aliases for u in alias.users if u is not writer)


def _undo_writes(graph: fx.Graph) -> None:
    """relu_(x) -> relu(x), and what reads x afterwards reads the result."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not _writes(node):
            continue
        target = node.args[0]
        node.target = _without_writing(node)
        target.replace_all_uses_with(node, delete_user_cb=lambda u, n=node: u is not n and order[u] > order[n])


def _writes(node: Any) -> bool:
    name = _name(node)
    return name.endswith("_") and not name.endswith("__") and isinstance(node.target, torch._ops.OpOverload)


def _without_writing(node: fx.Node) -> Any:
    packet = getattr(_aten, _name(node)[:-1], None)
    overload: Any = node.target
    return getattr(packet, overload._overloadname, None) if packet is not None else None


def _without_strides(graph: fx.Graph) -> None:
    """view -> reshape: a cut's tensor may come with other strides than those that the module was traced with."""
    for node in graph.nodes:
        if _name(node) in ("view", "_unsafe_view"):
            node.target = _aten.reshape.default
        elif _name(node) == "as_strided":
            raise BackboneError(f"{node.name} looks at memory by strides, which does not survive a cut")


def _one_batch_size(graph: fx.Graph, source: fx.Node, batch: Any) -> None:
    """Compute every size that follows from the batch from one node, the batch itself; others become plain numbers."""
    if isinstance(batch, int):
        return
    with graph.inserting_after(source):
        size = graph.call_function(_aten.sym_size.int, (source, 0))
        size.meta["val"] = source.meta["val"].shape[0]
    last = size
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node is size or node.op != "call_function" or not isinstance(value, int | torch.SymInt):
            continue
        expression = _plain(value)
        factor = expression if isinstance(expression, int) else expression / batch
        if isinstance(expression, int):
            _put_number(node, expression)
        elif getattr(factor, "is_Integer", False):
            if factor == 1:
                node.replace_all_uses_with(size)
            else:
                with graph.inserting_after(last):
                    last = graph.call_function(operator.mul, (size, int(factor)))
                last.meta = dict(node.meta)
                node.replace_all_uses_with(last)


def _put_number(node: fx.Node, number: int) -> None:
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda n: number if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: number if n is node else n)


def _fold_constants(module: fx.GraphModule) -> None:
    """Compute once what hangs on weights alone, such as the gathered position biases of windowed attention."""
    graph = module.graph
    values: dict[fx.Node, Any] = {}
    count = 0
    for node in list(graph.nodes):
        if node.op == "get_attr":
            values[node] = _attribute(module, node)
        elif (
            node.op == "call_function"
            and (node.all_input_nodes or _name(node) in _FILLED)
            and all(n in values for n in node.all_input_nodes)
        ):
            with torch.no_grad():
                values[node] = _call(node, values)
    for node, value in values.items():
        outside = any(user not in values for user in node.users)
        if node.op != "call_function" or not outside or not isinstance(value, Tensor) or value.numel() > FOLD_LIMIT:
            continue
        name = f"_constant_{count}"
        count += 1
        module.register_buffer(name, value.detach().clone())
        _replace_by_attribute(node, name)
    graph.eliminate_dead_code()


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args = fx.node.map_arg(node.args, values.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    function: Callable[..., Any] = node.target  # type: ignore[assignment]
    return function(*args, **kwargs)


def _replace_by_attribute(node: fx.Node, name: str) -> fx.Node:
    with node.graph.inserting_before(node):
        new = node.graph.get_attr(name)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def fold_norms(module: fx.GraphModule) -> int:
    """Fold batch normalisations into the convolution or linear layer whose only reader they are.

    The answers change by rounding alone (1e-6 or so).

    Returns:
        How many were folded.
    """
    graph = module.graph
    folded = 0
    for norm in [n for n in graph.nodes if _name(n) in _NORMS]:
        layer = norm.args[0]
        kind = _name(layer)
        if kind not in ("conv2d", "conv1d", "linear") or len(layer.users) != 1:
            continue
        weight, bias = (*layer.args, None, None)[1:3]
        parts = [_constant(module, n) for n in (weight, bias, *norm.args[1:5])]
        if any(isinstance(p, fx.Node) for p in parts) or parts[0] is None or parts[4] is None or parts[5] is None:
            continue
        epsilon = norm.args[7] if _name(norm) == "batch_norm" else norm.args[6]
        scale, shift, mean, variance = parts[2:]
        fuse: Any = fuse_linear_bn_weights if kind == "linear" else fuse_conv_bn_weights
        new_weight, new_bias = fuse(parts[0], parts[1], mean, variance, epsilon, scale, shift)
        nodes = []
        for part, value in (("weight", new_weight), ("bias", new_bias)):
            name = f"_folded_{folded}_{part}"
            module.register_buffer(name, _same_layout(value.detach(), parts[0]))
            with graph.inserting_before(layer):
                nodes.append(graph.get_attr(name))
        layer.args = (layer.args[0], *nodes, *layer.args[3:])
        # The layer now ends where its normalisation ended, which is what cuts are named by.
        layer.meta["nn_module_stack"] = norm.meta.get("nn_module_stack", {})
        taken = [u for u in norm.users if u.target is operator.getitem] or [norm]
        for each in taken:
            each.replace_all_uses_with(layer)
        folded += 1
    graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    return folded


def _same_layout(value: Tensor, like: Tensor) -> Tensor:
    if value.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return value.contiguous(memory_format=torch.channels_last)
    return value.contiguous()


def _constant(module: fx.GraphModule, argument: Any) -> Any:
    if isinstance(argument, fx.Node):
        return _attribute(module, argument).detach() if argument.op == "get_attr" else argument
    return argument


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _data(graph: fx.Graph, source: fx.Node) -> tuple[fx.Node, ...]:
    """Nodes that depend on the input's values. A size is none of them."""
    found = {source: None}
    for node in graph.nodes:
        if node.op == "call_function" and not _is_batch_size(node) and any(n in found for n in node.all_input_nodes):
            found[node] = None
    return tuple(found)


def _needed(inputs: Iterable[fx.Node], outputs: Iterable[fx.Node]) -> set[fx.Node]:
    given, found, stack = set(inputs), set(), list(outputs)
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        if node not in given and not _is_batch_size(node):
            stack.extend(node.all_input_nodes)
    return found


def _is_batch_size(node: fx.Node) -> bool:
    return _name(node) == "sym_size" and node.args[1:] == (0,)


def _name(node: Any) -> str:
    """Name of the operation without its namespace and overload, such as `conv2d`; "" for what is no operation."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(target, "__name__", "")


def _plain(size: Any) -> Any:
    """An int, or the symbolic expression of a free size."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_number else expression
    return size


def _flat(values: Any) -> list[Any]:
    if isinstance(values, tuple | list):
        return [x for v in values for x in _flat(v)]
    return [values]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


operation_name = _name

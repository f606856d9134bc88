"""Passes over an exported graph that make it fit to be cut anywhere; `graph.clean` runs them in order.

in-place writes -> results        strided views -> reshapes      sizes from the batch -> one operation
constants -> computed once        normalisations -> folded       dropout, checks -> nothing
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from ..exceptions import BackboneError

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
_OVERWRITING = {"relu", "hardtanh", "silu", "hardswish", "leaky_relu"}
_FRESH = {"conv2d", "linear", "batch_norm", "add", "add_"}
"""Operations whose result is memory of its own."""
_NORMS = ("batch_norm", "_native_batch_norm_legit_no_training")


def drop_idle(graph: fx.Graph) -> None:
    """Remove what does nothing in inference: dropout, checks of shapes, guards."""
    for node in list(graph.nodes):
        name = operation_name(node)
        if node.op == "call_module" and not node.users:
            graph.erase_node(node)
        elif name in ("dropout", "feature_dropout", "alpha_dropout", "lift_fresh_copy", "detach", "alias"):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif name.startswith(("_assert", "sym_constrain")) and not node.users:
            graph.erase_node(node)


def writes_can_be_undone(graph: fx.Graph) -> bool:
    """Whether every in-place operation has an equal that does not write, and nobody reads what it wrote by a view."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    return all(_without_writing(n) is not None and not _is_seen(n, order) for n in graph.nodes if _writes(n))


def _is_seen(writer: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether somebody reads the written memory under another name after the write."""
    target: Any = writer.args[0]
    names, stack = {target}, [target]
    while stack:
        node = stack.pop()
        near = [u for u in node.users if operation_name(u) in _VIEWS]
        near += [a for a in node.all_input_nodes if operation_name(node) in _VIEWS]
        for each in near:
            if each not in names:
                names.add(each)
                stack.append(each)
    aliases = names - {target}
    return any(order[u] > order[writer] for alias in aliases for u in alias.users if u is not writer)


def undo_writes(graph: fx.Graph) -> None:
    """relu_(x) -> relu(x), and what reads x afterwards reads the result."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not _writes(node):
            continue
        target = node.args[0]
        node.target = _without_writing(node)
        target.replace_all_uses_with(node, delete_user_cb=lambda u, n=node: u is not n and order[u] > order[n])


def _writes(node: Any) -> bool:
    name = operation_name(node)
    return name.endswith("_") and not name.endswith("__") and isinstance(node.target, torch._ops.OpOverload)


def _without_writing(node: fx.Node) -> Any:
    packet = getattr(_aten, operation_name(node)[:-1], None)
    overload: Any = node.target
    return getattr(packet, overload._overloadname, None) if packet is not None else None


def write_where_it_is_safe(graph: fx.Graph) -> None:
    """relu(conv(x)) -> relu_(conv(x)): what nobody else reads is overwritten, which saves a pass over fresh memory.

    Only results that were made for this one reader are, so that neither inputs nor gradients are touched.
    """
    for node in graph.nodes:
        name = operation_name(node)
        if name in _OVERWRITING and _is_only_ours(node.args[0], node):
            node.target = getattr(getattr(_aten, f"{name}_"), node.target._overloadname)
        elif name == "add" and node.target is _aten.add.Tensor and not node.kwargs and len(node.args) == 2:
            for first, second in (node.args, node.args[::-1]):
                if _is_only_ours(first, node) and _shape_of(first) == _shape_of(second) and first is not second:
                    node.target, node.args = _aten.add_.Tensor, (first, second)
                    break


def _is_only_ours(value: Any, reader: fx.Node) -> bool:
    return (
        isinstance(value, fx.Node)
        and operation_name(value) in _FRESH
        and list(value.users) == [reader]
        and _shape_of(value) == _shape_of(reader)
    )


def _shape_of(value: Any) -> tuple[Any, ...]:
    known = value.meta.get("val") if isinstance(value, fx.Node) else None
    return tuple(known.shape) if isinstance(known, Tensor) else ()


def without_strides(graph: fx.Graph) -> None:
    """view -> reshape: a cut's tensor may come with other strides than those that the module was traced with."""
    for node in graph.nodes:
        if operation_name(node) in ("view", "_unsafe_view"):
            node.target = _aten.reshape.default
        elif operation_name(node) == "as_strided":
            raise BackboneError(f"{node.name} looks at memory by strides, which does not survive a cut")


def one_batch_size(graph: fx.Graph, source: fx.Node, batch: Any) -> None:
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
        expression = plain_size(value)
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


def fold_constants(module: fx.GraphModule) -> None:
    """Compute once what hangs on weights alone, such as the gathered position biases of windowed attention."""
    graph = module.graph
    values: dict[fx.Node, Any] = {}
    count = 0
    for node in list(graph.nodes):
        if node.op == "get_attr":
            values[node] = attribute(module, node)
        elif (
            node.op == "call_function"
            and (node.all_input_nodes or operation_name(node) in _FILLED)
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
    for norm in [n for n in graph.nodes if operation_name(n) in _NORMS]:
        layer = norm.args[0]
        kind = operation_name(layer)
        if kind not in ("conv2d", "conv1d", "linear") or len(layer.users) != 1:
            continue
        weight, bias = (*layer.args, None, None)[1:3]
        parts = [_constant(module, n) for n in (weight, bias, *norm.args[1:5])]
        if any(isinstance(p, fx.Node) for p in parts) or parts[0] is None or parts[4] is None or parts[5] is None:
            continue
        epsilon = norm.args[7] if operation_name(norm) == "batch_norm" else norm.args[6]
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
        return attribute(module, argument).detach() if argument.op == "get_attr" else argument
    return argument


def attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def is_batch_size(node: fx.Node) -> bool:
    return operation_name(node) == "sym_size" and node.args[1:] == (0,)


def operation_name(node: Any) -> str:
    """Name of the operation without its namespace and overload, such as `conv2d`; "" for what is no operation."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(target, "__name__", "")


def plain_size(size: Any) -> Any:
    """An int, or the symbolic expression of a free size."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_number else expression
    return size

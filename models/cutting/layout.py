"""Layout: every tensor that crosses a cut becomes a map [B, C, H, W] on the head's side and itself again on the tail's.

    [B, C, H, W]   stays          [B, H, W, C]   (windowed attention)        permuted
    [B, N, C]      tokens         [B, C, N, 1], or [B, C, n, n] where N = n x n and no token is special
    [B, C, N]      channels first [B, C, N, 1]
    [B, C]         a vector       [B, C, 1, 1]

Which axis holds the channels is read off the operations around the tensor: a convolution takes them second, a linear
layer or a layer normalisation last. Everything behind this module knows maps alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import Tensor, fx

from .graph_passes import operation_name

REACH = 24
"""Operations that are looked at in each direction."""
_FIRST = {"conv2d", "conv1d", "batch_norm", "_native_batch_norm_legit_no_training", "group_norm", "max_pool2d",
          "avg_pool2d", "adaptive_avg_pool2d", "pixel_shuffle", "pixel_unshuffle", "upsample_bilinear2d",
          "upsample_nearest2d", "instance_norm", "conv_transpose2d", "convolution"}  # fmt: skip
"""Operations whose channels are the second axis."""
_LAST = {"linear", "layer_norm", "rms_norm", "native_layer_norm"}
"""Operations whose channels are the last axis."""


@dataclass(frozen=True, slots=True)
class MapLayout:
    """How one tensor becomes a map.

    Attributes:
        kind: "map", "channels_last", "tokens", "sequence" or "vector".
        tensor: its shape without the batch.
        shape: (C, H, W) of the map.
    """

    kind: str
    tensor: tuple[int, ...]
    shape: tuple[int, int, int]

    def to_map(self, tensor: Tensor) -> Tensor:
        """[B, *tensor] -> [B, C, H, W]."""
        if self.kind == "channels_last":
            return tensor.permute(0, 3, 1, 2)
        if self.kind == "tokens":
            return tensor.transpose(1, 2).reshape(-1, *self.shape)
        return tensor if self.kind == "map" else tensor.reshape(-1, *self.shape)

    def from_map(self, features: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, *tensor]."""
        if self.kind == "channels_last":
            return features.permute(0, 2, 3, 1)
        if self.kind == "tokens":
            return features.flatten(2).transpose(1, 2)
        return features if self.kind == "map" else features.reshape(-1, *self.tensor)


def layout_of(node: fx.Node, shape: tuple[int, ...]) -> MapLayout | None:
    """Layout of a node's tensor, `shape` without the batch; None where it has more or fewer axes than can be sent."""
    if len(shape) == 3:
        if _channel_axis(node, 4) == 3:
            return MapLayout("channels_last", shape, (shape[2], shape[0], shape[1]))
        return MapLayout("map", shape, (shape[0], shape[1], shape[2]))
    if len(shape) == 2:
        if _channel_axis(node, 3) == 1:
            return MapLayout("sequence", shape, (shape[0], shape[1], 1))
        side = isqrt(shape[0])
        square = (shape[1], side, side) if side * side == shape[0] else (shape[1], shape[0], 1)
        return MapLayout("tokens", shape, square)
    return MapLayout("vector", shape, (shape[0], 1, 1)) if len(shape) == 1 else None


def _channel_axis(node: fx.Node, axes: int) -> int:
    """Axis of the channels of a tensor with that many axes: 1 or the last one."""
    found = _follow(node, axes, forward=True)
    if found is None:
        found = _follow(node, axes, forward=False)
    if found is None:
        found = 1 if axes == 4 else axes - 1
    return found


def _follow(node: fx.Node, axes: int, forward: bool) -> int | None:
    """Go through operations that keep, move or merge axes until one says which axis is the channels'.

    The front holds a result and, for each of its axes, which axis of the tensor asked about it is (-1: none).
    """
    front: list[tuple[fx.Node, tuple[int, ...]]] = [(node, tuple(range(axes)))]
    seen = {node}
    for _ in range(REACH):
        if not front:
            return None
        at, axis_of = front.pop(0)
        if not forward and (found := _said(at, axis_of)) >= 0:
            return found
        for each in at.users if forward else at.all_input_nodes:
            if forward and each.args and each.args[0] is at and (found := _said(each, axis_of)) >= 0:
                return found
            moved = _moved(each, at, axis_of, forward)
            if each not in seen and moved is not None:
                seen.add(each)
                front.append((each, moved))
    return None


def _said(node: fx.Node, axis_of: tuple[int, ...]) -> int:
    """The axis asked about that an operation takes for the channels'; -1 where it does not say."""
    name = operation_name(node)
    return axis_of[1] if name in _FIRST else axis_of[-1] if name in _LAST else -1


def _moved(each: fx.Node, at: fx.Node, axis_of: tuple[int, ...], forward: bool) -> tuple[int, ...] | None:
    """`axis_of` of the neighbour `each` of `at`; None where nothing is known of it."""
    operation = each if forward else at
    name, count, there = operation_name(operation), len(axis_of), _shape(each)
    if name in ("matmul", "bmm", "scaled_dot_product_attention") or len(there) < 2:
        return None
    if name in ("permute", "transpose"):
        order = _order(operation, count)
        if forward:
            return tuple(axis_of[i] for i in order)
        back = [-1] * count
        for new, old in enumerate(order):
            back[old] = axis_of[new]
        return tuple(back)
    if name in ("reshape", "view", "flatten", "unflatten"):
        here, merged = _shape(at), [-1] * len(there)
        if here[1] == there[1]:
            merged[1] = axis_of[1]
        if here[-1] == there[-1]:
            merged[-1] = axis_of[-1]
        return tuple(merged) if max(merged) >= 0 else None
    return axis_of if len(there) == count else None


def _order(operation: fx.Node, count: int) -> list[int]:
    """Of a permutation: which axis of the input each axis of the output is."""
    if operation_name(operation) == "permute":
        given: Any = operation.args[1]
        return [int(i) % count for i in given]
    order = list(range(count))
    a, b = (int(i) % count for i in operation.args[1:3])  # type: ignore[arg-type]
    order[a], order[b] = order[b], order[a]
    return order


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()

"""Lean: a learned repair with no more rank than it uses.

What is learned at a rank of 16 lies mostly in a few directions, of some matrices in one. By the singular values of each
product it is cut to the fewest directions that hold `KEPT` of its energy (Eckart and Young, 1936), which costs less
accuracy than learning at a lower rank from the start, for nobody knows beforehand which matrix needs how much.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..learning.eight_bits import in_eight_bits
from .deltas import LEFT, RIGHT

KEPT = 0.8
"""Share of the sum of squares of a product that is kept; docs/repair.md has what it costs."""

Array = npt.NDArray[Any]


def kept(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """What a bundle keeps of a repair, which is as `Student.tensors` gives it: changes of the tail `lean`, kernels and
    matrices in eight bits."""
    return in_eight_bits(lean(tensors))


def lean(tensors: Mapping[str, Array], share: float = KEPT) -> dict[str, Array]:
    """The same tensors, `NAME/left` [out, r] and `NAME/right` [r, rest] with fewer directions; others as they are.

    Args:
        tensors: float16, as `Student.tensors` gives them.
        share: of each product's sum of squares to keep, 0..1.
    """
    found: dict[str, Array] = {}
    for name, array in tensors.items():
        if name.endswith(LEFT):
            base = name.removesuffix(LEFT)
            found[name], found[base + RIGHT] = _cut(array, tensors[base + RIGHT], share)
        elif not name.endswith(RIGHT):
            found[name] = array
    return found


def _cut(left: Array, right: Array, share: float) -> tuple[Array, Array]:
    columns, inner_left = np.linalg.qr(left.astype(np.float64))
    rows, inner_right = np.linalg.qr(right.astype(np.float64).T)
    u, values, v = np.linalg.svd(inner_left @ inner_right.T)
    energy = np.cumsum(values**2)
    rank = max(1, int(np.searchsorted(energy, share * energy[-1])) + 1)
    if rank >= left.shape[1]:
        return left, right
    # Half of each singular value on either side, so that neither leaves the range of float16.
    root = np.sqrt(values[:rank])
    return (columns @ u[:, :rank] * root).astype(left.dtype), (root[:, None] * v[:rank] @ rows.T).astype(right.dtype)

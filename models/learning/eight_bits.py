"""Eight bits: kernels of the server's learned networks, a byte a weight, so that larger ones fit into a bundle.

    NAME          int8 [out, ...], where it was float16
    NAME/step     float16 [out]: what a 1 of each row stands for

Uniform and symmetric, a scale an output channel (Krishnamoorthi, "Quantizing deep convolutional networks for efficient
inference", 2018): the largest weight of a row has 127 steps. Only storage is meant: what runs has these weights in
float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

STEP = "/step"
LEAST = 4096
"""Weights; smaller tensors stay as they are."""
LARGEST = 127

Array = npt.NDArray[Any]


def in_eight_bits(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The same tensors float16 with matrices and kernels of at least `LEAST` weights rounded to eight bits."""
    found: dict[str, Array] = {}
    for name, array in tensors.items():
        if array.ndim < 2 or array.size < LEAST:
            found[name] = array
            continue
        rows = array.astype(np.float32).reshape(len(array), -1)
        # A row of zeros has any step; one that float16 holds, so that what is rounded is what is read.
        step = np.maximum(np.abs(rows).max(1) / LARGEST, np.finfo(np.float16).tiny).astype(np.float16)
        whole = np.rint(rows / step.astype(np.float32)[:, None]).clip(-LARGEST, LARGEST)
        found[name], found[name + STEP] = whole.astype(np.int8).reshape(array.shape), step
    return found


def as_floats(tensors: Mapping[str, Array]) -> dict[str, npt.NDArray[np.float32]]:
    """Any tensors as float32 ones, those in eight bits multiplied by their steps.

    Raises:
        KeyError: a tensor in eight bits has no steps.
    """
    found = {}
    for name, array in tensors.items():
        if name.endswith(STEP) and name.removesuffix(STEP) in tensors:
            continue
        found[name] = array.astype(np.float32)
        if array.dtype == np.int8:
            step = tensors[name + STEP].astype(np.float32)
            found[name] = (found[name].reshape(len(array), -1) * step[:, None]).reshape(array.shape)
    return found

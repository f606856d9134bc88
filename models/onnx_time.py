"""Times on one core, as a device would spend them: ONNX Runtime for networks, Pillow for pictures."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from .image_codec import encode_image

ROUNDS = 25
"""Runs of each. The fastest counts: whatever else the machine does can only add to it."""


def one_core_session(path: Path) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU that keeps to one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def edge_milliseconds(paths: Mapping[str, Path], rounds: int = ROUNDS) -> dict[str, float]:
    """Time of each network in ms, one core, the fastest of `rounds`; they take turns, to meet the same machine.

    Args:
        paths: ONNX files that take one uint8 input.
        rounds: measured runs of each, after two that are not counted.
    """
    sessions = {name: one_core_session(path) for name, path in paths.items()}
    taken: dict[str, list[float]] = {name: [] for name in paths}
    for i in range(rounds + 2):
        for name, session in sessions.items():
            feed = {x.name: np.zeros(x.shape, np.uint8) for x in session.get_inputs()}
            begin = time.perf_counter()
            session.run(None, feed)
            if i >= 2:
                taken[name].append((time.perf_counter() - begin) * 1e3)
    return {name: min(times) for name, times in taken.items()}


def image_milliseconds(codec: str, size: int, quality: int = 50) -> float:
    """Time in ms to code a picture of size x size with the detail of a photograph, the fastest of `ROUNDS`."""
    noise = np.random.default_rng(0).normal(size=(size // 8 + 1, size // 8 + 1, 3))
    smooth = np.kron(noise, np.ones((8, 8, 1)))[:size, :size]
    pixels = np.clip(128 + 40 * smooth, 0, 255).astype(np.uint8)
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        encode_image(pixels, codec, quality)
        times.append((time.perf_counter() - begin) * 1e3)
    return min(times)

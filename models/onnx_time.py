"""Times on one core, as a device would spend them: ONNX Runtime for networks, Pillow for pictures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from .bundle import Bundle, SplitSpec
from .codec import Codec
from .image_codec import encode_image
from .onnx_session import open_session

ROUNDS = 25
"""Runs of each; their median counts. Processor time, not elapsed: on a busy machine a long run finds no moment in which
nothing else runs, a short one does, and heads looked half as dear beside the uncut model as they are."""

ADDED_ROUNDS = 100
"""Runs of each for a small difference between two long times."""

INPUTS = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}


def edge_milliseconds(paths: Mapping[str, Path], rounds: int = ROUNDS) -> dict[str, float]:
    """Time of each network in ms, one core, median of `rounds`; they take turns, to meet the same machine.

    Args:
        paths: ONNX files that take one input, uint8 or float32.
        rounds: measured runs of each, after two that are not counted.
    """
    sessions = {name: open_session(path) for name, path in paths.items()}
    taken: dict[str, list[float]] = {name: [] for name in paths}
    for i in range(rounds + 2):
        for name, session in sessions.items():
            milliseconds = _run(session)
            if i >= 2:
                taken[name].append(milliseconds)
    return {name: statistics.median(times) for name, times in taken.items()}


def added_milliseconds(
    path: Path, more: Mapping[str, npt.NDArray[Any]], before: Path, rounds: int = ADDED_ROUNDS
) -> tuple[float, float]:
    """What a network takes longer where it is given `more` inputs, and what another one takes, in ms, one core.

    The other one runs before each of its runs, with and without `more` in turn: neither finds in the caches what the
    one before left there. Of the differences the median counts.

    Args:
        path: ONNX file of one input and others that need not be given.
        more: those others.
        before: ONNX file of the other one.
        rounds: of both, after two that are not counted.
    """
    network, other = open_session(path), open_session(before)
    added, others = [], []
    for i in range(rounds + 2):
        times = {}
        for given in (i % 2 == 0, i % 2 == 1):
            others.append(_run(other))
            times[given] = _run(network, more if given else {})
        added.append(times[True] - times[False])
    return statistics.median(added[2:]), statistics.median(others[4:])


def _run(session: Any, more: Mapping[str, npt.NDArray[Any]] = MappingProxyType({})) -> float:
    """The ms of one run on zeros."""
    feed = {x.name: np.zeros(x.shape, INPUTS[x.type]) for x in session.get_inputs()}
    begin = time.thread_time()
    session.run(None, {**feed, **more})
    return (time.thread_time() - begin) * 1e3


def coding_milliseconds(
    bundle: Bundle, split: SplitSpec, path: Path, pictures: Sequence[npt.NDArray[np.uint8]]
) -> float:
    """Time in ms to code a split point's packet at the middle rate level, median of `pictures`, each coded twice.

    They have to be photographs: how many symbols are 0, and so how long coding takes, hangs on the detail that a head
    finds in them, and some noise with the detail of a photograph can take twice as long behind one head and no longer
    behind another.

    Args:
        bundle: tables and operating points.
        split: of the bundle.
        path: the head's and encoder's ONNX file, which takes uint8 [1, S, S, 3] and gives a latent float32.
        pictures: uint8 [S, S, 3], at least one.
    """
    session = open_session(path)
    (given,) = session.get_inputs()
    point = bundle.feature_point(split.name, split.rate_levels // 2)
    codec, times = Codec(bundle), []
    for at, picture in enumerate((pictures[0], *pictures)):
        latent = session.run(None, {given.name: picture[None]})[0][0]
        for _ in range(2):
            begin = time.thread_time()
            codec.compress(latent, point, 0).to_bytes()
            if at:  # the first one makes the coder
                times.append((time.thread_time() - begin) * 1e3)
    return statistics.median(times)


def image_milliseconds(
    codec: str,
    size: int,
    quality: int = 50,
    encode: Callable[[npt.NDArray[np.uint8], str, int], bytes] = encode_image,
) -> float:
    """Time in ms to code a picture of size x size with the detail of a photograph, median of `ROUNDS`.

    Args:
        codec: name of the codec.
        size: pixels of a side.
        quality: 0..100.
        encode: codes uint8 [size, size, 3] by that codec at that quality.
    """
    pixels = _picture(size)
    times = []
    for _ in range(ROUNDS):
        begin = time.thread_time()
        encode(pixels, codec, quality)
        times.append((time.thread_time() - begin) * 1e3)
    return statistics.median(times)


def _picture(size: int) -> npt.NDArray[np.uint8]:
    """Pixels uint8 [size, size, 3]."""
    noise = np.random.default_rng(0).normal(size=(size // 8 + 1, size // 8 + 1, 3))
    smooth = np.kron(noise, np.ones((8, 8, 1)))[:size, :size]
    return np.clip(128 + 40 * smooth, 0, 255).astype(np.uint8)

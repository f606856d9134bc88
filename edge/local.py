"""Local answers: the uncut model on the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..models.bundle import UNCUT
from ..protos.messages import Label
from .head import Graph

MAX_LABELS = 5


class Local:
    """pixels -> labels, best first; the graph is loaded on first use."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        """Keep where the graph lies."""
        self._folder, self._threads = folder, threads
        self._graph: Graph | None = None

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> tuple[Label, ...]:
        """The five best labels of pixels uint8 [S, S, 3].

        Raises:
            EngineError: the graph cannot be loaded or run.
        """
        if self._graph is None:
            self._graph = Graph(self._folder / UNCUT, "scores", self._threads)
        return best_labels(self._graph(pixels))


def best_labels(scores: npt.NDArray[np.float32], count: int = MAX_LABELS) -> tuple[Label, ...]:
    """The `count` classes with the highest of scores float32 [classes], best first."""
    order = np.argsort(-scores, kind="stable")[:count]
    return tuple(Label(int(index), float(scores[index])) for index in order)

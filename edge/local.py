"""Local answers: the uncut model on the device, or an exit behind a head that has run anyway."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..models.bundle import FEATURES, UNCUT, Bundle
from ..models.bundle_files import exit_file
from ..models.edge_half import SCORES
from ..models.exceptions import OperatingPointError
from ..protos.messages import Label
from .head import Graph, Reached

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
            self._graph = Graph(self._folder / UNCUT, SCORES, self._threads)
        return best_labels(self._graph(pixels))


class Exits:
    """The exits of a bundle: features at a split point -> labels, and how likely the best is the uncut model's; a
    graph is loaded on first use."""

    def __init__(self, bundle: Bundle, folder: Path, threads: int = 1) -> None:
        """Keep where the graphs lie."""
        self._bundle, self._folder, self._threads = bundle, folder, threads
        self._graphs: dict[str, Graph] = {}

    def __call__(self, split: str, reached: Reached) -> tuple[tuple[Label, ...], float]:
        """The five best labels behind a head that has run, and the confidence in the best, 0..1; from its scores where
        it was asked for them, else from its features.

        Raises:
            EngineError: the graph cannot be loaded or run.
            OperatingPointError: the split point has no exit.
        """
        spec = self._bundle.exit(split)
        if spec is None or reached.features is None:
            raise OperatingPointError(f"bundle {self._bundle.name} has no exit at {split}")
        labels = best_labels(reached.scores if reached.scores is not None else self._graph(split)(reached.features))
        return labels, spec.sure(labels[0].score, labels[1].score if len(labels) > 1 else 0.0)

    def _graph(self, split: str) -> Graph:
        graph = self._graphs.get(split)
        if graph is None:
            graph = self._graphs[split] = Graph(self._folder / exit_file(split), SCORES, self._threads, FEATURES)
        return graph


def best_labels(scores: npt.NDArray[np.float32], count: int = MAX_LABELS) -> tuple[Label, ...]:
    """The `count` classes with the highest of scores float32 [classes], best first."""
    order = np.argsort(-scores, kind="stable")[:count]
    return tuple(Label(int(index), float(scores[index])) for index in order)

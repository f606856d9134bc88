"""Head: pixels -> latent, in ONNX Runtime. Head and encoder network are one graph a split point.

Where the split point has an exit, the graph gives the features, too, which the exit's own graph takes. A narrow exit is
in the head's graph besides, and answers along with it when it is asked: calling another graph costs what a quarter of
such an exit does.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime

from ..models.bundle import FEATURES, PRESENCE, Bundle, head_file
from ..models.edge_half import ASK, SCORES
from ..models.onnx_session import open_session
from .exceptions import AbandonedError, EngineError


class Reached(NamedTuple):
    """What a head gives.

    Attributes:
        latent: float32 [K, H, W].
        presence: the filter's score; None where the split point has no filter.
        features: float32 [C, H, W]; None where the split point has no exit.
        scores: the exit's, float32 [classes]; None where it was not asked, or is not in the graph.
    """

    latent: npt.NDArray[np.float32]
    presence: float | None
    features: npt.NDArray[np.float32] | None
    scores: npt.NDArray[np.float32] | None = None


class Head:
    """The heads of a bundle; a split point's graph is loaded on first use and kept."""

    def __init__(self, bundle: Bundle, folder: Path, threads: int = 1) -> None:
        """Keep where the graphs lie."""
        self._bundle, self._folder, self._threads = bundle, folder, threads
        self._graphs: dict[str, Graph] = {}

    def __call__(
        self, split: str, pixels: npt.NDArray[np.uint8], abandon: Abandon | None = None
    ) -> npt.NDArray[np.float32]:
        """The latent float32 [K, H, W] of pixels uint8 [S, S, 3].

        Raises:
            EngineError: the graph cannot be loaded or run, or gives another shape.
            AbandonedError: it was stopped by `abandon`.
        """
        return self.reach(split, pixels, abandon).latent

    def reach(
        self, split: str, pixels: npt.NDArray[np.uint8], abandon: Abandon | None = None, *, ask: bool = False
    ) -> Reached:
        """All that the graph gives; `ask` for the exit's scores, too, where it has them. Raises as `__call__` does."""
        graph = self._graphs.get(split)
        if graph is None:
            graph = self._graphs[split] = Graph(self._folder / head_file(split), "latent", self._threads)
        names = ["latent"]
        if self._bundle.filters(split):
            names.append(PRESENCE)
        if self._bundle.exit(split) is not None:
            names.append(FEATURES)
        if ask and graph.can_ask:
            names.append(SCORES)
        asked = {ASK: np.array(True)} if SCORES in names else {}
        found = dict(zip(names, graph.outputs(names, pixels, abandon, asked), strict=True))
        latent, presence = found["latent"], found.get(PRESENCE)
        if latent.shape != (expected := self._bundle.split(split).latent_shape):
            raise EngineError(f"{graph.path} gives a latent of {latent.shape}, the bundle says {expected}")
        presence_score = None if presence is None else float(presence)
        return Reached(latent, presence_score, found.get(FEATURES), found.get(SCORES))


class Abandon:
    """Stops a computation halfway, from another thread: its result is of no use any more."""

    def __init__(self) -> None:
        """Not stopped."""
        self.options: Any = onnxruntime.RunOptions()
        self._event = threading.Event()
        self.wait = self._event.wait

    def set(self) -> None:
        """Stop what runs under it."""
        self._event.set()
        self.options.terminate = True

    def check(self) -> None:
        """Go on, unless stopped.

        Raises:
            AbandonedError: it is stopped.
        """
        if self._event.is_set():
            raise AbandonedError("the computation was abandoned")


class Graph:
    """One ONNX file: pixels uint8 [1, S, S, 3], or what else its one input is -> outputs float32 [1, ...].

    Attributes:
        can_ask: whether it has an exit inside, see `models.edge_half`.
    """

    def __init__(self, path: Path, output: str, threads: int, given: str = "pixels") -> None:
        """Load the file; `output` and `given` are the names of its main output and its input.

        Raises:
            EngineError: it cannot be loaded.
        """
        self.path, self._output, self._given = path, output, given
        try:
            self._session: Any = open_session(path, threads)
        except Exception as error:  # ONNX Runtime's own exceptions share no base but this
            raise EngineError(f"{path} cannot be loaded: {error}; export or fetch the edge half again") from error
        self.can_ask = any(each.name == ASK for each in self._session.get_overridable_initializers())

    def __call__(self, pixels: npt.NDArray[Any], abandon: Abandon | None = None) -> npt.NDArray[np.float32]:
        """The output without its batch axis, for pixels without one.

        Raises:
            EngineError: the graph cannot be run on these pixels.
            AbandonedError: it was stopped by `abandon`.
        """
        return self.outputs((self._output,), pixels, abandon)[0]

    def outputs(
        self,
        names: Sequence[str],
        pixels: npt.NDArray[Any],
        abandon: Abandon | None = None,
        more: Mapping[str, npt.NDArray[Any]] = MappingProxyType({}),
    ) -> list[npt.NDArray[np.float32]]:
        """The outputs of these names, `more` being inputs that need not be given; see `__call__`."""
        options = abandon.options if abandon is not None else None
        try:
            found = self._session.run(list(names), {self._given: pixels[None], **more}, options)
        except Exception as error:  # as above
            if abandon is not None:
                abandon.check()
            raise EngineError(f"{self.path} cannot be run on {self._given} of {pixels.shape}: {error}") from error
        return [output[0] for output in found]

"""Fits the tables of predicted frames: photographs that were moved -> counts of what moves where -> integer tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress

from .backbones import Backbone
from .bottleneck import Encoder
from .bundle import TEMPORAL, Bundle
from .entropy_coder import EntropyTables
from .entropy_model import LAPLACE_WEIGHT, TAIL_MASS, cumulative, table_of_rows
from .quantiser import quantise
from .synthetic import moving
from .temporal import CONTEXTS, TABLES, Prediction, Reference, Scales, Symbols

SCENES, LEAST_SCENES = 64, 16
MAX_NUMBERS = 60_000
"""Of the latents of all split points together; where there are more, so many fewer scenes do. Nor is there more than
one scene for four photographs."""
FRAMES = 12
"""Of each scene; running means need some."""
LEVELS_APART = 3
"""Every so many rate levels are counted; the tables are the same for all."""
REACH = 256
"""Largest value that is told apart when counting."""
PRIOR = 8.0
"""Symbols that a table's prior counts as."""


class MoveCounts:
    """Collects how symbols move, and freezes tables."""

    def __init__(self) -> None:
        """Nothing collected yet."""
        self._seen = np.zeros((TABLES, 2 * REACH + 1))

    def add(self, frames: Iterable[Symbols], scales: Scales, split: str = "", level: int = 0) -> None:
        """Count the frames int32 [n'] of one scene, each predicted from the one before."""
        earlier: Reference | None = None
        for symbols in frames:
            prediction = None
            if earlier is not None:
                prediction = Prediction.at(earlier, len(symbols), None)
                signs, contexts = prediction.contexts()
                activity = scales.activity(int(np.abs(symbols - prediction.symbols).sum()))
                values = np.clip(signs * symbols - np.abs(prediction.symbols), -REACH, REACH) + REACH
                where = (scales.spreads(activity) * CONTEXTS + contexts) * self._seen.shape[1] + values
                self._seen += np.bincount(where, minlength=self._seen.size).reshape(self._seen.shape)
            earlier = Reference.of(split, level, symbols, prediction)

    def freeze(self) -> EntropyTables:
        """Tables of every spread and context; those that were hardly seen are discrete Laplace distributions of the
        mean magnitude that their spread stands for.

        Raises:
            ValueError: nothing was counted.
        """
        if not self._seen.any():
            raise ValueError("no symbols were counted")
        grid = np.arange(-REACH, REACH + 1)
        rows, offsets = [], []
        for table, counts in enumerate(self._seen):
            expected = 2.0 ** ((table // CONTEXTS - 18) / 2)
            total = counts.sum()
            magnitude = ((counts * np.abs(grid)).sum() + PRIOR * expected) / (total + PRIOR)
            theta = (np.sqrt(1 + magnitude**2) - 1) / magnitude
            laplace = theta ** np.abs(grid)
            laplace /= laplace.sum()
            seen = (counts + PRIOR * laplace) / (total + PRIOR)
            masses = (1 - LAPLACE_WEIGHT) * seen + LAPLACE_WEIGHT * laplace
            kept = np.flatnonzero(masses >= TAIL_MASS / 4)
            first, last = min(int(kept[0]), REACH), max(int(kept[-1]), REACH)
            outside = masses[:first].sum() + masses[last + 1 :].sum()
            rows.append(cumulative(np.append(masses[first : last + 1], outside + TAIL_MASS)))
            offsets.append(int(grid[first]))
        return table_of_rows(rows, offsets)


def with_temporal(
    backbone: Backbone, bundle: Bundle, photographs: Sequence[Path], seed: int = 0, progress: Progress | None = None
) -> Bundle:
    """The bundle with tables for predicted frames; nothing else of it changes, but the fingerprint does.

    Args:
        backbone, bundle: as they go together.
        photographs: those that the bundle was fitted on.
        seed: of the scenes' motion.
        progress: where to show progress; None for nowhere.
    """
    progress = progress or Progress(disable=True)
    bar = progress.add_task("moving pictures", total=_scenes(bundle, len(photographs)))
    frames = scene_symbols(backbone, bundle, photographs, seed)
    counts = MoveCounts()
    for split, level, symbols in frames:
        scales = Scales(bundle.tables(split), bundle.indexes(split, level))
        counts.add(symbols, scales, split, level)
        if split == bundle.splits[-1].name and level == 0:
            progress.advance(bar)
    return with_tables(bundle, counts.freeze())


def with_tables(bundle: Bundle, tables: EntropyTables) -> Bundle:
    """The bundle with these tables for predicted frames."""
    parts = {"cdf": tables.flat(), "sizes": tables.sizes, "offsets": tables.offsets}
    added = {f"{TEMPORAL}/{part}": values for part, values in parts.items()}
    return replace(bundle, tensors={**bundle.tensors, **added}).check()


def scene_symbols(
    backbone: Backbone, bundle: Bundle, photographs: Sequence[Path], seed: int
) -> Iterator[tuple[str, int, list[Symbols]]]:
    """Scene by scene, split point by split point: the symbols int32 [n'] of its frames at some rate levels."""
    networks = {s.name: (backbone.head(s.name), Encoder.of(bundle, s.name)) for s in bundle.splits}
    sizes = {s.name: s.size or bundle.preprocessing.size for s in bundle.splits}
    for scene in range(_scenes(bundle, len(photographs))):
        path, other = (photographs[(scene + apart) % len(photographs)] for apart in (0, len(photographs) // 2))
        with Image.open(path) as picture, Image.open(other) as piece:
            pixels = {
                size: torch.from_numpy(np.stack(list(moving(picture, piece, size, FRAMES, seed + scene))))
                for size in set(sizes.values())
            }
        for name, (head, encoder) in networks.items():
            with torch.inference_mode():
                latents = encoder(*head(pixels[sizes[name]])).numpy()
            for level in range(0, bundle.split(name).rate_levels, LEVELS_APART):
                order = bundle.order(name)[: len(bundle.indexes(name, level))]
                gain = bundle.gain(name, level)
                yield name, level, [quantise(latent, gain).reshape(-1)[order] for latent in latents]


def _scenes(bundle: Bundle, photographs: int) -> int:
    numbers = sum(math.prod(split.latent_shape) for split in bundle.splits)
    return max(LEAST_SCENES, min(SCENES, SCENES * MAX_NUMBERS // numbers, photographs // 4))

"""Gallery: scenes for a detector, drawn where the photographs are and shown to the uncut detector, always new ones.

A camera's frame shows several things, is wider than high, and is scaled down to the detector's input. `album`'s views
are parts of one photograph, or four parts of equal size, and fill the square; these are whole photographs, parts, pairs
and mosaics of any shape on the letterbox's grey (`detection.collage`). They also come with maps of the uncut detector
behind later stages, which are dense targets on the way to its answers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..backbones import Backbone
from ..detection.collage import Collage
from .album import looked_at

KINDS = (0.2, 0.15, 0.2, 0.45)
"""Shares of a whole photograph, a part of one, two and four."""


class Gallery:
    """Photographs, and scenes of them; used as an `album` is."""

    def __init__(
        self, paths: Sequence[Path], backbone: Backbone, anchor: str, later: Sequence[str], device: torch.device
    ) -> None:
        """Read all photographs.

        Args:
            paths: of them.
            backbone: a detector.
            anchor: where the features are taken.
            later: split points behind it, whose maps come behind the outputs.
            device: where all happens.

        Raises:
            DataError: a photograph cannot be read.
            BackboneError: no such split point.
        """
        how = backbone.preprocessing
        self._collage, self._size = Collage(paths, how.fill, device), how.size
        parts = (backbone.head(anchor), backbone.tail_beside(anchor, later))
        self._head, self._tail = (copy.deepcopy(m).to(device) for m in parts)
        self.count = self.made = len(paths)

    def fill(self, note: Callable[[int], None] = lambda _: None) -> None:
        """Nothing has to be made beforehand."""
        note(self.made)

    def add(self, number: int, mix: float = 0.0) -> None:
        """Views are always new."""

    def batch(
        self,
        rng: np.random.Generator,
        number: int,
        mix: float = 0.0,  # noqa: ARG002 - a share of a collage's scenes always shines through another
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """New scenes: pixels uint8 [B, S, S, 3], features float32 [B, C, H, W], and float32 [B, ...] each output
        and each later map."""
        pixels = self._collage.draw(self._collage.layouts(rng, number, KINDS), self._size)
        return pixels, *looked_at(self._head, self._tail, pixels)

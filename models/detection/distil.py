"""Learning filters on a GPU: always new views, which the uncut detector is asked about as they are made.

collage --pixels--> detector --what is looked at, its scores--> the last views --batches--> a learner each split point

The detector runs once for all split points, and every view is learned from a few times before newer ones take its
place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..backbones import Backbone
from .collage import Collage, send
from .learner import Learner
from .presence import Presence
from .scenes import Watcher

DRAWN = 512
"""Views that are made at a time."""
CHUNK = 128
"""Views that the detector is asked about at a time."""
LATEST = 24_576
"""Views that are kept, at most; 0.2 MB each for three split points."""
BATCH = 512
STEPS = 5
"""Batches that are learned from each time that views are made."""

Note = Callable[[int, float, Mapping[str, Tensor]], None]
"""Called with the views made, the share of the learning done, and each split point's latest loss."""


class Views:
    """The latest views as a filter sees them and what it is told of them, on the device."""

    def __init__(
        self,
        backbone: Backbone,
        filters: Mapping[str, Presence],
        collage: Collage,
        interest: Sequence[int],
        *,
        drawn: int = DRAWN,
        latest: int = LATEST,
    ) -> None:
        """`interest`: indexes of the classes; `drawn` views are made at a time, `latest` kept."""
        pooled = {name: presence.pooled for name, presence in filters.items()}
        self._watch = Watcher(backbone, pooled, interest, collage.device)
        self._collage, self._drawn, self._latest = collage, drawn, max(latest, drawn)
        self._arrays: dict[str, Tensor] = {}
        self.made = 0

    def add(self, rng: np.random.Generator) -> None:
        """Make new views in place of the oldest."""
        places = torch.arange(self.made, self.made + self._drawn, device=self._collage.device) % self._latest
        for at in range(0, self._drawn, CHUNK):
            part = places[at : at + CHUNK]
            layouts = self._collage.layouts(rng, len(part))
            seen = self._watch([self._collage.draw(layouts, how.size) for how in self._watch.sizes])
            for key, found in seen.items():
                # As convolutions on a GPU want it.
                values = found.permute(0, 2, 3, 1) if found.ndim == 4 else found
                if key not in self._arrays:
                    shape = (self._latest, *values.shape[1:])
                    self._arrays[key] = torch.zeros(shape, dtype=torch.float16, device=values.device)
                self._arrays[key][part] = values.half()
        self.made += self._drawn

    def batch(self, rng: np.random.Generator, number: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Any of them, by split point: what is looked at [B, C, h, w], scores of places [B, h, w], of frames [B]."""
        chosen = send(rng.integers(0, min(self.made, self._latest), number), self._collage.device)
        best = self._arrays["best"][chosen]
        return {
            name: (self._arrays[name][chosen].permute(0, 3, 1, 2), self._arrays[f"{name}/places"][chosen], best)
            for name in self._arrays
            if f"{name}/places" in self._arrays
        }


def distil(
    views: Views,
    filters: Mapping[str, Presence],
    confident: float,
    done: Callable[[int], float],
    rng: np.random.Generator,
    note: Note = lambda *_: None,
    *,
    batch: int = BATCH,
    steps: int = STEPS,
) -> dict[str, Learner]:
    """Let filters learn from new views.

    Args:
        views: of the photographs that are learned from.
        filters: by split point, on the views' device.
        confident: score from which a box counts.
        done: number of views made -> share of the learning that lies behind; 1 ends it.
        rng: of views and batches.
        note: see `Note`.
        batch: views in a batch.
        steps: batches each time that views are made.

    Returns:
        By split point, what has learned.
    """
    views.add(rng)
    first = views.batch(rng, min(batch, 512))
    learners = {name: Learner(each, first[name][0].float(), confident) for name, each in filters.items()}
    while (share := done(views.made)) < 1:
        views.add(rng)
        losses: dict[str, Tensor] = {}
        for _ in range(steps):
            found = views.batch(rng, batch)
            for name, learner in learners.items():
                losses[name] = learner.step(*found[name], share)
        note(views.made, share, losses)
    return learners

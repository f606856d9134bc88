"""Steps and tables of a split point fitted anew to what its head gives now, under the transform that it has.

Where a head has learned to say the same in fewer symbols (`learning.restore`), tables that were fitted to what it said
before are too wide. Each rate level gets the step at which it takes as many bits as it did, so that an operating point
is in the same place of a control loop's choice and answers better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from .backbones import Backbone
from .bottleneck import Encoder
from .bundle import Bundle, rounded
from .fit import fit_coding, most_bits
from .measure import pixel_batches

HALVINGS = 24
REACH = 4.0
"""Most by which a step may move, either way."""

Latents = npt.NDArray[np.float32]


def latents_of(backbone: Backbone, bundle: Bundle, split: str, paths: Sequence[Path]) -> Latents:
    """What head and encoder give of photographs, float32 [N, K, H, W].

    Raises:
        DataError: one cannot be read.
    """
    head, encoder = backbone.head(split), Encoder.of(bundle, split)
    with torch.inference_mode():
        found = [encoder(head(pixels)[0]) for pixels in pixel_batches(paths, bundle.preprocessing_at(split))]
    latents: Latents = torch.cat(found).numpy()
    return latents


def recoded(bundle: Bundle, split: str, before: Latents, now: Latents) -> Bundle:
    """The bundle with gains, order, tables and slices of one split point for the latents that its head gives now.

    Args:
        bundle: any; operating points keep their ids, and what was measured of them.
        split: split point.
        before, now: latents float32 [N, K, H, W] of the same photographs.
    """
    gains = bundle.tensors[f"{split}/gains"][:, 0]
    levels = [_gain(now, float(gain), _bits(before, float(gain))) for gain in gains]
    coding = fit_coding(now, levels)
    spec = bundle.split(split)
    arrays = {f"{split}/{key}": value for key, value in coding.arrays.items()}
    # The transform keeps its channels also where the last of them are not sent any more.
    arrays[f"{split}/gains"] = np.repeat(np.array(levels, np.float32)[:, None], spec.latent_channels, 1)
    splits = tuple(replace(s, slices=coding.slices) if s.name == split else s for s in bundle.splits)
    return replace(bundle, splits=splits, tensors={**bundle.tensors, **rounded(arrays)}).check()


def _bits(latents: Latents, gain: float) -> float:
    return most_bits(np.abs(np.rint(latents * np.float32(gain))).mean(0))


def _gain(latents: Latents, gain: float, wanted: float) -> np.float32:
    """Of a level that had `gain`, so that these latents take the bits that are wanted."""
    low, high = np.log(gain / REACH), np.log(gain * REACH)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _bits(latents, float(np.exp(middle))) > wanted else (middle, high)
    return np.float32(np.exp((low + high) / 2))

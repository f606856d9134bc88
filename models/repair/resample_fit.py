"""Fits a `Resample`: least squares on photographs and mosaics, as a repair learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..backbones import Backbone
from ..detection.mosaic import mosaic
from ..measure import load_pixels
from .resample import KERNEL, Resample, enlarged, own_cut

PICTURES = 120
"""Every other one a mosaic."""
RIDGE = 1e-4
"""Of the mean of the diagonal."""


def fit_resample(
    backbone: Backbone,
    split: str,
    paths: Sequence[Path],
    seed: int,
    device: torch.device,
    note: Callable[[int, int], None] = lambda *_: None,
) -> Resample:
    """Fit one to a split point of fewer pixels.

    Args:
        backbone: any.
        split: its name says the size.
        paths: photographs.
        seed: of the mosaics.
        device: of the heads.
        note: called with pictures done, and pictures in all.
    """
    names = (split, own_cut(split))
    heads = [(backbone.head(name).to(device), backbone.at(name)[0].preprocessing) for name in names]
    _, rows, columns = backbone.shape(own_cut(split))
    chosen = [paths[i] for i in np.random.default_rng((seed, 7)).permutation(len(paths))[:PICTURES]]

    def features(index: int) -> list[Tensor]:
        found = []
        for head, how in heads:
            pixels = mosaic(chosen, how, seed, index) if index % 2 else load_pixels(chosen[index], how)
            with torch.inference_mode():
                found.append(head(torch.from_numpy(pixels.copy())[None].to(device))[0].float())
        return found

    squares, products = torch.zeros(()), torch.zeros(())
    for i in range(len(chosen)):
        less, more = features(i)
        patches = functional.unfold(enlarged(less, (rows, columns)), KERNEL, padding=KERNEL // 2)[0]
        patches = torch.cat([patches, torch.ones_like(patches[:1])])
        squares = squares + (patches @ patches.T).double().cpu()
        products = products + (patches @ more[0].flatten(1).T).double().cpu()
        note(i + 1, len(chosen))
    ridge = RIDGE * squares.diagonal().mean() * torch.eye(len(squares), dtype=squares.dtype)
    found = torch.linalg.solve(squares + ridge, products).float().T
    weight = found[:, :-1].reshape(len(found), -1, KERNEL, KERNEL).contiguous()
    return Resample(weight, found[:, -1].contiguous(), (rows, columns))

"""Maps: several feature maps of one cut, packed into one, so that everything behind the head sees a single map.

Some places can only be cut through several tensors (a backbone whose decoder looks back at an early stage, a feature
pyramid). Their grids differ; the finer ones are folded onto the coarsest by moving places into channels, and
all channels are stacked:

    [B, 40, 28, 28] --fold 2x2--> [B, 160, 14, 14] --+
                                                     +--stack--> [B, 256, 14, 14]        pack; unpack is its inverse
    [B, 96, 14, 14] ---------------------------------+

The closed form over the stack then also removes what the maps say twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..exceptions import BackboneError

MAX_FOLD = 8
"""Most places a side that are folded into channels."""
MAX_CHANNELS = 2048
"""Of a packed map: the closed form needs a covariance over all of them."""

Shape = tuple[int, int, int]
"""(C, H, W)."""


class Packing:
    """How maps of given shapes fit onto one grid."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        """Find the folds.

        Args:
            shapes: (C, H, W) of each map, at least one.

        Raises:
            BackboneError: the grids are too far apart, or there are too many channels.
        """
        self.shapes = tuple(shapes)
        self.grid = (min(h for _, h, _ in shapes), min(w for _, _, w in shapes))
        self.folds = tuple((ceil(h / self.grid[0]), ceil(w / self.grid[1])) for _, h, w in shapes)
        self.channels = tuple(c * down * across for (c, _, _), (down, across) in zip(shapes, self.folds, strict=True))
        told = ", ".join("x".join(map(str, shape)) for shape in shapes)
        if max(max(fold) for fold in self.folds) > MAX_FOLD:
            raise BackboneError(f"the maps {told} cannot be packed: their grids are more than {MAX_FOLD} times apart")
        if len(shapes) > 1 and sum(self.channels) > MAX_CHANNELS:
            raise BackboneError(
                f"the maps {told} make {sum(self.channels)} channels when packed, more than {MAX_CHANNELS}"
            )

    @property
    def packed(self) -> Shape:
        """(C, H, W) of the packed map."""
        return (sum(self.channels), *self.grid)


class Pack(nn.Module):
    """Maps float32 [B, C_i, H_i, W_i] -> one map float32 [B, C, H, W]. Padding, where a fold needs it, is zero."""

    def __init__(self, packing: Packing) -> None:
        super().__init__()
        self.packing = packing

    def forward(self, *maps: Tensor) -> Tensor:
        """Fold and stack; a single map is passed on as it is."""
        if len(maps) == 1:
            return maps[0]
        (height, width), folded = self.packing.grid, []
        for each, (c, h, w), (down, across) in zip(maps, self.packing.shapes, self.packing.folds, strict=True):
            padded = functional.pad(each, (0, width * across - w, 0, height * down - h))
            blocks = padded.reshape(-1, c, height, down, width, across).permute(0, 1, 3, 5, 2, 4)
            folded.append(blocks.reshape(-1, c * down * across, height, width))
        return torch.cat(folded, 1)


class Unpack(nn.Module):
    """The inverse of `Pack`."""

    def __init__(self, packing: Packing) -> None:
        super().__init__()
        self.packing = packing

    def forward(self, packed: Tensor) -> tuple[Tensor, ...]:
        """Unstack and unfold; a single map is passed on as it is."""
        if len(self.packing.shapes) == 1:
            return (packed,)
        (height, width), maps = self.packing.grid, []
        parts = torch.split(packed, list(self.packing.channels), 1)
        for part, (c, h, w), (down, across) in zip(parts, self.packing.shapes, self.packing.folds, strict=True):
            blocks = part.reshape(-1, c, down, across, height, width).permute(0, 1, 4, 2, 5, 3)
            maps.append(blocks.reshape(-1, c, height * down, width * across)[:, :, :h, :w])
        return tuple(maps)

"""From the features of fewer pixels to those of the backbone's own size, in closed form.

features of 320 pixels [B, C, 40, 40] --bicubic--> [B, C, 52, 52] --3x3 convolution--> features of 416 pixels, nearly

A detector on fewer pixels answers on a coarser grid, where it finds something else: its boxes agree less with the uncut
ones than its precision falls. The device has to save pixels, the server has not. The convolution is the least-squares
fit, on photographs, from what the cut gives on fewer pixels to what it gives on all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backbones import SIZED

KERNEL = 3


class Resample(nn.Module):
    """features float32 [B, C, H, W] -> [B, C, rows, columns] as the cut gives them on more pixels, about."""

    def __init__(self, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> None:
        """weight float32 [C, C, 3, 3], bias float32 [C]; rows and columns."""
        super().__init__()
        self.weight, self.bias, self.size = nn.Buffer(weight), nn.Buffer(bias), size

    def forward(self, features: Tensor) -> Tensor:
        return functional.conv2d(enlarged(features, self.size), self.weight, self.bias, padding=KERNEL // 2)

    def tensors(self) -> dict[str, Tensor]:
        """What a bundle holds of it; sizes are small integers, which half precision holds."""
        return {"weight": self.weight, "bias": self.bias, "size": torch.tensor(self.size)}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Resample:
        """Of `tensors`.

        Raises:
            KeyError: one is missing.
        """
        rows, columns = (int(n) for n in tensors["size"])
        return cls(tensors["weight"], tensors["bias"], (rows, columns))


def own_cut(split: str) -> str:
    """The cut of a split point at the backbone's own size: `pool3` of `pool3-320px`."""
    return SIZED.sub(r"\1", split)


def enlarged(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic."""
    return functional.interpolate(features.float(), size=size, mode="bicubic", align_corners=False)

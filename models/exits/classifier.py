"""A backbone's last layer, by itself: what an exit needs behind one pooled vector."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from ..backbones import Backbone
from ..cutting.cuts import Tail
from ..cutting.maps import Unpack
from ..exceptions import BackboneError

AFFINE = 1e-3
"""Most that the classifier may differ from a linear layer, relative to its largest output."""

Floats = npt.NDArray[np.float32]


def pooled_cut(backbone: Backbone) -> str:
    """Name of the cut in front of the classifier, where one vector [V, 1, 1] crosses.

    Raises:
        BackboneError: the backbone has none.
    """
    cut = backbone.cuts[-1]
    if len(cut.shapes) != 1 or cut.shapes[0][1:] != (1, 1):
        raise BackboneError(
            f"{backbone.spec.name} has no vector in front of its classifier that an exit could read; its last cut is "
            f"{cut.name} with {', '.join(str(list(s)) for s in cut.shapes)}"
        )
    return cut.name


def classifier(backbone: Backbone) -> tuple[Floats, Floats]:
    """The backbone's last layer: weight float32 [classes, V] and offset float32 [classes].

    Raises:
        BackboneError: what is behind the pooled vector is not linear.
    """
    name = pooled_cut(backbone)
    unpack, operations = Unpack(backbone.packing(name)), Tail(backbone.traced, backbone.cut(name)).eval()
    (count, _, _) = backbone.shape(name)

    def logits(vectors: Tensor) -> Tensor:
        unpacked = unpack(vectors[:, :, None, None])
        found: Tensor = operations(*(unpacked if isinstance(unpacked, tuple) else (unpacked,)))[0]
        return found

    with torch.inference_mode():
        offset = logits(torch.zeros(1, count))[0]
        weight = torch.cat([logits(part) for part in torch.split(torch.eye(count), 64)]).T - offset[:, None]
        probe = torch.randn(8, count, generator=torch.Generator().manual_seed(0))
        found = logits(probe)
        error = (functional.linear(probe, weight, offset) - found).abs().max() / found.abs().max()
    if not float(error) <= AFFINE:
        raise BackboneError(
            f"{backbone.spec.name} does not end in a linear classifier behind {name}; it cannot have an exit"
        )
    return np.ascontiguousarray(weight.numpy()), offset.numpy()

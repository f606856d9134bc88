"""How much a disturbance of the features disturbs the answer, in nats, to second order.

Twice: under the closed form's metric (`closed_form`), a product of one factor each for channels, rows and columns, and
under that of the channels alone, which does not trust that patterns over the map cancel. Their mean is what is learned
from; where errors are large, as they are at first, the second keeps the first honest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..closed_form import along, metric_roots


class Nats(nn.Module):
    """errors float32 [B, C, H, W] of features -> float32 [B]."""

    def __init__(self, gradients: Tensor) -> None:
        """From gradients float32 [M, C, H, W] as `closed_form.fisher_gradients` gives them."""
        super().__init__()
        self.whole = [nn.Buffer(r.float()) for r in metric_roots(gradients)]
        # Gradients whose places are all counted as photographs of their own have only channels to be whitened.
        spots = gradients.permute(0, 2, 3, 1).reshape(-1, gradients.shape[1], 1, 1)
        self.channels = [nn.Buffer(r.float()) for r in metric_roots(spots)[:1]]
        self.scales = (_scale(gradients, self.whole), _scale(gradients, self.channels))

    def forward(self, errors: Tensor) -> Tensor:
        """Mean of the two."""
        found = [
            0.5 * scale * _apply(errors, roots).float().square().flatten(1).sum(1)
            for roots, scale in zip((self.whole, self.channels), self.scales, strict=True)
        ]
        return (found[0] + found[1]) / 2

    def to_device(self, device: torch.device) -> Nats:
        """Move the matrices."""
        self.whole = [r.to(device) for r in self.whole]  # type: ignore[misc]
        self.channels = [r.to(device) for r in self.channels]  # type: ignore[misc]
        return self


def _apply(maps: Tensor, roots: Sequence[Tensor]) -> Tensor:
    for axis, root in enumerate(roots):
        maps = along(maps, root, axis)
    return maps


def _scale(gradients: Tensor, roots: Sequence[Tensor]) -> float:
    """The metric is this number times the product of A^T A: whitened gradients have it as their mean square."""
    return float(_apply(gradients, [torch.linalg.inv(r).T for r in roots]).square().mean())

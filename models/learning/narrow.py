"""Fewer hidden channels in a head's bottlenecks: those that say most stay, and the layer behind them makes up for it.

One bottleneck after the other: of its hidden channels those stay that add most to what comes out of it, by their root
mean square and the weights that read them; then its last layer, which is linear, is fitted by least squares to what the
whole bottleneck gave, from what the narrower one has now. (As in He, Zhang and Sun, "Channel Pruning for Accelerating
Very Deep Neural Networks", ICCV 2017, but for how channels are chosen.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cutting.own_head import Bottleneck, OwnHead
from ..exceptions import DataError

PLACES = 60_000
"""Most places of the maps that a layer is fitted on."""
RIDGE = 1e-4


def narrow(
    light: OwnHead, whole: OwnHead, hidden: Sequence[int], pixels: Tensor, before: OwnHead | None = None
) -> list[Tensor]:
    """Narrow a head, in place; which hidden channels stay, int64 [kept] of each bottleneck.

    Args:
        light: of the backbone's weights, or a light head that has learned already, with the clips that it will have.
        whole: of the backbone's weights, with all clips.
        hidden: channels to keep of each bottleneck.
        pixels: float32 [B, 3, S, S], normalised.
        before: what is to lose channels: the same as `light` before it is changed; None for `whole`.

    Raises:
        DataError: the head has another number of bottlenecks, or one of them has fewer channels.
    """
    before = before or whole
    found = before.bottlenecks()
    if len(hidden) != len(found) or any(not 1 <= n <= b.hidden for n, b in zip(hidden, found, strict=True)):
        there = ",".join(str(b.hidden) for b in found) or "no bottlenecks"
        raise DataError(f"hidden channels {','.join(map(str, hidden))} do not fit a head that has {there}")
    stay = []
    inside = before.values(pixels, {b.middle_node for b in found})
    wanted = whole.values(pixels, {b.last_node for b in found})
    for keep, bottleneck in zip(hidden, found, strict=True):
        weights = {name: value.clone() for name, value in light.weights().items()}
        stay.append(_keep(weights, bottleneck, inside[bottleneck.middle_node], keep))
        light.take(weights)
        given = light.values(pixels, {bottleneck.middle_node})[bottleneck.middle_node]
        matrix, offset = _fitted(given, wanted[bottleneck.last_node])
        weights[str(bottleneck.last)] = matrix[:, :, None, None]
        weights[str(bottleneck.last + 1)] = offset
        light.take(weights)
    return stay


def _keep(weights: dict[str, Tensor], bottleneck: Bottleneck, hidden: Tensor, keep: int) -> Tensor:
    readers = weights[str(bottleneck.last)][:, :, 0, 0]
    strength = hidden.square().mean((0, 2, 3)).sqrt() * readers.norm(dim=0)
    kept: Tensor = strength.argsort(descending=True)[:keep].sort().values
    for at in (bottleneck.first, bottleneck.middle):
        for number in (at, at + 1):
            weights[str(number)] = weights[str(number)][kept]
    weights[str(bottleneck.last)] = weights[str(bottleneck.last)][:, kept]
    return kept


def _fitted(given: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix [made, given] and offset [made] that bring one map nearest to another one."""
    rows, targets = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in (given, wanted))
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:PLACES]
    a = torch.cat((rows[chosen], torch.ones(len(chosen), 1)), 1).double()
    square = a.T @ a
    square += RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
    found = torch.linalg.solve(square, a.T @ targets[chosen].double()).float()
    return found[:-1].T.contiguous(), found[-1]

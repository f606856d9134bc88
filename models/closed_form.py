"""The closed-form bottleneck: a pretrained backbone, cut without training a weight.

At the cut, from some 150 unlabelled photographs:

    S = covariance of the features over channels, all places together
    M = mean of g g^T + a little identity, g = gradient of log p(y|x) at the cut, y drawn from the backbone's own output

M is the Fisher metric: d^T M d is, to second order, by how much a disturbance d of the features changes the answer
(Amari, "Natural Gradient Works Efficiently in Learning", 1998). With A = M^(1/2) and U, D from A S A^T = U D U^T,

    encoder = U^T A (after subtracting the mean)      decoder = A^-1 U

the components are uncorrelated, plain squared error between them is error in the answer, and one quantiser step for
all of them is the right one (the Karhunen-Loève transform under that metric). They come out ordered by how much they
matter, so that groups of them are the slices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 0.15
"""The little identity, relative to the mean diagonal of the metric: what looks irrelevant on 150 photographs may matter
on the next one. 0.15 is what the first trials found."""


@dataclass(frozen=True, slots=True)
class ClosedForm:
    """Encoder float32 [C, C], decoder float32 [C, C], mean float32 [C], variances float32 [C] in falling order."""

    encoder: Tensor
    decoder: Tensor
    mean: Tensor
    variances: Tensor

    @property
    def unit(self) -> float:
        """Mean standard deviation of the components; rate levels are steps in this unit."""
        return float(self.variances.sqrt().mean())


def fisher_metric(
    tail: Callable[[Tensor], Sequence[Tensor]],
    batches: Iterable[Tensor],
    seed: int,
    note: Callable[[int], None],
    likelihood: Callable[[Sequence[Tensor], torch.Generator], Tensor],
) -> Tensor:
    """Fisher metric over channels at a cut.

    Args:
        tail: features [B, C, H, W] -> outputs, such as scores [B, classes] that sum to 1.
        batches: features float32 [B, C, H, W].
        seed: of the draw of y.
        note: called with the number of photographs done, after each batch.
        likelihood: log p(y|x) of a drawn y, summed over the batch, from outputs; see `tasks.Task`.

    Returns:
        float32 [C, C], mean diagonal 1, `RIDGE` included.
    """
    generator = torch.Generator().manual_seed(seed)
    metric: Tensor | None = None
    for batch in batches:
        features = batch.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(likelihood(tail(features), generator), features)
        flat = gradient.permute(1, 0, 2, 3).flatten(1).double()
        metric = flat @ flat.T if metric is None else metric + flat @ flat.T
        note(len(batch))
    if metric is None:
        raise ValueError("no photographs")
    metric = metric / metric.diagonal().mean()
    return (metric + RIDGE * torch.eye(len(metric), dtype=metric.dtype)).float()


def fit_closed_form(features: Tensor, metric: Tensor) -> ClosedForm:
    """Encoder and decoder for a cut.

    Args:
        features: float32 [N, C, H, W] of the calibration photographs.
        metric: float32 [C, C], symmetric, positive definite.
    """
    flat = features.permute(1, 0, 2, 3).flatten(1).double()
    mean = flat.mean(1)
    centred = flat - mean[:, None]
    covariance = centred @ centred.T / centred.shape[1]
    values, vectors = torch.linalg.eigh(metric.double())
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    u, d, _ = torch.linalg.svd(root @ covariance @ root)
    # A component's sign is arbitrary; the largest entry is made positive, so that runs can be compared.
    u = u * u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return ClosedForm(
        encoder=(u.T @ root).float(),
        decoder=torch.linalg.solve(root, u).float(),
        mean=mean.float(),
        variances=d.clamp_min(0).float(),
    )

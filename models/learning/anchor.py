"""What is measured at the anchor before anything is learned: features and gradients, and what they vary by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn

from ..backbones import Backbone
from ..closed_form import fisher_gradients
from ..measure import pixel_batches
from .plan import TrainPlan


def at_anchor(backbone: Backbone, plan: TrainPlan, paths: Sequence[Path], progress: Progress) -> tuple[Tensor, Tensor]:
    """Features [N, C, H, W] and gradients [M, C, H, W] of some photographs."""
    bar = progress.add_task(f"{plan.anchor}: metric", total=2 * len(paths))
    head, batches = backbone.head(plan.anchor), []
    with torch.inference_mode():
        for pixels in pixel_batches(paths, backbone.preprocessing):
            batches.append(head(pixels)[0].clone())
            progress.advance(bar, len(pixels))
    copies = [b.clone() for b in batches]

    def note(done: int) -> None:
        progress.advance(bar, done)

    gradients = fisher_gradients(backbone.tail(plan.anchor), copies, plan.seed, backbone.task.probe, note)
    return torch.cat(batches), gradients


def variances(tail: nn.Module, features: Tensor, maps: int, device: torch.device) -> list[Tensor]:
    """What each of the last `maps` that a tail gives varies by, float32 [C, 1, 1] each."""
    if not maps:
        return []
    with torch.inference_mode():
        found = [tail(part.to(device))[-maps:] for part in torch.split(features, 32)]
    whole = [torch.cat(each).float() for each in zip(*found, strict=True)]
    varied = [each.var((0, 2, 3)) for each in whole]
    # Some channels of what follows a ReLU hardly ever say anything.
    return [v.clamp_min(1e-2 * float(v.mean()))[:, None, None].clone() for v in varied]


def root(features: Tensor) -> Tensor:
    """A root of the covariance over channels of centred features [N, C, H, W]."""
    flat = features.movedim(1, 0).flatten(1).double()
    covariance = flat @ flat.T / flat.shape[1]
    ridge = 1e-4 * covariance.diagonal().mean().clamp_min(1e-12)
    root: Tensor = torch.linalg.cholesky(covariance + ridge * torch.eye(len(covariance), dtype=torch.float64))
    return root.float()

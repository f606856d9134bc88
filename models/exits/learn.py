"""What a narrow exit learns, in minutes on a processor: the uncut model's answers, from features.

crops of photographs -> head -> features -> narrow rest + deltas -> classifier, the backbone's own -> answer
                             -> uncut model: the answer that it moves towards (Hinton et al., "Distilling the Knowledge
                                in a Neural Network", 2015)

Labels are not used. Features and answers are kept on disk, so a step costs the exit alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from rich.progress import Progress
from torch import Tensor

from ..backbones import Backbone
from ..learning.descent import descend
from ..measure import pixel_batches
from ..repair.data import make_crops
from ..repair.deltas import Deltas
from ..repair.distil import crops_of_step, distance
from ..repair.lean import lean
from .classifier import classifier
from .narrow import PROJECT, Answering, NarrowRest, begun

RATE = 2e-3
AVERAGE = 0.99
"""What the running average of the weights keeps of itself a step."""
RANK = 16
"""Of what is added to the backbone's layers."""
SHARE = 0.95
"""Of the energy of what is added, that a bundle keeps."""


@dataclass(frozen=True, slots=True)
class NarrowPlan:
    """How narrow exits are learned.

    Attributes:
        hidden: channels that stay, see `narrow`; 0 for exits that are the whole rest, which learn
            nothing.
        steps, batch: how long, and crops a step.
        crops: of photographs, that are made at most.
    """

    hidden: int = 0
    steps: int = 1500
    batch: int = 32
    crops: int = 12_000


def learn(
    backbone: Backbone,
    split: str,
    fitted: Sequence[Path],
    paths: Sequence[Path],
    plan: NarrowPlan,
    seed: int,
    work: Path,
    progress: Progress,
) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a narrow exit, see `narrow`.

    Args:
        backbone: any classifier.
        split: split point of its own.
        fitted: photographs by whose features hidden channels are chosen.
        paths: photographs to learn from.
        plan: how.
        seed: of the crops.
        work: folder for crops and a checkpoint; a run that was killed goes on from there.
        progress: where to show progress.

    Raises:
        BackboneError, DataError: as `narrow.begun`; a photograph cannot be read.
    """
    rest, kept = begun(backbone, split, plan.hidden, _features(backbone, split, fitted))
    said = json.dumps([backbone.spec.sha256, split, [str(p) for p in paths], asdict(plan), seed, kept.tolist()])
    identity = hashlib.sha256(said.encode()).hexdigest()[:16]
    bar = progress.add_task(f"{split}: crops", total=plan.crops)
    crops = make_crops(
        backbone, split, paths, plan.crops, seed, work / identity, torch.device("cpu"),
        lambda done, of: progress.update(bar, completed=done, total=of),
    )  # fmt: skip
    answering = Answering(rest, *map(torch.from_numpy, classifier(backbone)))
    deltas = Deltas(answering, RANK, seed)
    bar = progress.add_task(f"{split}: narrow exit", total=plan.steps)
    mean = 0.0

    def loss(step: int) -> Tensor:
        features, wanted = crops.batch(crops_of_step(len(crops), plan.batch, seed, step))
        return distance(backbone.task, deltas(features), wanted).mean()

    def note(done: int, loss: float) -> None:
        nonlocal mean
        mean = 0.98 * mean + 0.02 * loss if mean else loss
        progress.update(bar, completed=done, said=f"loss {mean:.3f}")

    named = dict(deltas.named_parameters())
    descend(named, loss, RATE, plan.steps, work / identity / "exit.safetensors", identity, note, average=AVERAGE)
    return _tensors(rest, kept, deltas)


def _tensors(rest: NarrowRest, kept: Tensor, deltas: Deltas) -> dict[str, npt.NDArray[Any]]:
    """With what was learned for the layer that is kept in full added to it."""
    found = {name.removeprefix("rest."): value for name, value in deltas.tensors().items()}
    with torch.no_grad():
        left, right = (torch.from_numpy(found[f"{PROJECT}_weight/{side}"]).float() for side in ("left", "right"))
        rest.project_weight += (left @ right)[:, :, None, None]
        rest.project_bias += torch.from_numpy(found[f"{PROJECT}_bias"])
    return rest.tensors(kept, lean(found, SHARE))


def _features(backbone: Backbone, split: str, paths: Sequence[Path]) -> Tensor:
    head = backbone.head(split)
    with torch.inference_mode():
        found = [head(pixels)[0] for pixels in pixel_batches(paths, backbone.at(split)[0].preprocessing)]
    return torch.cat(found)

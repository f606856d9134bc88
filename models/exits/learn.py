"""How an exit is learned: by distillation from the uncut model's pooled features and answers, without labels.

views' features --Learner--> pooled features --backbone's classifier--> logits
      compared: logits (divergence, also softened), pooled features, and place by place the backbone's last map

The dense targets are what makes 3,000 photographs enough for 1,000 classes, most of which none of them shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from ..backbones import Backbone
from ..cutting.cuts import Tail
from ..cutting.maps import Unpack
from ..exceptions import BackboneError
from ..learning.descent import descend
from .network import Learner, Width
from .views import LAST, POOLED, Views, last_map, pooled_cut

TEMPERATURE = 2.0
"""Of the softened answers, by which classes are told apart that the uncut model hardly considers."""
SOFTENED, POOLED_WEIGHT, LAST_WEIGHT = 1.0, 2.0, 1.0
"""Weights beside the plain divergence: of the softened one, and of the errors of pooled features and of the last map,
each as a share of their variance."""
AFFINE = 1e-3
"""Most that the classifier may differ from a linear layer, relative to its largest output."""
SAMPLE = 512
"""Views that means and variances are taken from."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast.

    Attributes:
        epochs: passes over the views.
        batch: views a step.
        rate: learning rate at its height.
        seed: of the first weights and the order.
        width: channels of the network's layers.
    """

    epochs: int = 25
    batch: int = 64
    rate: float = 3e-3
    seed: int = 0
    width: Width = field(default_factory=Width)


def classifier(backbone: Backbone) -> tuple[Tensor, Tensor]:
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
        offset = logits(torch.zeros(1, count))[0].clone()
        weight = torch.cat([logits(part) for part in torch.split(torch.eye(count), 64)]).T - offset[:, None]
        probe = torch.randn(8, count, generator=torch.Generator().manual_seed(0))
        found = logits(probe)
        error = (functional.linear(probe, weight, offset) - found).abs().max() / found.abs().max()
    if not float(error) <= AFFINE:
        raise BackboneError(
            f"{backbone.spec.name} does not end in a linear classifier behind {name}; an exit cannot be taught to it"
        )
    return weight.contiguous().clone(), offset.clone()


class Lesson:
    """What is learned, from what, and the loss."""

    def __init__(self, backbone: Backbone, split: str, views: Views, plan: Schedule) -> None:
        """Begin with random weights."""
        self._split, self._views, self._plan = split, views, plan
        self.weight, self.offset = classifier(backbone)
        shape, last = backbone.shape(split), backbone.shape(last_map(backbone))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            self.learner = Learner(shape, self.weight.shape[1], last[0], plan.width)
        self.learner.to(memory_format=torch.channels_last)
        some = np.arange(min(SAMPLE, len(views)))
        pooled, maps = views.batch(POOLED, some), views.batch(LAST, some)
        self._pooled_variance = pooled.var(0).mean()
        self._mean, self._last_variance = maps.mean((0, 2, 3), keepdim=True), maps.var((0, 2, 3)).mean()
        # The first guess is what the uncut model says of nothing in particular.
        with torch.no_grad():
            self.learner.widen.bias.copy_(pooled.mean(0))
        self.learner.train()

    @property
    def steps(self) -> int:
        """In all."""
        return self._plan.epochs * max(1, len(self._views) // self._plan.batch)

    @property
    def state(self) -> dict[str, Tensor]:
        """What changes besides parameters: running statistics."""
        return dict(self.learner.named_buffers())

    def loss(self, step: int) -> Tensor:
        """Mean over the step's views."""
        indexes = self._indexes(step)
        features = self._views.batch(self._split, indexes).contiguous(memory_format=torch.channels_last)
        wanted = self._views.batch(POOLED, indexes)
        with torch.autocast("cpu", torch.bfloat16):
            pooled, last = self.learner(features)
        pooled, last = pooled.float(), last.float()
        mine = functional.linear(pooled, self.weight, self.offset)
        theirs = functional.linear(wanted, self.weight, self.offset)
        total = divergence(theirs, mine, 1.0) + SOFTENED * divergence(theirs, mine, TEMPERATURE)
        total = total + POOLED_WEIGHT * functional.mse_loss(pooled, wanted) / self._pooled_variance
        maps = self._views.batch(LAST, indexes)
        if maps.shape == last.shape:
            total = total + LAST_WEIGHT * functional.mse_loss(last, maps - self._mean) / self._last_variance
        return total

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """What the bundle holds of it."""
        return self.learner.tensors(self.weight, self.offset)

    def _indexes(self, step: int) -> npt.NDArray[np.int64]:
        each = max(1, len(self._views) // self._plan.batch)
        order = np.random.default_rng((self._plan.seed, 2, step // each)).permutation(len(self._views))
        at = step % each * self._plan.batch
        return np.sort(order[at : at + self._plan.batch])


def divergence(theirs: Tensor, mine: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened answers, in nats, times the temperature's square; mean over the batch."""
    wanted = (theirs / temperature).log_softmax(1)
    found = (mine / temperature).log_softmax(1)
    return (wanted.exp() * (wanted - found)).sum(1).mean() * temperature**2


def learn(lesson: Lesson, plan: Schedule, checkpoint: Path, identity: str, note: Callable[[int, float], None]) -> None:
    """Train to the end, from the checkpoint on where there is one of that identity."""
    named = dict(lesson.learner.named_parameters())
    descend(named, lesson.loss, plan.rate, lesson.steps, checkpoint, identity, note, state=lesson.state)
    lesson.learner.eval()


def identity_of(fingerprint: bytes, split: str, paths: Sequence[Path], views: int, plan: Schedule) -> str:
    """16 hex digits over everything that a run's result hangs on, by which its files are found again."""
    parts = [fingerprint, split, [str(p) for p in paths], views, asdict(plan)]
    return hashlib.sha256(msgpack.packb(parts)).hexdigest()[:16]

"""What Entropic Student learns from: both stages' losses, for several rates side by side on the same views.

1. encoder, prior, decoder: squared errors of features behind four stages of the backbone + beta x bits, noise for
   rounding; the backbone stays as it is. At first one student learns for all, and is then copied for every rate.
2. decoder and tail: divergence of the answers from the uncut model's; encoder and prior stay, symbols are rounded.

As published (see `entropic_student`), the errors are summed over stages of the backbone at strides of 4, 8, 16 and 32,
and batches are of 64 and 128 views. What differs: each stage's errors are in units of what its features vary by,
because that differs by a factor of forty here; beta is not given but found, see `student_rate`; labels are not used;
Adam in both stages and rates that fall along a cosine, as for our own encoder.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..backbones import Backbone, Pixels
from ..exceptions import DataError
from ..repair.deltas import weights
from ..tasks import CLASSIFICATION
from .entropic_student import ANCHOR, Student
from .student_rate import HEADER, Steering

STAGES = (ANCHOR, "blocks.2", "blocks.4", "blocks.6")
"""The last stages of the EfficientNet-Lite models at strides of 4, 8, 16, 32."""
ROWS = 4
"""The prior looks at every fourth row of a latent, others in each step: a fourth of the work, the same on the mean."""
RUNNING = 0.95
REFRESHED = 50
"""Steps after which the medians, about which latents are rounded, are found anew."""


class Views(Protocol):
    """Of photographs, see `learning.album`; `later` are the other `STAGES`."""

    def batch(self, rng: np.random.Generator, number: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Pixels uint8 [B, S, S, 3], features float32 [B, C, H, W], scores and the features behind the other stages."""


@dataclass(frozen=True)
class StudentPlan:
    """How it is learned.

    Attributes:
        targets: bytes of a packet, one student each.
        batch: views a step, the same ones for all students; twice as many in the second stage.
        first: share of the views that are the first stage's.
        together: share of the first stage in which one student learns for all.
        rate: learning rate at its height; the prior's is `prior` times as high.
        tail_rate: what the tail may change by in a step, in units of each output channel's root mean square, as a
            share of `rate`.
        tuned: how many of the tail's four parts (up to `STAGES`, and the rest) are tuned in full, of the others
            biases alone.
        seed: of views, noise and first weights.
    """

    targets: tuple[int, ...] = (1000, 2000, 4000)
    batch: int = 64
    first: float = 0.6
    together: float = 0.45
    rate: float = 1e-3
    prior: float = 10.0
    tail_rate: float = 0.3
    tuned: int = len(STAGES)
    seed: int = 0

    def views(self, stage: int) -> int:
        """A step of a stage."""
        return self.batch * (1 + stage)


class StudentLesson:
    """Students, the uncut model's stages, and the losses."""

    def __init__(self, backbone: Backbone, plan: StudentPlan, views: Views, device: torch.device) -> None:
        """Students with random weights, for a backbone that `check` lets pass."""
        self._plan, self._views, self._device = plan, views, device
        channels = backbone.shape(ANCHOR)[0]
        torch.manual_seed(plan.seed)
        self.students = nn.ModuleList(Student(channels) for _ in plan.targets)
        self.students.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._pixels = Pixels(backbone.preprocessing).to(device)
        self.parts = [copy.deepcopy(part).to(device) for part in tail_parts(backbone)]
        self.steering = Steering(plan.targets, device)
        self._finest = max(range(len(plan.targets)), key=plan.targets.__getitem__)
        self._divided = torch.zeros(())
        self.deltas = nn.ModuleList(
            nn.ParameterDict({_key(i, name): nn.Parameter(torch.zeros_like(w)) for i, name, w in self._changed()})
            for _ in plan.targets
        )
        self._units = {_key(i, name): unit(w) for i, name, w in self._changed()}
        _, features, outputs = views.batch(np.random.default_rng((plan.seed, 9)), plan.batch)
        seen = [f.to(device) for f in (features, *outputs[1:])]
        for decoder in (student.decoder for student in self._each):
            decoder.mean.copy_(seen[0].mean((0, 2, 3))[:, None, None])
            decoder.deviation.copy_(seen[0].std((0, 2, 3))[:, None, None])
        self.spreads = torch.stack([(f - f.mean((0, 2, 3), True)).square().flatten(1).sum(1).mean() for f in seen])
        zeros = torch.zeros(len(plan.targets), device=device)
        self.running = {"errors": zeros.clone(), "bytes": zeros.clone(), "nats": zeros.clone(), "same": zeros.clone()}
        """Running means, a student each: errors and bytes in the first stage; nats by which answers are off, and share
        of views with the uncut model's label, in the second."""

    def parameters(self, stage: int) -> dict[str, nn.Parameter]:
        """What learns in a stage, by name."""
        found: dict[str, nn.Parameter] = {}
        for i, (student, deltas) in enumerate(zip(self._each, self.deltas, strict=True)):
            chosen = dict(student.named_parameters())
            if stage:
                chosen = {k: p for k, p in chosen.items() if k.startswith("decoder.")}
                chosen |= {f"tail.{k}": p for k, p in deltas.named_parameters()}
            found |= {f"{i}.{k}": p for k, p in chosen.items() if p.requires_grad}
        return found

    def rates(self, name: str) -> float:
        """Learning rate of a parameter as a multiple of the plan's."""
        return {"prior": self._plan.prior, "tail": self._plan.tail_rate}.get(name.split(".")[1], 1.0)

    def state(self) -> dict[str, Tensor]:
        """What else a checkpoint has to hold."""
        quantiles = {f"quantiles.{i}": student.prior.quantiles.data for i, student in enumerate(self._each)}
        return {"log_betas": self.steering.log_betas, "spreads": self.spreads, "divided": self._divided, **quantiles}

    def student(self, number: int) -> Student:
        """Of one rate, in the order of the plan's targets."""
        found = self.students[number]
        assert isinstance(found, Student)
        return found

    @property
    def _each(self) -> list[Student]:
        return [self.student(number) for number in range(len(self.students))]

    def begin_second(self) -> None:
        """Freeze the priors, of a student for every rate."""
        if not self._divided:
            self._divide()
        for student in self._each:
            student.freeze_prior()

    def losses(self, stage: int, step: int, share: float) -> Iterator[Tensor]:
        """The losses of a step at a share 0..1 of its stage, of each student that learns in it, of which none sees
        another's; one after another, so that gradients of one can be taken before the next one is computed."""
        rng = np.random.default_rng((self._plan.seed, stage, step))
        torch.manual_seed(int(rng.integers(2**62)))
        pixels, features, outputs = self._views.batch(rng, self._plan.views(stage))
        x = self._pixels(pixels.to(self._device))
        scores, *levels = (each.to(self._device) for each in (outputs[0], features, *outputs[1:]))
        if stage:
            for number in range(len(self.students)):
                yield self._second(number, x, scores)
            return
        if share >= self._plan.together and not self._divided:
            self._divide()
        learning = range(len(self.students)) if self._divided else [self._finest]
        row, coded = int(rng.integers(ROWS)), {}
        for number in learning:
            if step % REFRESHED == 0:
                self.student(number).freeze_prior()
            loss, coded[number] = self._first(number, x, levels, row)
            yield loss
        # Noise costs bits that rounding does not: where most latents are small, several times what is then coded.
        self.steering.follow(coded, share)

    def _first(self, number: int, x: Tensor, wanted: Sequence[Tensor], row: int) -> tuple[Tensor, Tensor]:
        """The loss of a student, and the bits of its rounded latent."""
        student = self.student(number)
        with self._half():
            latent = student.encoder(x)
            noise = torch.rand_like(latent) - 0.5
            made = [student.decoder(latent + noise)]
            for part in self.parts[:-1]:
                made += part(made[-1])
        some = latent[:, :, row::ROWS]
        each = latent.shape[2] / some.shape[2] / len(x)
        bits = _bits(student.prior(some, training=True)[1]) * each
        with torch.no_grad():
            coded = _bits(student.prior(some, training=False)[1]) * each
        pairs = zip(made, wanted, self.spreads, strict=True)
        errors = torch.stack([(a.float() - b).square().sum() / len(x) / spread for a, b, spread in pairs]).sum()
        self._remember(number, errors=errors, bytes=coded / 8 + HEADER)
        return errors + self.steering.beta(number) * bits, coded

    def _second(self, number: int, x: Tensor, wanted: Tensor) -> Tensor:
        student = self.student(number)
        with torch.no_grad(), self._half():
            latent = student.rounded(student.encoder(x))
        scores = self.scores(number, latent)
        nats = divergence(wanted, scores)
        self._remember(number, nats=nats, same=(scores.argmax(1) == wanted.argmax(1)).float().mean())
        return nats

    def scores(self, number: int, latent: Tensor) -> Tensor:
        """What a student's decoder and the tail, as it is changed for that student, answer: float32 [B, classes]."""
        changes = self._changes(number)
        with self._half():
            found = self.student(number).decoder(latent)
            for at, part in enumerate(self.parts):
                changed = {
                    name: weight + changes[_key(at, name)]
                    for name, weight in weights(part).items()
                    if _key(at, name) in changes
                }
                (found,) = functional_call(part, changed, (found,))
        answers: Tensor = found.float()
        return answers

    @torch.no_grad()
    def _divide(self) -> None:
        """From here on every rate has a student of its own."""
        learned = self.student(self._finest)
        for student in self._each:
            for mine, theirs in zip(student.parameters(), learned.parameters(), strict=True):
                mine.copy_(theirs)
        self.steering.divide(self._finest)
        self._divided.fill_(1)

    def _changed(self) -> list[tuple[int, str, Tensor]]:
        """Number of the part, name and weight of what is tuned."""
        return [
            (number, name, weight)
            for number, part in enumerate(self.parts)
            for name, weight in weights(part).items()
            if number < self._plan.tuned or weight.ndim == 1
        ]

    def changes(self, student: int) -> dict[str, Tensor]:
        """What is added to the tail's weights, by part and name, see `student_file`."""
        return {key: change.detach() for key, change in self._changes(student).items()}

    def _changes(self, student: int) -> dict[str, Tensor]:
        deltas = self.deltas[student]
        assert isinstance(deltas, nn.ParameterDict)
        return {key: delta * self._units[key] for key, delta in deltas.items()}

    def _half(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16)

    @torch.no_grad()
    def _remember(self, number: int, **values: Tensor) -> None:
        for name, value in values.items():
            known = self.running[name][number]
            keep = torch.where(known > 0, RUNNING, 0.0)
            known.copy_(keep * known + (1 - keep) * value)


def divergence(wanted: Tensor, scores: Tensor) -> Tensor:
    """Kullback-Leibler divergence in nats of scores [B, classes] from wanted ones, on the mean."""
    nats: Tensor = (wanted * (wanted.clamp_min(1e-8).log() - scores.clamp_min(1e-8).log())).sum(1).mean()
    return nats


def check(backbone: Backbone) -> None:
    """See that a backbone has the stages that are known here.

    Raises:
        DataError: it has not.
    """
    if backbone.task.name != CLASSIFICATION or not set(backbone.split_points) >= set(STAGES):
        raise DataError(
            f"{backbone.spec.name} has no stages {', '.join(STAGES)}; the baseline is for EfficientNet-Lite models"
        )


def tail_parts(backbone: Backbone) -> Sequence[nn.Module]:
    """The backbone behind `ANCHOR`, cut at `STAGES`: features -> tuple of features, at last -> tuple of outputs."""
    return [
        *(backbone.between(a, b) for a, b in pairwise(STAGES)),
        backbone.tail(STAGES[-1]),
    ]


def unit(weight: Tensor) -> Tensor:
    """Root mean square of a tensor, for matrices and kernels that of each output channel; its shape broadcasts."""
    whole = weight.detach().square().mean().sqrt().clamp_min(1e-6)
    if weight.ndim < 2:
        return whole
    rows = weight.detach().flatten(1).square().mean(1).sqrt().maximum(1e-2 * whole)
    return rows.reshape(-1, *[1] * (weight.ndim - 1))


def _bits(likelihoods: Tensor) -> Tensor:
    return -likelihoods.log2().sum()


def _key(part: int, name: str) -> str:
    return f"{part}/{name.replace('.', '/')}"

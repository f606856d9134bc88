"""What Entropic Student learns from: both stages' losses, for several rates side by side on the same views.

1. encoder, prior, decoder: squared errors of features behind four stages of the backbone + beta x bits, noise for
   rounding; the backbone stays as it is.
2. decoder and tail: divergence of the answers from the uncut model's; encoder and prior stay, symbols are rounded.

As published (see `entropic_student`), the errors are summed over stages of the backbone at strides of 4, 8, 16 and 32.
What differs: each stage's errors are in units of what its features vary by, because that differs by a factor of forty
here; beta is not given but found, it moves until the rate is the one that was asked for; labels are not used; Adam in
both stages and rates that fall along a cosine, as for our own encoder.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
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

STAGES = (ANCHOR, "blocks.2", "blocks.4", "blocks.6")
"""The last stages of the EfficientNet-Lite models at strides of 4, 8, 16, 32."""
HEADER = 22
"""Bytes of a packet beside its slice."""
ROWS = 4
"""The prior looks at every fourth row of a latent, others in each step: a fourth of the work, the same on the mean."""
COARSER = 8.0
"""How many times the rate that is asked for is allowed at first, ..."""
REACHED = 0.5
"""... falling to it in this share of the first stage."""
FREE = 0.08
"""Until this share of the first stage beta stays as it began, ..."""
HELD = 0.8
"""... and from this one on it stays as it is."""
GAIN = 20.0
"""How fast beta moves: its logarithm, for a rate off by a factor of e, in all of the stage."""
WORTH = 0.03
"""Beta at first times the bits that are asked for. Little: where bits cost much from the first step, none are used."""
FARTHEST = math.log(300.0)
"""Most that beta moves from there, as a logarithm."""
LONGEST = 0.02
"""Share of the stage that a step counts for at most; a process that stood still has not learned meanwhile."""
RUNNING = 0.95


class Views(Protocol):
    """Of photographs, see `learning.album` and `learning.views`."""

    def batch(self, rng: np.random.Generator, number: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Pixels uint8 [B, S, S, 3], features float32 [B, C, H, W], outputs float32 [B, ...]."""


@dataclass(frozen=True)
class StudentPlan:
    """How it is learned.

    Attributes:
        targets: bytes of a packet, one student each.
        batch: views a step, the same ones for all students.
        first: share of the steps that are the first stage's.
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
    rate: float = 1e-3
    prior: float = 10.0
    tail_rate: float = 0.3
    tuned: int = len(STAGES)
    seed: int = 0


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
        self._wanted = 8.0 * (torch.tensor(plan.targets, device=device) - HEADER)
        self.first_betas = (WORTH / self._wanted).log()
        self.log_betas = self.first_betas.clone()
        self._share: float | None = None
        self.deltas = nn.ModuleList(
            nn.ParameterDict({_key(i, name): nn.Parameter(torch.zeros_like(w)) for i, name, w in self._changed()})
            for _ in plan.targets
        )
        self._units = {_key(i, name): unit(w) for i, name, w in self._changed()}
        with torch.no_grad():
            seen = self._levels(views.batch(np.random.default_rng((plan.seed, 9)), plan.batch)[1])
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
        return {"log_betas": self.log_betas, "spreads": self.spreads}

    def student(self, number: int) -> Student:
        """Of one rate, in the order of the plan's targets."""
        found = self.students[number]
        assert isinstance(found, Student)
        return found

    @property
    def _each(self) -> list[Student]:
        return [self.student(number) for number in range(len(self.students))]

    def begin_second(self) -> None:
        """Freeze the priors."""
        for student in self._each:
            student.prior.find_quantiles()

    def loss(self, stage: int, step: int, share: float) -> Tensor:
        """The loss of a step at a share 0..1 of its stage; the sum over students, none of which sees another's."""
        rng = np.random.default_rng((self._plan.seed, stage, step))
        generator = torch.Generator(self._device).manual_seed(int(rng.integers(2**62)))
        pixels, features, outputs = self._views.batch(rng, self._plan.batch)
        pixels, features = pixels.to(self._device), features.to(self._device)
        if stage == 0:
            return self._first(pixels, features, generator, int(rng.integers(ROWS)), share)
        return self._second(pixels, outputs[0].to(self._device))

    def _first(self, pixels: Tensor, features: Tensor, generator: torch.Generator, row: int, share: float) -> Tensor:
        bits, coded, decoded = [], [], []
        with self._half():
            with torch.no_grad():
                wanted = self._levels(features)
            x = self._pixels(pixels)
            for student in self._each:
                latent = student.encoder(x)
                noise = torch.rand(latent.shape, generator=generator, device=self._device) - 0.5
                noisy = latent + noise
                decoded.append(student.decoder(noisy))
                with torch.autocast(self._device.type, enabled=False):
                    some = noisy[:, :, row::ROWS]
                    each = noisy.shape[2] / some.shape[2] / len(x)
                    bits.append(student.prior.bits(some).sum() * each)
                    with torch.no_grad():
                        coded.append(student.prior.bits(latent[:, :, row::ROWS].round()).sum() * each)
            made = self._levels(torch.cat(decoded))
        rates = torch.stack(bits)
        errors = torch.stack(
            [
                ((mine.float() - theirs.float().repeat(len(self.students), 1, 1, 1)) ** 2).flatten(1).sum(1)
                .reshape(len(self.students), -1).mean(1) / spread
                for mine, theirs, spread in zip(made, wanted, self.spreads, strict=True)
            ]
        ).sum(0)  # fmt: skip
        self._remember(errors=errors, bytes=torch.stack(coded) / 8 + HEADER)
        loss = (errors + self.log_betas.exp() * rates).sum()
        # Noise costs bits that rounding does not: where most latents are small, several times what is then coded.
        self._steer(torch.stack(coded), share)
        return loss

    def _second(self, pixels: Tensor, wanted: Tensor) -> Tensor:
        x = self._pixels(pixels)
        nats, same = [], []
        for index, student in enumerate(self._each):
            with self._half():
                with torch.no_grad():
                    medians = student.prior.medians
                    latent = torch.round(student.encoder(x) - medians) + medians
                found = student.decoder(latent)
                changes = self._changes(index)
                for number, part in enumerate(self.parts):
                    changed = {
                        name: weight + changes[_key(number, name)]
                        for name, weight in weights(part).items()
                        if _key(number, name) in changes
                    }
                    (found,) = functional_call(part, changed, (found,))
            scores = found.float()
            logarithms = wanted.clamp_min(1e-8).log() - scores.clamp_min(1e-8).log()
            nats.append((wanted * logarithms).sum(1).mean())
            same.append((scores.argmax(1) == wanted.argmax(1)).float().mean())
        self._remember(nats=torch.stack(nats), same=torch.stack(same))
        return torch.stack(nats).sum()

    @torch.no_grad()
    def _steer(self, rates: Tensor, share: float) -> None:
        moved, self._share = share - (share if self._share is None else self._share), share
        if FREE < share < HELD:
            allowed = self._wanted * COARSER ** (1 - min(share / REACHED, 1))
            self.log_betas += GAIN * min(moved, LONGEST) * (rates / allowed).log().clamp(-1, 1)
            self.log_betas.clamp_(self.first_betas - FARTHEST, self.first_betas + FARTHEST)

    def _levels(self, features: Tensor) -> list[Tensor]:
        """Features behind each of `STAGES`."""
        found = [features]
        for part in self.parts[:-1]:
            found.append(part(found[-1])[0])
        return found

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
    def _remember(self, **values: Tensor) -> None:
        for name, value in values.items():
            known = self.running[name]
            keep = torch.where(known > 0, RUNNING, 0.0)
            known.copy_(keep * known + (1 - keep) * value)


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


def _key(part: int, name: str) -> str:
    return f"{part}/{name.replace('.', '/')}"

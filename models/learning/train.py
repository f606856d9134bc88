"""`headrace train`: a slimmable encoder and its synthesis, distilled from the uncut model; labels are not used.

views -> encoder, each part of the batch at another width -> surrogate of quantiser and coder, each view at its own gain
      -> synthesis -> features, and behind the rest of the backbone, which may change a little (`deltas`), scores
loss = price x gain^2 x nats by which the answer is disturbed + bits

Stage by stage: `features` learns from the metric at the anchor (a dense target from the first step), `answers` from the
divergence of the scores themselves. Photographs may be laid over each other: the uncut model answers anything, and a
few thousand photographs then teach like many more (Beyer et al., "Knowledge distillation: A good teacher is patient and
consistent", CVPR 2022, after Zhang et al., "mixup", ICLR 2018). Every width is taught by the uncut model, not by the
widest one, in each step the widest, the narrowest and one between (the sandwich of Yu and Huang, "Universally Slimmable
Networks", ICCV 2019).
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from ..backbones import Backbone, Pixels
from ..exceptions import DataError
from ..repair.deltas import Deltas
from ..repair.distil import distance
from ..tasks import CLASSIFICATION, DETECTION
from .album import Album
from .anchor import at_anchor, root, variances
from .descent import descend
from .gallery import Gallery
from .metric import Nats
from .plan import Stage, TrainPlan
from .resume import Arrays, resume
from .slimmable import STRIDE, SlimmableEncoder
from .start import Narrowing, start
from .surrogate import Surrogate
from .synthesis import Synthesis, SynthesisShape
from .team import Team
from .views import Teacher, Views

FITTED = 300
"""Photographs from which the metric and the features' statistics are taken."""
STARTED = 64
"""Views from which the encoder's first statistics are taken."""
ANSWERS_SHARE = 0.75
"""In the stage towards answers, the share of their divergence; the rest is the metric's."""
RESUMED = 256
"""Views from which statistics of networks are taken that are gone on from."""
RUNNING = 0.98


@dataclass(frozen=True)
class Learned:
    """What training gives.

    Attributes:
        encoder: all widths.
        synthesis: of the anchor's features.
        tail: changes of the rest of the backbone.
        said: what the bundle's provenance says of the training.
    """

    encoder: SlimmableEncoder
    synthesis: Synthesis
    tail: Deltas
    said: str


def train(
    backbone: Backbone,
    plan: TrainPlan,
    paths: Sequence[Path],
    work: Path,
    team: Team,
    progress: Progress | None = None,
    begun: Arrays | None = None,
) -> Learned:
    """Learn, from where an earlier run of the same plan and photographs was killed.

    On a GPU it goes on with the views that it would have met. On a CPU with nearly those: the ring of views is ahead of
    the checkpoint by what was made since, so a step after it meets some views that it would have met later.

    Args:
        backbone: a classifier or a detector; what is learned goes behind its input and before `plan.anchor`.
        plan: what to learn, and how.
        paths: photographs.
        work: folder for views and checkpoints.
        team: the processes that learn together, and this one's device.
        progress: where to show progress; None for nowhere.
        begun: what a bundle holds of the networks, where the plan begins with those.

    Raises:
        DataError: the plan begins with a bundle's networks and there are none, or others; too few photographs, or one
            cannot be read; the backbone is for another task, its input no multiple of 16 pixels, or its features at the
            anchor are not one map of a size that a latent can be scaled to.
        BackboneError: no such split point.
    """
    progress = progress or Progress(disable=True)
    shape = synthesis_shape(backbone, plan)
    if plan.scenes and backbone.task.name != DETECTION:
        raise DataError(f"{backbone.spec.name} sees no scenes, which are a detector's; take scenes out of the plan")
    if len(paths) < FITTED:
        raise DataError(f"{len(paths)} photographs are too few to learn from; give at least {FITTED}")
    if plan.begin == "bundle" and not begun:
        raise DataError(f"there are no networks {plan.name!r} to go on from; let the plan begin with the backbone")
    begun = begun if begun and plan.begin == "bundle" else {}
    folder = work / _identity(backbone, plan, 0, paths, begun)
    device, mine = team.device, folder / f"rank-{team.rank}"
    share = paths[team.rank :: team.size]  # each of a team takes every so manieth photograph
    views: Album | Gallery | Views
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # all batches have one shape, and depthwise kernels differ much in speed
    if plan.scenes:
        views = Gallery(share, backbone, plan.anchor, plan.later, device)
    elif device.type == "cuda":
        views = Album(share, backbone, plan.anchor, device, plan.later)
    else:
        teacher = Teacher(backbone, plan.anchor, mine, device, plan.later)
        views = Views(share, teacher, backbone, plan.views, plan.seed, mine)
    bar = progress.add_task("views", total=plan.views, completed=views.made)
    views.fill(lambda made: progress.update(bar, completed=made))
    lesson = Lesson(backbone, plan, shape, views, _fitted(paths, plan.seed), team, progress, begun)
    for number, stage in enumerate(plan.stages):
        lesson.begin(number, stage)
        note = _noting(progress, f"towards {stage.towards}", stage.steps, lesson.batch * team.size, lesson)
        named, state = lesson.parameters(stage), lesson.state(stage)
        descend(
            named,
            lesson.loss,
            stage.rate,
            stage.steps,
            folder / f"stage-{number}.safetensors",
            _identity(backbone, plan, number + 1, paths, begun),
            note,
            state,
            partial(team.average_gradients, list(named.values())),
            keeps=team.first,
            average=plan.average,
        )
        team.average(state.values())
    stages = ", then ".join(
        f"{s.steps} steps of {s.batch or plan.batch} views towards {s.towards}" for s in plan.stages
    )
    said = f"{lesson.began} {stages}, of {len(paths)} unlabelled photographs, seed {plan.seed}"
    return Learned(lesson.encoder.eval(), lesson.synthesis.eval(), lesson.tail.eval(), said)


def synthesis_shape(backbone: Backbone, plan: TrainPlan) -> SynthesisShape:
    """Size of the synthesis that a plan asks for.

    Raises:
        DataError: see `train`.
        BackboneError: no such split point.
    """
    size, name = backbone.preprocessing.size, backbone.spec.name
    if backbone.task.name not in (CLASSIFICATION, DETECTION) or size % STRIDE:
        raise DataError(
            f"{name} cannot be learned for: a classifier or a detector is needed whose input is a multiple of 16 pixels"
        )
    channels, height, width = backbone.shape(plan.anchor)
    side = size // STRIDE
    scale = height // side
    doubled = 2 ** (len(plan.synthesis) - 1)
    if height != width or scale * side != height or scale < 1 or scale % doubled:
        raise DataError(
            f"{name} has {channels}x{height}x{width} after {plan.anchor}; an anchor of {side}, {2 * side}, ... places "
            f"a side is needed, and one that {len(plan.synthesis)} levels of the synthesis can reach"
        )
    return SynthesisShape(plan.encoder.latent, (channels, height, width), scale, plan.synthesis)


class Lesson:
    """The networks, what they learn from, and their loss."""

    def __init__(
        self,
        backbone: Backbone,
        plan: TrainPlan,
        shape: SynthesisShape,
        views: Album | Gallery | Views,
        fitted: Sequence[Path],
        team: Team,
        progress: Progress,
        begun: Arrays | None = None,
    ) -> None:
        """The metric at the anchor, and the networks, which start as what has begun, or else from the backbone where
        that has their form."""
        device = team.device
        self._plan, self._views, self._device, self._rank = plan, views, device, team.rank
        self._pixels = Pixels(backbone.preprocessing).to(device)
        tail = copy.deepcopy(backbone.tail_beside(plan.anchor, plan.later)).to(device)
        self.tail = Deltas(tail, plan.tail_rank, plan.seed)
        self._task = backbone.task
        self._widths = list(plan.encoder.widths)
        self._number, self._stage = 0, plan.stages[0]
        self.nats, self.bytes = 0.0, 0.0
        features, gradients = at_anchor(backbone, plan, fitted, progress)
        self._metric = Nats(gradients).to_device(device)
        self._varied = variances(tail, features, len(plan.later), device)
        # What the features vary by, in nats: so the loss is of the order of 1, as the optimiser expects.
        varied = torch.cat([self._metric((part - features.mean(0)).to(device)) for part in torch.split(features, 32)])
        self._unlearned = max(float(varied.mean()), 1e-30)
        torch.manual_seed(plan.seed)
        self.encoder = SlimmableEncoder(plan.encoder.widths, plan.encoder.latent)
        mean = features.mean((0, 2, 3))
        spread = root(features - mean[:, None, None])
        self.synthesis = Synthesis(shape, mean, spread)
        self.began = "from random weights"
        narrowing = Narrowing.of(backbone, plan.anchor)
        if not begun and narrowing and narrowing.covers(self.encoder) and shape.scale == 2:
            seen = Pixels(backbone.preprocessing)(
                views.batch(np.random.default_rng(plan.seed), min(STARTED, views.count))[0].cpu()
            )
            start(self.encoder, self.synthesis, narrowing, seen, features, self._metric, plan.price)
            self.began = "from the backbone's own first stages"
        self.encoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.synthesis.to(device)
        if begun:
            seen = self._pixels(views.batch(np.random.default_rng(plan.seed), min(RESUMED, views.count))[0].to(device))
            resume(begun, plan.name, self.encoder, self.synthesis, self.tail, seen)
        side = backbone.preprocessing.size // STRIDE
        self.surrogate = Surrogate(len(self._widths), plan.encoder.latent, side).to(device)
        if begun:
            self.began = "from the bundle's networks"
            with torch.no_grad():
                for at, width in enumerate(self._widths):
                    self.surrogate.observe(self.encoder.eval()(seen, width), at, 1.0)

    def begin(self, number: int, stage: Stage) -> None:
        """Go on to a stage."""
        self._number, self._stage = number, stage
        self.encoder.train(stage.encoder)
        self.synthesis.train()
        self.surrogate.train(stage.encoder)
        self.tail.requires_grad_(stage.tail)

    @property
    def batch(self) -> int:
        """Views a step of this stage."""
        return self._stage.batch or self._plan.batch

    def parameters(self, stage: Stage) -> dict[str, torch.nn.Parameter]:
        """What learns in a stage, by name."""
        named = {f"synthesis.{k}": p for k, p in self.synthesis.named_parameters()}
        if stage.encoder:
            named |= {f"encoder.{k}": p for k, p in self.encoder.named_parameters()}
        if stage.tail:
            named |= {f"tail.{k}": p for k, p in self.tail.named_parameters()}
        return named

    def state(self, stage: Stage) -> dict[str, Tensor]:
        """Running statistics, by name, and what does not learn in a stage but had learned before, for the checkpoint to
        hold."""
        named = {f"synthesis.{k}": b for k, b in self.synthesis.named_buffers()}
        named |= {f"encoder.{k}": b for k, b in self.encoder.named_buffers()}
        if not stage.encoder:
            named |= {f"encoder.{k}": p.data for k, p in self.encoder.named_parameters()}
        if not stage.tail and any(s.tail for s in self._plan.stages[: self._number]):
            named |= {f"tail.{k}": p.data for k, p in self.tail.named_parameters()}
        return named | {"surrogate.scales": self.surrogate.scales}

    def loss(self, step: int) -> Tensor:
        """The loss of a step; see the module's docstring. Views at fine gains would outweigh all others, so each view's
        loss is divided by its gain."""
        plan, stage = self._plan, self._stage
        if step:
            self._views.add(plan.fresh, stage.mix)
        rng = np.random.default_rng((plan.seed, self._number, step, self._rank))
        torch.manual_seed(int(rng.integers(2**62)))
        pixels, features, wanted = self._views.batch(rng, self.batch, stage.mix)
        pixels, features = pixels.to(self._device), features.to(self._device)
        gain = torch.from_numpy(np.exp(rng.uniform(0, np.log(plan.gains), self.batch)).astype(np.float32)).to(
            self._device
        )
        rounded = step >= stage.noise * stage.steps
        x = self._pixels(pixels)
        decoded, bits = [], []
        at = 0
        for width, number in self._shares(rng):
            part = slice(at, at + number)
            at += number
            with self._half(), torch.set_grad_enabled(stage.encoder):
                latent = self.encoder(x[part], self._widths[width])
            each = self.surrogate(latent, gain[part], width, rounded)
            decoded.append(each[0])
            bits.append(each[1])
        rate = torch.cat(bits)
        with self._half():
            made = self.synthesis(torch.cat(decoded).contiguous(memory_format=torch.channels_last)).float()
        with self._half():
            nats = self._metric(made - features)
        if stage.towards == "answers":
            with self._half():
                outputs = tuple(o.float() for o in self.tail(made.contiguous(memory_format=torch.channels_last)))
            aims = tuple(w.to(self._device) for w in wanted)
            end = len(outputs) - len(self._varied)
            divergence = distance(self._task, outputs[:end], aims[:end])
            nats = ANSWERS_SHARE * stage.worth * divergence + (1 - ANSWERS_SHARE) * nats
            for name, mine, aim, varied in zip(plan.later, outputs[end:], aims[end:], self._varied, strict=True):
                if name in stage.later:
                    nats = nats + stage.later[name] * ((mine - aim).square() / varied).flatten(1).mean(1)
        self._remember(nats, rate)
        if stage.ramp:
            rate = rate * min(1.0, (step + 1) / (stage.ramp * stage.steps))
        loss: Tensor = ((plan.price * gain**2 * nats + rate) / gain).mean() / (plan.price * self._unlearned)
        return loss

    def _shares(self, rng: np.random.Generator) -> list[tuple[int, int]]:
        """(width, views): so many at the widest as the plan says, half of the others at the narrowest and at one
        between."""
        batch, last = self.batch, len(self._widths) - 1
        if last == 0:
            return [(0, batch)]
        rest = 1 - (self._stage.widest or self._plan.widest)
        if last == 1:
            narrowest = max(1, round(batch * rest))
            return [(last, batch - narrowest), (0, narrowest)]
        between = int(rng.integers(1, last))
        others = max(1, round(batch * rest / 2))
        return [(last, batch - 2 * others), (between, others), (0, others)]

    def _half(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16)

    def _remember(self, nats: Tensor, rate: Tensor) -> None:
        now = float(nats.detach().mean()), float(rate.detach().mean()) / 8
        keep = RUNNING if self.bytes else 0.0
        self.nats = keep * self.nats + (1 - keep) * now[0]
        self.bytes = keep * self.bytes + (1 - keep) * now[1]


def _fitted(paths: Sequence[Path], seed: int) -> list[Path]:
    order = np.random.default_rng((seed, 7)).permutation(len(paths))[:FITTED]
    return [paths[i] for i in order]


def _identity(backbone: Backbone, plan: TrainPlan, stages: int, paths: Sequence[Path], begun: Arrays) -> str:
    """16 hex digits over everything that the result of the first stages hangs on, by which files are found again: a
    plan that gets one more stage goes on from where it ended."""
    first = plan.model_copy(update={"stages": plan.stages[:stages]})
    parts = [
        backbone.spec.sha256,
        first.model_dump(mode="json", exclude={"bundle": True, "encoder": {"kept"}}),
        [f"{p.parent.name}/{p.name}" for p in paths],
        *(hashlib.sha256(begun[key].tobytes()).hexdigest() for key in sorted(begun)),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _noting(progress: Progress, name: str, steps: int, batch: int, lesson: Lesson) -> Callable[[int, float], None]:
    """Show steps, speed, and running means of loss, distortion and bytes."""
    bar, mean, last, speed = progress.add_task(name, total=steps), 0.0, time.monotonic(), 0.0

    def note(done: int, loss: float) -> None:
        nonlocal mean, last, speed
        now = time.monotonic()
        mean = RUNNING * mean + (1 - RUNNING) * loss if mean else loss
        speed = RUNNING * speed + (1 - RUNNING) * (now - last) if speed else now - last
        said = (
            f"{batch / max(speed, 1e-6):.0f} views/s, loss {mean:.3f}, {lesson.nats:.3f} nats, {lesson.bytes:.0f} bytes"
        )
        progress.update(bar, completed=done, said=said)
        last = now

    return note

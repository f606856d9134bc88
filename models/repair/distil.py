"""`headrace repair`: teach the server's half to answer coarse symbols, by distillation from the uncut model.

crops of photographs -> features -> encoder -> hard-quantised symbols of a random rate level, sometimes a prefix
symbols -> decoder -> denoiser -> tail + deltas -> outputs, moved towards the uncut model's outputs for that crop

Encoder, tables and bitstream stay as they are (the second stage of Matsubara et al., "SC2 Benchmark: Supervised
Compression for Split Computing", TMLR 2023, on a closed form instead of a learned encoder). One repair serves all rate
levels and prefixes, for a server answers them in one batch. Behind a light head it begins with the restorer that was
learned with it (`learning.restore`), in the denoiser's place. The tail is changed by products of low rank (Hu et al.,
"LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022), so that a bundle stays small; they are added to the
weights when the tail is loaded and cost no time. Labels are not used.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgpack
import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress
from torch import Tensor

from ..backbones import Backbone
from ..bottleneck import Decoder
from ..bundle import Bundle
from ..bundle_files import replace_files
from ..exceptions import DataError
from ..learning.descent import descend
from ..learning.team import ALONE, Team
from ..measure import find_pictures, views_of
from ..split import choose, measured_points
from ..tasks import Detection, Segmentation, Several, Task
from ..zoo.catalogue import backbone_of
from .data import Crops, RandomSymbols, make_crops
from .lean import kept
from .resample import Resample, own_cut
from .resample_fit import fit_resample
from .restorer import RESTORE, Restorer
from .student import Student
from .tail import Denoiser, mean_gain, repair_of, restores, said_without

LEVEL_POWER = 2.0
"""Of the gain, by which frames are weighed."""
CROPS_SHARE = 0.3
"""Share of the minutes after which no more crops are made."""
STATE = "student.safetensors"
RARE = 1e-4
"""Scores of a detector's candidates that are lower are not told apart."""
TIMED = 6
"""Steps that are timed to tell how many fit."""


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """How a repair is learned.

    Attributes:
        at: split points; empty for all of the bundle's.
        minutes: time for each split point, crops included; decides the number of steps from a few timed ones.
        steps: number of steps, instead of what fits into `minutes`; 0 for the latter.
        crops: how many at most are made of the photographs.
        batch: crops a step.
        rank: of the deltas of the tail's matrices; 0 leaves them alone.
        hidden: channels of the denoiser; 0 for none. A restorer that the bundle has stands in its place as it is.
        rate: learning rate at its height.
        device: "cpu" or "cuda".
        half: compute in bfloat16, where the processor has it in half the time; what is learned stays float32.
        seed: of crops, rate levels and prefixes.
        photographs, held_out: as given to `split`; with its seed too, the operating points are measured on the same
            photographs as then. Those are not learned from.
        views: of each photograph that is measured on: itself, and parts of it.
        resample: of a split point on fewer pixels, answer on the grid of all (see `resample`).
    """

    at: tuple[str, ...] = ()
    minutes: float = 20.0
    steps: int = 0
    crops: int = 16_000
    batch: int = 16
    rank: int = 16
    hidden: int = 64
    rate: float = 1e-3
    device: str = "cpu"
    half: bool = False
    seed: int = 0
    photographs: int = 300
    held_out: int = 64
    views: int = 1
    resample: bool = False


def repair(
    bundle: Bundle,
    calibration: Path,
    plan: RepairPlan,
    work: Path,
    progress: Progress | None = None,
    more: Sequence[Path] = (),
    team: Team = ALONE,
) -> tuple[Backbone, Bundle]:
    """Learn a repair for a bundle's split points and measure its operating points anew.

    Args:
        bundle: any; a repair that it has is replaced where `plan.at` says.
        calibration: folder of unlabelled photographs.
        plan: how.
        work: folder for crops and checkpoints, to be removed once the bundle is saved. A run that was killed goes on
            from there.
        progress: where to show progress; None for nowhere.
        more: folders of other photographs to learn from; none of theirs is measured on.
        team: the processes that share each step's crops; all but the first one measure nothing.

    Returns:
        The backbone, whose weights the bundle's folder may have to hold (`zoo.write_weights`), and the same bundle
        (and fingerprint) with `repair`, its operating points measured with it.

    Raises:
        DataError: too few photographs, or no such device; crops cannot be shared out evenly; features are to be
            resampled that a restorer is for.
        BackboneError: the backbone's weights are missing or are not the bundle's.
        OperatingPointError: the bundle has no such split point.
    """
    progress = progress or Progress(disable=True)
    if plan.resample and not plan.hidden:
        raise DataError("features are resampled before the denoiser; a repair without one cannot")
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise DataError("there is no CUDA device here; use --device cpu, or check the driver with nvidia-smi")
    backbone = backbone_of(bundle)
    names = tuple(bundle.split(name).name for name in plan.at) or tuple(s.name for s in bundle.splits)
    if plan.batch % team.size:
        raise DataError(f"{plan.batch} crops a step are not the same number for each of {team.size} processes")
    if team.size > 1 and not plan.steps:
        raise DataError("several processes would not find the same number of steps in the minutes; say --steps")
    for name in names:
        if plan.resample and restores(bundle, name):
            raise DataError(f"the restorer of {name} is for its own grid; repair it without --resample")
    _, held_out = choose(calibration, plan.photographs, plan.held_out, plan.seed)
    paths = [p for folder in (calibration, *more) for p in find_pictures(folder) if p not in set(held_out)]
    found = {k: v for k, v in bundle.repair.items() if not k.startswith(tuple(f"{name}/" for name in names))}
    of = f"steps of {plan.batch} crops of {len(paths)} unlabelled photographs, rate {plan.rate:g}, seed {plan.seed}"
    said = []
    for name in names:
        student, steps = _learn(backbone, bundle, name, paths, plan, work / name, progress, team)
        said.append(f"{name} by {steps} {of}")
        found |= {f"{name}/{key}": value for key, value in kept(student.tensors()).items()}
    provenance = {**bundle.provenance, "repair": "; ".join([*said_without(bundle, names), *said])}
    result = replace(bundle, repair=found, provenance=provenance).check()
    if team.first:
        result = measured_points(backbone, result, views_of(held_out, plan.views, plan.seed), progress, names)
    return backbone, result


def distance(task: Task, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """How far each frame's outputs are from the uncut model's, float32 [B].

    Classes, of a frame or of its pixels, are compared by the Kullback-Leibler divergence (distillation:
    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015), candidates of a detector by the divergence
    of their scores, each a yes or no of its own, and, as far as the uncut model takes them for something, by squared
    errors of their corners. Where the candidates
    themselves hang on the features (two-stage detectors) only what tells how sure the first stage is can be compared.
    """
    if isinstance(task, Several):
        parts = zip(task.tasks, task.apart(outputs), task.apart(wanted), strict=True)
        return torch.stack([distance(each, mine, theirs) for each, mine, theirs in parts]).sum(0)
    if isinstance(task, Segmentation):
        mine, theirs = outputs[0].log_softmax(1), wanted[0].log_softmax(1)
        return (theirs.exp() * (theirs - mine)).sum(1).flatten(1).mean(1)
    if isinstance(task, Detection):
        if len(outputs) > 2:
            return sum((((m - t) ** 2).flatten(1).sum(1) for m, t in zip(outputs[2:], wanted[2:], strict=True)),
                       outputs[0].new_zeros(len(outputs[0])))  # fmt: skip
        weight = wanted[0].clamp_min(0).sqrt()
        weight = weight[..., None] if outputs[1].ndim == 4 else weight.amax(2, keepdim=True)
        corners = (outputs[1] - wanted[1]) * weight * (8 / task.size)  # as in the Fisher metric
        mine, theirs = (scores.clamp(RARE, 1 - RARE) for scores in (outputs[0], wanted[0]))
        divergence = theirs * (theirs / mine).log() + (1 - theirs) * ((1 - theirs) / (1 - mine)).log()
        return divergence.flatten(1).sum(1) + corners.square().flatten(1).sum(1)
    logarithms = wanted[0].clamp_min(1e-8).log() - outputs[0].clamp_min(1e-8).log()
    return (wanted[0] * logarithms).sum(1)


def _learn(
    backbone: Backbone,
    bundle: Bundle,
    split: str,
    paths: Sequence[Path],
    plan: RepairPlan,
    work: Path,
    progress: Progress,
    team: Team,
) -> tuple[Student, int]:
    """A student that has learned, and in how many steps."""
    device, began = torch.device(plan.device), time.monotonic()
    folder = work / _identity(bundle, split, paths, plan)
    if team.first and not folder.is_dir():
        shutil.rmtree(work, ignore_errors=True)
    team.wait()
    plan = replace(plan, crops=plan.crops // team.size, batch=plan.batch // team.size)
    bar = progress.add_task(f"{split}: crops", total=None)
    schedule = folder / "steps.json"
    until = math.inf if plan.steps else began + 60 * plan.minutes * CROPS_SHARE
    if schedule.is_file():  # a run that is resumed keeps its crops and its schedule
        until = -math.inf

    def note_crops(done: int, of: int) -> None:
        progress.update(bar, completed=done, total=of, said=f"{done / max(time.monotonic() - began, 1e-3):.0f}/s")

    resampled = plan.resample and own_cut(split) != split
    mine = folder / f"crops-{team.rank}"
    seed = plan.seed + team.rank
    crops = make_crops(backbone, split, paths, plan.crops, seed, mine, device, note_crops, until, resampled)
    resample = fit_resample(backbone, split, paths, plan.seed, device) if resampled else None
    lesson = Lesson(bundle, split, backbone, crops, plan, device, resample, seed)
    team.average(lesson.student.buffers())  # of its own crops, by which a denoiser normalises
    if not schedule.is_file():
        left = 60 * plan.minutes - (time.monotonic() - began)
        replace_files(folder, {schedule.name: json.dumps({"steps": plan.steps or lesson.steps_within(left)}).encode()})
    steps = int(json.loads(schedule.read_text())["steps"])
    note = _noting(progress, f"{split}: repair", steps, plan.batch * team.size)
    named = dict(lesson.student.named_parameters())
    descend(
        named,
        lesson.loss,
        plan.rate,
        steps,
        folder / STATE,
        folder.name,
        note,
        exchange=lambda: team.average_gradients(named.values()),
        keeps=team.first,
    )
    return lesson.student, steps


def _noting(progress: Progress, name: str, steps: int, batch: int) -> Callable[[int, float], None]:
    """Show steps, speed and a running mean of the loss."""
    bar, mean, last = progress.add_task(name, total=steps), 0.0, time.monotonic()

    def note(done: int, loss: float) -> None:
        nonlocal mean, last
        now = time.monotonic()
        mean = 0.98 * mean + 0.02 * loss if mean else loss
        progress.update(bar, completed=done, said=f"{batch / max(now - last, 1e-6):.0f} crops/s, loss {mean:.4f}")
        last = now

    return note


class Lesson:
    """A student, what it learns from, and its loss."""

    def __init__(
        self,
        bundle: Bundle,
        split: str,
        backbone: Backbone,
        crops: Crops,
        plan: RepairPlan,
        device: torch.device,
        resample: Resample | None = None,
        seed: int | None = None,
    ) -> None:
        """Begin as the unrepaired half, on `device`; with a `resample` at the backbone's own size.

        `seed` is of the order of crops, and of rate levels and prefixes; None for the plan's.
        """
        self._seed = plan.seed if seed is None else seed
        tail, self._task = backbone.tail(own_cut(split) if resample else split).to(device), backbone.task
        self._crops, self._plan, self._device = crops, plan, device
        self._symbols = RandomSymbols(bundle, split, self._seed, device)
        self._gain = mean_gain(bundle, split)
        denoiser: Denoiser | Restorer | None = None
        if restores(bundle, split):
            denoiser = Restorer.of(repair_of(bundle, split), self._gain)
        elif plan.hidden:
            features, _ = crops.batch(np.arange(min(len(crops), 256)))
            if resample is not None:
                features = resample(features)
            deviation = features.std((0, 2, 3))
            deviation = deviation.clamp_min(1e-3 * float(deviation.mean()))
            torch.manual_seed(plan.seed)
            denoiser = Denoiser(features.mean((0, 2, 3)), deviation, self._gain, plan.hidden, resample)
        decoder = Decoder.of(bundle, split).to(device)
        self.student = Student(decoder, tail, denoiser, plan.rank, plan.seed).to(device)

    def loss(self, step: int) -> Tensor:
        """`distance` of the outputs to the uncut model's, each frame in proportion to what is usual at its rate level.

        A distance grows about as the square of the quantiser's step. Without this, what little goes wrong at fine rate
        levels would not count, and the tail, which is the same for all, would get worse there.
        """
        features, wanted = self._crops.batch(self._indexes(step))
        symbols, gain = self._symbols(features, step)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._plan.half):
            outputs = self.student(symbols, gain)
        distances = distance(self._task, tuple(o.float() for o in outputs), tuple(w.to(self._device) for w in wanted))
        return (distances * (gain.mean(1) / self._gain) ** LEVEL_POWER).mean()

    def steps_within(self, seconds: float) -> int:
        """Steps that fit into a time, at least one; nothing is learned by timing some."""
        began = 0.0
        for step in range(TIMED + 1):
            if step == 1:  # the first one allocates
                began = time.monotonic()
            self.loss(step).backward()  # type: ignore[no-untyped-call]
            self.student.zero_grad(set_to_none=True)
        return max(1, int(seconds * TIMED / max(time.monotonic() - began, 1e-4)))

    def _indexes(self, step: int) -> npt.NDArray[np.int64]:
        return crops_of_step(len(self._crops), self._plan.batch, self._seed, step)


def crops_of_step(count: int, batch: int, seed: int, step: int) -> npt.NDArray[np.int64]:
    """Indexes of a step's crops: every crop once an epoch, in an order of the epoch's own."""
    an_epoch = max(1, count // batch)
    order = np.random.default_rng((seed, 2, step // an_epoch)).permutation(count)
    at = step % an_epoch * batch
    return order[at : at + batch]


def _identity(bundle: Bundle, split: str, paths: Sequence[Path], plan: RepairPlan) -> str:
    """16 hex digits over everything that a run's result hangs on, by which its files are found again."""
    # In an order of its own: that of a file's tensors differs from one process to the next.
    begun = [(k, a.tobytes()) for k, a in sorted(bundle.repair.items()) if k.startswith(f"{split}/{RESTORE}/")]
    parts = [bundle.fingerprint, split, [str(p) for p in paths], asdict(plan), begun]
    return hashlib.sha256(msgpack.packb(parts)).hexdigest()[:16]

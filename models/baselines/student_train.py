"""`headrace eval train-student`: Entropic Student for several rates, learned side by side on the same views."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ..backbones import Backbone
from ..exceptions import DataError
from ..learning.album import Album
from ..learning.descent import descend
from ..measure import find_pictures
from ..split import bar_columns
from .entropic_student import ANCHOR
from .student_file import SUFFIX, StudentFacts, student_tensors, write_student
from .student_lesson import STAGES, StudentLesson, StudentPlan, check

SMOOTHED = 0.98


def train_student(
    backbone: Backbone,
    folders: Sequence[Path],
    output: Path,
    work: Path,
    plan: StudentPlan,
    views: int,
    device: str = "cpu",
) -> list[Path]:
    """Learn, from where an earlier run of the same plan and photographs was killed, and write a file a rate.

    Args:
        backbone: an EfficientNet-Lite model.
        folders: of photographs.
        output: folder for the files, made if need be.
        work: folder for checkpoints; it is left there.
        plan: rates, batch, and the like.
        views: in all, of both stages.
        device: "cpu" or "cuda".

    Returns:
        The files, one for each of the plan's targets.

    Raises:
        DataError: no photographs, one cannot be read, the backbone is another one, too few views, or no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("there is no CUDA device here; use --device cpu, or check the driver with nvidia-smi")
    steps = [int(views * share / plan.views(stage)) for stage, share in enumerate((plan.first, 1 - plan.first))]
    if min(steps) < 1:
        raise DataError(f"{views} views are too few for both stages of batches of {plan.batch}; give more")
    check(backbone)
    paths = [path for folder in folders for path in find_pictures(folder)]
    where = torch.device(device)
    identity = _identity(backbone, plan, paths, views)
    output.mkdir(parents=True, exist_ok=True)
    lesson = StudentLesson(backbone, plan, Album(paths, backbone, ANCHOR, where, STAGES[1:]), where)
    with Progress(*bar_columns(), console=Console(stderr=True)) as progress:
        for stage, count in enumerate(steps):
            if stage:
                lesson.begin_second()
            descend(
                lesson.parameters(stage),
                lambda step, stage=stage, count=count: _sum(lesson.losses(stage, step, step / count)),  # type: ignore[misc]
                plan.rate,
                count,
                work / identity / f"stage-{stage}{SUFFIX}",
                identity,
                _noting(progress, lesson, stage, count, plan.views(stage)),
                lesson.state(),
                rates=lesson.rates,
            )
    parts = "all of the tail" if plan.tuned == len(STAGES) else f"the tail up to {STAGES[plan.tuned]}, and its biases"
    said = (
        f"{steps[0]} steps of {plan.views(0)} views in the first stage, {steps[1]} of {plan.views(1)} in the second, "
        f"of {len(paths)} unlabelled photographs, seed {plan.seed}; tuned: decoder, {parts}"
    )
    written = []
    for i, target in enumerate(plan.targets):
        name, digest = backbone.spec.name, backbone.spec.sha256
        seen = sum(count * plan.views(stage) for stage, count in enumerate(steps))
        facts = StudentFacts(name, digest, target, float(lesson.steering.beta(i)), seen, said)
        written.append(output / f"student-{target}{SUFFIX}")
        write_student(written[-1], student_tensors(lesson.student(i), lesson.changes(i)), facts)
    return written


def _sum(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()


def _identity(backbone: Backbone, plan: StudentPlan, paths: Sequence[Path], views: int) -> str:
    """16 hex digits over all that the result hangs on, by which its checkpoints are found again."""
    parts = [backbone.spec.sha256, asdict(plan), views, [f"{p.parent.name}/{p.name}" for p in paths]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _noting(
    progress: Progress, lesson: StudentLesson, stage: int, steps: int, batch: int
) -> Callable[[int, float], None]:
    """Show steps, speed, and each student's running means."""
    bar, last, speed = progress.add_task(f"stage {stage + 1}", total=steps), time.monotonic(), 0.0

    def note(done: int, _: float) -> None:
        nonlocal last, speed
        now = time.monotonic()
        speed = SMOOTHED * speed + (1 - SMOOTHED) * (now - last) if speed else now - last
        last = now
        shown = ("errors", "bytes") if stage == 0 else ("nats", "same")
        each = zip(*(lesson.running[name].tolist() for name in shown), strict=True)
        told = ", ".join(f"{a:.3f} at {b:.0f}" if stage == 0 else f"{a:.3f} nats, {b:.3f}" for a, b in each)
        progress.update(bar, completed=done, said=f"{batch / max(speed, 1e-6):.0f} views/s, {told}")

    return note

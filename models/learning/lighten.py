"""`headrace lighten`: what devices run, made cheaper without a change of what it gives.

pixels -> the head as it is  -> latent, the target
       -> the lightened head -> latent

A ReLU6 costs ONNX Runtime a pass over the map that a ReLU does not (`cutting.own_head`). Of a mobile network most can
go: little of what they clip matters, and weights that know of it make up for it. The backbone's own heads can lose
hidden channels besides (`narrow`). The target is dense, every number of the latent that is quantised next, so that
neither synthesis nor the rest of the backbone is run and no GPU is needed. (A distillation of features: Romero et al.,
"FitNets: Hints for Thin Deep Nets", ICLR 2015.) What the server runs, the transform, the tables and the operating
points stay as they are.

Clips that matter stay: those whose leaving out would by itself move the latent by more than `SPARED` of its variance. A
head of the backbone's own that is light already learns on. What such a head cannot compute any more the server's half
can learn to tell, with it: see `restore`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress

from ..backbones import Backbone
from ..bundle import Bundle
from ..bundle_files import tensors_file
from ..exceptions import DataError
from ..repair.tail import restores, said_without
from .course import Course, Lesson, Lightening, lessons_of
from .cut import learned_cuts, own_heads
from .descent import descend
from .light import Light
from .restore import RestoreCourse
from .team import ALONE, Team

SPARED = 0.05
"""Share of its variance by which a latent may move when one clip is left out."""


def lighten(
    backbone: Backbone,
    bundle: Bundle,
    names: Sequence[str],
    paths: Sequence[Path],
    how: Lightening,
    work: Path,
    progress: Progress | None = None,
    team: Team = ALONE,
) -> Bundle:
    """A bundle whose heads at some split points have few of their ReLU6s left; operating points are as they were.

    Args:
        backbone: the bundle's; it knows the new heads afterwards.
        bundle: any.
        names: split points, see `lessons_of`.
        paths: photographs to learn from.
        how: steps, rate, seed.
        work: folder for checkpoints, from which a run that was killed goes on.
        progress: where to show progress; None for nowhere.
        team: the processes that share each step's views; what is learned is the same, but for rounding.

    Raises:
        DataError: as `lessons_of`; a head has no ReLU6; there are no photographs, or one cannot be read; there is
            nothing to restore behind a learned encoder; a head that learned with a restorer is to learn without.
    """
    progress = progress or Progress(disable=True)
    made, course_of = bundle, RestoreCourse if how.restore else Course
    for name in names:
        if restores(bundle, name) and not how.restore:
            raise DataError(
                f"the head of {name} learned with a restorer, which would not fit it any more: add --restore"
            )
    for lesson in lessons_of(bundle, names):
        clips, networks = _learned(course_of(backbone, bundle, lesson, paths, how, work, team), work, progress)
        made = _with(made, lesson, clips, networks, how, len(paths))
    backbone.learned, backbone.own_heads = learned_cuts(made), own_heads(made)
    return made.check()


def _learned(course: Course, work: Path, progress: Progress) -> tuple[tuple[int, ...], Light]:
    """Clips that stay, and networks that have learned."""
    clips = course.lesson.specs[0].clips
    if clips is None:
        every = set(course.networks(None).clipped)
        if not every:
            raise DataError(f"{course.called}: there is no ReLU6 in what the device runs, nothing can be left out")
        clips = tuple(at for at in sorted(every) if course.worst(course.networks(every - {at})) > SPARED)
    how, networks = course.how, course.networks(clips, course.how.hidden)
    bar = progress.add_task(f"{course.called}: lighter", total=how.steps, said=f"clips {clips} stay")

    def note(done: int, loss: float) -> None:
        progress.update(bar, completed=done, said=f"{loss / len(course.lesson.specs):.4f} of the variance off")

    said = json.dumps([*course.identity, list(clips)], default=list)
    identity = hashlib.sha256(said.encode() + tensors_file(course.arrays())).hexdigest()
    checkpoint = work / f"lighten-{identity[:16]}.safetensors"
    descend(
        networks.parameters,
        lambda step: course.step(networks, step),
        how.rate,
        how.steps,
        checkpoint,
        identity,
        note,
        exchange=lambda: course.team.average_gradients(networks.parameters.values()),
        keeps=course.team.first,
        average=how.average,
    )
    return clips, networks


def _with(
    bundle: Bundle, lesson: Lesson, clips: tuple[int, ...], networks: Light, how: Lightening, photographs: int
) -> Bundle:
    names = {s.name for s in lesson.specs}
    splits = tuple(replace(s, clips=clips) if s.name in names else s for s in bundle.splits)
    said = (
        f"{', '.join(sorted(names))} by {how.steps} steps of {how.batch} views of {photographs} unlabelled "
        f"photographs, rate {how.rate:g}, average {how.average:g}, seed {how.seed}"
        f"{', hidden channels ' + ','.join(map(str, how.hidden)) if how.hidden else ''}"
        f"{', with a restorer' if how.restore else ''}"
    )
    before = [bundle.provenance["lighten"]] if "lighten" in bundle.provenance else []
    repair = networks.repair()
    if repair:  # what was learned behind the head that was there is of no use behind this one
        others = {k: v for k, v in bundle.repair.items() if not k.startswith(tuple(f"{name}/" for name in names))}
        of_others = "; ".join(said_without(bundle, names))
        bundle = replace(bundle, repair=others | repair, provenance={**bundle.provenance, "repair": of_others})
    return replace(
        bundle.with_learned({**bundle.learned, **networks.tensors()}),
        splits=splits,
        provenance={**bundle.provenance, "lighten": "; ".join([*before, said])},
    )

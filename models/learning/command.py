"""`headrace train` and `headrace lighten`, from what is asked for to the bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from ..bundle import Bundle, short
from ..exceptions import DataError
from ..measure import find_pictures, views_of
from ..recode import latents_of, recoded
from ..split import bar_columns, choose, measured_points, timed
from ..zoo.catalogue import backbone_of, write_weights
from .assemble import assemble, without
from .course import Lightening, lessons_of
from .lighten import lighten
from .plan import TrainPlan
from .team import Team
from .train import train


def train_bundle(
    plan_file: Path,
    folders: Sequence[Path],
    output: Path,
    work: Path,
    fitted: int,
    held_out: int,
    views: int,
    device: str,
) -> None:
    """Learn what a plan says and write the bundle that has it; see `train` and `assemble` for what is raised.

    Args:
        plan_file: TOML, see `plan`.
        folders: of photographs; the closed form is fitted and measured on those of the first.
        output: folder of the new bundle.
        work: folder for views and checkpoints; it is left there, to go on from.
        fitted, held_out: numbers of photographs to fit and to measure on; the latter are not learned from.
        views: of each photograph that is measured on: itself, and parts of it.
        device: "cpu" or "cuda".
    """
    plan = TrainPlan.load(plan_file)
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("there is no CUDA device here; use --device cpu, or check the driver with nvidia-smi")
    paths, fit_on, measured_on = _divided(folders, fitted, held_out)
    bundle = Bundle.load(plan.bundle)
    if plan.begin == "bundle" and any(
        s.learned and s.learned.name == plan.name and s.clips is not None for s in bundle.splits
    ):
        raise DataError(
            f"{plan.name!r} of bundle {bundle.name} is light already; to learn on, begin with the bundle from before "
            "`headrace lighten`, or with the backbone"
        )
    backbone = backbone_of(without(bundle, plan.name))
    with (
        Team.joined(device) as team,
        Progress(*bar_columns(), console=Console(stderr=True), disable=not team.first) as progress,
    ):
        begun = {key: each for key, each in bundle.learned.items() if key.startswith(f"{plan.name}/")}
        learned = train(backbone, plan, paths, work, team, progress, begun)
        if not team.first:
            return
        made = assemble(backbone, bundle, plan, learned, fit_on, views_of(measured_on, views, plan.seed), progress)
    made.save(output)
    write_weights(backbone, output)
    typer.echo(f"{output}: {len(made.operating_points)} operating points, fingerprint {short(made.fingerprint)}")


def lighten_bundle(
    folder: Path,
    names: Sequence[str],
    how: Lightening,
    folders: Sequence[Path],
    output: Path,
    work: Path,
    fitted: int,
    held_out: int,
    views: int,
) -> None:
    """Learn heads without clips and write the bundle that has them; see `lighten` for what is raised.

    Args:
        folder: of the bundle.
        names: split points.
        how: steps, rate, seed.
        folders, output, work, fitted, held_out, views: as for `train_bundle`.
    """
    bundle = Bundle.load(folder)
    paths, fit_on, measured_on = _divided(folders, fitted, held_out)
    backbone = backbone_of(bundle)
    changed = [s.name for lesson in lessons_of(bundle, names) for s in lesson.specs]
    with (
        Team.joined("cpu") as team,
        Progress(*bar_columns(), console=Console(stderr=True), disable=not team.first) as progress,
    ):
        before = {name: latents_of(backbone, bundle, name, fit_on) for name in names if how.restore and team.first}
        made = lighten(backbone, bundle, names, paths, how, work, progress, team)
        if not team.first:
            return
        for name, latents in before.items():
            made = recoded(made, name, latents, latents_of(backbone, made, name, fit_on))
        seen = views_of(measured_on, views, how.seed)
        made = timed(backbone, made, seen, progress)
        made = measured_points(backbone, made, seen, progress, changed).check()
    made.save(output)
    write_weights(backbone, output)
    typer.echo(f"{output}: {', '.join(changed)} lighter, fingerprint {short(made.fingerprint)}")


def _divided(folders: Sequence[Path], fitted: int, held_out: int) -> tuple[list[Path], list[Path], list[Path]]:
    """Photographs to learn from, to fit the closed form on, and to measure on."""
    fit_on, measured_on = choose(folders[0], fitted, held_out, 0)
    apart = set(measured_on) - set(fit_on)
    return [path for folder in folders for path in find_pictures(folder) if path not in apart], fit_on, measured_on

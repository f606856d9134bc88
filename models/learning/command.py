"""`headrace train` from the plan to the bundle."""

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
from ..split import bar_columns, choose
from ..zoo.catalogue import backbone_of, write_weights
from .assemble import assemble, without
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
    fit_on, measured_on = choose(folders[0], fitted, held_out, 0)
    apart = set(measured_on) - set(fit_on)
    paths = [path for folder in folders for path in find_pictures(folder) if path not in apart]
    bundle = Bundle.load(plan.bundle)
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

"""Commands that make a bundle, improve it, and take the device's half out of it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from .command_line import COMMITTED, COMMITTED_DETECTION, BundleFolder

app = typer.Typer()


def _device(name: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise typer.BadParameter(f"{name!r} is no device to learn on; give cpu, cuda, or cuda:1 for the second GPU")
    return name


Device = Annotated[str, typer.Option(help="Where to learn: cpu or cuda.", callback=_device)]
BundleOutput = Annotated[Path, typer.Option(help="Folder to write the bundle to; may be the bundle's own.")]


@app.command()
def split(
    backbone: Annotated[
        str,
        typer.Argument(
            help="efficientnet_lite0, _lite1, _lite2, yolov2_tiny, any timm/NAME or torchvision/NAME, "
            "package.module:factory, or a FILE.pt2 of torch.export."
        ),
    ],
    calibration: Annotated[Path | None, typer.Option(help="Folder of at least 100 unlabelled photographs.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write the bundle to.")] = None,
    task: Annotated[
        str,
        typer.Option(help="classification, detection or segmentation, or several joined by +; for models of your own."),
    ] = "",
    at: Annotated[list[str] | None, typer.Option(help="Split point; may be given several times.")] = None,
    show: Annotated[bool, typer.Option("--list", help="List where it can be cut, and stop.")] = False,
    photographs: Annotated[int, typer.Option(help="Photographs to fit on, at most.")] = 300,
    held_out: Annotated[int, typer.Option(min=1, help="Other photographs to measure operating points on.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the choice of photographs and of the metric's draws.")] = 0,
    weights: Annotated[Path | None, typer.Option(help="The backbone's weights, a safetensors file.")] = None,
    random_weights: Annotated[int | None, typer.Option(help="Draw the weights with this seed, to try it.")] = None,
    size: Annotated[int, typer.Option(help="Side of the input in pixels; 0 for the model's own.")] = 0,
    labels: Annotated[Path | None, typer.Option(help="Text file with the name of a class in each line.")] = None,
    data_note: Annotated[str, typer.Option(help="What the provenance says about the photographs.")] = "",
    add_to: Annotated[
        Path | None,
        typer.Option(help="Folder of a bundle of this backbone that gets the split points of --at besides its own."),
    ] = None,
    instead_of: Annotated[
        str,
        typer.Option(
            help="With --add-to: the split point that leaves for the one of --at, the same cut on other pixels; a "
            "light head goes over."
        ),
    ] = "",
    distortions: Annotated[
        str,
        typer.Option(help="Rate levels, finest first: by how many nats answers may be off, such as 0.02,0.06,0.12."),
    ] = "",
    repair: Annotated[bool, typer.Option("--repair", help="Then learn the server's repair, see `repair`.")] = False,
    repair_minutes: Annotated[float, typer.Option(help="Time for the repair of each split point.")] = 20.0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write over a bundle that is in --output; all that it learned is lost.")
    ] = False,
    device: Device = "cpu",
) -> None:
    """Cut a backbone without training and write a bundle, or list where it can be cut."""
    from .zoo.sources import source

    asked = source(backbone, task, weights, random_weights, size, labels)
    if show:
        from .listing import list_cuts

        list_cuts(asked)
        raise typer.Exit
    if calibration is None or output is None:
        raise typer.BadParameter("--calibration and --output are needed (or --list to see where it can be cut)")

    if instead_of and add_to is None:
        raise typer.BadParameter("--instead-of wants --add-to, the bundle that the split point leaves")
    from .bundle import MANIFEST, short

    if add_to is None and not overwrite and (output / MANIFEST).exists():
        raise typer.BadParameter(
            f"--output {output} holds a bundle: give another folder, --add-to {output} to add split points to it, or "
            "--overwrite to lose it and what was learned for it"
        )

    from rich.console import Console
    from rich.progress import Progress

    from .extend import extended
    from .split import SplitPlan, bar_columns
    from .split import split as make_bundle
    from .zoo.catalogue import write_weights

    try:
        levels = tuple(float(each) for each in distortions.split(",") if each)
    except ValueError as error:
        raise typer.BadParameter(f"--distortions {distortions}: give numbers with commas between them") from error
    if add_to is not None and (own := _of_the_bundle(task, size, weights, random_weights, labels, data_note)):
        raise typer.BadParameter(f"{', '.join(own)}: with --add-to these are the bundle's own; leave them out")
    plan = SplitPlan(asked, calibration, tuple(at or ()), photographs, held_out, seed, levels)
    with Progress(*bar_columns(), console=Console(stderr=True)) as progress:
        model, bundle = (
            extended(plan, add_to, progress, instead_of)
            if add_to is not None
            else make_bundle(plan, progress, data_note)
        )
    bundle.save(output)
    write_weights(model, output)
    typer.echo(f"{output}: {len(bundle.operating_points)} operating points, fingerprint {short(bundle.fingerprint)}")
    if repair:
        repair_bundle(
            calibration, output, output, minutes=repair_minutes, photographs=photographs, held_out=held_out, seed=seed,
            device=device,
        )  # fmt: skip


def _of_the_bundle(
    task: str, size: int, weights: Path | None, random_weights: int | None, labels: Path | None, data_note: str
) -> list[str]:
    """Flags of `split` that a bundle answers, of those that were given."""
    given = {"--task": task, "--size": size, "--weights": weights, "--labels": labels, "--data-note": data_note}
    return [flag for flag, value in given.items() if value] + ["--random-weights"] * (random_weights is not None)


@app.command("repair")
def repair_bundle(
    calibration: Annotated[Path, typer.Option(help="Folder of at least 100 unlabelled photographs.")],
    output: Annotated[Path, typer.Option(help="Folder to write the repaired bundle to; may be the bundle's own.")],
    bundle: BundleFolder = COMMITTED,
    more: Annotated[list[Path] | None, typer.Option(help="Folder of more photographs to learn from.")] = None,
    at: Annotated[list[str] | None, typer.Option(help="Split point; several times for several. [default: all]")] = None,
    minutes: Annotated[float, typer.Option(help="Time for each split point.")] = 20.0,
    steps: Annotated[int, typer.Option(help="Number of steps, instead of what fits into the minutes.")] = 0,
    crops: Annotated[int, typer.Option(help="Most crops of photographs that are made.")] = 16_000,
    rank: Annotated[
        int, typer.Option(help="Of what is added to the tail's matrices: more learns more, and is larger.")
    ] = 16,
    rate: Annotated[float, typer.Option(help="Learning rate at its height.")] = 1e-3,
    bfloat16: Annotated[
        bool, typer.Option("--bfloat16", help="Learn in half precision, where the processor has it in half the time.")
    ] = False,
    resample: Annotated[
        bool, typer.Option("--resample", help="Behind a cut on fewer pixels, answer on the grid of all.")
    ] = False,
    photographs: Annotated[int, typer.Option(help="As given to `split`, to measure on the same photographs.")] = 300,
    held_out: Annotated[int, typer.Option(min=1, help="Photographs to measure on, not to learn from.")] = 64,
    views: Annotated[int, typer.Option(min=1, help="Views of each of those: itself, and parts of it.")] = 1,
    seed: Annotated[int, typer.Option(help="Of crops, rate levels and prefixes.")] = 0,
    device: Device = "cpu",
) -> None:
    """Teach the server's half to answer coarse symbols better; edge and bitstream stay as they are.

    A run that was killed goes on where it was when the same command is given again. Several processes share the crops,
    each makes its own: torchrun --nproc-per-node N -m headrace.cli repair --steps 2000 ...
    """
    from rich.console import Console
    from rich.progress import Progress

    from .bundle import Bundle, short
    from .learning.team import Team
    from .repair.distil import RepairPlan, repair
    from .split import bar_columns
    from .zoo.catalogue import write_weights

    places = tuple(at or ())
    plan = RepairPlan(
        places, minutes, steps, crops, rank=rank, rate=rate, device=device, half=bfloat16, seed=seed,
        photographs=photographs, held_out=held_out, resample=resample, views=views,
    )  # fmt: skip
    with (
        Team.joined(device) as team,
        Progress(*bar_columns(), console=Console(stderr=True), disable=not team.first) as progress,
    ):
        work = output / "repair-work"
        model, repaired = repair(Bundle.load(bundle), calibration, plan, work, progress, more or (), team)
        if not team.first:
            return
    repaired.save(output)
    write_weights(model, output)
    shutil.rmtree(work, ignore_errors=True)
    size = sum(array.nbytes for array in repaired.repair.values())
    typer.echo(f"{output}: repair of {size} bytes, fingerprint {short(repaired.fingerprint)} as before")


@app.command("temporal")
def fit_temporal(
    calibration: Annotated[Path, typer.Option(help="Folder of unlabelled photographs, as given to `split`.")],
    output: BundleOutput,
    bundle: BundleFolder = COMMITTED,
    photographs: Annotated[int, typer.Option(help="As given to `split`.")] = 300,
    held_out: Annotated[int, typer.Option(min=1, help="As given to `split`, to leave out the same photographs.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the choice of photographs and of the scenes' motion.")] = 0,
) -> None:
    """Give a bundle that has none its tables for predicted frames, and leave all else of it as it is.

    `split` does it by itself. The fingerprint changes: both sides need the new bundle.
    """
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import Progress

    from .bundle import Bundle, short
    from .split import bar_columns, choose
    from .temporal_fit import with_temporal
    from .zoo.catalogue import backbone_of, write_weights

    loaded = Bundle.load(bundle)
    fit_on, _ = choose(calibration, photographs, held_out, seed)
    backbone = backbone_of(loaded)
    with Progress(*bar_columns(), console=Console(stderr=True)) as progress:
        made = with_temporal(backbone, loaded, fit_on, seed, progress)
    command = f"headrace temporal --photographs {photographs} --held-out {held_out} --seed {seed}"
    made = replace(made, provenance={**made.provenance, "temporal": command})
    made.save(output)
    write_weights(backbone, output)
    typer.echo(f"{output}: fingerprint {short(made.fingerprint)}, before {short(loaded.fingerprint)}")


@app.command()
def train(
    plan: Annotated[Path, typer.Argument(help="TOML file that says what to learn, see models/plans/.")],
    photographs: Annotated[
        list[Path], typer.Option(help="Folder of photographs to learn from; labels are not needed.")
    ],
    output: BundleOutput,
    work: Annotated[Path, typer.Option(help="Folder for views and checkpoints, some GB.")] = Path("train-work"),
    fitted: Annotated[int, typer.Option(help="Photographs of the first folder for the closed form and tables.")] = 300,
    held_out: Annotated[
        int, typer.Option(min=1, help="Photographs of the first folder to measure on, not learned from.")
    ] = 64,
    views: Annotated[int, typer.Option(min=1, help="Views of each of those: itself, and parts of it.")] = 1,
    device: Device = "cpu",
) -> None:
    """Learn a light slimmable encoder by distillation, and add its widths to a bundle as split points.

    A run that was killed goes on where it was when the same command is given again. With several GPUs:
    torchrun --nproc-per-node N -m headrace.cli train ...
    """
    from .learning.command import train_bundle

    train_bundle(plan, photographs, output, work, fitted, held_out, views, device)


@app.command("lighten")
def lighten_heads(
    at: Annotated[
        list[str], typer.Option(help="Split point whose head is learned; several times for several. One width for all.")
    ],
    photographs: Annotated[
        list[Path], typer.Option(help="Folder of photographs to learn from; labels are not needed.")
    ],
    output: BundleOutput,
    bundle: BundleFolder = COMMITTED,
    steps: Annotated[int, typer.Option(min=1, help="Batches.")] = 3000,
    batch: Annotated[int, typer.Option(min=2, help="Views a step.")] = 16,
    rate: Annotated[float, typer.Option(help="Learning rate at its height.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the views.")] = 0,
    hidden: Annotated[
        str, typer.Option(help="Hidden channels of each bottleneck, such as 16,64,96,96, where some are to go.")
    ] = "",
    restore: Annotated[
        bool, typer.Option("--restore", help="The server learns along to tell what a light head cannot compute.")
    ] = False,
    work: Annotated[Path, typer.Option(help="Folder for checkpoints.")] = Path("train-work"),
    fitted: Annotated[int, typer.Option(help="As given to `split`, to leave out the same photographs.")] = 300,
    held_out: Annotated[
        int, typer.Option(min=1, help="Photographs of the first folder to measure on, not learned from.")
    ] = 64,
    views: Annotated[int, typer.Option(min=1, help="Views of each of those: itself, and parts of it.")] = 1,
) -> None:
    """Make heads cheaper: they learn to do without most of what ReLU6 clips, and with fewer hidden channels. No GPU.

    A run that was killed goes on where it was when the same command is given again. The fingerprint changes. Several
    processes share each step's views: torchrun --nproc-per-node N -m headrace.cli lighten ...
    """
    from .exceptions import DataError
    from .learning.command import lighten_bundle
    from .learning.course import Lightening

    try:
        channels = tuple(int(each) for each in hidden.split(",") if hidden)
    except ValueError as error:
        raise DataError(f"--hidden {hidden!r} are no numbers with commas between, such as 16,64,96,96") from error
    how = Lightening(steps, batch, rate, seed=seed, hidden=channels, restore=restore)
    lighten_bundle(bundle, at, how, photographs, output, work, fitted, held_out, views)


@app.command("filter")
def learn_filter(
    calibration: Annotated[list[Path], typer.Option(help="Folder of unlabelled photographs; several times for more.")],
    classes: Annotated[list[str], typer.Option(help="A class of interest, such as person; several times for more.")],
    output: BundleOutput,
    bundle: BundleFolder = COMMITTED_DETECTION,
    at: Annotated[
        list[str] | None, typer.Option(help="Split point that gets a filter; several times for several. All of them.")
    ] = None,
    miss_rate: Annotated[float, typer.Option(help="Most that may be missed of the frames that hold one, 0..1.")] = 0.02,
    epochs: Annotated[int, typer.Option(help="Passes over the photographs, on a CPU.")] = 20,
    views: Annotated[int, typer.Option(help="Views to learn from, on a GPU, where each is a new one.")] = 150_000,
    seed: Annotated[int, typer.Option(help="Of the photographs' division and order.")] = 0,
    device: Device = "cpu",
) -> None:
    """Teach a detector's bundle to keep frames on the device that hold nothing of the classes of interest.

    On a CPU a run that was killed goes on where it was when the same command is given again.
    """
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from .bundle import Bundle, short
    from .detection import filter as neural_filter
    from .split import bar_columns
    from .zoo.catalogue import write_weights

    loaded, bars = Bundle.load(bundle), dict[str, Any]()
    plan = neural_filter.FilterPlan(tuple(classes), miss_rate, epochs, views, seed, tuple(at or ()))
    with Progress(*bar_columns(), console=Console(stderr=True)) as progress:

        def note(what: str, done: int, of: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=of)
            progress.update(bars[what], completed=done)

        work = output / "filter-work"
        there = torch.device(device)
        backbone, learned, reports = neural_filter.learn_filter(loaded, calibration, plan, note, work, there)
    learned.save(output)
    write_weights(backbone, output)
    shutil.rmtree(work, ignore_errors=True)
    for report in reports:
        typer.echo(str(report))
    typer.echo(f"{output}: fingerprint {short(learned.fingerprint)}")


@app.command("exit")
def make_exit(
    calibration: Annotated[Path, typer.Option(help="Folder of at least 100 unlabelled photographs.")],
    output: BundleOutput,
    at: Annotated[list[str], typer.Option(help="Split point that gets an exit; several times for several.")],
    bundle: BundleFolder = COMMITTED,
    photographs: Annotated[int, typer.Option(help="Photographs to calibrate on, at most.")] = 300,
    held_out: Annotated[int, typer.Option(min=1, help="Other photographs to measure on; as given to `split`.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the choice of photographs; as given to `split`.")] = 0,
    hidden: Annotated[
        int,
        typer.Option(min=0, help="Hidden channels of a narrow exit, learned, behind a deep cut; 0 for the whole rest."),
    ] = 0,
    more: Annotated[list[Path] | None, typer.Option(help="Folder of more photographs for it to learn from.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of its learning, 32 crops each.")] = 1500,
    crops: Annotated[int, typer.Option(min=32, help="Most crops of photographs that are made.")] = 12_000,
) -> None:
    """Let a device answer from a head's features, early and knowing how sure it is; all else of the bundle stays."""
    from rich.console import Console
    from rich.progress import Progress

    from .bundle import Bundle, short
    from .exits.command import ExitPlan, make_exits
    from .exits.learn import NarrowPlan
    from .split import bar_columns
    from .zoo.catalogue import write_weights

    plan = ExitPlan(
        tuple(at), photographs, held_out, seed, NarrowPlan(hidden, steps=steps, crops=crops), tuple(more or ())
    )
    with Progress(*bar_columns(), console=Console(stderr=True)) as progress:
        work = output / "exit-work"
        model, made, reports = make_exits(Bundle.load(bundle), calibration, plan, work, progress)
    made.save(output)
    write_weights(model, output)
    shutil.rmtree(work, ignore_errors=True)
    for report in reports:
        typer.echo(str(report))
    typer.echo(f"{output}: fingerprint {short(made.fingerprint)} as before")


@app.command()
def export(
    output: Annotated[Path, typer.Option(help="Folder to write the edge half to.")],
    bundle: BundleFolder = COMMITTED,
) -> None:
    """Write the device's half of a bundle: ONNX files that run without torch."""
    from .bundle import Bundle
    from .export import export_edge_half

    export_edge_half(Bundle.load(bundle), output, lambda name: typer.echo(name, err=True))
    typer.echo(f"{output}: ready for `headrace edge --bundle {output}`")

"""The command line. Each command's work is in its folder; here are only names, flags and error messages.

`edge` and `serve` get their flags from their settings classes, so that a setting is documented once.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError

from . import __version__
from .edge.config import EdgeSettings
from .models.exceptions import DataError, HeadraceError
from .server.auth import Scope
from .server.config import ServerSettings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Split computing for cameras: head on the device, tail on a server, a learned bottleneck between them.",
)
eval_app = typer.Typer(no_args_is_help=True, help="Measure a bundle on labelled photographs.")
bench_app = typer.Typer(no_args_is_help=True, help="Programs that measure the runtime, and the demo.")
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")
token_app = typer.Typer(no_args_is_help=True, help="Tokens that devices show to a server (`headrace serve --tokens`).")
app.add_typer(token_app, name="token")

ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with these settings.")]
BundleFolder = Annotated[Path, typer.Option("--bundle", help="Folder of the bundle.")]
Device = Annotated[str, typer.Option(help="Where to learn: cpu or cuda.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]


class Baselines(StrEnum):
    """What `headrace eval rd` can measure beside our operating points and pictures."""

    TRAINING_FREE = "training-free"


COMMITTED = Path(__file__).parent / "models" / "bundles" / "efficientnet_lite0"
COMMITTED_DETECTION = COMMITTED.with_name("yolov2_tiny")


def main() -> None:
    """Entry point: errors of ours are one line on standard error and exit code 2."""
    # OpenMP's threads spin while they wait, by default. Beside another busy process on the same cores that makes torch
    # several times slower; asleep they cost microseconds. It has to be said before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except HeadraceError as error:
        typer.echo(f"headrace: {error}", err=True)
        sys.exit(2)
    except ValidationError as error:
        for each in error.errors():
            name = "--" + "-".join(str(part).replace("_", "-") for part in each["loc"][:1])
            typer.echo(f"headrace: {name}: {each['msg']} (got {each.get('input')!r})", err=True)
        sys.exit(2)


def with_settings(settings: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `--config` and one flag for each field of a settings class, none of them required."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        def run(config: Path | None = None, **flags: Any) -> None:
            command(config, {k: v for k, v in flags.items() if v is not None and v != []})

        parameters = [inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ConfigFile)]
        for name, field in settings.model_fields.items():
            kind = _plain_type(field.annotation)
            default = field.get_default(call_default_factory=True)
            shown = default if default not in (None, [], ()) and not isinstance(default, Path) else None
            flag = "--" + name.replace("_", "-")
            option = typer.Option(
                f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
                help=(field.description or "") + (f"  [default: {_text(shown)}]" if shown is not None else ""),
                show_default=False,
            )
            parameters.append(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
                )
            )
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return wrap


def _plain_type(annotation: Any) -> Any:
    """What typer can parse: without None, and literals as text (the settings class checks them)."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(a for a in get_args(annotation) if a is not type(None))
        return _plain_type(annotation)
    if get_origin(annotation) in (list, tuple, set, frozenset):
        return list[_plain_type(get_args(annotation)[0])]  # type: ignore[misc]
    return annotation if annotation in (str, int, float, bool, Path) else str


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@app.command()
@with_settings(EdgeSettings)
def edge(config: Path | None, flags: dict[str, Any]) -> None:
    """Run the device's half: frames in, one JSON line a frame out."""
    from .edge.daemon import run

    raise typer.Exit(run(EdgeSettings.load(config, **flags)))


@app.command()
@with_settings(ServerSettings)
def serve(config: Path | None, flags: dict[str, Any]) -> None:
    """Run the server's half: packets in, answers out."""
    from .server.daemon import run

    raise typer.Exit(run(ServerSettings.load(config, **flags)))


@app.command()
@with_settings(EdgeSettings)
def profile(config: Path | None, flags: dict[str, Any]) -> None:
    """Time every operating point on this device and store it for `headrace edge`."""
    from .edge.profile import profile as time_stages

    found = time_stages(EdgeSettings.load(config, **flags))
    typer.echo(f"bundle {found.bundle} on device {found.device} ({found.machine}), medians of {found.rounds}")
    for name, point in found.points.items():
        times = f"{found.stages_ms[point['stage']]:8.1f} ms  {point['bytes']:8.0f} bytes"
        typer.echo(f"{name:14} {times}  {point['accuracy']:.3f} of the uncut answers")
    typer.echo(f"stored in {found.path}")


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
        str, typer.Option(help="classification, detection or segmentation; needed for models of your own.")
    ] = "",
    at: Annotated[list[str] | None, typer.Option(help="Split point; may be given several times.")] = None,
    show: Annotated[bool, typer.Option("--list", help="List where it can be cut, and stop.")] = False,
    photographs: Annotated[int, typer.Option(help="Photographs to fit on, at most.")] = 300,
    held_out: Annotated[int, typer.Option(help="Other photographs to measure operating points on.")] = 64,
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
    repair: Annotated[bool, typer.Option("--repair", help="Then learn the server's repair, see `repair`.")] = False,
    repair_minutes: Annotated[float, typer.Option(help="Time for the repair of each split point.")] = 20.0,
    device: Device = "cpu",
) -> None:
    """Cut a backbone without training and write a bundle, or list where it can be cut."""
    from .models.zoo.sources import source

    asked = source(backbone, task, weights, random_weights, size, labels)
    if show:
        from .models.listing import list_cuts

        list_cuts(asked)
        raise typer.Exit
    if calibration is None or output is None:
        raise typer.BadParameter("--calibration and --output are needed (or --list to see where it can be cut)")

    from rich.console import Console
    from rich.progress import Progress

    from .models.bundle import short
    from .models.split import SplitPlan, bar_columns, extended
    from .models.split import split as make_bundle
    from .models.zoo.catalogue import write_weights

    plan = SplitPlan(asked, calibration, tuple(at or ()), photographs, held_out, seed)
    with Progress(*bar_columns(), console=Console(stderr=True)) as progress:
        model, bundle = (
            extended(plan, add_to, progress) if add_to is not None else make_bundle(plan, progress, data_note)
        )
    bundle.save(output)
    write_weights(model, output)
    typer.echo(f"{output}: {len(bundle.operating_points)} operating points, fingerprint {short(bundle.fingerprint)}")
    if repair:
        repair_bundle(calibration, output, output, None, None, repair_minutes, 0, photographs, held_out, seed, device)


@app.command("repair")
def repair_bundle(
    calibration: Annotated[Path, typer.Option(help="Folder of at least 100 unlabelled photographs.")],
    output: Annotated[Path, typer.Option(help="Folder to write the repaired bundle to; may be the bundle's own.")],
    bundle: BundleFolder = COMMITTED,
    more: Annotated[list[Path] | None, typer.Option(help="Folder of more photographs to learn from.")] = None,
    at: Annotated[list[str] | None, typer.Option(help="Split point; several times for several. [default: all]")] = None,
    minutes: Annotated[float, typer.Option(help="Time for each split point.")] = 20.0,
    steps: Annotated[int, typer.Option(help="Number of steps, instead of what fits into the minutes.")] = 0,
    photographs: Annotated[int, typer.Option(help="As given to `split`, to measure on the same photographs.")] = 300,
    held_out: Annotated[int, typer.Option(help="Photographs to measure on, not to learn from.")] = 64,
    seed: Annotated[int, typer.Option(help="Of crops, rate levels and prefixes.")] = 0,
    device: Device = "cpu",
) -> None:
    """Teach the server's half to answer coarse symbols better; edge and bitstream stay as they are.

    A run that was killed goes on where it was when the same command is given again.
    """
    from rich.console import Console
    from rich.progress import Progress

    from .models.bundle import Bundle, short
    from .models.repair.distil import RepairPlan, repair
    from .models.split import bar_columns
    from .models.zoo.catalogue import write_weights

    places = tuple(at or ())
    plan = RepairPlan(places, minutes, steps, device=device, seed=seed, photographs=photographs, held_out=held_out)
    with Progress(*bar_columns(), console=Console(stderr=True)) as progress:
        model, repaired = repair(Bundle.load(bundle), calibration, plan, output / "repair-work", progress, more or ())
    repaired.save(output)
    write_weights(model, output)
    size = sum(array.nbytes for array in repaired.repair.values())
    typer.echo(f"{output}: repair of {size} bytes, fingerprint {short(repaired.fingerprint)} as before")


@app.command("temporal")
def fit_temporal(
    calibration: Annotated[Path, typer.Option(help="Folder of unlabelled photographs, as given to `split`.")],
    output: Annotated[Path, typer.Option(help="Folder to write the bundle to; may be the bundle's own.")],
    bundle: BundleFolder = COMMITTED,
    photographs: Annotated[int, typer.Option(help="As given to `split`.")] = 300,
    held_out: Annotated[int, typer.Option(help="As given to `split`, to leave out the same photographs.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the choice of photographs and of the scenes' motion.")] = 0,
) -> None:
    """Give a bundle that has none its tables for predicted frames, and leave all else of it as it is.

    `split` does it by itself. The fingerprint changes: both sides need the new bundle.
    """
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import Progress

    from .models.bundle import Bundle, short
    from .models.split import bar_columns, choose
    from .models.temporal_fit import with_temporal
    from .models.zoo.catalogue import backbone_of, write_weights

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
    output: Annotated[Path, typer.Option(help="Folder to write the bundle to; may be the bundle's own.")],
    work: Annotated[Path, typer.Option(help="Folder for views and checkpoints, some GB.")] = Path("train-work"),
    fitted: Annotated[int, typer.Option(help="Photographs of the first folder for the closed form and tables.")] = 300,
    held_out: Annotated[
        int, typer.Option(help="Photographs of the first folder to measure on, not learned from.")
    ] = 64,
    device: Device = "cpu",
) -> None:
    """Learn a light slimmable encoder by distillation, and add its widths to a bundle as split points.

    A run that was killed goes on where it was when the same command is given again. With several GPUs:
    torchrun --nproc-per-node N -m headrace train ...
    """
    from .models.learning.command import train_bundle

    train_bundle(plan, photographs, output, work, fitted, held_out, device)


@app.command("filter")
def learn_filter(
    calibration: Annotated[list[Path], typer.Option(help="Folder of unlabelled photographs; several times for more.")],
    classes: Annotated[list[str], typer.Option(help="A class of interest, such as person; several times for more.")],
    output: Annotated[Path, typer.Option(help="Folder to write the bundle to; may be the bundle's own.")],
    bundle: BundleFolder = COMMITTED_DETECTION,
    miss_rate: Annotated[float, typer.Option(help="Most that may be missed of the frames that hold one, 0..1.")] = 0.02,
    epochs: Annotated[int, typer.Option(help="Passes over the photographs.")] = 30,
    seed: Annotated[int, typer.Option(help="Of the photographs' division and order.")] = 0,
) -> None:
    """Teach a detector's bundle to keep frames on the device that hold nothing of the classes of interest."""
    from rich.console import Console
    from rich.progress import Progress

    from .models.bundle import Bundle, short
    from .models.detection import filter as neural_filter
    from .models.split import bar_columns
    from .models.zoo.catalogue import write_weights

    loaded, bars = Bundle.load(bundle), dict[str, Any]()
    plan = neural_filter.FilterPlan(tuple(classes), miss_rate, epochs, seed)
    with Progress(*bar_columns(), console=Console(stderr=True)) as progress:

        def note(what: str, done: int, of: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=of)
            progress.update(bars[what], completed=done)

        backbone, learned, reports = neural_filter.learn_filter(loaded, calibration, plan, note)
    learned.save(output)
    write_weights(backbone, output)
    for report in reports:
        typer.echo(str(report))
    typer.echo(f"{output}: fingerprint {short(learned.fingerprint)}")


@app.command()
def export(
    output: Annotated[Path, typer.Option(help="Folder to write the edge half to.")],
    bundle: BundleFolder = COMMITTED,
) -> None:
    """Write the device's half of a bundle: ONNX files that run without torch."""
    from .models.bundle import Bundle
    from .models.export import export_edge_half

    export_edge_half(Bundle.load(bundle), output, lambda name: typer.echo(name, err=True))
    typer.echo(f"{output}: ready for `headrace edge --bundle {output}`")


@app.command()
def doctor(
    server: Annotated[str, typer.Option(help="Address of a server to try, host:port.")] = "",
    config: Annotated[Path | None, typer.Option(help="The edge's TOML file: how it reaches that server.")] = None,
) -> None:
    """Say what is missing or misconfigured on this machine, and what to do about it."""
    from .bench.doctor import examine
    from .edge.access import Access

    # TLS and token as `headrace edge` would have them, from the file and the environment.
    settings = EdgeSettings.load(config, **({"server": server} if server else {}))
    raise typer.Exit(examine(settings.server if server or config else "", access=Access.of(settings)))


TokenFile = Annotated[Path, typer.Option("--file", help="The file of tokens.")]


@token_app.command("add")
def token_add(
    name: Annotated[str, typer.Argument(help="Name of the device, for the log.")],
    file: TokenFile,
    scope: Annotated[Scope, typer.Option(help="What it opens: the service for devices, or the admin calls.")] = (
        Scope.DEVICE
    ),
    days: Annotated[float, typer.Option(help="Days until it expires; 0 for never.")] = 0.0,
) -> None:
    """Make a token, print it once, and put its salted hash into the file."""
    from .server.token_commands import add

    typer.echo(add(file, name, scope, days))


@token_app.command("list")
def token_list(file: TokenFile) -> None:
    """Show the tokens of a file: id, scope, expiry, name."""
    from .server.token_commands import listing

    for line in listing(file):
        typer.echo(line)


@token_app.command("revoke")
def token_revoke(
    name: Annotated[str, typer.Argument(help="Name or id of the token.")],
    file: TokenFile,
) -> None:
    """Take a device's tokens back: a running server ends its streams within seconds."""
    from .server.token_commands import revoke

    for token in revoke(file, name):
        typer.echo(f"{token.id} {token.name} is taken back")


@app.command()
def emulate(
    trace: Annotated[Path | None, typer.Option(help="Recorded link, replayed both ways.")] = None,
    up_trace: Annotated[Path | None, typer.Option(help="Recorded link from edge to server.")] = None,
    down_trace: Annotated[Path | None, typer.Option(help="Recorded link from server to edge.")] = None,
    trace_format: Annotated[
        str, typer.Option(help="mahimahi, seconds-mbit or ms-kbit; by default told by the number of columns.")
    ] = "",
    up_mbps: Annotated[float | None, typer.Option(help="Constant rate up, Mbit/s.")] = None,
    down_mbps: Annotated[float | None, typer.Option(help="Constant rate down; by default no limit.")] = None,
    phases: Annotated[str, typer.Option(help="Steps up, MBITS:SECONDS,...: 8:10,0:4,2:10 has an outage.")] = "",
    delay_ms: Annotated[float, typer.Option(help="Propagation one way, each way.")] = 0.0,
    jitter_ms: Annotated[float, typer.Option(help="Further delay of each packet, 0 to this.")] = 0.0,
    loss: Annotated[float, typer.Option(help="Probability that a packet is lost, each way: 0.01 is 1 %.")] = 0.0,
    queue_bytes: Annotated[
        int, typer.Option(help="Most bytes that wait at the bottleneck, each way; rate / 8 is a bufferbloat of 1 s.")
    ] = 64 * 1024,
    seed: Annotated[int, typer.Option(help="Of losses and jitter.")] = 0,
    server: Annotated[
        str, typer.Option(help="Server command; {host} and {port} say where it is to listen.", metavar="COMMAND")
    ] = "",
    edge: Annotated[
        str, typer.Option(help="Edge command; {server} is the HOST:PORT to connect to.", metavar="COMMAND")
    ] = "",
    port: Annotated[int, typer.Option(help="Where the server listens; 0: 50051, or any free one on loopback.")] = 0,
    emulator: Annotated[
        str, typer.Option(help="netem, tun (both as root) or proxy; auto: the first of them that works here.")
    ] = "auto",
    congestion: Annotated[str, typer.Option(help="TCP's congestion control at both ends: reno, cubic, bbr.")] = "reno",
    slow_start_after_idle: Annotated[
        bool, typer.Option(help="TCP forgets its congestion window in a pause (the kernel's default).")
    ] = True,
    server_wait: Annotated[float, typer.Option(help="Seconds that the server may take until it listens.")] = 120.0,
    listen: Annotated[str, typer.Option(help="Instead of commands: HOST:PORT of a proxy; port 0 is any.")] = "",
    to: Annotated[str, typer.Option(help="HOST:PORT of the server behind that proxy.")] = "",
    json: JsonFile = None,
) -> None:
    """Put any edge and server behind an emulated or recorded link.

    headrace emulate --up-trace verizon.up --delay-ms 20 --loss 0.01
    --server "headrace serve --host {host} --port {port} --insecure"
    --edge "headrace edge --server {server} --source video.mp4"

    As root, TCP itself meets the link's losses and queue, in network namespaces that are removed in the end. Without
    root a proxy on loopback stands in, which shows rate, delay and outages.
    """
    from .bench.links.emulate import Pair, run
    from .bench.links.emulate_spec import LinkFlags

    flags = LinkFlags(
        trace=trace,
        up_trace=up_trace,
        down_trace=down_trace,
        up_mbps=up_mbps,
        down_mbps=down_mbps,
        phases=phases,
        trace_format=trace_format,
        delay_ms=delay_ms,
        jitter_ms=jitter_ms,
        loss=loss,
        queue_bytes=queue_bytes,
        seed=seed,
    )
    pair = (
        Pair(server, edge, port, emulator, congestion, slow_start_after_idle, server_wait) if server or edge else None
    )
    raise typer.Exit(run(flags.spec(), pair=pair, listen=listen, to=to, json_file=json))


@eval_app.command("rd")
def eval_rd(
    data: Annotated[Path, typer.Option(help="Folder of photographs, files or folders named by WordNet id.")],
    bundle: BundleFolder = COMMITTED,
    limit: Annotated[int, typer.Option(help="At most this many photographs; 0 for all.")] = 0,
    json: JsonFile = None,
    baselines: Annotated[
        Baselines | None, typer.Option(help="Also run these codecs; training-free: from papers, at the same cuts.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Folder of photographs to calibrate the baselines on: those the bundle saw.")
    ] = None,
    photographs: Annotated[int, typer.Option(help="Photographs to calibrate the baselines on.")] = 300,
    at: Annotated[
        list[str] | None, typer.Option(help="Split point for the baselines; the bundle's own by default.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for rate-accuracy.csv and rate-accuracy.png.")] = None,
) -> None:
    """Bytes against accuracy for every operating point, beside JPEG, WebP and AVIF on the same photographs.

    With 95 % intervals, BD-rates, and what head and encoder of every split point compute.
    """
    from .models.bundle import Bundle
    from .models.evaluate import Others, evaluate_rate_distortion

    others: Others | None = None
    if baselines is not None:
        from .bench.training_free.run import TrainingFree

        if calibration is None:
            raise DataError("--baselines needs --calibration, a folder of photographs such as the bundle was made from")
        others = TrainingFree(calibration, photographs, tuple(at or ()))
    evaluate_rate_distortion(Bundle.load(bundle), data, limit, json, others=others, output=output)


@eval_app.command("front")
def eval_front(
    data: Annotated[Path | None, typer.Option(help="Folder of labelled photographs, as for `eval rd`.")] = None,
    measured: Annotated[
        Path | None, typer.Option("--from", help="What `eval rd --json` wrote, instead of measuring again.")
    ] = None,
    bundle: BundleFolder = COMMITTED,
    limit: Annotated[int, typer.Option(help="At most this many photographs; 0 for all.")] = 0,
    json: JsonFile = None,
    output: Annotated[Path | None, typer.Option(help="Folder for front.csv and front.png.")] = None,
) -> None:
    """Bytes for 0.95 (0.98, 0.90) of the uncut accuracy against the device's compute, one point a split point."""
    from .models.bundle import Bundle
    from .models.evaluate import evaluate_rate_distortion
    from .models.evaluation.front import read_rd, report_front
    from .models.evaluation.plots import need_matplotlib

    if (data is None) == (measured is None):
        raise DataError("give either --data, a folder of photographs, or --from, a file that `eval rd --json` wrote")
    if output is not None:
        need_matplotlib()
    found = read_rd(measured) if measured else evaluate_rate_distortion(Bundle.load(bundle), data or Path(), limit)
    report_front(found, json, output)


@eval_app.command("detection")
def eval_detection(
    data: Annotated[Path, typer.Option(help="Folder with images/ and YOLO's text files in labels/.")],
    bundle: BundleFolder = COMMITTED_DETECTION,
    limit: Annotated[int, typer.Option(help="At most this many pictures; 0 for all.")] = 0,
    json: JsonFile = None,
    output: Annotated[Path | None, typer.Option(help="Folder for detection.csv and detection.png.")] = None,
) -> None:
    """Bytes against COCO's mAP for every operating point, beside JPEG, WebP and AVIF on the same pictures."""
    from .models.bundle import Bundle
    from .models.detection.evaluate import evaluate_detection

    evaluate_detection(Bundle.load(bundle), data, limit, json, output)


@eval_app.command("video")
def eval_video(
    video: Annotated[Path, typer.Option(help="Video file.")],
    bundle: BundleFolder = COMMITTED,
    fps: Annotated[list[float] | None, typer.Option(help="Frames a second; several times. [default: its own]")] = None,
    behind: Annotated[int, typer.Option(help="Frames by which answers lag behind.")] = 0,
    hysteresis: Annotated[float, typer.Option(help="As for `headrace edge`; 0 keeps the symbols.")] = 0.0,
    limit: Annotated[int, typer.Option(help="At most this many of the video's frames; 0 for all.")] = 0,
    json: JsonFile = None,
) -> None:
    """Bytes of a video's frames for every operating point: each by itself, and predicted from an earlier one."""
    from .bench.video import Lag, evaluate_video
    from .models.bundle import Bundle

    how = Lag(behind, hysteresis)
    evaluate_video(Bundle.load(bundle), video, tuple(fps or ()), how, limit=limit, json_file=json)


@bench_app.command("overhead")
def bench_overhead(
    frames: Annotated[int, typer.Option(help="Frames to send, one in flight.")] = 300,
    json: JsonFile = None,
) -> None:
    """What the runtime adds to compute on loopback: end-to-end time less head, coding, decoding and tail."""
    from .bench.overhead import run

    raise typer.Exit(run(frames, json))


@bench_app.command("switch")
def bench_switch(
    bundle: BundleFolder = COMMITTED,
    rounds: Annotated[int, typer.Option(help="Times that every operating point is changed to.")] = 25,
    json: JsonFile = None,
) -> None:
    """What changing the operating point between two frames costs the device: time beyond a frame's own, and memory."""
    from .bench.switch import run

    raise typer.Exit(run(bundle, rounds, json))


@bench_app.command("server")
def bench_server(
    devices: Annotated[int, typer.Option(help="Emulated devices, each with a connection of its own.")] = 32,
    seconds: Annotated[float, typer.Option(help="Length of each measurement.")] = 3.0,
    rounds: Annotated[int, typer.Option(help="Rounds; in each, every system has its turn.")] = 3,
    deadline_ms: Annotated[
        float, typer.Option(help="Deadline of a frame; also the bound of the 99th percentile.")
    ] = 250.0,
    batch: Annotated[int, typer.Option(help="Most frames in a batch, for every system.")] = 8,
    pattern: Annotated[str, typer.Option(help="When a device's frames are due: poisson or periodic.")] = "poisson",
    rivals: Annotated[str, typer.Option(help="Compare with these; empty for none.")] = "litserve,ray",
    overload_s: Annotated[float, typer.Option(help="Seconds of ten times the capacity; 0 leaves it out.")] = 60.0,
    idle: Annotated[int, typer.Option(help="Idle devices; 0 leaves them out.")] = 500,
    repetitions: Annotated[int, typer.Option(help="Drains and swaps under load; 0 leaves them out.")] = 20,
    json: JsonFile = None,
) -> None:
    """The server under load, beside a bare loop, LitServe and plain Ray Serve with the same tail.

    The server has one core, the load another. Devices speak the real stream and send when it is time, whatever has
    become of the frames before. What a system carries is the goodput at the largest load at which 99 % of the frames
    are answered within the deadline.
    """
    from .bench.server.run import Plan, run

    plan = Plan.of(devices, seconds, rounds, deadline_ms, batch, pattern, rivals, overload_s, idle, repetitions)
    raise typer.Exit(run(plan, json))


@bench_app.command("fleet")
def bench_fleet(
    traces: Annotated[Path, typer.Option(help="Folder of recorded links, subfolders included.")],
    devices: Annotated[int, typer.Option(help="Devices to simulate.")] = 100_000,
    fps: Annotated[float, typer.Option(help="Frames a second of each.")] = 1.0,
    seconds: Annotated[float, typer.Option(help="Seconds of the fleet's life.")] = 6.0,
    deadline_ms: Annotated[float, typer.Option(help="Deadline of a frame.")] = 250.0,
    devices_ms: Annotated[
        str, typer.Option(help="Kinds of devices, by the ms that the uncut model takes.")
    ] = "300,500",
    seed: Annotated[int, typer.Option(help="Of links, sizes, compute times and phases.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
    json: JsonFile = None,
) -> None:
    """What a fleet needs: a capacity model with constants measured here, checked by a simulation in virtual time.

    The simulation runs the real control loop of every device over a recorded link, and the real admission and batching
    of every server. 100,000 devices take tens of minutes on one core.
    """
    from .bench.fleet.run import Plan, run

    raise typer.Exit(run(Plan.of(traces, devices, fps, seconds, deadline_ms, devices_ms, seed, jobs), json))


@bench_app.command("backbones")
def bench_backbones(
    names: Annotated[list[str] | None, typer.Argument(help="Backbones to try; none for the whole table.")] = None,
    output: Annotated[Path | None, typer.Option(help="Markdown file to write the table to.")] = None,
) -> None:
    """Cut every architecture that this field compares itself on, send one frame through each, and write a table."""
    from .bench.backbones import run

    raise typer.Exit(run(names or (), output))


@bench_app.command("demo")
def bench_demo(
    output: Annotated[Path, typer.Option(help="Folder for the summary, the timeline and the frames.")] = Path(
        "demo-output"
    ),
    kill_server_at: Annotated[
        float, typer.Option(help="Kill the server after this many seconds and start it again; 0: never.")
    ] = 0.0,
) -> None:
    """A real video over a narrowing emulated link, live, with references on the same link."""
    from .bench.demo.run import run

    raise typer.Exit(run(output, kill_server_at=kill_server_at))


@bench_app.command("control")
def bench_control(
    traces: Annotated[Path, typer.Option(help="Folder of recorded links, subfolders included.")],
    bundle: BundleFolder = COMMITTED,
    deadlines_ms: Annotated[str, typer.Option(help="Deadlines in ms.")] = "100,200,400",
    devices_ms: Annotated[str, typer.Option(help="Devices, by the ms that the uncut model takes.")] = "150,500",
    fps: Annotated[float, typer.Option(help="Frames a second.")] = 10.0,
    seconds: Annotated[float, typer.Option(help="Length of a window.")] = 60.0,
    windows: Annotated[int, typer.Option(help="Windows of each trace, spread over it; 0 for all.")] = 1,
    every: Annotated[int, typer.Option(help="Only every so-manieth window.")] = 1,
    below_mbps: Annotated[float, typer.Option(help="Only windows with a mean rate under this.")] = 5.0,
    rtt_ms: Annotated[float, typer.Option(help="Round trip of propagation.")] = 30.0,
    server_ms: Annotated[float, typer.Option(help="The server's service time.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of packet sizes and compute times.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
    real: Annotated[
        int, typer.Option(help="Run so many cells, evenly spread, with real processes over an emulated link, too.")
    ] = 0,
    emulator: Annotated[str, typer.Option(help="Of that link: auto, netem, tun or proxy.")] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the cells that are in the output folder.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for control.csv and control.png.")] = Path("control-output"),
    json: JsonFile = None,
) -> None:
    """The control loop on recorded links in virtual time, beside the offline optimum and seven other policies."""
    from .bench.control.run import Plan, run

    plan = Plan.of(
        bundle,
        traces,
        deadlines_ms,
        devices_ms,
        fps,
        seconds,
        windows,
        every,
        below_mbps,
        rtt_ms,
        server_ms,
        seed,
        jobs,
        real,
        emulator,
        resume,
    )
    raise typer.Exit(run(plan, output, json))


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Split computing for cameras: head on the device, tail on a server, a learned bottleneck between them."""
    if show:
        typer.echo(f"headrace {__version__}")
        raise typer.Exit


if __name__ == "__main__":
    main()

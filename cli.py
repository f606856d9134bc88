"""The command line. Each command's work is in its folder; here are only names, flags and error messages.

`edge` and `serve` get their flags from their settings classes, so that a setting is documented once.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError

from . import __version__
from .edge.config import EdgeSettings
from .models.exceptions import HeadraceError
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

ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with these settings.")]
BundleFolder = Annotated[Path, typer.Option("--bundle", help="Folder of the bundle.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]
COMMITTED = Path(__file__).parent / "models" / "bundles" / "efficientnet_lite0"


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
    backbone: Annotated[str, typer.Argument(help="Name of the backbone, such as efficientnet_lite0.")],
    calibration: Annotated[Path, typer.Option(help="Folder of at least 100 unlabelled photographs.")],
    output: Annotated[Path, typer.Option(help="Folder to write the bundle to.")],
    at: Annotated[list[str] | None, typer.Option(help="Split point; may be given several times.")] = None,
    photographs: Annotated[int, typer.Option(help="Photographs to fit on.")] = 150,
    held_out: Annotated[int, typer.Option(help="Other photographs to measure operating points on.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the choice of photographs and of the metric's draws.")] = 0,
    data_note: Annotated[str, typer.Option(help="What the provenance says about the photographs.")] = "",
) -> None:
    """Cut a backbone without training and write a bundle."""
    from rich.console import Console
    from rich.progress import Progress

    from .models.bundle import short
    from .models.split import SplitPlan, bar_columns
    from .models.split import split as make_bundle

    plan = SplitPlan(backbone, calibration, tuple(at or ()), photographs, held_out, seed)
    with Progress(*bar_columns(), console=Console(stderr=True)) as progress:
        bundle = make_bundle(plan, progress, data_note)
    bundle.save(output)
    typer.echo(f"{output}: {len(bundle.operating_points)} operating points, fingerprint {short(bundle.fingerprint)}")


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
) -> None:
    """Say what is missing or misconfigured on this machine, and what to do about it."""
    from .bench.doctor import examine

    raise typer.Exit(examine(server))


@eval_app.command("rd")
def eval_rd(
    data: Annotated[Path, typer.Option(help="Folder of photographs, files or folders named by WordNet id.")],
    bundle: BundleFolder = COMMITTED,
    limit: Annotated[int, typer.Option(help="At most this many photographs; 0 for all.")] = 0,
    json: JsonFile = None,
) -> None:
    """Bytes against accuracy for every operating point, beside JPEG and WebP on the same photographs."""
    from .models.bundle import Bundle
    from .models.evaluate import evaluate_rate_distortion

    evaluate_rate_distortion(Bundle.load(bundle), data, limit, json)


@bench_app.command("overhead")
def bench_overhead(
    frames: Annotated[int, typer.Option(help="Frames to send, one in flight.")] = 300,
    json: JsonFile = None,
) -> None:
    """What the runtime adds to compute on loopback: end-to-end time less head, coding, decoding and tail."""
    from .bench.overhead import run

    raise typer.Exit(run(frames, json))


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
    from .bench.demo import run

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
    output: Annotated[Path, typer.Option(help="Folder for control.csv and control.png.")] = Path("control-output"),
    json: JsonFile = None,
) -> None:
    """The control loop on recorded links in virtual time, beside the offline optimum and six other policies."""
    from .bench.control_run import Plan, run

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

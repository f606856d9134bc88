"""Commands of the device: `headrace edge`, `headrace profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from ..models.command_line import with_settings
from .config import EdgeSettings

app = typer.Typer()


@app.command()
@with_settings(EdgeSettings)
def edge(config: Path | None, flags: dict[str, Any]) -> None:
    """Run the device's half: frames in, one JSON line a frame out."""
    from .daemon import run

    raise typer.Exit(run(EdgeSettings.load(config, **flags)))


@app.command()
@with_settings(EdgeSettings)
def profile(config: Path | None, flags: dict[str, Any]) -> None:
    """Time every operating point on this device and store it for `headrace edge`."""
    from .profile import profile as time_stages

    found = time_stages(EdgeSettings.load(config, **flags))
    typer.echo(f"bundle {found.bundle} on device {found.device} ({found.machine}), medians of {found.rounds}")
    for name, point in found.points.items():
        times = f"{found.stages_ms[point['stage']]:8.1f} ms  {point['bytes']:8.0f} bytes"
        typer.echo(f"{name:14} {times}  {point['accuracy']:.3f} of the uncut answers")
    typer.echo(f"stored in {found.path}")

"""The command line. Commands are in `commands.py` of their side, and each one's work in a module beside it.

`edge` and `serve` get their flags from their settings classes, so that a setting is documented once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from pydantic import ValidationError

from . import __version__
from .bench import commands as bench
from .bench import eval_commands
from .edge import commands as edge
from .models import commands as models
from .models.exceptions import HeadraceError
from .models.extras import missing
from .server import commands as server

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Split computing for cameras: head on the device, tail on a server, a learned bottleneck between them.",
)
for side in (edge, server, models, bench):
    app.add_typer(side.app)
app.add_typer(eval_commands.app, name="eval")


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
    except ModuleNotFoundError as error:
        if not (said := missing(error)):
            raise
        typer.echo(f"headrace: {said}", err=True)
        sys.exit(2)


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

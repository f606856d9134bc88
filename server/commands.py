"""Commands of the server: `headrace serve`, `headrace token`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..models.command_line import with_settings
from .auth import Scope
from .config import ServerSettings

app = typer.Typer()
token_app = typer.Typer(no_args_is_help=True, help="Tokens that devices show to a server (`headrace serve --tokens`).")
app.add_typer(token_app, name="token")

TokenFile = Annotated[Path, typer.Option("--file", help="The file of tokens.")]


@app.command()
@with_settings(ServerSettings)
def serve(config: Path | None, flags: dict[str, Any]) -> None:
    """Run the server's half: packets in, answers out."""
    from .daemon import run

    raise typer.Exit(run(ServerSettings.load(config, **flags)))


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
    from .token_commands import add

    typer.echo(add(file, name, scope, days))


@token_app.command("list")
def token_list(file: TokenFile) -> None:
    """Show the tokens of a file: id, scope, expiry, name."""
    from .token_commands import listing

    for line in listing(file):
        typer.echo(line)


@token_app.command("revoke")
def token_revoke(
    name: Annotated[str, typer.Argument(help="Name or id of the token.")],
    file: TokenFile,
) -> None:
    """Take a device's tokens back: a running server ends its streams within seconds."""
    from .token_commands import revoke

    for token in revoke(file, name):
        typer.echo(f"{token.id} {token.name} is taken back")

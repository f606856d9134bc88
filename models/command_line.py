"""What command lines of all sides share: options in the same words, and flags made from a settings class."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel

ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with these settings.")]
BundleFolder = Annotated[Path, typer.Option("--bundle", help="Folder of the bundle.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]

COMMITTED = Path(__file__).parent / "bundles" / "efficientnet_lite0"
COMMITTED_DETECTION = COMMITTED.with_name("yolov2_tiny")


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

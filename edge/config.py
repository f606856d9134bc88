"""Settings of the edge. A flag goes before the environment (`HEADRACE_EDGE_...`), that before a TOML file."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from ..models.operating_point import Kind
from .exceptions import ConfigError

PREFIX = "HEADRACE_EDGE_"

INSTEAD = {"device_speed": "device_uncut_ms", "device_uncut_ms": "device_speed"}
"""Settings that say the same in another way, one for the other."""

_table: ContextVar[dict[str, Any]] = ContextVar("_table", default={})  # noqa: B039  never written to


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/headrace`, or `~/.cache/headrace`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "headrace"


class EdgeSettings(BaseSettings):
    """Everything that can be set for `headrace edge` and `headrace profile`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", validate_default=True, allow_inf_nan=False)

    server: str = Field("127.0.0.1:50051", min_length=1, description="Address of the server, host:port.")
    bundle: Path | None = Field(
        None,
        description="Folder of an edge half, as `headrace export` writes it. Without it the edge half comes from the "
        "server and is kept in the cache.",
    )
    cache_dir: Path = Field(
        default_factory=default_cache_dir,
        description="Folder for fetched edge halves and for profiles of this device.",
    )
    source: Annotated[list[str], NoDecode] = Field(
        default_factory=list,
        description="What to look at: a video file, a picture, a folder of pictures, or a camera such as /dev/video0. "
        "Several are played one after another (in the environment separated by commas).",
    )
    fps: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="Frames captured per second. Default: the source's own rate, 10 for pictures.",
    )
    as_fast_as_possible: bool = Field(
        False,
        description="Take the next frame whenever the device is free instead of at a frame rate; nothing is dropped.",
    )
    loop: bool = Field(False, description="Begin again when the last source has ended.")
    max_frames: int | None = Field(None, gt=0, description="Stop after so many captured frames.")
    deadline_ms: float = Field(250.0, gt=0, le=60_000, description="Time from capture to answer, in ms.")
    grace_ms: float = Field(
        1000.0, ge=0, le=60_000, description="How long after its deadline a frame's answer is still waited for, in ms."
    )
    point: str | None = Field(
        None,
        description='Always use this operating point, such as "blocks.3@4", "webp@30", "local" or "exit@blocks.3".',
    )
    kinds: Annotated[list[str], NoDecode] = Field(
        default_factory=list,
        description="Choose among operating points of these kinds only: feature, image, local. Default: all.",
    )
    splits: Annotated[list[str], NoDecode] = Field(
        default_factory=list,
        description="Use these split points only; heads of others are neither fetched nor loaded. Default: all.",
    )
    objective: Literal["accuracy", "bytes", "compute"] = Field(
        "accuracy",
        description="What is sought: the most right answers within the deadline; or the fewest bytes, or the least "
        "compute on the device (as a proxy of its energy), at an on-time accuracy of --accuracy-floor.",
    )
    accuracy_floor: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="On-time accuracy that is kept while bytes or compute are saved, as a share of captured frames.",
    )
    bytes_per_day: float | None = Field(
        None,
        gt=0,
        description="Send no more than this, packets and framing. What is not used can be saved up for ten minutes.",
    )
    max_in_flight: int | None = Field(
        None,
        gt=0,
        le=1024,
        description="Most frames on their way without an answer. Default: 16, or 4 with --as-fast-as-possible; never "
        "more than the server allows.",
    )
    cut_short: bool = Field(
        True,
        description="On a link that needs long for a frame, send its slices one by one, and give up the rest when it "
        "would make the next frame late; the server answers from what it has.",
    )
    predict: bool = Field(
        True,
        description="Code a frame's symbols under contexts from an earlier frame that the server has answered, where "
        "that takes fewer bytes. The symbols stay the same.",
    )
    hysteresis: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="Let a symbol of a predicted frame stay what it was while the latent is no further than this share "
        "of a step beyond its rounding threshold. Saves bytes on video and costs accuracy; 0: symbols as ever.",
    )
    filter: bool = Field(
        False,
        description="Send only frames in which the bundle's filter sees something of its classes of interest "
        "(`headrace filter`), and those of the next two settings. Pictures are not sent then, nor features of "
        "a split point without a filter.",
    )
    audit_share: float = Field(
        0.02,
        ge=0,
        le=1,
        description="Share of all frames that are sent whatever the filter says.",
    )
    keep_alive_s: float = Field(
        10.0,
        gt=0,
        le=3600,
        description="After so many seconds without a packet the filter, or a sure exit, lets the next frame pass.",
    )
    fallback: bool = Field(
        True,
        description="Where it pays, let the device answer frames, too, that are sent, and give that answer (outcome "
        "`local`) where the server's is not there by the deadline.",
    )
    exit_confidence: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Where a split point has an exit (`headrace exit`), ask it about each frame before it is sent: if "
        "it is at least so sure that its label is the uncut model's, 0..1, that is the answer and nothing is sent, but "
        "for --keep-alive-s. Default: no exit is asked.",
    )
    device_speed: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Emulate a slower device: models and coders take as long as if this machine had only this share of "
        "its speed, 0..1.",
    )
    device_uncut_ms: float | None = Field(
        None, gt=0, description="Emulate a device on which the uncut model takes this many ms."
    )
    cpu: int | None = Field(
        None, ge=0, description="Keep to this core. Implied by an emulated device (then the last core by default)."
    )
    threads: int = Field(
        1, ge=1, le=64, description="Threads that ONNX Runtime computes with (1 on an emulated device)."
    )
    metrics_host: str = Field("127.0.0.1", description="Address on which Prometheus metrics are served.")
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port of the Prometheus metrics; 0 for any free one. Default: none are served.",
    )
    render: Path | None = Field(
        None, description="Video file to write the captured frames to, with their boxes or labels drawn on them."
    )
    profile: Path | None = Field(
        None,
        description="File with measured compute times. Default: the one that `headrace profile` left in the cache.",
    )
    tracing: bool = Field(
        False,
        description="Send OpenTelemetry spans of every frame by OTLP, to where OTEL_EXPORTER_OTLP_ENDPOINT says; needs "
        "the extra `tracing`.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log lines that are written to standard error."
    )
    connect_timeout_s: float = Field(
        3.0, gt=0, le=60, description="How long a connection may take to be made and greeted, in seconds."
    )
    stall_s: float = Field(
        3.0,
        gt=0,
        le=600,
        description="A connection on which frames have waited so long without any answer is made anew, in seconds.",
    )
    reconnect_min_s: float = Field(0.1, gt=0, le=60, description="First bound of the random wait before reconnecting.")
    reconnect_max_s: float = Field(
        3.0, gt=0, le=600, description="Largest bound of that wait; each failure doubles it."
    )
    update_patience_s: float = Field(
        120.0,
        ge=0,
        le=86_400,
        description="A server that refuses this device's bundle, and gives the very same one when asked, is tried "
        "again for so long, in seconds: of several behind one address not all may be up to date.",
    )
    device_name: str = Field("", max_length=128, description="Name of this device in the server's log. Default: host.")
    tls: bool = Field(
        False, description="Connect by TLS; the server's certificate is checked against the authorities known to gRPC."
    )
    tls_ca: Path | None = Field(
        None, description="PEM file with the authorities that may have signed the server's certificate. Means --tls."
    )
    tls_cert: Path | None = Field(
        None, description="PEM file with this device's own certificate, for servers that ask for one. Means --tls."
    )
    tls_key: Path | None = Field(None, description="PEM file with that certificate's key.")
    tls_server_name: str = Field(
        "", max_length=255, description="Name that the server's certificate is for, where it is not that in --server."
    )
    token_file: Path | None = Field(
        None, description="File with this device's token, as `headrace token add` prints it; read at each connection."
    )
    insecure: bool = Field(False, description="Send the token although the connection is not encrypted.")

    @field_validator("source", "kinds", "splits", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        """Environment variables hold a JSON list, or text with commas."""
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return json.loads(value)
        return [part.strip() for part in value.split(",") if part.strip()]

    @field_validator("kinds")
    @classmethod
    def _known_kinds(cls, value: list[str]) -> list[str]:
        for kind in value:
            if kind not in list(Kind):
                raise ValueError(f"{kind!r} is no kind of operating point; there are {', '.join(Kind)}")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> EdgeSettings:
        if self.device_speed is not None and self.device_uncut_ms is not None:
            raise ValueError("device_speed and device_uncut_ms both set the emulated device; give one of them")
        if (self.objective == "accuracy") != (self.accuracy_floor is None):
            raise ValueError("accuracy_floor belongs to the objectives bytes and compute, which need one")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: a certificate and its key")
        if self.reconnect_min_s > self.reconnect_max_s:
            raise ValueError("reconnect_min_s is larger than reconnect_max_s")
        return self

    @property
    def emulated(self) -> bool:
        """Whether a slower device is emulated."""
        return self.device_speed is not None or self.device_uncut_ms is not None

    @classmethod
    def load(cls, config: Path | None = None, **flags: Any) -> EdgeSettings:
        """Settings from flags, environment and file.

        Args:
            config: TOML file; the table `[edge]` if it has one, else its top level.
            flags: by field name; None means not given.

        Raises:
            ConfigError: the file cannot be read, or a value cannot be used.
        """
        given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
        named = {key.upper(): value for key, value in os.environ.items()}
        environ = {name: named[key] for name in cls.model_fields if (key := PREFIX + name.upper()) in named}
        table, taken = _read_toml(config) if config else {}, _replaced(environ)
        token = _table.set({name: value for name, value in table.items() if name not in taken})
        try:
            given |= dict.fromkeys(_replaced(given))
            return cls(**given)
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(e, config) for e in error.errors())) from error
        except ValueError as error:
            raise ConfigError(f"the settings cannot be used: {error}") from error
        finally:
            _table.reset(token)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the TOML file."""
        return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=_table.get())


def _replaced(given: Mapping[str, Any]) -> set[str]:
    """Settings whose place is taken by what is given: it goes before them wherever they are set less firmly."""
    taken = {other for one, other in INSTEAD.items() if one in given}
    if given.get("objective") == "accuracy":
        taken.add("accuracy_floor")
    return taken - given.keys()


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"settings file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings file {path} is not TOML: {error}") from error
    table = content.get("edge")
    return table if isinstance(table, dict) else {k: v for k, v in content.items() if not isinstance(v, dict)}


def _explain(error: Any, config: Path | None) -> str:
    name = ".".join(str(part) for part in error["loc"][:1])
    message = str(error["msg"]).removeprefix("Value error, ")
    if not name:
        return message
    if error["type"] == "extra_forbidden":
        where = f" in {config}" if config else ""
        return f"there is no setting {name!r}{where}"
    return f"--{name.replace('_', '-')} (or {PREFIX}{name.upper()}) is {error['input']!r}: {message}"

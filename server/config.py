"""Settings of `headrace serve`: flag > environment (HEADRACE_SERVER_...) > TOML file > default."""

from __future__ import annotations

import os
import tomllib
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import (
    SettingsError as PydanticSettingsError,
)

from ..models.bitstream import MAX_PACKET_BYTES
from .engine import Runtime
from .exceptions import SettingsError
from .security import SecuritySettings

ENV_PREFIX = "HEADRACE_SERVER_"
TABLE = "server"
SHIPPED_BUNDLE = Path(__file__).resolve().parent.parent / "models" / "bundles" / "efficientnet_lite0"
"""The committed bundle that comes with the package."""

_file_values: ContextVar[dict[str, Any]] = ContextVar("file_values")


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace" / "server"


class ServerSettings(SecuritySettings):
    """Everything that can be set. Made by `ServerSettings.load`, which reports bad values in plain words."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True, allow_inf_nan=False)

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface (see --insecure).")
    port: int = Field(50051, ge=0, le=65535, description="Port to listen on; 0 takes any free one.")
    metrics_host: str = Field("127.0.0.1", description="Address of the HTTP endpoint for metrics and probes.")
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port of /metrics, /livez and /readyz; 0 takes any free one. Off when not given.",
    )
    bundles: Annotated[list[Path], NoDecode] = Field(
        default_factory=lambda: [SHIPPED_BUNDLE],
        min_length=1,
        description="Folders of the bundles to serve; the first is the default of GetBundle. "
        f"In the environment separated by {os.pathsep!r}.",
    )
    max_packet_bytes: int = Field(
        MAX_PACKET_BYTES, ge=1024, le=64 * 2**20, description="Largest packet that is read, in bytes."
    )
    bundle_dir: Path | None = Field(
        None,
        description="Folder that is watched: every subfolder is a bundle that is served, also those that come, change "
        "and go later. Without --bundles these are all.",
    )
    linger_s: float = Field(
        30.0,
        ge=0,
        le=86400,
        description="How long streams of a bundle that was taken away or replaced may go on, in seconds.",
    )
    max_elements: int = Field(
        2**22, ge=1, description="Most numbers that one packet may decode to; a bundle beyond it is not loaded."
    )
    max_streams: int = Field(4096, ge=1, description="Calls at a time, over all peers; one more is refused.")
    max_streams_per_peer: int = Field(1024, ge=1, description="Streams of one address; one more is refused.")
    max_in_flight: int = Field(
        16, ge=1, le=4096, description="Frames of one stream without a result; one more is refused."
    )
    references: int = Field(
        8,
        ge=0,
        le=64,
        description="Frames of a stream that are kept to predict later ones from, which saves bytes on video; 0: none.",
    )
    reference_bytes: int = Field(
        256 * 2**20,
        ge=0,
        description="Bytes that all streams together may keep for that. A stream that no longer fits keeps none: its "
        "device sends key frames only.",
    )
    queue_limit: int = Field(
        256, ge=1, le=65536, description="Frames that may wait for their batch, over all streams; one more is refused."
    )
    device_queue_limit: int = Field(
        64, ge=1, le=65536, description="Frames of one device that may wait for their batch; one more is refused."
    )
    queue_bytes: int = Field(
        64 * 2**20, ge=1024, description="Bytes of the packets that may wait, and as many that may gather slices."
    )
    max_batch: int = Field(8, ge=1, le=1024, description="Most frames in one batch; how many there are follows load.")
    max_wait_ms: float = Field(
        5.0,
        ge=0,
        le=1000,
        description="The longest that a frame waits for company, in ms; it waits only where, by measured times and "
        "arrivals, that saves more than it costs. 0: what waits is batched, nothing waits for company.",
    )
    engine: Literal["local", "ray"] = Field(
        "local", description="Where tails run: in this process, or in replicas on Ray Serve (needs the extra `ray`)."
    )
    ray_address: str = Field(
        "", description="The Ray cluster to join, such as auto or ray-head:6379; empty starts Ray on this machine."
    )
    ray_replicas: int = Field(2, ge=1, le=4096, description="Most replicas of the tails on Ray.")
    ray_min_replicas: int | None = Field(
        None,
        ge=1,
        description="Least replicas; Ray adds and removes some in between as load needs. Not given: all.",
    )
    ray_cpus: float = Field(1.0, gt=0, description="Cores that Ray keeps for one replica.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where decoders and tails run.")
    runtime: Runtime = Field(
        "onnx",
        description="What computes tails on the CPU: ONNX Runtime, which is faster, or PyTorch (`torch`). A tail that "
        "ONNX Runtime cannot take, or answers differently, stays with PyTorch, and the log says so. On CUDA always "
        "PyTorch.",
    )
    threads: int = Field(0, ge=0, le=1024, description="Threads of a tail on the CPU; 0 for one a core.")
    decode_threads: int = Field(2, ge=1, le=64, description="Worker threads for entropy and image decoding.")
    drain_s: float = Field(
        10.0, ge=0, le=3600, description="How long admitted frames may take to be answered after SIGTERM, in seconds."
    )
    cache_dir: Path = Field(
        default_factory=_default_cache, description="Folder for exported edge halves, by fingerprint."
    )
    reflection: bool = Field(False, description="Describe the services to whoever asks (gRPC reflection).")
    tracing: bool = Field(
        False,
        description="Send OpenTelemetry spans of traced frames by OTLP, to where OTEL_EXPORTER_OTLP_ENDPOINT says; "
        "needs the extra `tracing`.",
    )
    log_format: Literal["text", "json"] = Field("text", description="Logs for people, or one JSON object a line.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")

    @property
    def given_bundles(self) -> list[Path]:
        """The folders to serve beside those of `bundle_dir`: the shipped one only where nothing else was asked for."""
        return [] if self.bundle_dir is not None and "bundles" not in self.model_fields_set else self.bundles

    @field_validator("bundles", mode="before")
    @classmethod
    def _split_paths(cls, value: Any) -> Any:
        """One text is a list of paths, as in PATH."""
        return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order of the sources, strongest first."""
        return init_settings, env_settings, InitSettingsSource(settings_cls, _file_values.get({}))

    @classmethod
    def load(cls, config: Path | None = None, **flags: Any) -> Self:
        """Read the settings.

        Args:
            config: TOML file. Its table `[server]` is read where it has one, so that both sides can share a file;
                else its top level.
            **flags: values by field name; None stands for a flag that was not given.

        Raises:
            SettingsError: the file cannot be read, a value is unknown or out of range, or the server would listen to
                strangers without `insecure`. The text names the setting.
        """
        token = _file_values.set(_read_toml(config) if config else {})
        try:
            settings = cls(**{name: value for name, value in flags.items() if value is not None})
        except (ValidationError, PydanticSettingsError) as error:
            raise SettingsError(_plain(error, config)) from error
        finally:
            _file_values.reset(token)
        settings.check_security(settings.host)
        return settings


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingsError(f"the configuration file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"the configuration file {path} is not TOML: {error}") from error
    table = content.get(TABLE, content)
    if not isinstance(table, dict):
        raise SettingsError(f"in the configuration file {path}, {TABLE} is not a table; write [{TABLE}]")
    return table


def _plain(error: ValidationError | PydanticSettingsError, config: Path | None) -> str:
    """One sentence a wrong setting, with the names under which it can be given."""
    if not isinstance(error, ValidationError):
        return f"the settings cannot be read: {error}"
    parts = []
    for each in error.errors():
        name = str(each["loc"][0]) if each["loc"] else "settings"
        if each["type"] == "extra_forbidden":
            where = f" in {config}" if config else ""
            parts.append(f"there is no setting {name!r}{where}; `headrace serve --help` lists them")
        else:
            flag = "--" + name.replace("_", "-")
            parts.append(f"{flag} (or {ENV_PREFIX}{name.upper()}) is {each['input']!r}: {each['msg'].lower()}")
    return "; ".join(parts)

"""Profile: what every stage of a bundle takes on this device, measured once and kept in the cache.

CACHE/profiles/FINGERPRINT-DEVICE.json      DEVICE: native, speed-0.04, uncut-150
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime
import structlog

from ..models.bundle import Bundle, read_limited
from ..models.exceptions import HeadraceError
from .config import EdgeSettings
from .device import pin
from .exceptions import ConfigError

if TYPE_CHECKING:
    from .engine import Engine

log = structlog.get_logger(__name__)

ROUNDS = 25
MAX_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Profile:
    """Measured times.

    Attributes:
        fingerprint: of the bundle, hex.
        bundle: its name.
        device: `native`, or which device was emulated.
        factor: by which this machine was slowed down for that, 1 if native.
        threads: of ONNX Runtime.
        machine: processor architecture and ONNX Runtime's version.
        rounds: how many times each stage was timed; they took turns.
        stages_ms: median by stage (`OperatingPoint.stage`), preparing the picture included.
        points: by operating point: stage, kind, and the bundle's measured bytes (median) and accuracy.
        path: where it was stored.
    """

    fingerprint: str
    bundle: str
    device: str
    factor: float
    threads: int
    machine: str
    rounds: int
    stages_ms: dict[str, float]
    points: dict[str, dict[str, Any]]
    path: Path | None = None

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, as the control loop takes them."""
        return {stage: ms / 1000 for stage, ms in self.stages_ms.items()}

    def to_json(self) -> str:
        """What is stored."""
        return json.dumps({k: v for k, v in asdict(self).items() if k != "path"}, indent=1)


def profile(settings: EdgeSettings, rounds: int = ROUNDS) -> Profile:
    """Time every stage on this device and store the result; `headrace profile` does this.

    Raises:
        HeadraceError: there is no edge half, or it cannot be run.
    """
    from .assembly import make_engine, of_splits  # assembly reads profiles

    if settings.emulated or settings.cpu is not None:
        pin(settings.cpu)
    bundle = _edge_half(settings)
    engine: Engine = make_engine(bundle, settings)
    points = of_splits(bundle, settings)
    engine.warm_up(points)
    seconds = engine.time_stages(points, rounds, settings.predict)
    path = settings.profile or profile_path(settings, bundle.fingerprint)
    result = Profile(
        fingerprint=bundle.fingerprint.hex(),
        bundle=bundle.name,
        device=device_key(settings),
        factor=round(engine.device.factor, 4),
        threads=1 if settings.emulated else settings.threads,
        machine=f"{platform.machine()}, onnxruntime {onnxruntime.__version__}",
        rounds=rounds,
        stages_ms={stage: round(each * 1000, 4) for stage, each in seconds.items()},
        points={
            p.name: {"stage": p.stage, "kind": str(p.kind), "bytes": p.bytes_median, "accuracy": p.accuracy}
            for p in points
        },
        path=path,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(result.to_json())
    partial.replace(path)
    return result


def device_key(settings: EdgeSettings) -> str:
    """Which device a profile is for."""
    if settings.device_uncut_ms is not None:
        return f"uncut-{settings.device_uncut_ms:g}"
    if settings.device_speed is not None:
        return f"speed-{settings.device_speed:g}"
    return "native" if settings.threads == 1 else f"native-{settings.threads}"


def profile_path(settings: EdgeSettings, fingerprint: bytes) -> Path:
    """Where the profile of that bundle on this device is kept."""
    return settings.cache_dir / "profiles" / f"{fingerprint.hex()[:16]}-{device_key(settings)}.json"


def read_profile(settings: EdgeSettings, fingerprint: bytes) -> Profile | None:
    """The stored profile, if there is one for this bundle and device.

    Raises:
        ConfigError: the settings name one, and it cannot be used.
    """
    path = settings.profile or profile_path(settings, fingerprint)
    try:
        fields = json.loads(read_limited(path, MAX_BYTES))
        found = Profile(**fields, path=path)
        if not all(ms > 0 for ms in found.seconds().values()):
            raise ValueError("times have to be positive")
    except (HeadraceError, ValueError, TypeError, AttributeError) as error:
        if settings.profile is not None:
            raise ConfigError(
                f"profile {path} cannot be read: {error}; make it anew with `headrace profile`"
            ) from error
        return None
    if found.fingerprint == fingerprint.hex() and found.device == device_key(settings):
        return found
    if settings.profile is not None:
        raise ConfigError(
            f"profile {path} is for bundle {found.fingerprint[:16]} on device {found.device}, not for "
            f"{fingerprint.hex()[:16]} on {device_key(settings)}; make it anew with `headrace profile`"
        )
    return None


def _edge_half(settings: EdgeSettings) -> Bundle:
    """The edge half that the daemon would run: as given, from the cache, or from the server."""
    import asyncio

    from ..models.edge_half import load_edge_half
    from .access import Access
    from .fetch import Cache, fetch_edge_half

    if settings.bundle is not None:
        return load_edge_half(settings.bundle, settings.splits)
    cache = Cache(settings.cache_dir, settings.splits)
    bundle = cache.last_from(settings.server)
    if bundle is None:
        bundle = asyncio.run(fetch_edge_half(settings.server, cache, access=Access.of(settings)))
    return bundle

"""Assembly: from a verified edge half to an engine that is warm, operating points, and a control loop for them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import structlog

from ..models.bundle import Bundle, short
from ..models.exceptions import OperatingPointError
from ..models.operating_point import Kind, OperatingPoint
from .config import EdgeSettings
from .controller import ControlLoop, ControlSettings
from .device import Device
from .engine import Engine
from .exceptions import ConfigError
from .frames import PICTURE_FPS
from .objective import Objective
from .profile import read_profile

log = structlog.get_logger(__name__)

QUICK_ROUNDS = 3
LOSSLESS_IN_FLIGHT = 4
LIVE_IN_FLIGHT = 16


@dataclass(frozen=True, slots=True)
class Half:
    """The edge's half, ready to run.

    Attributes:
        engine: warm.
        points: what may be chosen, as the settings restrict it.
        compute_s: seconds by `OperatingPoint.stage`, all edge compute of a frame.
        local_s: seconds of the uncut model's answer.
    """

    engine: Engine
    points: tuple[OperatingPoint, ...]
    compute_s: dict[str, float]
    local_s: float

    @property
    def exits_s(self) -> dict[str, float]:
        """Seconds of the exits' answers, by stage."""
        return {p.stage: self.compute_s[p.stage] for p in self.points if p.is_exit}

    @property
    def remote(self) -> bool:
        """Whether anything is ever sent."""
        return any(p.kind is not Kind.LOCAL for p in self.points)


def make_ready(bundle: Bundle, settings: EdgeSettings) -> Half:
    """Load and warm up what the settings need, and time it. Takes seconds; called in the compute thread.

    Raises:
        ConfigError: the settings ask for points that are not there, or for a device faster than this machine.
        EngineError: a graph cannot be loaded or run.
    """
    points = select_points(bundle, settings)
    engine = make_engine(bundle, settings)
    local = next((p for p in bundle.operating_points if p.is_uncut), None)
    asked = [bundle.exit_point(s) for s in exits_asked(bundle, points, settings)]
    timed = [*points, *(p for p in (local, *asked) if p is not None and p not in points)]
    engine.warm_up(timed)
    profile = read_profile(settings, bundle.fingerprint)
    timing = partial(engine.time_stages, rounds=QUICK_ROUNDS, predicted=settings.predict)
    compute_s = profile.seconds() if profile is not None else timing(timed)
    if profile is not None and (missing := {p.stage for p in timed} - compute_s.keys()):
        compute_s |= timing([p for p in timed if p.stage in missing])
    local_s = compute_s[local.stage] if local is not None else max(compute_s.values())
    log.info(
        "device is ready",
        bundle=bundle.name,
        fingerprint=short(bundle.fingerprint),
        points=len(points),
        slowed_down=round(engine.device.factor, 2),
        stages_ms={stage: round(seconds * 1000, 1) for stage, seconds in compute_s.items()},
        measured="profile" if profile is not None else "now",
    )
    return Half(engine, points, compute_s, local_s)


def make_engine(bundle: Bundle, settings: EdgeSettings) -> Engine:
    """The engine on the device that the settings describe."""
    if bundle.folder is None:
        raise ConfigError(f"bundle {bundle.name} lies in no folder; load it from one")
    threads = 1 if settings.emulated else settings.threads
    engine = Engine(bundle, bundle.folder, Device(), threads, settings.hysteresis)
    if settings.device_uncut_ms is not None:
        engine.emulate(settings.device_uncut_ms)
    elif settings.device_speed is not None:
        engine.device.factor = 1 / settings.device_speed
    return engine


def of_splits(bundle: Bundle, settings: EdgeSettings) -> tuple[OperatingPoint, ...]:
    """The bundle's operating points without those of split points that are not used.

    Raises:
        ConfigError: the bundle has no such split point.
    """
    known = [s.name for s in bundle.splits]
    if unknown := sorted(set(settings.splits) - set(known)):
        raise ConfigError(f"bundle {bundle.name} has no split point {unknown[0]!r}; --splits takes {', '.join(known)}")
    used = settings.splits or known
    return tuple(p for p in bundle.operating_points if not p.split or p.split in used)


def exits_asked(bundle: Bundle, points: Sequence[OperatingPoint], settings: EdgeSettings) -> list[str]:
    """Split points whose exits are asked about frames that are to be sent.

    Raises:
        ConfigError: the settings ask for it, and there is no exit at any split point that is used.
    """
    if settings.exit_confidence is None:
        return []
    used = dict.fromkeys(p.split for p in points if p.kind is Kind.FEATURE)
    found = [split for split in used if bundle.exit(split) is not None]
    if not found:
        having = ", ".join(s.split for s in bundle.exit_specs) or "none"
        raise ConfigError(
            f"--exit-confidence needs an exit at a split point that is used; bundle {bundle.name} has exits at: "
            f"{having} (`headrace exit` makes one)"
        )
    return found


def select_points(bundle: Bundle, settings: EdgeSettings) -> tuple[OperatingPoint, ...]:
    """The bundle's operating points that the settings leave.

    Raises:
        ConfigError: none is left, or there is none of the name asked for.
    """
    points = [p for p in of_splits(bundle, settings) if not settings.kinds or p.kind in settings.kinds]
    if settings.filter:
        if bundle.filter is None:
            raise ConfigError(f"bundle {bundle.name} has no filter; give it one with `headrace filter`")
        points = [p for p in points if p.kind is Kind.LOCAL or (p.split and bundle.filters(p.split))]
    if settings.point is not None:
        named = [p for p in points if p.name == settings.point]
        if not named:
            raise ConfigError(
                f"there is no operating point {settings.point!r} to fix with --point; "
                f"there are {', '.join(p.name for p in points)}"
            )
        points = named
    if not points:
        raise ConfigError(f"bundle {bundle.name} has no operating points of --kinds {','.join(settings.kinds)}")
    return tuple(points)


def frame_interval_s(settings: EdgeSettings, rates: Sequence[float | None]) -> float:
    """Seconds between frames: as set, else the fastest source's own; on demand a deadline stands for it."""
    if settings.as_fast_as_possible:
        return settings.deadline_ms / 1000
    return 1 / (settings.fps or max((rate for rate in rates if rate), default=PICTURE_FPS))


def most_in_flight(settings: EdgeSettings) -> int:
    """The cap on frames without an answer."""
    return settings.max_in_flight or (LOSSLESS_IN_FLIGHT if settings.as_fast_as_possible else LIVE_IN_FLIGHT)


def make_control(half: Half, settings: EdgeSettings, interval_s: float, taken: Collection[int] = ()) -> ControlLoop:
    """A control loop for those points that the server takes.

    Args:
        half: points and measured times.
        settings: deadline, cap and objective.
        interval_s: between frames.
        taken: ids of the points that the server can decode; empty if not known.
    """
    points = [p for p in half.points if p.kind is Kind.LOCAL or not taken or p.id in taken]
    if not points:
        names = ", ".join(p.name for p in half.points)
        raise OperatingPointError(f"the server can decode none of {names}; update it, or choose others with --kinds")
    # The loop's own cap (what fits into a deadline) is the better one for live frames, unless one is asked for.
    cap = most_in_flight(settings) if settings.as_fast_as_possible or settings.max_in_flight else 0
    return ControlLoop(
        points,
        deadline_s=settings.deadline_ms / 1000,
        frame_interval_s=interval_s,
        uncut_s=half.local_s,
        settings=ControlSettings(
            max_in_flight=cap,
            objective=Objective(settings.objective),
            accuracy_floor=settings.accuracy_floor or 0.0,
            bytes_per_day=settings.bytes_per_day or 0.0,
            fallback=settings.fallback and not settings.as_fast_as_possible,
        ),
        compute_s=half.compute_s,
    )

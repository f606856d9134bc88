"""What `headrace bench server` measures, and the figures that it found."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from ...models.bundle import Bundle
from ...models.exceptions import HeadraceError
from ...models.operating_point import Kind
from ...server.config import SHIPPED_BUNDLE
from .load import Pattern
from .systems import spread

POINT = "blocks.2.0@3"
"""What devices of the simulated fleet (docs/scale.md) send most of all cuts."""
PARTS = ("compare", "bare", "overload", "heed", "greed", "idle", "drain", "swap")
KEYS = (
    "over_bare_loop",
    "over_bare_loop_same_runtime",
    "over_litserve",
    "over_ray_serve",
    "null_over_litserve",
    "null_over_ray_serve",
    "overload_goodput_share",
    "greed_points",
    "greed_points_mean",
    "greed_points_error",
    "idle_mb_per_device",
    "lost_on_swap",
    "lost_on_drain",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. Seconds are of each measurement; see the command's help."""

    devices: int = 32
    seconds: float = 3.0
    rounds: int = 3
    deadline_s: float = 0.25
    batch: int = 8
    pattern: Pattern = "poisson"
    rivals: tuple[str, ...] = ("litserve", "ray")
    overload_s: float = 60.0
    idle: int = 500
    repetitions: int = 20
    point: str = POINT
    parts: tuple[str, ...] = PARTS
    keep: Path | None = None

    @classmethod
    def of(
        cls,
        devices: int,
        seconds: float,
        rounds: int,
        deadline_ms: float,
        batch: int,
        pattern: str,
        rivals: str,
        overload_s: float,
        idle: int,
        repetitions: int,
        point: str = POINT,
        parts: str = ",".join(PARTS),
        keep: Path | None = None,
    ) -> Plan:
        """From the command's flags.

        Raises:
            HeadraceError: one of them cannot be used.
        """
        names = tuple(name.strip() for name in rivals.split(",") if name.strip())
        if unknown := sorted(set(names) - {"litserve", "ray"}):
            raise HeadraceError(f"--rivals knows litserve and ray, not {unknown[0]!r}")
        chosen = tuple(part.strip() for part in parts.split(",") if part.strip())
        if unknown := sorted(set(chosen) - set(PARTS)):
            raise HeadraceError(f"--parts knows {', '.join(PARTS)}, not {unknown[0]!r}")
        names_of = [p.name for p in Bundle.load(SHIPPED_BUNDLE).operating_points if p.kind is Kind.FEATURE]
        if point not in names_of:
            raise HeadraceError(f"--point is one of the shipped bundle's, such as {names_of[0]}, not {point!r}")
        if pattern not in ("poisson", "periodic"):
            raise HeadraceError(f"--pattern is poisson or periodic, not {pattern!r}")
        if min(devices, rounds, batch) < 1 or min(seconds, deadline_ms) <= 0:
            raise HeadraceError("--devices, --rounds, --batch, --seconds and --deadline-ms are positive")
        which: Pattern = "poisson" if pattern == "poisson" else "periodic"
        return cls(
            devices,
            seconds,
            rounds,
            deadline_ms / 1e3,
            batch,
            which,
            names,
            overload_s,
            idle,
            repetitions,
            point,
            chosen,
            keep,
        )


@dataclass(slots=True)
class Found:
    """Figures by name; a list has one of each round. `keep` holds them between runs."""

    rounds: dict[str, list[float]] = field(default_factory=dict)
    figures: dict[str, float | int | None] = field(default_factory=lambda: dict.fromkeys(KEYS))
    complete: int = 0
    keep: Path | None = None

    @classmethod
    def kept(cls, keep: Path | None) -> Found:
        """What an earlier run has kept, or nothing.

        Raises:
            HeadraceError: the file is none of ours.
        """
        if keep is None or not keep.exists():
            return cls(keep=keep)
        try:
            read = json.loads(keep.read_text())
            figures = dict.fromkeys(KEYS) | {key: read["figures"].get(key) for key in KEYS}
            complete = int(read["complete"])
            rounds = {str(name): [float(value) for value in each] for name, each in read["rounds"].items()}
            # What a round that was not completed left is measured again.
            rounds = {name: each if name in KEYS else each[:complete] for name, each in rounds.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HeadraceError(f"{keep} does not hold what `bench server --keep` writes; take another file") from error
        return cls(rounds, figures, complete, keep)

    def save(self) -> None:
        """Write what is there to the file."""
        if self.keep is not None:
            what = {"complete": self.complete, "figures": self.figures, "rounds": self.rounds}
            self.keep.write_text(json.dumps(what, indent=2) + "\n")

    def add(self, name: str, value: float) -> None:
        """One round's."""
        self.rounds.setdefault(name, []).append(value)

    def ratio(self, key: str, ours: str, theirs: str) -> None:
        """Median over the rounds of ours / theirs, kept with every round's; nothing where one of them is missing."""
        pairs = zip(self.rounds.get(ours, ()), self.rounds.get(theirs, ()), strict=False)
        each = [a / b for a, b in pairs if b]
        if each:
            self.rounds[key] = each
            self.figures[key] = round(spread(each)[0], 3)

"""`headrace bench control`: how near the control loop comes to the offline optimum, on recorded links in virtual time.

    for each window of each trace, deadline and device:
        the loop | causal oracle | best fixed point | EWMA | WebP with its own quality | local    ->  / optimum

WebP alone is given twice: with this very loop to choose its quality (the strongest rival of its kind), and with EWMA.
All runs of one cell share the frames: the same packet sizes, compute times and link. Sizes are drawn from the bundle's
table (log-normal, by its median and 95th percentile), alike between neighbouring frames and between points of one
frame, as pictures are. An answer counts with its point's accuracy if it is in time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ...edge.controller import ControlLoop
from ...models.operating_point import Kind, OperatingPoint
from ..links.trace_set import Window
from .optimum import offline_optimum
from .policies import LoopPolicy
from .records import Replay
from .rivals import CausalOracle, Ewma, most_in_flight
from .simulate import best_fixed, coder_seconds, replay

Floats = NDArray[np.float64]
LOOP, ORACLE, BEST_FIXED, WEBP, LOCAL = "loop", "causal oracle", "best fixed", "adaptive webp", "local"
EWMA, EWMA_NO_QUEUE, EWMA_WEBP = "ewma", "ewma, no queue", "ewma webp"
POLICIES = (LOOP, ORACLE, BEST_FIXED, EWMA, EWMA_NO_QUEUE, WEBP, EWMA_WEBP, LOCAL)
Z95 = 1.6449
SCENE_S = 1.0
"""How long the camera sees much the same."""
ALIKE = 0.9
"""Correlation of the (log) sizes of one frame at different points, and of a scene's frames."""
COMPUTE_SCATTER = 0.03
"""By how much (log-normal) the compute of one frame differs from the next one's."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What all cells share.

    Attributes:
        deadlines_s, devices_s: of the cells; a device by what the uncut model takes on it.
        fps: frames a second.
        seconds: of each run.
        delay_s: one way.
        server_s: service time.
        overhead_bytes: what the stream adds to a packet on the wire.
        seed: of sizes and compute times.
    """

    deadlines_s: tuple[float, ...] = (0.1, 0.2, 0.4)
    devices_s: tuple[float, ...] = (0.15, 0.5)
    fps: float = 10.0
    seconds: float = 60.0
    delay_s: float = 0.015
    server_s: float = 0.01
    overhead_bytes: int = 40
    seed: int = 0

    @property
    def frames(self) -> int:
        """Frames of a run."""
        return round(self.seconds * self.fps)


@dataclass(frozen=True, slots=True)
class Row:
    """What one policy came to in one cell.

    Attributes:
        score: on-time accuracy, 0..1.
        miss: share of captured frames without an answer in time.
        switches: changes of the point from one computed frame to the next.
        bytes: written in all.
        point: which one, of the best fixed.
    """

    score: float
    miss: float
    switches: int
    bytes: int
    point: str = ""

    @classmethod
    def of(cls, run: Replay, point: str = "") -> Row:
        return cls(run.score, 1.0 - run.on_time, run.switches, run.bytes, point)


@dataclass(frozen=True, slots=True)
class Cell:
    """One window, deadline and device.

    Attributes:
        trace, group, cellular: of the window; its name ends in the second at which it begins, `+60s`.
        mean_bps: its mean rate.
        deadline_s, device_s: of the cell.
        seconds: of the run.
        optimum: on-time accuracy that was possible, 0..1.
        rows: by policy.
    """

    trace: str
    group: str
    cellular: bool
    mean_bps: float
    deadline_s: float
    device_s: float
    seconds: float
    optimum: float
    rows: dict[str, Row] = field(default_factory=dict)

    @property
    def recording(self) -> str:
        """Name of the trace that the window is a part of."""
        name, _, begin = self.trace.rpartition("+")
        return name if name and begin.endswith("s") and begin[:-1].replace(".", "", 1).isdigit() else self.trace

    def of_optimum(self, policy: str) -> float:
        """Share of the optimum that a policy came to; not a number where nothing was possible."""
        return self.rows[policy].score / self.optimum if self.optimum > 0 else math.nan


def draw_workload(
    points: Sequence[OperatingPoint], device_s: float, frames: int, fps: float, seed: int
) -> tuple[Floats, Floats]:
    """Packet sizes in bytes (whole numbers) and edge seconds, float64 [frames, points] each; seeded."""
    rng = np.random.default_rng(seed)
    median = np.array([point.bytes_median for point in points])
    p95 = np.maximum([point.bytes_p95 for point in points], median)
    spread = np.where(median > 0, np.log(np.maximum(p95, 1) / np.maximum(median, 1)) / Z95, 0.0)
    stay = math.exp(-1.0 / (SCENE_S * fps))
    scene = np.empty(frames)
    level = rng.standard_normal()
    for frame in range(frames):
        scene[frame] = level
        level = stay * level + math.sqrt(1 - stay**2) * rng.standard_normal()
    noise = ALIKE * scene[:, None] + math.sqrt(1 - ALIKE**2) * rng.standard_normal((frames, len(points)))
    sizes = np.round(median * np.exp(spread * noise))
    share = np.array([point.edge_share for point in points])
    return sizes, share * device_s * np.exp(COMPUTE_SCATTER * rng.standard_normal((frames, 1)))


def run_cell(
    points: Sequence[OperatingPoint],
    window: Window,
    deadline_s: float,
    device_s: float,
    conditions: Conditions,
    policies: Sequence[str] = POLICIES,
) -> Cell:
    """The optimum and every policy on one window."""
    c = conditions
    sizes, compute = draw_workload(points, device_s, c.frames, c.fps, c.seed)
    every = {
        "delay_s": c.delay_s,
        "deadline_s": deadline_s,
        "fps": c.fps,
        "server_s": c.server_s,
        "overhead_bytes": c.overhead_bytes,
    }
    common = dict(every, uncut_s=device_s, coder_s=coder_seconds(points, device_s))
    best = offline_optimum(points, sizes, compute, window.trace, **every)  # type: ignore[arg-type]

    def run(**how: object) -> Row:
        return Row.of(replay(points, sizes, compute, window.trace, **(common | how)))  # type: ignore[arg-type]

    def fixed() -> Row:
        index, found = best_fixed(points, sizes, compute, window.trace, **every)  # type: ignore[arg-type]
        return Row.of(found, points[index].name)

    def ewma(queue: bool, allowed: Sequence[int]) -> Row:
        rival = Ewma(
            [points[index] for index in allowed],
            np.median(compute, axis=0)[list(allowed)],
            deadline_s=deadline_s,
            max_in_flight=most_in_flight(deadline_s, c.fps),
            round_trip_s=2 * c.delay_s,
            server_s=c.server_s,
            queue=queue,
        )
        return run(policy=rival)

    every_point = range(len(points))
    webp = [index for index, point in enumerate(points) if point.codec == "webp"]
    local = [index for index, point in enumerate(points) if point.is_uncut]
    ways: dict[str, Callable[[], Row]] = {
        LOOP: run,
        ORACLE: lambda: run(policy=CausalOracle(points, sizes, compute, window.trace, **every)),  # type: ignore[arg-type]
        BEST_FIXED: fixed,
        EWMA: lambda: ewma(True, every_point),
        EWMA_NO_QUEUE: lambda: ewma(False, every_point),
    }
    if webp:
        ways[WEBP] = lambda: run(allowed=webp)
        ways[EWMA_WEBP] = lambda: ewma(True, webp)
    if local:
        ways[LOCAL] = lambda: run(fixed=local[0])
    rows = {name: way() for name, way in ways.items() if name in policies}
    name, mean = window.trace.name, window.trace.mean_bps
    return Cell(name, window.group, window.cellular, mean, deadline_s, device_s, c.seconds, best, rows)


def spread_points(points: Sequence[OperatingPoint], count: int) -> list[OperatingPoint]:
    """A table of `count` points with the same stages and the same trade-off, rate levels interpolated between them."""
    local = [point for point in points if point.kind is Kind.LOCAL]
    stages: dict[str, list[OperatingPoint]] = {}
    for point in points:
        if point.kind is not Kind.LOCAL:
            stages.setdefault(point.stage, []).append(point)
    spread = list(local)
    for number, stage in enumerate(stages.values()):
        ordered = sorted(stage, key=lambda p: p.bytes_median)
        share = (count - len(local)) * (number + 1) // len(stages) - (count - len(local)) * number // len(stages)
        at = np.linspace(0, len(ordered) - 1, share)
        steps = np.arange(len(ordered))
        columns = [
            np.interp(at, steps, [getattr(p, name) for p in ordered])
            for name in ("bytes_median", "bytes_p95", "accuracy")
        ]
        for level, (median, p95, accuracy) in enumerate(zip(*columns, strict=True)):
            spread.append(replace(ordered[0], rate_level=level, bytes_median=median, bytes_p95=p95, accuracy=accuracy))
    return [replace(point, id=number) for number, point in enumerate(spread)]


class _Timed(LoopPolicy):
    def __init__(self, loop: ControlLoop) -> None:
        super().__init__(loop)
        self.seconds: list[float] = []

    def choose(self, now: float, captured_at: float):  # type: ignore[no-untyped-def]
        began = time.perf_counter()
        choice = super().choose(now, captured_at)
        self.seconds.append(time.perf_counter() - began)
        return choice


def decision_us(points: Sequence[OperatingPoint], window: Window, conditions: Conditions, count: int = 100) -> float:
    """Median microseconds of one decision among `count` points, as it is made in a run: frames in flight, and caches
    as cold as the rest of the run leaves them."""
    c = conditions
    many = spread_points(points, count)
    sizes, compute = draw_workload(many, c.devices_s[0], c.frames, c.fps, c.seed)
    deadline = sorted(c.deadlines_s)[len(c.deadlines_s) // 2]
    timed = _Timed(ControlLoop(many, deadline_s=deadline, frame_interval_s=1 / c.fps, uncut_s=c.devices_s[0]))
    replay(
        many,
        sizes,
        compute,
        window.trace,
        delay_s=c.delay_s,
        deadline_s=deadline,
        fps=c.fps,
        policy=timed,
        server_s=c.server_s,
        overhead_bytes=c.overhead_bytes,
    )
    return float(np.median(timed.seconds)) * 1e6

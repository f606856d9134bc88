"""`headrace bench switch`: what changing the operating point between two frames costs the device.

Every frame is captured first, as the daemon does (a picture of 640x480 is read and decoded), then run at a point. Arms
take turns at every point p, in random order; only their last frame counts:

    stay      p  p       the device computes p as it did before
    switch    q  p       ... after another point q

`switch` less `stay` is what a change costs, caches included. The same two arms *back to back*, one decoded picture for
all frames and nothing in between, say what a change costs a device that does nothing but compute: there `stay` finds
the processor's caches as it left them, which no device that captures its frames does. Frames are timed in processor
seconds of what depends on the point: head, encoder and coding, not capturing or scaling the picture.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..edge.device import Device
from ..edge.engine import Engine, reference_picture
from ..edge.exceptions import SourceError
from ..edge.frames import Source, open_sources
from ..models.bundle import EDGE_MANIFEST, Bundle
from ..models.edge_half import load_edge_half
from ..models.exceptions import DataError
from ..models.operating_point import Kind, OperatingPoint
from ..server.config import ServerSettings
from ..server.edge_halves import EdgeHalves
from .cores import on_one_core

ROUNDS = 25
LAPS = 5
"""Times that all points have their turn while memory is watched. What is loaded late is loaded in the first lap; what
leaks does so in every one."""
RESAMPLES = 500
CAMERA_QUALITY = 90
"""Of the JPEG that a frame comes as."""
PERCENTILES = (2.5, 97.5)
STATM = Path("/proc/self/statm")

Times = npt.NDArray[np.float64]


class Change(StrEnum):
    """What is another one than a frame before."""

    RATE_LEVEL = "rate level"
    """The same graph runs; gains and tables are others."""
    SPLIT = "split point or width"
    """Another graph runs, too."""
    KIND = "kind"
    """To or from a picture or a local answer."""

    @classmethod
    def of(cls, before: OperatingPoint, after: OperatingPoint) -> Change:
        """What changes from one point to another."""
        if Kind.FEATURE is not before.kind or Kind.FEATURE is not after.kind:
            return cls.KIND
        return cls.RATE_LEVEL if before.stage == after.stage else cls.SPLIT


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of the last frame of each arm, float64 [rounds, points], and what changed before it.

    Attributes:
        stay, switch: every frame captured before it is run.
        hot_stay, hot_switch: back to back.
        changes: [rounds, points].
    """

    stay: Times
    switch: Times
    hot_stay: Times
    hot_switch: Times
    changes: npt.NDArray[np.object_]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that all points in alternation leave allocated, less what the same frames leave with each point's in a row.

    Attributes:
        traced: by Python and NumPy.
        resident: growth of the process's resident memory, in whole pages.
        switches: how many changes there were.
        leaked: a change in the laps after the first, median of laps, traced and resident together. An allocator that
            takes a page more now and then is not in it; what each change leaves behind is.
    """

    traced: int
    resident: int
    switches: int
    leaked: float = 0.0

    @property
    def allocated(self) -> int:
        """Both together; what is in both counts twice."""
        return max(self.traced, 0) + max(self.resident, 0)


@dataclass(slots=True)
class Bench:
    """Engines of one edge half, and how a frame is run on them.

    Attributes:
        folder: the edge half.
        bundle: in it.
        points: among which is changed.
        picture: every frame.
    """

    folder: Path
    bundle: Bundle
    points: Sequence[OperatingPoint]
    picture: Image.Image = field(default_factory=reference_picture)

    def engine(self) -> Engine:
        """A warm one, as the daemon makes it; its times are in processor seconds."""
        engine = Engine(self.bundle, self.folder, Device(clock=time.thread_time, cpu_clock=time.thread_time))
        engine.warm_up(self.points)
        return engine

    def frame(self, engine: Engine, point: OperatingPoint, picture: Image.Image | None = None) -> float:
        """Seconds that a frame takes at a point, without scaling; by default `picture`, without capturing it."""
        picture = picture or self.picture
        if point.kind is Kind.LOCAL:
            return engine.answer(picture, None, point).compute_s
        encoded = engine.encode(picture, point, 0)
        return encoded.compute_s + encoded.compress_s

    def time(self, rounds: int, seed: int = 0, note: Callable[[], None] = lambda: None) -> Timed:
        """Run the arms at every point, `rounds` times, each time after another point; `note` is called after each."""
        engine, rng, count = self.engine(), np.random.default_rng(seed), len(self.points)
        shape = (rounds, count)
        timed = Timed(np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(shape), np.empty(shape, np.object_))
        with TemporaryDirectory() as folder:
            file = Path(folder) / "frame.jpg"
            self.picture.save(file, quality=CAMERA_QUALITY)
            (camera,) = open_sources([str(file)])
            for r in range(rounds):
                for i, point in enumerate(self.points):
                    before = self._another(point, rng, r)
                    timed.changes[r, i] = Change.of(before, point)
                    arms = [
                        (timed.stay, point, camera),
                        (timed.switch, before, camera),
                        (timed.hot_stay, point, None),
                        (timed.hot_switch, before, None),
                    ]
                    for arm in rng.permutation(len(arms)):
                        into, first, source = arms[arm]
                        self.frame(engine, first, _captured(source))
                        into[r, i] = self.frame(engine, point, _captured(source))
                note()
        return timed

    def _another(self, point: OperatingPoint, rng: np.random.Generator, number: int) -> OperatingPoint:
        """Any other point; for a feature point another feature point two times of three, that is what is asked most."""
        others = [p for p in self.points if p is not point]
        features = [p for p in others if p.kind is Kind.FEATURE]
        chosen = features if point.kind is Kind.FEATURE and features and number % 3 else others
        return chosen[int(rng.integers(len(chosen)))]

    def memory(self, seed: int = 0) -> Memory:
        """What changing leaves allocated; the second measurement is under `tracemalloc`, which takes memory itself."""
        resident, a = self._growth(resident_bytes, seed)
        tracemalloc.start()
        try:
            traced, b = self._growth(lambda: tracemalloc.get_traced_memory()[0], seed)
        finally:
            tracemalloc.stop()
        return Memory(traced, resident, LAPS * len(self.points), max(a, 0.0) + max(b, 0.0))

    def _growth(self, measure: Callable[[], int], seed: int) -> tuple[int, float]:
        """Growth over frames at all points in alternation, less that over the same frames, each point's in a row; and
        what a change in the later laps of alternation adds, the median of laps.

        Another engine runs the same frames before: what the process keeps for work of that size, such as the heap's
        largest extent, is then there, and what the measured engine has to load or make still is not.
        """
        settled, engine = self.engine(), self.engine()
        rng, count = np.random.default_rng(seed), len(self.points)
        alternating = [self.points[i] for _ in range(LAPS) for i in rng.permutation(count).tolist()]
        staying = sorted(alternating, key=lambda point: point.id)
        grown = []
        gc.collect()
        gc.freeze()  # or else every collection goes through all that the libraries have made
        try:
            for chosen, points in (
                (settled, alternating),
                (settled, staying),
                (engine, alternating),
                (engine, staying),
            ):
                laps = [points[lap * count : (lap + 1) * count] for lap in range(LAPS)]
                grown.append([self._lap(chosen, lap, measure) for lap in laps])
        finally:
            gc.unfreeze()
        later = float(np.median(grown[2][1:])) if LAPS > 1 else 0.0
        return sum(grown[2]) - sum(grown[3]), later / count

    def _lap(self, engine: Engine, points: Sequence[OperatingPoint], measure: Callable[[], int]) -> int:
        before = measure()
        for point in points:
            self.frame(engine, point)
        gc.collect()
        return measure() - before


def run(folder: Path, rounds: int = ROUNDS, json_file: Path | None = None) -> int:
    """Measure, print a table, and write `summarise`'s result to `json_file`.

    Args:
        folder: of a bundle, or of an edge half.
        rounds: of times.
        json_file: none by default.

    Returns:
        Exit code 0.

    Raises:
        DataError: there is nothing to change between, or no rounds.
        HeadraceError: the edge half cannot be made or run.
    """
    if rounds < 1:
        raise DataError(f"--rounds is {rounds}; at least 1 is needed")
    console = Console()
    half = edge_half(folder)
    bundle = load_edge_half(half)
    if len(bundle.operating_points) < 2:
        raise DataError(f"bundle {bundle.name} has one operating point; there is nothing to change between")
    bench = Bench(half, bundle, bundle.operating_points)
    with on_one_core(), Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("rounds", total=rounds + 1)
        memory = bench.memory()
        progress.advance(bar)
        timed = bench.time(rounds, note=lambda: progress.advance(bar))
    result = summarise(timed, memory) | {"bundle": bundle.name, "points": len(bundle.operating_points)}
    _print(console, result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def edge_half(folder: Path) -> Path:
    """The folder itself if it holds an edge half, else that of the bundle in it, exported if need be."""
    if (folder / EDGE_MANIFEST).is_file():
        return folder
    return asyncio.run(EdgeHalves(ServerSettings.load().cache_dir).folder(Bundle.load(folder)))


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not tell."""
    try:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def summarise(timed: Timed, memory: Memory, seed: int = 0) -> dict[str, Any]:
    """What `--json` holds.

    Args:
        timed, memory: measured.
        seed: of the intervals' resamples of rounds.

    Returns:
        `share_of_frame`: median over all changes of rate level, split point or width (of all, where there are none) of
        (switch - stay) / stay, where stay is the point's median; with `share_of_frame_ci`, its 95 % interval over
        rounds, `switch_us` the same in microseconds, and `frame_ms`, the median frame; `back_to_back_share`, with
        `back_to_back_ci`: the same without capturing in between, see the module; `changes`: by what changed,
        `share_of_frame`, `back_to_back_share` and how many `switches`; `allocated_bytes`, and of those `traced_bytes`
        and `resident_bytes`, by `switches` changes; `leaked_bytes`, by each change after the first lap.
    """
    rounds = len(timed.stay)
    rng = np.random.default_rng(seed)
    asked = timed.changes != Change.KIND
    if not asked.any():
        asked[:] = True
    drawn = [rng.integers(rounds, size=rounds) for _ in range(RESAMPLES)]
    hot = timed.hot_stay, timed.hot_switch

    def interval(stay: Times, switch: Times) -> list[float]:
        shares = [_share(stay, switch, asked, each) for each in drawn if asked[each].any()]
        return [round(float(x), 5) for x in np.percentile(shares, PERCENTILES)]

    changes = {}
    for change in Change:
        where = timed.changes == change
        if where.any():
            changes[str(change)] = {
                "share_of_frame": round(_share(timed.stay, timed.switch, where), 5),
                "back_to_back_share": round(_share(*hot, where), 5),
                "switches": int(where.sum()),
            }
    return {
        "share_of_frame": round(_share(timed.stay, timed.switch, asked), 5),
        "share_of_frame_ci": interval(timed.stay, timed.switch),
        "back_to_back_share": round(_share(*hot, asked), 5),
        "back_to_back_ci": interval(*hot),
        "switch_us": round(float(np.median((timed.switch - np.median(timed.stay, axis=0))[asked])) * 1e6, 1),
        "frame_ms": round(float(np.median(timed.stay[asked])) * 1e3, 3),
        "rounds": rounds,
        "changes": changes,
        "allocated_bytes": memory.allocated,
        "traced_bytes": memory.traced,
        "resident_bytes": memory.resident,
        "leaked_bytes": round(memory.leaked, 1),
        "switches": memory.switches,
    }


def _captured(camera: Source | None) -> Image.Image | None:
    """The next frame of a source; none of no source.

    Raises:
        SourceError: it cannot be read.
    """
    if camera is None:
        return None
    picture = next(iter(camera.frames()))
    if isinstance(picture, SourceError):
        raise picture
    return picture


def _share(
    stay: Times, switch: Times, where: npt.NDArray[np.bool_], rounds: npt.NDArray[np.integer[Any]] | None = None
) -> float:
    """Median of (switch - stay) / stay over the chosen frames of the chosen rounds (all of them by default)."""
    chosen = np.arange(len(stay)) if rounds is None else rounds
    usual = np.median(stay[chosen], axis=0)
    return float(np.median(((switch[chosen] - usual) / usual)[where[chosen]]))


def _print(console: Console, result: dict[str, Any]) -> None:
    table = Table(title=f"Changing among {result['points']} operating points of {result['bundle']}")
    for title in ("what changes", "share of a frame", "back to back", "changes"):
        table.add_column(title, justify="left" if title == "what changes" else "right")
    for change, found in result["changes"].items():
        shares = (f"{100 * found[key]:.2f} %" for key in ("share_of_frame", "back_to_back_share"))
        table.add_row(change, *shares, str(found["switches"]))
    console.print(table)
    low, high = result["share_of_frame_ci"]
    console.print(
        f"A change of rate level, split point or width takes {result['switch_us']:.0f} us, "
        f"{100 * result['share_of_frame']:.2f} % of a frame (95 %: {100 * low:.2f} to {100 * high:.2f}), caches "
        f"included, and back to back {100 * result['back_to_back_share']:.2f} %; "
        f"a frame takes {result['frame_ms']:.1f} ms. "
        f"{result['switches']} changes of every kind leave {result['allocated_bytes']} bytes allocated, "
        f"each one after the first lap {result['leaked_bytes']:.0f}.",
        highlight=False,
        soft_wrap=True,
    )

"""The program behind `headrace bench control`: all cells, on one or more processes, and what is told of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from ...models.bundle import Bundle
from ...models.exceptions import DataError
from ...models.operating_point import OperatingPoint
from ..links.trace_set import Window, read_windows, square_wave
from .cells import Cell, Conditions, decision_us, run_cell
from .kept import KEPT_FILE, KeptCells
from .real import RealCell, real_table, run_real
from .report import CSV_FILE, PNG_FILE, summary, table, trace_table, write_csv, write_json, write_picture

Task = tuple[Window, float, float]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Attributes:
        points: the operating points.
        windows: of the links.
        conditions: of every cell.
        jobs: processes.
        bundle: folder of the bundle, for cells that are run for real.
        real: so many cells, evenly spread, are also run with real processes over an emulated link.
        emulator: of that link: "auto" or a name.
        resume: take over the cells that an earlier run left in the output folder.
    """

    points: tuple[OperatingPoint, ...]
    windows: tuple[Window, ...]
    conditions: Conditions
    jobs: int = 1
    bundle: Path = Path()
    real: int = 0
    emulator: str = "auto"
    resume: bool = False

    @classmethod
    def of(
        cls,
        bundle: Path,
        traces: Path,
        deadlines_ms: str,
        devices_ms: str,
        fps: float,
        seconds: float,
        windows: int,
        every: int,
        below_mbps: float,
        rtt_ms: float,
        server_ms: float,
        seed: int,
        jobs: int,
        real: int = 0,
        emulator: str = "auto",
        resume: bool = False,
    ) -> Plan:
        """From the command's flags. The square wave 8 <-> 0.3 Mbit/s comes after the recorded links.

        Raises:
            BundleError: the bundle cannot be read.
            DataError: no trace is left, or a number can't be used.
        """
        if (
            min(fps, seconds, below_mbps) <= 0
            or min(windows, rtt_ms, server_ms, seed, real) < 0
            or min(every, jobs) < 1
        ):
            raise DataError(
                "rates and lengths must be above 0, --every and --jobs at least 1, other numbers not below 0"
            )
        found = read_windows(traces, seconds=seconds, below_bps=below_mbps * 1e6, per_trace=windows)
        conditions = Conditions(
            deadlines_s=_milliseconds(deadlines_ms, "--deadlines-ms"),
            devices_s=_milliseconds(devices_ms, "--devices-ms"),
            fps=fps,
            seconds=seconds,
            delay_s=rtt_ms / 2000,
            server_s=server_ms / 1000,
            seed=seed,
        )
        points, links = Bundle.load(bundle).operating_points, (*found[::every], square_wave())
        return cls(points, links, conditions, jobs, bundle, real, emulator, resume)


def run(plan: Plan, output: Path, json: Path | None, console: Console | None = None) -> int:
    """Measure, print the table and write the files; returns 0."""
    console = console or Console(highlight=False)
    output.mkdir(parents=True, exist_ok=True)
    kept = KeptCells(output / KEPT_FILE, plan.points, plan.conditions, resume=plan.resume)
    if len(kept):
        console.print(f"{output / KEPT_FILE}: {len(kept)} cells are taken over", highlight=False, soft_wrap=True)
    cells = list(track(_cells(plan, kept), "replaying", total=_count(plan), console=Console(stderr=True)))
    cost = decision_us(plan.points, plan.windows[0], plan.conditions)
    console.print(table(cells))
    console.print(trace_table(cells))
    figures = summary(cells, cost)
    for name in (
        "mean_of_optimum", "accuracy_of_optimum", "worst_of_optimum", "worst_trace_of_optimum",
        "worst_trace_accuracy_of_optimum", "minus_best_fixed", "worst_set_minus_best_fixed", "over_adaptive_webp",
        "over_ewma_webp", "optimum_over_adaptive_webp", "decision_us",
    ):  # fmt: skip
        console.print(f"{name:32} {figures[name]}")
    write_csv(cells, output / CSV_FILE)
    write_picture(cells, output / PNG_FILE)
    console.print(f"{output / CSV_FILE}, {output / PNG_FILE}")
    measured: list[RealCell] = []
    if plan.real:
        measured = run_real(plan.bundle, _spread(_tasks(plan), plan.real), plan.conditions, console, plan.emulator)
        console.print(real_table(measured))
    if json is not None:
        write_json(cells, cost, json, measured)
    return 0


def _spread(tasks: Sequence[Task], count: int) -> list[Task]:
    """At most so many of the tasks, evenly spread, the last one (the square wave) among them."""
    count = min(count, len(tasks))
    return [tasks[len(tasks) - 1 - number * len(tasks) // count] for number in reversed(range(count))]


def _tasks(plan: Plan) -> list[Task]:
    return list(itertools.product(plan.windows, plan.conditions.deadlines_s, plan.conditions.devices_s))


def _count(plan: Plan) -> int:
    return len(_tasks(plan))


def _cells(plan: Plan, kept: KeptCells) -> Iterator[Cell]:
    """All cells in order, those that are not kept measured now, and kept."""
    tasks = _tasks(plan)
    before = [kept.get((w.group, w.trace.name, deadline, device)) for w, deadline, device in tasks]
    new = [task for task, cell in zip(tasks, before, strict=True) if cell is None]
    with ExitStack() as stack:
        measured = (run_cell(plan.points, *task, plan.conditions) for task in new)
        if plan.jobs > 1:
            pool = stack.enter_context(ProcessPoolExecutor(plan.jobs))
            arguments = itertools.repeat(plan.points), new, itertools.repeat(plan.conditions)
            measured = pool.map(_one, *arguments, chunksize=4)  # type: ignore[assignment]
        for found in before:
            cell = found or next(measured)
            if found is None:
                kept.add(cell)
            yield cell


def _one(points: Sequence[OperatingPoint], task: Task, conditions: Conditions) -> Cell:
    return run_cell(points, *task, conditions)


def _milliseconds(text: str, flag: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) / 1000 for part in text.split(","))
    except ValueError as error:
        raise DataError(f"{flag} {text!r}: write numbers separated by commas") from error
    if not found or min(found) <= 0:
        raise DataError(f"{flag} {text!r}: must be above 0")
    return found

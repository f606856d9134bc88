"""What `headrace bench control` tells: a table, a CSV file, a picture, a JSON file."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.table import Table

from .cells import BEST_FIXED, EWMA_WEBP, LOOP, ORACLE, POLICIES, WEBP, Cell
from .real import RealCell

Key = TypeVar("Key")
COLUMNS = (
    *("set", "trace", "mean_mbps", "deadline_ms", "device_ms", "optimum"),
    *("policy", "score", "of_optimum", "miss", "switches", "bytes", "point"),
)
CSV_FILE, PNG_FILE = "control.csv", "control.png"


def mean_of_optimum(cells: Iterable[Cell], policy: str = LOOP) -> float:
    """Mean share of the optimum, over the cells in which anything is possible."""
    shares = [cell.of_optimum(policy) for cell in cells if policy in cell.rows and cell.optimum > 0]
    return float(np.mean(shares)) if shares else math.nan


def worst_of_optimum(cells: Iterable[Cell]) -> float:
    """The smallest share of the optimum that the loop came to in any cell: one window, deadline and device."""
    return min((cell.of_optimum(LOOP) for cell in cells if cell.optimum > 0), default=math.nan)


def accuracy_of_optimum(cells: Iterable[Cell], policy: str = LOOP) -> float:
    """On-time accuracy summed over the cells, over the optimum's: each cell counts by what was possible in it, where
    in a mean of shares one in which next to nothing was counts as much as any other."""
    measured = [cell for cell in cells if policy in cell.rows]
    possible = sum(cell.optimum for cell in measured)
    return sum(cell.rows[policy].score for cell in measured) / possible if possible > 0 else math.nan


def by_trace(cells: Iterable[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """The cells of each recorded trace: all its windows, deadlines and devices; by set and name."""
    return _grouped(cells, lambda cell: (cell.group, cell.recording))


def worst_trace(cells: Iterable[Cell], share: Callable[[list[Cell]], float]) -> tuple[str, float]:
    """The trace whose cells together come to the smallest share, and that; not a number where nothing was possible."""
    shares = [(name, share(part)) for (_, name), part in by_trace(cells).items()]
    return min((each for each in shares if math.isfinite(each[1])), key=lambda each: each[1], default=("", math.nan))


def minus_best_fixed(cells: Sequence[Cell]) -> float:
    """Mean of the loop's on-time accuracy less that of the best fixed point, which differs from cell to cell."""
    return float(np.mean([cell.rows[LOOP].score - cell.rows[BEST_FIXED].score for cell in cells]))


def over_adaptive_webp(cells: Sequence[Cell], webp: str = WEBP) -> float:
    """Mean on-time accuracy of the loop over that of WebP, whose quality is chosen by the same loop (or by EWMA)."""
    rival = sum(cell.rows[webp].score for cell in cells if webp in cell.rows)
    return sum(cell.rows[LOOP].score for cell in cells) / rival if rival > 0 else math.nan


def optimum_over_adaptive_webp(cells: Sequence[Cell]) -> float:
    """What `over_adaptive_webp` would be for the offline optimum: no policy gets above that."""
    rival = sum(cell.rows[WEBP].score for cell in cells if WEBP in cell.rows)
    return sum(cell.optimum for cell in cells) / rival if rival > 0 else math.nan


def summary(cells: Sequence[Cell], decision_us: float) -> dict[str, Any]:
    """Everything, as plain values.

    Top level: the figures over all cells (`over_adaptive_webp` and the like: those on cellular links;
    `worst_set_minus_best_fixed`: the trace set on which the loop does worst; `worst_of_optimum`: the worst single cell;
    `worst_trace_of_optimum` and `worst_trace_accuracy_of_optimum`: the worst of the traces' `mean_of_optimum` and
    `accuracy_of_optimum`, each over all cells of a trace). `policies`, `sets`, `settings` and `traces` have them by
    policy, trace set, deadline and device, and recorded trace.
    """
    mean, accuracy = worst_trace(cells, mean_of_optimum), worst_trace(cells, accuracy_of_optimum)
    cellular = [cell for cell in cells if cell.cellular]
    sets = {name: _figures(part) for name, part in _grouped(cells, lambda c: c.group).items()}
    return {
        **_figures(cells),
        "worst_trace_of_optimum": _plain(mean[1]),
        "worst_trace_accuracy_of_optimum": _plain(accuracy[1]),
        "worst_traces": {"mean_of_optimum": mean[0], "accuracy_of_optimum": accuracy[0]},
        "over_adaptive_webp": _plain(over_adaptive_webp(cellular)),
        "over_ewma_webp": _plain(over_adaptive_webp(cellular, EWMA_WEBP)),
        "optimum_over_adaptive_webp": _plain(optimum_over_adaptive_webp(cellular)),
        "decision_us": round(decision_us, 1),
        "worst_set_minus_best_fixed": min(each["minus_best_fixed"] for each in sets.values()),
        "policies": {name: _policy(cells, name) for name in POLICIES},
        "sets": sets,
        "settings": {
            f"{deadline * 1000:g} ms, device {device * 1000:g} ms": _figures(part)
            for (deadline, device), part in _grouped(cells, lambda c: (c.deadline_s, c.device_s)).items()
        },
        "traces": [
            {"trace": name, "set": group, "mean_mbps": round(float(np.mean([c.mean_bps for c in part])) / 1e6, 3)}
            | _figures(part)
            | {"cells": [_cell(cell) for cell in part]}
            for (group, name), part in by_trace(cells).items()
        ],
    }


def table(cells: Sequence[Cell]) -> Table:
    """On-time accuracy as a share of the optimum, by trace set, deadline and device."""
    columns = {LOOP: "loop", ORACLE: "oracle", BEST_FIXED: "fixed", "ewma": "ewma", "ewma, no queue": "no queue"}
    columns |= {WEBP: "webp", EWMA_WEBP: "ewma webp", "local": "local"}
    found = Table(title="on-time accuracy as a share of the offline optimum", title_justify="left")
    found.add_column("traces")
    for name in (
        "deadline",
        "device",
        "windows",
        "optimum",
        *columns.values(),
        "worst",
        "- fixed",
        "miss",
        "switches",
        "KB/s",
    ):
        found.add_column(name, justify="right")

    def add(names: Sequence[str], part: Sequence[Cell]) -> None:
        rows = [cell.rows[LOOP] for cell in part]
        best = float(np.mean([cell.optimum for cell in part]))
        found.add_row(
            *names,
            str(len({cell.trace for cell in part})),
            _share(best),
            *(_share(mean_of_optimum(part, name)) for name in columns),
            _share(worst_of_optimum(part)),
            f"{minus_best_fixed(part):+.3f}",
            _share(float(np.mean([row.miss for row in rows]))),
            f"{np.mean([row.switches for row in rows]):.0f}",
            f"{np.mean([row.bytes for row in rows]) / 1000 / part[0].seconds:.1f}",
        )

    for (group, deadline, device), part in _grouped(cells, lambda c: (c.group, c.deadline_s, c.device_s)).items():
        add([group, f"{deadline * 1000:g} ms", f"{device * 1000:g} ms"], part)
    found.add_section()
    add(["all", "", ""], cells)
    return found


def trace_table(cells: Sequence[Cell], most: int = 10) -> Table:
    """The traces on which the loop comes least near to the optimum: all cells of each together."""
    found = Table(title="by trace: the loop's share of the offline optimum, worst first", title_justify="left")
    for title in ("cells", "optimum", "mean of shares", "accuracy", "worst cell"):
        found.add_column(title, justify="right")
    found.add_column("trace", overflow="fold")
    ordered = sorted(by_trace(cells).items(), key=lambda each: _nan_last(accuracy_of_optimum(each[1])))
    for (group, name), part in ordered[:most]:
        best = float(np.mean([cell.optimum for cell in part]))
        shares = mean_of_optimum(part), accuracy_of_optimum(part), worst_of_optimum(part)
        found.add_row(str(len(part)), _share(best), *map(_share, shares), f"{group}/{name}")
    return found


def write_csv(cells: Sequence[Cell], path: Path) -> None:
    """One line a cell and policy."""
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(COLUMNS)
        for cell in cells:
            head = [cell.group, cell.trace, round(cell.mean_bps / 1e6, 4), cell.deadline_s * 1000, cell.device_s * 1000]
            for name, row in cell.rows.items():
                share = round(cell.of_optimum(name), 5) if cell.optimum > 0 else ""
                numbers = [round(row.score, 5), share, round(row.miss, 5), row.switches, row.bytes, row.point]
                out.writerow([*head, round(cell.optimum, 5), name, *numbers])


def write_picture(cells: Sequence[Cell], path: Path) -> None:
    """Distribution over the cells of each policy's share of the optimum."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    settings = _grouped(cells, lambda c: (c.deadline_s, c.device_s))
    deadlines, devices = sorted({d for d, _ in settings}), sorted({d for _, d in settings})
    figure, axes = plt.subplots(
        len(devices),
        len(deadlines),
        figsize=(4 * len(deadlines), 3 * len(devices)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for line, device in zip(axes, devices, strict=True):
        for axis, deadline in zip(line, deadlines, strict=True):
            part = settings.get((deadline, device), [])
            for name in POLICIES:
                shares = sorted(c.of_optimum(name) for c in part if name in c.rows and c.optimum > 0)
                style = {"linewidth": 2.4, "color": "black"} if name == LOOP else {"linewidth": 1.2}
                axis.plot(shares, np.linspace(0, 1, len(shares)), label=name, **style)
            axis.set_title(f"deadline {deadline * 1000:g} ms, device {device * 1000:g} ms", fontsize=9)
            axis.set_xlim(0, 1.02)
            axis.grid(alpha=0.3)
    axes[-1][0].set_xlabel("share of the offline optimum")
    axes[0][0].set_ylabel("share of windows")
    axes[0][0].legend(fontsize=7, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_json(cells: Sequence[Cell], decision_us: float, path: Path, real: Sequence[RealCell] = ()) -> None:
    """`summary` as a file; cells that were run for real under `real`, beside their simulation."""
    found = summary(cells, decision_us) | {
        "real": [asdict(c) | {"difference": round(c.difference, 4)} for c in real],
        "real_difference": max((abs(c.difference) for c in real), default=None),
    }
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _figures(cells: Sequence[Cell]) -> dict[str, Any]:
    return {
        "windows": len({(cell.group, cell.trace) for cell in cells}),
        "mean_of_optimum": _plain(mean_of_optimum(cells)),
        "accuracy_of_optimum": _plain(accuracy_of_optimum(cells)),
        "worst_of_optimum": _plain(worst_of_optimum(cells)),
        "minus_best_fixed": _plain(minus_best_fixed(cells)),
        "over_adaptive_webp": _plain(over_adaptive_webp(cells)),
        "oracle_of_optimum": _plain(mean_of_optimum(cells, ORACLE)),
    }


def _policy(cells: Sequence[Cell], name: str) -> dict[str, Any]:
    rows = [cell.rows[name] for cell in cells if name in cell.rows]

    def mean(values: Iterable[float]) -> float | None:
        return _plain(np.mean(list(values) or [math.nan]))

    return {
        "mean_of_optimum": _plain(mean_of_optimum(cells, name)),
        "score": mean(row.score for row in rows),
        "miss": mean(row.miss for row in rows),
        "switches": mean(row.switches for row in rows),
        "bytes": mean(row.bytes for row in rows),
    }


def _cell(cell: Cell) -> dict[str, Any]:
    return {
        "window": cell.trace,
        "deadline_ms": cell.deadline_s * 1000,
        "device_ms": cell.device_s * 1000,
        "optimum": _plain(cell.optimum),
        "of_optimum": {name: _plain(cell.of_optimum(name)) for name in cell.rows},
        "miss": {name: _plain(row.miss) for name, row in cell.rows.items()},
        "switches": {name: row.switches for name, row in cell.rows.items()},
        "bytes": {name: row.bytes for name, row in cell.rows.items()},
        "best_fixed": cell.rows[BEST_FIXED].point,
    }


def _grouped(cells: Iterable[Cell], key: Callable[[Cell], Key]) -> dict[Key, list[Cell]]:
    groups: dict[Key, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return groups


def _plain(value: float | np.floating[Any]) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None


def _nan_last(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _share(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"

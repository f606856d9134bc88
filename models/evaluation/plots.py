"""CSV files and pictures of bytes against quality."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..exceptions import DataError
from ..extras import how_to_install
from .curves import RATIOS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, slots=True)
class Curve:
    """Points that belong together.

    Attributes:
        name: for the legend.
        points: bytes and quality.
        ends: lower and upper end of each point's interval, in their order; none for no bars.
        ours: whether it is drawn as one of ours, not as a codec beside it.
    """

    name: str
    points: Sequence[tuple[float, float]]
    ends: Sequence[tuple[float | None, float | None]] = ()
    ours: bool = True


def write_csv(rows: Sequence[DataclassInstance], path: Path) -> None:
    """One line a row; columns are the fields of the rows' class."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def need_matplotlib() -> None:
    """Say so before anything is measured if pictures cannot be drawn.

    Raises:
        DataError: matplotlib is not installed.
    """
    figure_with_axes()


def figure_with_axes() -> tuple[Any, Any]:
    """A figure that needs no display, and its axes.

    Raises:
        DataError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError(f"matplotlib is missing for the picture; {how_to_install('bench')}") from error
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def draw_curves(curves: Iterable[Curve], path: Path, title: str, xlabel: str, ylabel: str, lowest: float = 0.4) -> None:
    """Bytes (log) against a share of the uncut quality, from `lowest` on; lines at the ratios.

    Raises:
        DataError: matplotlib is not installed.
    """
    figure, axes = figure_with_axes()
    for curve in curves:
        order = sorted(range(len(curve.points)), key=lambda i, c=curve: c.points[i])  # type: ignore[misc]
        xs, ys = ([curve.points[i][axis] for i in order] for axis in (0, 1))
        bars = None
        if curve.ends:
            ends = [curve.ends[i] for i in order]
            bars = [
                [max(0.0, y - (y if low is None else low)) for y, (low, _) in zip(ys, ends, strict=True)],
                [max(0.0, (y if high is None else high) - y) for y, (_, high) in zip(ys, ends, strict=True)],
            ]
        style = "o-" if curve.ours else "x--"
        axes.errorbar(xs, ys, bars, fmt=style, markersize=4, elinewidth=0.6, label=curve.name)
    for ratio in RATIOS:
        axes.axhline(ratio, color="#9ca3af", linewidth=0.8)
    axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel, title=title, ylim=(lowest, 1.05))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)

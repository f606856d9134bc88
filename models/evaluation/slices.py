"""What the first slices of a packet are worth: any prefix decodes, and each further slice says more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ..bundle import Bundle
from ..operating_point import Kind, OperatingPoint
from .plots import Curve, draw_curves, write_csv
from .resampling import Resampled, interval
from .samples import Measurements

CSV_FILE, PNG_FILE = "slices.csv", "slices.png"


@dataclass(frozen=True, slots=True)
class SliceRow:
    """The first slices of an operating point.

    Attributes:
        point, split: the operating point's name, and where it cuts.
        slices: how many are sent; as many as there are in the last row of a point.
        bytes: mean of the packets.
        top1, relative: share of right answers, and that as a share of the uncut model's.
        relative_low, relative_high: 95 % interval of `relative`.
    """

    point: str
    split: str
    slices: int
    bytes: float
    top1: float
    relative: float
    relative_low: float | None
    relative_high: float | None


def points_by_slice(bundle: Bundle) -> list[OperatingPoint]:
    """Whose prefixes are measured: the middle rate level of every split point."""
    middle = {s.name: s.rate_levels // 2 for s in bundle.splits}
    return [p for p in bundle.operating_points if p.kind is Kind.FEATURE and p.rate_level == middle[p.split]]


def slice_rows(found: Measurements) -> list[SliceRow]:
    """Rows of every point whose prefixes were measured, one slice first, the whole packet last."""
    if not found.prefixes:
        return []
    whole = {s.name: s for s in found.samples}
    chosen = []
    for name, samples in found.prefixes.items():
        chosen += [(name, n, sample) for n, sample in enumerate((*samples, whole[name]), 1)]
    resampled = Resampled(
        np.stack([s.packet_bytes for _, _, s in chosen], axis=1),
        np.stack([s.right for _, _, s in chosen], axis=1),
        found.uncut_right,
        seed=found.seed,
    )
    rows = []
    for i, (name, slices, sample) in enumerate(chosen):
        top1, uncut = float(sample.right.mean()), found.uncut_top1
        ends = interval(resampled.relative[:, i])
        relative = top1 / uncut if uncut else 0.0
        rows.append(SliceRow(name, sample.split, slices, float(sample.packet_bytes.mean()), top1, relative, *ends))
    return rows


def slices_as_json(rows: Sequence[SliceRow]) -> dict[str, list[dict[str, Any]]]:
    """Operating point -> its rows."""
    result: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        fields = asdict(row)
        ends = [fields.pop("relative_low"), fields.pop("relative_high")]
        name = fields.pop("point")
        result.setdefault(name, []).append({**fields, "bytes": round(row.bytes, 1), "relative_ci": ends})
    return result


def slices_table(rows: Sequence[SliceRow]) -> Table:
    """Bytes and share of the uncut top-1 of each number of slices, one operating point a line."""
    most = max((row.slices for row in rows), default=0)
    table = Table(title="accuracy by slice: bytes and share of the uncut top-1 of the first slices")
    for title in ("operating point", *map(str, range(1, most + 1))):
        table.add_column(title, justify="left" if title == "operating point" else "right")
    for name in dict.fromkeys(row.point for row in rows):
        table.add_row(name, *(f"{r.bytes:.0f}: {r.relative:.3f}" for r in rows if r.point == name))
    return table


def write_slices(rows: Sequence[SliceRow], folder: Path, title: str) -> None:
    """CSV and picture into a folder; nothing where no prefixes were measured."""
    if not rows:
        return
    write_csv(rows, folder / CSV_FILE)
    curves = []
    for name in dict.fromkeys(row.point for row in rows):
        own = [r for r in rows if r.point == name]
        ends = [(r.relative_low, r.relative_high) for r in own]
        curves.append(Curve(name, [(r.bytes, r.relative) for r in own], ends))
    said = "bytes of the first 1, 2, ... slices of a packet"
    draw_curves(curves, folder / PNG_FILE, f"{title}: accuracy by slice", said, "share of the uncut top-1", lowest=0.0)

"""What `headrace eval rd` tells: JSON, tables, a CSV file, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .curves import LIMITS, RATIOS, RateDifference, key, rate_difference
from .edge_costs import is_learned
from .exits import exit_summary, print_exits
from .pictures import QUALITIES
from .plots import Curve, draw_curves, write_csv
from .resampling import RESAMPLES
from .samples import ENTROPIC_STUDENT, FEATURE, Measurements, Row
from .slices import slice_rows, slices_as_json, slices_table, write_slices

CSV_FILE, PNG_FILE = "rate-accuracy.csv", "rate-accuracy.png"
NONE = "—"
PARTS = ("at", "at_hull", "at_ci", "at_hull_ci")


def summary(found: Measurements) -> dict[str, Any]:
    """What `--json` holds.

    Returns:
        `uncut_top1`, `images`, `uncut` (`gmac`, `ms`); `at` (ratio -> family -> bytes of the cheapest measured point
        that reaches it; null where none does) and `at_hull` (the same on the family's convex hull), with 95 % intervals
        `at_ci` and `at_hull_ci`; `at_split` (split point -> ratio -> family -> bytes, as `at`); `splits` (`gmac`, `ms`,
        `share_of_uncut`, `learned` and the four of `at` by ratio, of each split point of the bundle); `encoder`
        (`widest`, `narrowest` of the learned ones; null where there are none); `entropic_student` (`gmac`, `ms`,
        `share_of_uncut` of its encoder, `models`: what their files say; null where none was measured); `bd_rate` (ours
        -> picture codec or baseline -> `percent`, `lowest`, `highest`; null where the curves have no accuracy in
        common); `coded_over_entropy` (null without points of ours);
        `slices` (operating point -> of the first 1, 2, ... slices `slices`, `bytes`, `top1`, `relative`,
        `relative_ci`); `points`; `exits` (fields of `exits.ExitRow`).
    """
    rows, families, splits = found.rows, found.families, found.split_families
    by_family = {name: found.bytes_at(chosen) for name, chosen in families.items()}
    coded = [r for r in rows if r.family == FEATURE]
    return {
        "uncut_top1": found.uncut_top1,
        "images": len(found.uncut_right),
        "resamples": RESAMPLES,
        "uncut": {k: v for k, v in found.costs.uncut.to_dict().items() if k != "share_of_uncut"},
        **{part: {key(r): {n: each[part][key(r)] for n, each in by_family.items()} for r in RATIOS} for part in PARTS},
        "at_split": {
            split: {key(r): {n: found.bytes_at(chosen)["at"][key(r)] for n, chosen in there.items()} for r in RATIOS}
            for split, there in splits.items()
        },
        "splits": {
            split: {**cost.to_dict(), "learned": is_learned(split), **found.bytes_at(splits[split].get(FEATURE, []))}
            for split, cost in found.costs.splits.items()
            if split in splits
        },
        "picture_ms": {codec: round(ms, 3) for codec, ms in found.picture_ms.items()},
        "encoder": found.costs.encoder(),
        "entropic_student": _student(found),
        "bd_rate": _rate_differences(found),
        "coded_over_entropy": {
            "total": sum(r.slice_bytes for r in coded) / sum(r.entropy_bytes for r in coded),
            "worst": max(r.slice_bytes / r.entropy_bytes for r in coded),
        }
        if coded
        else None,
        "slices": slices_as_json(slice_rows(found)),
        "points": [_point(row) for row in rows],
        "exits": exit_summary(found.exits),
    }


def _rate_differences(found: Measurements) -> dict[str, dict[str, dict[str, float] | None]]:
    rows, families = found.rows, found.families

    def reported(difference: RateDifference | None) -> dict[str, float] | None:
        if difference is None:
            return None
        return {"percent": round(difference.percent, 2), "lowest": difference.lowest, "highest": difference.highest}

    return {
        ours: {
            codec: reported(rate_difference([rows[i] for i in families[ours]], [rows[i] for i in families[codec]]))
            for codec in (*QUALITIES, ENTROPIC_STUDENT)
        }
        for ours in LIMITS
    }


def _student(found: Measurements) -> dict[str, Any] | None:
    cost = found.costs.beside.get(ENTROPIC_STUDENT)
    return None if cost is None else {**cost.to_dict(), "models": [asdict(each) for each in found.learned]}


def _point(row: Row) -> dict[str, Any]:
    digits = {"slice_bytes": 1, "entropy_bytes": 1, "head_ms": 3, "share_of_uncut": 4, "gmac": 5}
    rounded = {k: round(v, digits[k]) if k in digits and v is not None else v for k, v in asdict(row).items()}
    ends = [rounded.pop("relative_low"), rounded.pop("relative_high")]
    return {"bytes": round(rounded.pop("mean_bytes"), 1), **rounded, "relative_ci": ends}


def print_tables(console: Console, found: Measurements, result: Mapping[str, Any]) -> None:
    """Every point; bytes at the ratios; split points; rate differences."""
    console.print(_points_table(found))
    print_exits(console, found.exits)
    for part, title in (
        ("at", "bytes of the cheapest measured point that reaches a share of the uncut top-1, 95 %"),
        ("at_hull", "the same on each convex hull (frames divided between two points), 95 %"),
    ):
        console.print(_bytes_table(found, result, part, title))
    table = _table("head and encoder, one core", "split point", "GMAC", "ms", "/ uncut")
    for split, cost in [*found.costs.splits.items(), *found.costs.beside.items()]:
        table.add_row(split, f"{cost.gmac:.4f}", f"{cost.ms:.2f}", f"{cost.share_of_uncut:.3f}")
    console.print(table)
    table = _table("BD-rate, in brackets the relative accuracies in common", "", *QUALITIES, ENTROPIC_STUDENT)
    for ours, against in result["bd_rate"].items():
        table.add_row(ours, *(_difference(each) for each in against.values()))
    console.print(table)
    if found.prefixes:
        console.print(slices_table(slice_rows(found)))
    if over := result["coded_over_entropy"]:
        console.print(f"coded size over the tables' entropy: {over['total']:.3f} in all, {over['worst']:.3f} at worst")


def _points_table(found: Measurements) -> Table:
    uncut = found.costs.uncut
    table = _table(
        f"{len(found.uncut_right)} photographs, uncut top-1 {found.uncut_top1:.3f} in {uncut.ms:.1f} ms, "
        f"{uncut.gmac:.3f} GMAC",
        *("operating point", "bytes", "relative", "95 %", "ms", "/ uncut", "coded/entropy"),
    )
    for r in found.rows:
        over = f"{r.slice_bytes / r.entropy_bytes:.3f}" if r.entropy_bytes else ""
        ends = "" if r.relative_low is None else f"{r.relative_low:.2f}–{r.relative_high:.2f}"
        times = ("", "") if r.head_ms is None else (f"{r.head_ms:.1f}", f"{r.share_of_uncut:.3f}")
        table.add_row(r.name, f"{r.mean_bytes:.0f}", f"{r.relative:.3f}", ends, *times, over)
    return table


def _bytes_table(found: Measurements, result: Mapping[str, Any], part: str, title: str) -> Table:
    table = _table(title, "", *map(key, RATIOS))
    for family, chosen in found.families.items():
        if chosen or family in LIMITS:
            limit = f" (time <= {LIMITS[family]:.2f})" if LIMITS.get(family, 1) < 1 else ""
            each = ((result[part][key(r)][family], result[f"{part}_ci"][key(r)][family]) for r in RATIOS)
            table.add_row(f"{family}{limit}", *(_cell(*ends) for ends in each))
    for split, there in found.split_families.items():
        for family, chosen in there.items():
            if chosen:
                at = found.bytes_at(chosen)
                name = split if family == FEATURE else f"{split}, {family}"
                table.add_row(name, *(_cell(at[part][key(r)], at[f"{part}_ci"][key(r)]) for r in RATIOS))
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title)
    table.add_column(first)
    for column in others:
        table.add_column(column, justify="right")
    return table


def _cell(value: float | None, ends: Sequence[float | None] | None) -> str:
    """`454 (430–481)`."""
    if value is None:
        return NONE
    low, high = (NONE if end is None else f"{end:.0f}" for end in ends or (None, None))
    return f"{value:.0f} ({low}–{high})"


def _difference(found: Mapping[str, float] | None) -> str:
    if found is None:
        return NONE
    return f"{found['percent']:+.1f} % ({found['lowest']:.2f}–{found['highest']:.2f})"


def write_files(found: Measurements, folder: Path, title: str) -> None:
    """CSV files and pictures into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = found.rows
    write_csv(rows, folder / CSV_FILE)
    curves = []
    for name in dict.fromkeys((r.split if r.family == FEATURE else r.family) for r in rows):
        chosen = [r for r in rows if name == (r.split if r.family == FEATURE else r.family)]
        ours = chosen[0].family == FEATURE
        share = f" ({chosen[0].share_of_uncut:.2f} of the time)" if ours and chosen[0].share_of_uncut else ""
        curves.append(
            Curve(
                f"{name}{share}",
                [(r.mean_bytes, r.relative) for r in chosen],
                [(r.relative_low, r.relative_high) for r in chosen],
                ours,
            )
        )
    draw_curves(curves, folder / PNG_FILE, title, "bytes a photograph", "share of the uncut top-1")
    write_slices(slice_rows(found), folder, title)

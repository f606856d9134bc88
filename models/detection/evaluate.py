"""`headrace eval detection`: bytes against COCO's average precision, for every operating point and for pictures.

Pictures are coded as they lie in the detector's input but without a letterbox's bars, which cost them no bytes here and
which the server would add again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..bundle import Bundle, Preprocessing
from ..evaluation.curves import LIMITS, RATIOS, cheapest_of, key, shared_of
from ..evaluation.edge_costs import EdgeCosts, edge_costs
from ..evaluation.pictures import QUALITIES, Box, measure_pictures, settings
from ..evaluation.plots import Curve, draw_curves, need_matplotlib, write_csv
from ..exceptions import DataError
from ..measure import measure
from ..operating_point import Kind
from ..preprocessing import placement
from ..split import bar_columns
from ..tasks import Detection
from ..zoo.catalogue import backbone_of
from .filter import audit
from .labelled import labelled_boxes
from .precision import Judge, Precision

FAMILIES = ("deep", "light", *QUALITIES)
"""Ours, those of them that take at most 0.15 of the uncut detector's time, and picture codecs."""
MINIMUM = 0.005
"""Score from which boxes are judged, as Darknet does; average precision looks at the whole ranking."""


@dataclass(frozen=True, slots=True)
class Row:
    """One operating point, or one quality of a picture codec, on the labelled pictures.

    Attributes:
        family: "deep" for ours, or the picture codec's.
        mean_bytes: whole packets.
        map, map50: COCO's average precision over overlaps of 0.5 to 0.95, and at 0.5.
        relative: mAP50 as a share of the uncut detector's on the same pictures.
        head_share: time of head and encoder on one core as a share of the uncut detector's; None for pictures.
        split: split point; empty for pictures.
    """

    name: str
    family: str
    mean_bytes: float
    map: float
    map50: float
    relative: float
    head_share: float | None = None
    split: str = ""


def evaluate_detection(
    bundle: Bundle,
    data: Path,
    limit: int = 0,
    json_file: Path | None = None,
    output: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure, print a table, and return (and write) what `--json` holds.

    Args:
        bundle: whole bundle of a detector.
        data: labelled pictures, see `labelled`.
        limit: at most this many pictures; 0 for all.
        json_file: where to write the result.
        output: folder for detection.csv and detection.png; None writes neither.
        console: where the table goes; standard output by default.

    Returns:
        `uncut_map50`, `uncut_map`, `images`, `uncut_ms`, `at` (ratio -> bytes for each of `FAMILIES`; null where
        no point reaches it or there is none), `at_hull` (the same between points), `at_split` (split point -> ratio ->
        bytes), `points`; with a filter `filter`, what of these pictures it would keep on the device.

    Raises:
        DataError: the bundle is for another task, or pictures or labels cannot be used.
    """
    backbone = backbone_of(bundle)
    if not isinstance(backbone.task, Detection):
        raise DataError(f"bundle {bundle.name} is for {bundle.task}; `eval rd` measures that, `eval detection` boxes")
    if output is not None:
        need_matplotlib()
    backbone.parts = replace(backbone.parts, task=replace(backbone.task, minimum=MINIMUM))
    pictures = labelled_boxes(data, bundle.labels, limit)
    judge = Judge(pictures, bundle.preprocessing)
    paths = [p.path for p in pictures]
    points = [p for p in bundle.operating_points if p.kind is Kind.FEATURE]
    chosen = settings(QUALITIES)
    with Progress(*bar_columns(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("times on one core", total=len(bundle.splits) + 1)
        costs = edge_costs(bundle, backbone, partial(progress.advance, bar))
        bar = progress.add_task("operating points", total=len(paths))
        reference, measured = measure(backbone, bundle, paths, points, partial(progress.advance, bar))
        bar = progress.add_task("pictures", total=len(paths))
        boxes = [without_bars(p.size, bundle.preprocessing) for p in pictures]
        coded = measure_pictures(backbone, paths, chosen, boxes, partial(progress.advance, bar))
    uncut = judge(reference)
    rows = [
        _row(p.name, "deep", measured[p.id].packet_bytes, judge(measured[p.id].answers), uncut, costs, p.split)
        for p in points
    ]
    rows += [
        _row(each.name, each.codec, coded[each].packet_bytes, judge(coded[each].answers), uncut, costs)
        for each in chosen
    ]
    result = _summary(rows, uncut, len(paths), costs.uncut.ms)
    console = console or Console()
    _print(console, rows, result)
    if bundle.filter is not None:
        holds = np.array([any(i in bundle.filter.classes for i in p.indexes) for p in pictures])
        found = audit(bundle, backbone, paths, holds)
        result["filter"] = {by: [asdict(report) for report in reports] for by, reports in found.items()}
        for by, reports in found.items():
            console.print(f"the filter, by the {by if by == 'labels' else 'uncut detector'}:", *reports, sep="\n")
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_csv(rows, output / "detection.csv")
        _draw(rows, bundle.name, output / "detection.png")
    return result


def without_bars(size: tuple[int, int], how: Preprocessing) -> Box:
    """What of a detector's input shows the picture, of `size` width and height, and not a letterbox's bars."""
    place = placement(*size, how)
    return (
        max(place.left, 0),
        max(place.top, 0),
        min(how.size, place.left + round(size[0] * place.across)),
        min(how.size, place.top + round(size[1] * place.down)),
    )


def _row(
    name: str,
    family: str,
    sizes: Sequence[int],
    found: Precision,
    uncut: Precision,
    costs: EdgeCosts,
    split: str = "",
) -> Row:
    relative = found.map50 / uncut.map50 if uncut.map50 else 0.0
    share = costs.splits[split].share_of_uncut if split else None
    return Row(name, family, float(np.mean(sizes)), found.map, found.map50, relative, share, split)


def cheapest(
    rows: Sequence[Row],
    families: Sequence[str] = FAMILIES,
    of: Callable[[Iterable[Row]], dict[str, float | None]] = cheapest_of,
) -> dict[str, dict[str, float | None]]:
    """Ratio -> family -> mean bytes of its cheapest row that reaches the ratio; None where none does. `of` may be
    `shared_of`: interpolated between two rows (precision is no mean over frames, so that frames divided between two
    points have about that precision, not exactly)."""
    found = {family: of(r for r in rows if _belongs(r, family)) for family in families}
    return {key(ratio): {family: each[key(ratio)] for family, each in found.items()} for ratio in RATIOS}


def _belongs(row: Row, family: str) -> bool:
    if family in LIMITS:
        return row.family == "deep" and (row.head_share or 0.0) <= LIMITS[family]
    return row.family == family


def _summary(rows: Sequence[Row], uncut: Precision, images: int, uncut_ms: float) -> dict[str, Any]:
    splits = tuple(dict.fromkeys(r.split for r in rows if r.split))
    return {
        "uncut_map50": uncut.map50,
        "uncut_map": uncut.map,
        "images": images,
        "uncut_ms": round(uncut_ms, 2),
        "at": cheapest(rows),
        "at_hull": cheapest(rows, of=shared_of),
        "at_split": {s: cheapest([r for r in rows if r.split == s], ("deep", "light")) for s in splits},
        "points": [
            asdict(r) | {"mean_bytes": round(r.mean_bytes, 1), "head_share": r.head_share and round(r.head_share, 3)}
            for r in rows
        ],
    }


def _print(console: Console, rows: Sequence[Row], result: dict[str, Any]) -> None:
    table = Table(
        title=f"{result['images']} pictures, uncut mAP50 {result['uncut_map50']:.3f}, mAP {result['uncut_map']:.3f}, "
        f"{result['uncut_ms']:.0f} ms"
    )
    for title in ("operating point", "bytes", "mAP50", "relative", "mAP", "head / uncut"):
        table.add_column(title, justify="left" if title == "operating point" else "right")
    for r in rows:
        share = "" if r.head_share is None else f"{r.head_share:.2f}"
        table.add_row(r.name, f"{r.mean_bytes:.0f}", f"{r.map50:.3f}", f"{r.relative:.3f}", f"{r.map:.3f}", share)
    console.print(table)
    told = {"": result["at"], "between points, ": result["at_hull"]}
    told |= {f"cut after {split}, ": at for split, at in result["at_split"].items()}
    for where, at in told.items():
        for ratio, families in at.items():
            said = ", ".join(f"{f} {'-' if b is None else f'{b:.0f} bytes'}" for f, b in families.items())
            console.print(f"{where}{ratio} of the uncut mAP50: {said}")


def _draw(rows: Sequence[Row], title: str, path: Path) -> None:
    curves = []
    for name in dict.fromkeys(r.split or r.family for r in rows):
        chosen = [r for r in rows if (r.split or r.family) == name]
        curves.append(Curve(name, [(r.mean_bytes, r.relative) for r in chosen], ours=bool(chosen[0].split)))
    draw_curves(curves, path, title, "bytes a picture", "share of the uncut mAP50")


__all__ = ["FAMILIES", "Row", "cheapest", "evaluate_detection"]

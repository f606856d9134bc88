"""`headrace eval rd`: bytes against accuracy, for every operating point and for pictures, on the same photographs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .backbones import Backbone
from .bundle import UNCUT, Bundle, head_file
from .exceptions import DataError
from .export import export_edge_half
from .measure import Measured, find_pictures, measure
from .onnx_time import edge_milliseconds, image_milliseconds
from .operating_point import MAX_ID, Kind, OperatingPoint
from .split import bar_columns
from .tasks import CLASSIFICATION, Answer, Labels
from .zoo.catalogue import backbone_of

RATIOS = (0.98, 0.95, 0.90)
"""Shares of the uncut accuracy at which bytes are stated."""
QUALITIES = {"webp": (1, 10, 20, 30, 40, 50, 60, 70, 80, 90), "jpeg": (10, 20, 30, 40, 50, 60, 70, 80, 90, 95)}
DEEP = "deep"


@dataclass(frozen=True, slots=True)
class Row:
    """One operating point on the labelled photographs.

    Attributes:
        mean_bytes: whole packets; `slice_bytes` and `entropy_bytes`: the slices alone, and the tables' own entropy.
        top1, relative: share of right answers, and that as a share of the uncut model's.
        head_ms: head and encoder (or picture coding) on one core of this machine; None where it was not timed.
        split: split point of feature codecs, empty for pictures.
    """

    name: str
    family: str
    mean_bytes: float
    slice_bytes: float
    entropy_bytes: float
    top1: float
    relative: float
    head_ms: float | None
    split: str = ""


@dataclass(slots=True)
class OtherCodec:
    """A feature codec of others at one rate setting, measured beside ours on the same photographs.

    Attributes:
        name, family: of the setting, and of the codec, under which bytes at a ratio are stated.
        split: where the backbone is cut.
        coded_bytes, answers: per photograph, length of the coded stream alone, and top-1 behind the real tail.
    """

    name: str
    family: str
    split: str
    coded_bytes: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)


Others = Callable[[Backbone, Bundle, Sequence[Path], Progress], Sequence[OtherCodec]]
"""Measures other codecs on photographs."""


def labelled_pictures(folder: Path, class_ids: Sequence[str], limit: int = 0) -> tuple[list[Path], list[int]]:
    """Photographs whose class is known: `WNID/any.jpg`, or `WNID_any.jpg`, with WordNet ids such as n01440764.

    Args:
        folder: searched with what is below it.
        class_ids: WordNet ids in index order.
        limit: take at most this many, evenly spread; 0 for all.

    Raises:
        DataError: no photograph's class can be told.
    """
    index = {wnid: i for i, wnid in enumerate(class_ids)}
    found = []
    for path in find_pictures(folder):
        wnid = path.stem.split("_")[0] if path.stem.split("_")[0] in index else path.parent.name
        if wnid in index:
            found.append((path, index[wnid]))
    if not found:
        raise DataError(
            f"{folder} holds no photograph whose class can be told; name files or folders by WordNet id (n01440764)"
        )
    if limit and len(found) > limit:
        found = [found[i] for i in np.linspace(0, len(found) - 1, limit).astype(int)]
    return [p for p, _ in found], [i for _, i in found]


def evaluate_rate_distortion(
    bundle: Bundle,
    data: Path,
    limit: int = 0,
    json_file: Path | None = None,
    console: Console | None = None,
    others: Others | None = None,
) -> dict[str, Any]:
    """Measure, print a table, and return (and write) what `--json` holds.

    Args:
        bundle: whole bundle.
        data: labelled photographs, see `labelled_pictures`.
        limit: at most this many photographs; 0 for all.
        json_file: where to write the result.
        console: where the table goes; standard output by default.
        others: measures further codecs, which get rows and families of their own.

    Returns:
        `uncut_top1`, `images`, `at` (ratio -> bytes for `deep`, `webp`, `jpeg` and other families; null where no point
        reaches it), `at_split` (split point -> ratio -> bytes for families that cut), `coded_over_entropy`, `points`.
    """
    console = console or Console()
    if bundle.task != CLASSIFICATION:
        raise DataError(f"bundle {bundle.name} is for {bundle.task}; `eval rd` counts right classes")
    backbone = backbone_of(bundle)
    paths, truth = labelled_pictures(data, backbone.class_ids, limit)
    points = [p for p in bundle.operating_points if p.kind is Kind.FEATURE]
    points += _picture_points({p.id for p in points})
    with Progress(*bar_columns(), console=Console(stderr=True)) as progress:
        times = _one_core_times(bundle, backbone, progress)
        bar = progress.add_task("photographs", total=len(paths))
        reference, measured = measure(backbone, bundle, paths, points, lambda n: progress.advance(bar, n))
        beside = others(backbone, bundle, paths, progress) if others else ()
    uncut = _top1(reference, truth)
    rows = [_row(p, measured[p.id], truth, uncut, times[p.stage]) for p in points]
    rows += [_other_row(each, truth, uncut) for each in beside]
    result = _summary(rows, uncut, len(paths))
    _print(console, rows, result, times["local"])
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _picture_points(taken: set[int]) -> list[OperatingPoint]:
    """Pictures at ten qualities each, under ids that the bundle's feature points leave free."""
    free = iter(i for i in range(MAX_ID + 1) if i not in taken)
    return [
        OperatingPoint(id=next(free), kind=Kind.IMAGE, codec=codec, rate_level=quality)
        for codec, qualities in QUALITIES.items()
        for quality in qualities
    ]


def _one_core_times(bundle: Bundle, backbone: Backbone, progress: Progress) -> dict[str, float]:
    bar = progress.add_task("times on one core", total=len(bundle.splits) + 1)
    with TemporaryDirectory() as folder:
        export_edge_half(bundle, Path(folder), lambda _: progress.advance(bar))
        paths = {s.name: Path(folder) / head_file(s.name) for s in bundle.splits}
        times = edge_milliseconds({**paths, "local": Path(folder) / UNCUT})
    return times | {codec: image_milliseconds(codec, backbone.preprocessing.size) for codec in QUALITIES}


def _row(point: OperatingPoint, found: Measured, truth: Sequence[int], uncut: float, head_ms: float) -> Row:
    top1 = _top1(found.answers, truth)
    return Row(
        name=point.name,
        family=point.codec or DEEP,
        mean_bytes=float(np.mean(found.packet_bytes)),
        slice_bytes=float(np.mean(found.slice_bytes)),
        entropy_bytes=float(np.mean(found.entropy_bits)) / 8,
        top1=top1,
        relative=top1 / uncut if uncut else 0.0,
        head_ms=head_ms,
        split=point.split,
    )


def _top1(answers: Sequence[Answer], truth: Sequence[int]) -> float:
    return float(np.mean([isinstance(a, Labels) and a.indexes[0] == t for a, t in zip(answers, truth, strict=True)]))


def _other_row(other: OtherCodec, truth: Sequence[int], uncut: float) -> Row:
    mean_bytes, top1 = float(np.mean(other.coded_bytes)), float(np.mean(np.array(other.answers) == np.array(truth)))
    relative = top1 / uncut if uncut else 0.0
    return Row(other.name, other.family, mean_bytes, mean_bytes, 0.0, top1, relative, None, other.split)


def _cheapest(rows: Sequence[Row], families: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Ratio -> family -> bytes of its cheapest row that reaches the ratio."""
    at: dict[str, dict[str, float | None]] = {}
    for ratio in RATIOS:
        at[f"{ratio:.2f}"] = cheapest = dict.fromkeys(families)
        for family in families:
            reaching = [r.mean_bytes for r in rows if r.family == family and r.relative >= ratio]
            cheapest[family] = round(min(reaching), 1) if reaching else None
    return at


def _summary(rows: Sequence[Row], uncut: float, images: int) -> dict[str, Any]:
    others = tuple(dict.fromkeys(r.family for r in rows if r.family not in (DEEP, *QUALITIES)))
    splits = tuple(dict.fromkeys(r.split for r in rows if r.split))
    coded = [r for r in rows if r.family == DEEP]
    return {
        "uncut_top1": uncut,
        "images": images,
        "at": _cheapest(rows, (DEEP, *QUALITIES, *others)),
        "at_split": {s: _cheapest([r for r in rows if r.split == s], (DEEP, *others)) for s in splits},
        "coded_over_entropy": {
            "total": sum(r.slice_bytes for r in coded) / sum(r.entropy_bytes for r in coded),
            "worst": max(r.slice_bytes / r.entropy_bytes for r in coded),
        },
        "points": [
            {
                "name": r.name,
                "family": r.family,
                "split": r.split,
                "bytes": round(r.mean_bytes, 1),
                "slice_bytes": round(r.slice_bytes, 1),
                "entropy_bytes": round(r.entropy_bytes, 1),
                "top1": r.top1,
                "relative": r.relative,
                "head_ms": None if r.head_ms is None else round(r.head_ms, 2),
            }
            for r in rows
        ],
    }


def _print(console: Console, rows: Sequence[Row], result: dict[str, Any], uncut_ms: float) -> None:
    table = Table(title=f"{result['images']} photographs, uncut top-1 {result['uncut_top1']:.3f} in {uncut_ms:.1f} ms")
    for title in ("operating point", "bytes", "top-1", "relative", "head ms", "coded/entropy"):
        table.add_column(title, justify="left" if title == "operating point" else "right")
    for r in rows:
        over = f"{r.slice_bytes / r.entropy_bytes:.3f}" if r.entropy_bytes else ""
        head_ms = "" if r.head_ms is None else f"{r.head_ms:.1f}"
        table.add_row(r.name, f"{r.mean_bytes:.0f}", f"{r.top1:.3f}", f"{r.relative:.3f}", head_ms, over)
    console.print(table)
    _print_cheapest(console, result["at"], "")
    for split, at in result["at_split"].items():
        _print_cheapest(console, at, f"cut after {split}, ")
    over = result["coded_over_entropy"]
    console.print(f"coded size over the tables' entropy: {over['total']:.3f} in all, {over['worst']:.3f} at worst")


def _print_cheapest(console: Console, at: dict[str, dict[str, float | None]], where: str) -> None:
    for ratio, families in at.items():
        said = ", ".join(f"{f} {'not reached' if b is None else f'{b:.0f} bytes'}" for f, b in families.items())
        console.print(f"{where}{ratio} of the uncut accuracy: {said}")

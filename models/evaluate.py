"""`headrace eval rd`: bytes against accuracy, for every operating point and for pictures, on the same photographs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from .backbones import Backbone
from .bundle import Bundle
from .evaluation.curves import bjontegaard
from .evaluation.edge_costs import edge_costs
from .evaluation.exits import exit_rows, measure_exits
from .evaluation.pictures import QUALITIES, available, encode_picture, measure_pictures, settings
from .evaluation.plots import need_matplotlib
from .evaluation.report import print_tables, summary, write_files
from .evaluation.samples import FEATURE, Measurements, Sample
from .exceptions import DataError
from .measure import Measured, find_pictures, measure
from .onnx_time import image_milliseconds
from .operating_point import Kind
from .split import bar_columns
from .tasks import CLASSIFICATION, Answer, Labels
from .zoo.catalogue import backbone_of


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
    output: Path | None = None,
) -> dict[str, Any]:
    """Measure, print tables, and return (and write) what `--json` holds.

    Args:
        bundle: whole bundle.
        data: labelled photographs, see `labelled_pictures`.
        limit: at most this many photographs; 0 for all.
        json_file: where to write the result.
        console: where the tables go; standard output by default.
        others: measures further codecs, which get rows and families of their own.
        output: folder for rate-accuracy.csv and rate-accuracy.png; None writes neither.

    Returns:
        See `evaluation.report.summary`.

    Raises:
        DataError: the bundle is for another task, photographs cannot be used, or a library is missing.
    """
    console = console or Console()
    if bundle.task != CLASSIFICATION:
        raise DataError(f"bundle {bundle.name} is for {bundle.task}; `eval rd` counts right classes")
    bjontegaard()
    if output is not None:
        need_matplotlib()
    found = measure_all(bundle, data, limit, others)
    result = summary(found)
    print_tables(console, found, result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    if output is not None:
        write_files(found, output, bundle.name)
    return result


def measure_all(bundle: Bundle, data: Path, limit: int = 0, others: Others | None = None) -> Measurements:
    """Every operating point, every picture codec and `others` on the same photographs, and what the edge computes."""
    backbone = backbone_of(bundle)
    paths, truth = labelled_pictures(data, backbone.class_ids, limit)
    points = [p for p in bundle.operating_points if p.kind is Kind.FEATURE]
    chosen = settings()
    with Progress(*bar_columns(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("times on one core", total=len(bundle.splits) + 1)
        costs = edge_costs(bundle, backbone, partial(progress.advance, bar))
        size = backbone.preprocessing.size
        picture_ms = {
            codec: image_milliseconds(codec, size, encode=encode_picture) for codec in QUALITIES if available(codec)
        }
        bar = progress.add_task("operating points", total=len(paths))
        reference, measured = measure(backbone, bundle, paths, points, partial(progress.advance, bar))
        bar = progress.add_task("pictures", total=len(paths))
        pictures = measure_pictures(backbone, paths, chosen, note=partial(progress.advance, bar))
        beside = others(backbone, bundle, paths, progress) if others else ()
        if bundle.exit_specs:
            bar = progress.add_task("exits", total=len(paths) * len(bundle.exit_specs))
        told = measure_exits(backbone, bundle, paths, partial(progress.advance, bar))
        uncut = np.array([a.indexes[0] for a in reference if isinstance(a, Labels)], np.int64)
        exits = exit_rows(backbone, bundle, told, np.array(truth, np.int64), uncut, costs.splits) if told else []
    samples = [_sample(p.name, FEATURE, p.split, measured[p.id], truth) for p in points]
    samples += [_sample(each.name, each.codec, "", pictures[each], truth) for each in chosen]
    samples += [_other_sample(each, truth) for each in beside]
    return Measurements(samples, _right(reference, truth), costs, picture_ms, exits)


def _sample(name: str, family: str, split: str, found: Measured, truth: Sequence[int]) -> Sample:
    return Sample(
        name=name,
        family=family,
        split=split,
        packet_bytes=np.array(found.packet_bytes, np.float64),
        right=_right(found.answers, truth),
        slice_bytes=float(np.mean(found.slice_bytes)),
        entropy_bytes=float(np.mean(found.entropy_bits)) / 8,
    )


def _other_sample(other: OtherCodec, truth: Sequence[int]) -> Sample:
    coded = np.array(other.coded_bytes, np.float64)
    right = np.array(other.answers) == np.array(truth)
    return Sample(other.name, other.family, other.split, coded, right, float(coded.mean()), 0.0)


def _right(answers: Sequence[Answer], truth: Sequence[int]) -> npt.NDArray[np.bool_]:
    return np.array([isinstance(a, Labels) and a.indexes[0] == t for a, t in zip(answers, truth, strict=True)])

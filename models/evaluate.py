"""`headrace eval rd`: bytes against accuracy, for every operating point and for pictures, on the same photographs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from .backbones import Backbone
from .baselines.student_file import LearnedStudent, read_student, student_files
from .baselines.student_measure import measure_student
from .bundle import Bundle
from .evaluation.curves import bjontegaard
from .evaluation.edge_costs import edge_costs
from .evaluation.exits import exit_rows, measure_exits
from .evaluation.kept import (
    Kept,
    costs_as_json,
    costs_from_json,
    exits_as_json,
    exits_from_json,
    pictures_identity,
    samples_as_json,
    samples_from_json,
    split_digest,
)
from .evaluation.pictures import QUALITIES, available, encode_picture, measure_pictures, settings
from .evaluation.plots import need_matplotlib
from .evaluation.report import print_tables, summary, write_files
from .evaluation.samples import ENTROPIC_STUDENT, FEATURE, Measurements, Sample
from .evaluation.slices import points_by_slice
from .evaluation.uncut import UncutInOnnx
from .exceptions import DataError
from .measure import Measured, find_pictures, measure, measure_prefixes
from .onnx_time import image_milliseconds
from .operating_point import Kind, OperatingPoint
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


class Others(Protocol):
    """Measures other codecs on photographs, cut by cut."""

    @property
    def identity(self) -> str:
        """Of what is measured and how, beside the bundle and the photographs."""

    def splits(self, bundle: Bundle) -> Sequence[str]:
        """Where it cuts."""

    def measure(
        self, backbone: Backbone, bundle: Bundle, split: str, paths: Sequence[Path], progress: Progress
    ) -> Sequence[OtherCodec]:
        """Every codec at every rate setting at a split point, on the photographs `paths`."""


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
    work: Path | None = None,
    codecs: Sequence[str] = tuple(QUALITIES),
    student: Path | None = None,
    own: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measure, print tables, and return (and write) what `--json` holds.

    Args:
        bundle: whole bundle.
        data: labelled photographs, see `labelled_pictures`.
        limit: at most this many photographs; 0 for all.
        json_file: where to write the result.
        console: where the tables go; standard output by default.
        others: measures further codecs, which get rows and families of their own.
        output: folder for rate-accuracy.csv, slices.csv and their pictures; None writes none.
        work: folder that keeps every finished stage, so that a run that was stopped goes on; None keeps nothing.
        codecs: of `pictures.QUALITIES`.
        student: file of a learned Entropic Student, or folder of some, to measure beside ours.
        own: which of our split points to measure; None for all, and exits. What the device computes is told of all.

    Returns:
        See `evaluation.report.summary`.

    Raises:
        DataError: the bundle is for another task, photographs cannot be used, a codec is unknown, or a library is
            missing.
    """
    console = console or Console()
    if bundle.task != CLASSIFICATION:
        raise DataError(f"bundle {bundle.name} is for {bundle.task}; `eval rd` counts right classes")
    if unknown := sorted(set(codecs) - set(QUALITIES)):
        raise DataError(f"unknown picture codec {unknown[0]!r}; there are {', '.join(QUALITIES)}")
    bjontegaard()
    if output is not None:
        need_matplotlib()
    found = measure_all(bundle, data, limit, others, work, codecs, student, own)
    result = summary(found)
    print_tables(console, found, result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    if output is not None:
        write_files(found, output, bundle.name)
    return result


def measure_all(
    bundle: Bundle,
    data: Path,
    limit: int = 0,
    others: Others | None = None,
    work: Path | None = None,
    codecs: Sequence[str] = tuple(QUALITIES),
    student: Path | None = None,
    own: Sequence[str] | None = None,
) -> Measurements:
    """Every operating point, every picture codec and `others` on the same photographs, and what the edge computes.

    Arguments as of `evaluate_rate_distortion`.
    """
    backbone = backbone_of(bundle)
    students = [read_student(path, backbone) for path in student_files(student)] if student is not None else []
    splits = _splits(bundle, own, bool(students or codecs or others))
    paths, truth = labelled_pictures(data, backbone.class_ids, limit)
    points = [p for p in bundle.operating_points if p.kind is Kind.FEATURE and p.split in splits]
    chosen = [each for each in settings() if each.codec in codecs]
    fingerprint = bundle.fingerprint.hex()
    kept = Kept(work, backbone.spec.sha256, str(backbone.preprocessing), pictures_identity(paths), str(truth))
    with Progress(*bar_columns(), console=Console(stderr=True)) as progress:

        def times() -> dict[str, Any]:
            beside = {ENTROPIC_STUDENT: students[0].encoder} if students else {}
            bar = progress.add_task("times on one core", total=len(bundle.splits) + 1 + len(beside))
            costs = edge_costs(bundle, backbone, partial(progress.advance, bar), beside)
            size = backbone.preprocessing.size
            there = [codec for codec in QUALITIES if available(codec)]
            picture_ms = {codec: image_milliseconds(codec, size, encode=encode_picture) for codec in there}
            return costs_as_json(costs) | {"picture_ms": picture_ms}

        def uncut_answers() -> list[int]:
            bar = progress.add_task("uncut model", total=len(paths))
            answers, _ = measure(backbone, bundle, paths, (), partial(progress.advance, bar))
            return [a.indexes[0] for a in answers if isinstance(a, Labels)]

        def ours(split: str) -> list[dict[str, Any]]:
            bar = progress.add_task(f"{split}: operating points", total=len(paths))
            there = [p for p in points if p.split == split]
            _, measured = measure(backbone, bundle, paths, there, partial(progress.advance, bar), reference=False)
            return samples_as_json([_sample(p.name, FEATURE, split, measured[p.id], truth) for p in there])

        def pictures() -> list[dict[str, Any]]:
            bar = progress.add_task("pictures", total=len(paths))
            found = measure_pictures(
                backbone, paths, chosen, note=partial(progress.advance, bar), uncut=UncutInOnnx(backbone)
            )
            return samples_as_json([_sample(each.name, each.codec, "", found[each], truth) for each in chosen])

        def prefixes(point: OperatingPoint) -> list[dict[str, Any]]:
            bar = progress.add_task(f"{point.name}: first slices", total=len(paths))
            measured = measure_prefixes(backbone, bundle, paths, [point], partial(progress.advance, bar))
            return samples_as_json(
                [
                    _sample(f"{point.name}, {n} slices", FEATURE, point.split, each, truth)
                    for (_, n), each in measured.items()
                ]
            )

        def exits() -> list[dict[str, Any]]:
            bar = progress.add_task("exits", total=len(paths) * len(bundle.exit_specs))
            told = measure_exits(backbone, bundle, paths, partial(progress.advance, bar))
            rows = exit_rows(backbone, bundle, told, np.array(truth, np.int64), uncut, costs.splits)
            return exits_as_json(rows)

        timed = kept.stage("times", times, fingerprint, *([ENTROPIC_STUDENT] if students else []))
        costs = costs_from_json(timed)
        uncut = np.array(kept.stage("uncut", uncut_answers), np.int64)
        samples = []
        for name in splits:
            identity = split_digest(bundle, name)
            samples += samples_from_json(kept.stage(f"{name}: points", partial(ours, name), identity))
        samples += samples_from_json(kept.stage("pictures", pictures, str(chosen))) if chosen else []
        samples += _student_samples(kept, backbone, students, paths, truth, progress)
        samples += _other_samples(kept, others, backbone, bundle, paths, truth, progress) if others else []
        by_slice = {}
        for point in (p for p in points_by_slice(bundle) if p.split in splits):
            identity = split_digest(bundle, point.split)
            found = kept.stage(f"{point.name}: slices", partial(prefixes, point), identity)
            by_slice[point.name] = samples_from_json(found)
        with_exits = bundle.exit_specs and own is None
        told = exits_from_json(kept.stage("exits", exits, fingerprint, str(bundle.exit_specs)) if with_exits else [])
    return Measurements(
        samples,
        uncut == np.array(truth),
        costs,
        timed["picture_ms"],
        told,
        prefixes=by_slice,
        learned=[each.facts for each in students],
    )


def _splits(bundle: Bundle, own: Sequence[str] | None, others: bool) -> list[str]:
    if own is None:
        return [each.name for each in bundle.splits]
    if not own and not others:
        raise DataError("nothing is measured; leave some of our split points, a picture codec or a baseline")
    return [bundle.split(name).name for name in own]


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


def _student_samples(
    kept: Kept,
    backbone: Backbone,
    students: Sequence[LearnedStudent],
    paths: Sequence[Path],
    truth: Sequence[int],
    progress: Progress,
) -> list[Sample]:
    def measured(student: LearnedStudent) -> list[dict[str, Any]]:
        bar = progress.add_task(student.name, total=len(paths))
        found = measure_student(backbone, student, paths, partial(progress.advance, bar))
        return samples_as_json([_sample(student.name, ENTROPIC_STUDENT, "", found, truth)])

    stages = [kept.stage(each.name, partial(measured, each), each.digest) for each in students]
    return [sample for stage in stages for sample in samples_from_json(stage)]


def _other_samples(
    kept: Kept,
    others: Others,
    backbone: Backbone,
    bundle: Bundle,
    paths: Sequence[Path],
    truth: Sequence[int],
    progress: Progress,
) -> list[Sample]:
    def measured(split: str) -> list[dict[str, Any]]:
        found = others.measure(backbone, bundle, split, paths, progress)
        return samples_as_json([_other_sample(each, truth) for each in found])

    identities = {split: split_digest(bundle, split) for split in others.splits(bundle)}
    stages = [kept.stage(s, partial(measured, s), digest, others.identity) for s, digest in identities.items()]
    return [sample for stage in stages for sample in samples_from_json(stage)]


def _other_sample(other: OtherCodec, truth: Sequence[int]) -> Sample:
    coded = np.array(other.coded_bytes, np.float64)
    right = np.array(other.answers) == np.array(truth)
    return Sample(other.name, other.family, other.split, coded, right, float(coded.mean()), 0.0)


def _right(answers: Sequence[Answer], truth: Sequence[int]) -> npt.NDArray[np.bool_]:
    return np.array([isinstance(a, Labels) and a.indexes[0] == t for a, t in zip(answers, truth, strict=True)])

"""`headrace exit`: give a bundle local exits, calibrate and measure them.

photographs -> narrow exit, where one is asked for: learned (`learn`)
            -> uncut model: labels
            -> head, the exit's own graph: scores -> temperature and confidence, fitted on some, judged on others
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress

from ..backbones import Backbone
from ..bundle import FEATURES, Bundle
from ..bundle_exits import with_exits
from ..bundle_specs import ExitSpec
from ..exceptions import DataError
from ..measure import find_pictures, pixel_batches
from ..onnx_session import open_session
from ..operating_point import MAX_ID, Kind, OperatingPoint
from ..split import choose
from ..tasks import CLASSIFICATION
from ..zoo.catalogue import backbone_of
from .confidence import best_two, calibration_error, confidences, fit_confidence, fit_temperature, surest, tempered
from .costs import exit_costs
from .graph import write_exit
from .learn import NarrowPlan, learn

UNCALIBRATED = (0.0, 1.0, 0.0)
"""Confidence that is the best score itself."""


@dataclass(frozen=True, slots=True)
class ExitPlan:
    """What to make.

    Attributes:
        at: split points that get an exit.
        photographs: how many temperature and confidence are fitted on.
        held_out: how many others the exits are measured on. With `photographs`, this and the seed as they were given to
            `split` they are those that the bundle's other operating points were measured on.
        seed: of the choice of photographs.
        narrow: how narrow exits are learned, if they are.
        more: folders of more photographs to learn from; none of theirs is calibrated or measured on.
    """

    at: tuple[str, ...]
    photographs: int = 300
    held_out: int = 64
    seed: int = 0
    narrow: NarrowPlan = field(default_factory=NarrowPlan)
    more: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """How an exit does on the photographs that were held out.

    Attributes:
        name: of its operating point.
        accuracy: share of photographs with the uncut model's label; `surest`: of the quarter it is surest about.
        error: expected calibration error of its confidence.
        share: its time as a share of the uncut model's; `with_head`: that of head and exit.
    """

    name: str
    accuracy: float
    surest: float
    error: float
    share: float
    with_head: float

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.accuracy:.3f} of the uncut answers, {self.surest:.3f} on the quarter it is surest "
            f"about, calibration error {self.error:.3f}, {self.with_head:.3f} of the uncut model's time, of that "
            f"{self.share:.3f} behind the head"
        )


def make_exits(
    bundle: Bundle, calibration: Path, plan: ExitPlan, work: Path, progress: Progress | None = None
) -> tuple[Backbone, Bundle, list[Report]]:
    """The backbone, the bundle with exits (its fingerprint stays), and how each one does.

    Args:
        bundle: of a classifier; exits that it has at other split points stay.
        calibration: folder of unlabelled photographs.
        plan: what to make.
        work: folder for what narrow exits learn from, and a checkpoint, to be removed once the bundle is saved; a run
            that was killed goes on from there.
        progress: where to show progress; None for nowhere.

    Raises:
        DataError: the bundle is for another task, no split point is named, there are too few photographs, or no room
            for more operating points.
        BackboneError: the backbone has no linear classifier behind one vector, or is not the bundle's; no narrow exit
            can be there, see `narrow`.
        OperatingPointError: the bundle has no such split point.
    """
    progress = progress or Progress(disable=True)
    if bundle.task != CLASSIFICATION:
        raise DataError(f"bundle {bundle.name} is for {bundle.task}; an exit is for classifiers")
    names = tuple(dict.fromkeys(bundle.split(name).name for name in plan.at))
    if not names:
        raise DataError(f"name the split points that get an exit with --at: {', '.join(s.name for s in bundle.splits)}")
    backbone = backbone_of(bundle)
    fitted, held_out = choose(calibration, plan.photographs, plan.held_out, plan.seed)
    bar = progress.add_task("uncut model", total=len(fitted) + len(held_out))
    labels = uncut_labels(backbone, [*fitted, *held_out], lambda n: progress.advance(bar, n))
    narrow = {split: tensors for split, tensors in backbone.narrow_exits.items() if split not in names}
    if plan.narrow.hidden:
        seen = {*fitted, *held_out}
        paths = [p for folder in (calibration, *plan.more) for p in find_pictures(folder) if p not in seen]
        if not paths:
            raise DataError(
                f"all {len(seen)} photographs are calibrated or measured on, none is left to learn from; give a folder "
                "of others with --more"
            )
        for name in names:
            narrow[name] = learn(backbone, name, fitted, paths, plan.narrow, plan.seed, work / name, progress)
    backbone.narrow_exits = narrow
    specs = {s.split: s for s in bundle.exit_specs}
    points = {p.split: p for p in bundle.operating_points if p.is_exit}
    free = iter(sorted(set(range(MAX_ID + 1)) - {p.id for p in bundle.operating_points}))
    reports = {}
    for name in names:
        plain = ExitSpec(name, 1.0, UNCALIBRATED)
        bar = progress.add_task(name, total=len(fitted) + len(held_out))
        scores = exit_scores(backbone, plain, [*fitted, *held_out], lambda n, bar=bar: progress.advance(bar, n))  # type: ignore[misc]
        spec = calibrated(plain, scores[: len(fitted)], labels[: len(fitted)])
        told = tempered(scores[len(fitted) :], spec.temperature)
        right = told.argmax(1) == labels[len(fitted) :]
        sure = confidences(spec, *best_two(told))
        specs[name] = replace(spec, surest=float(right[surest(sure)].mean()))
        if name not in points:
            number = next(free, None)
            if number is None:
                raise DataError(f"bundle {bundle.name} has {MAX_ID + 1} operating points already, no more fit")
            points[name] = OperatingPoint(number, Kind.LOCAL, name)
        points[name] = replace(points[name], accuracy=float(right.mean()))
        error = calibration_error(sure, right)
        reports[name] = Report(points[name].name, points[name].accuracy, specs[name].surest, error, 0.0, 0.0)
    costs = exit_costs(backbone, [specs[name] for name in names])
    for name, cost in costs.items():
        share = bundle.split(name).edge_share + cost.share
        specs[name] = replace(specs[name], share=cost.share)
        points[name] = replace(points[name], edge_share=share)
        reports[name] = replace(reports[name], share=cost.share, with_head=share)
    made = with_exits(bundle, tuple(specs.values()), tuple(points.values()), narrow)
    return (
        backbone,
        replace(made, provenance={**made.provenance, "exits": _said(made, plan, names)}),
        [*reports.values()],
    )


def _said(bundle: Bundle, plan: ExitPlan, names: Sequence[str]) -> str:
    """The command, behind those that made the bundle's other exits."""
    said = (
        f"headrace exit {' '.join(f'--at {name}' for name in names)} --photographs {plan.photographs} "
        f"--held-out {plan.held_out} --seed {plan.seed}"
    )
    if plan.narrow.hidden:
        how = plan.narrow
        said += f" --hidden {how.hidden} --steps {how.steps} --crops {how.crops}{' --more FOLDER' * len(plan.more)}"
    others = {s.split for s in bundle.exit_specs} - set(names)
    before = str(bundle.provenance.get("exits", ""))
    return "; ".join([before, said]) if others and before else said


def uncut_labels(
    backbone: Backbone, paths: Sequence[Path], note: Callable[[int], None] = lambda _: None
) -> npt.NDArray[np.int64]:
    """int64 [N]: the uncut model's label of each photograph; `note` is called with how many more are done."""
    uncut, found = backbone.uncut, []
    with torch.inference_mode():
        for pixels in pixel_batches(paths, backbone.preprocessing):
            found.append(uncut(pixels)[0].argmax(1).numpy())
            note(len(pixels))
    return np.concatenate(found)


def exit_scores(
    backbone: Backbone, spec: ExitSpec, paths: Sequence[Path], note: Callable[[int], None] = lambda _: None
) -> npt.NDArray[np.float64]:
    """Scores float64 [N, classes] of photographs, by the graph that a device runs; `note` as above."""
    head, found = backbone.head(spec.split), []
    with TemporaryDirectory() as folder:
        write_exit(backbone, spec, Path(folder) / "exit.onnx")
        session = open_session(Path(folder) / "exit.onnx")
    with torch.inference_mode():
        for pixels in pixel_batches(paths, backbone.at(spec.split)[0].preprocessing):
            (features,) = head(pixels)
            found += [session.run(None, {FEATURES: each[None].numpy()})[0][0] for each in features]
            note(len(pixels))
    return np.asarray(np.stack(found), dtype=np.float64)


def calibrated(spec: ExitSpec, scores: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> ExitSpec:
    """The specification with temperature and confidence.

    Args:
        spec: at temperature 1.
        scores: float64 [N, classes] at that temperature.
        labels: int64 [N], the uncut model's of the same photographs.
    """
    temperature = fit_temperature(np.log(np.maximum(scores, 1e-30)), labels)
    two = best_two(tempered(scores, temperature))
    return replace(spec, temperature=temperature, confidence=fit_confidence(*two, scores.argmax(1) == labels))

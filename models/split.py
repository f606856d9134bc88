"""`headrace split`: from a backbone and a folder of unlabelled photographs to a bundle, without training.

photographs -> features and gradients at each cut -> `fit`: transform, quantiser, tables, slices
held-out photographs -> every operating point -> measured bytes and accuracy
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text
from torch import Tensor

from .backbones import SIZED, Backbone
from .bottleneck import Encoder
from .bundle import Bundle, SplitSpec
from .closed_form import fisher_gradients
from .cutting.cuts import Cut
from .cutting.maps import Packing
from .detection.mosaic import scene_batches
from .exceptions import BackboneError, DataError
from .export import Only, write_onnx
from .fit import BOX_DISTORTIONS, DISTORTIONS, fit_map
from .measure import View, find_pictures, load_pixels, measure, pixel_batches
from .monotone import monotone
from .onnx_time import coding_milliseconds, edge_milliseconds, image_milliseconds
from .operating_point import Kind, OperatingPoint
from .tasks import CLASSIFICATION, DETECTION
from .temporal_fit import with_temporal
from .zoo.catalogue import load_backbone
from .zoo.sources import Source

MIN_PHOTOGRAPHS = 100
CODED = 16
"""Photographs on which it is timed how long coding takes."""
DEFAULT_SHARES = (0.25, 0.5, 0.75)
"""Shares of the uncut model's multiply-accumulates near which it is cut when no split point is named."""
SHARE_REACH = 0.12
IMAGE_QUALITIES: Mapping[str, Sequence[int]] = {"webp": (1, 5, 10, 20, 35, 50, 75, 90), "jpeg": (5, 10, 20, 35, 55, 80)}


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """What to make.

    Attributes:
        source: name of the backbone and where its weights come from.
        calibration: folder of photographs; labels are not looked at.
        at: split points; empty for the backbone's usual ones.
        photographs: how many are used to fit, at least 100; fewer where the folder does not hold as many besides those
            that are held out.
        held_out: how many others are used to measure the operating points.
        seed: of the choice of photographs and of the draws for the Fisher metric.
        distortions: rate levels of these split points, finest first, in nats (see `fit.DISTORTIONS`); empty for the
            usual ones.
    """

    source: Source
    calibration: Path
    at: tuple[str, ...] = ()
    photographs: int = 300
    held_out: int = 64
    seed: int = 0
    distortions: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Raises:
        DataError: distortions are not positive and rising.
        """
        if list(self.distortions) != sorted(set(self.distortions)) or any(d <= 0 for d in self.distortions):
            raise DataError(
                f"distortions {', '.join(f'{d:g}' for d in self.distortions)} are not positive and rising; give them "
                "from the finest rate level to the coarsest, such as 0.02,0.05,0.12"
            )


def split(plan: SplitPlan, progress: Progress | None = None, data_note: str = "") -> tuple[Backbone, Bundle]:
    """Make a bundle.

    Args:
        plan: what to make.
        progress: where to show progress; None for nowhere.
        data_note: what the provenance says about the photographs.

    Returns:
        The backbone, whose weights the bundle's folder may have to hold (`zoo.write_weights`), and the bundle.

    Raises:
        DataError: too few photographs.
        BackboneError: unknown backbone or split point, its weights are missing, or it cannot be cut.
    """
    fit_on, held_out = choose(plan.calibration, plan.photographs, plan.held_out, plan.seed)
    backbone = load_backbone(plan.source)
    names = tuple(full_name(backbone, name) for name in plan.at) or default_splits(backbone)
    if not names:
        backbone.packing(backbone.cuts[0].name)
        raise BackboneError(f"{backbone.spec.name} has no cut to take by itself; name one with --at, see --list")
    bundle = fit(backbone, names, fit_on, held_out, plan.seed, progress, plan.distortions)
    bundle = with_temporal(backbone, bundle, fit_on, plan.seed, progress)
    others = "of them" if set(held_out) & set(fit_on) else "others"
    provenance = {
        "command": f"headrace split {plan.source.name} --photographs {plan.photographs} --held-out {plan.held_out} "
        f"--seed {plan.seed}{_further(plan)}",
        "data": data_note or f"{len(fit_on)} unlabelled photographs, {len(held_out)} {others} to measure on",
        "seed": plan.seed,
    }
    return backbone, replace(bundle, provenance=provenance)


def _further(plan: SplitPlan) -> str:
    """The flags that are not always there."""
    source, flags = plan.source, [f"--at {name}" for name in plan.at]
    if plan.distortions:
        flags.append(f"--distortions {','.join(f'{d:g}' for d in plan.distortions)}")
    flags += [f"{flag} {value}" for flag, value in (("--task", source.task), ("--size", source.size)) if value]
    if source.weights is not None:
        flags.append(f"--weights {source.weights.name}")
    if source.seed is not None:
        flags.append(f"--random-weights {source.seed}")
    return "".join(f" {flag}" for flag in flags)


def fit(
    backbone: Backbone,
    names: Sequence[str],
    fit_on: Sequence[Path],
    held_out: Sequence[Path],
    seed: int = 0,
    progress: Progress | None = None,
    distortions: Sequence[float] = (),
) -> Bundle:
    """Fit the closed form at each split point, and measure every operating point.

    Args:
        backbone: to cut.
        names: split points.
        fit_on, held_out: photographs to fit and to measure on.
        seed: of the draws for the Fisher metric.
        progress: where to show progress; None for nowhere.
        distortions: rate levels, see `SplitPlan`.

    Raises:
        BackboneError: a split point is unknown, its maps cannot be packed, or it does not join exactly.
    """
    progress = progress or Progress(disable=True)
    bundle = fit_unmeasured(backbone, names, fit_on, seed, progress, distortions).compact()
    return measured_points(backbone, timed(backbone, bundle, held_out, progress), held_out, progress).check()


def fit_unmeasured(
    backbone: Backbone,
    names: Sequence[str],
    fit_on: Sequence[Path],
    seed: int = 0,
    progress: Progress | None = None,
    distortions: Sequence[float] = (),
) -> Bundle:
    """As `fit`, but bytes, accuracy and times of the operating points are left at 0."""
    progress = progress or Progress(disable=True)
    for name in names:
        backbone.prove(name)
    levels = dict.fromkeys(names, distortions)
    specs, tensors = fit_splits(backbone, names, fit_on, seed, progress, levels)
    return Bundle(
        name=_bundle_name(backbone.spec.name),
        task=backbone.task.name,
        backbone=backbone.spec,
        preprocessing=backbone.preprocessing,
        labels=backbone.labels,
        splits=tuple(specs),
        operating_points=_operating_points(specs, local=backbone.task.name == CLASSIFICATION),
        tensors=tensors,
    ).check()


def full_name(backbone: Backbone, name: str) -> str:
    """A cut's own name where an alias was given, with the size that was asked for.

    Also where it is the backbone's own size: by that name a cut can be in a bundle twice, with two heads.
    """
    sized, _ = backbone.at(name)
    cut = backbone.cut(name).name
    return f"{cut}-{sized.preprocessing.size}px" if SIZED.fullmatch(name) else cut


def fit_splits(
    backbone: Backbone,
    names: Sequence[str],
    fit_on: Sequence[Path],
    seed: int,
    progress: Progress,
    levels: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> tuple[list[SplitSpec], dict[str, np.ndarray[Any, Any]]]:
    """Fit the closed form at split points, learned ones among them: their specifications, and tensors as `Bundle` has
    them. `levels` are the distortions of some split points, in place of the usual ones."""
    features: dict[str, list[Tensor]] = {name: [] for name in names}
    sizes: dict[int, list[str]] = {}
    for name in names:
        sizes.setdefault(backbone.at(name)[0].preprocessing.size, []).append(name)
    for size, alike in sizes.items():
        sized = backbone.at(alike[0])[0]
        bar = progress.add_task(f"features, {size} pixels", total=len(fit_on))
        parts = sized.head_parts([name for name in alike if not backbone.has_head(name)])
        apart = {name: backbone.head(name) for name in alike if backbone.has_head(name)}
        with torch.inference_mode():
            for pixels in calibration_batches(sized, fit_on, seed):
                reached: tuple[Tensor, ...] = (pixels,)
                for name, part in parts:
                    reached = part(*reached)
                    features[name].append(reached[0])
                for name, head in apart.items():
                    features[name].append(head(pixels)[0])
                progress.advance(bar, len(pixels))
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    specs = []
    for name in names:
        bar = progress.add_task(f"{name}: closed form", total=len(fit_on))
        batches = [b.clone() for b in features.pop(name)]
        done = partial(progress.advance, bar)
        gradients = fisher_gradients(backbone.tail(name), batches, seed, backbone.task.probe, done)
        size, whole = backbone.at(name)[0].preprocessing.size, backbone.preprocessing.size
        own = size == whole
        # With fewer pixels the answer is less certain, and every disturbance says more than it costs in accuracy.
        usual = BOX_DISTORTIONS if backbone.task.name == DETECTION else DISTORTIONS
        distortions = levels.get(name) or [d * (whole / size) ** 2 for d in usual]
        fitted = fit_map(torch.cat(batches), gradients, distortions)
        specs.append(SplitSpec(name, fitted.features, fitted.latent_channels, fitted.slices, size=0 if own else size))
        tensors |= {f"{name}/{key}": value for key, value in fitted.arrays.items()}
    return specs, tensors


def calibration_batches(backbone: Backbone, paths: Sequence[Path], seed: int) -> Iterator[Tensor]:
    """Photographs as pixels uint8 [B, S, S, 3]; of a detector's, every other one is replaced by a mosaic of four."""
    if backbone.task.name != DETECTION:
        return pixel_batches(paths, backbone.preprocessing)
    return scene_batches(paths, backbone.preprocessing, seed)


def default_splits(backbone: Backbone) -> tuple[str, ...]:
    """Split points when none are named: the source's own, or the narrowest near a quarter, half and three quarters of
    the compute, of single maps where there are any near. Empty where no cut's maps can be packed."""
    if backbone.parts.splits:
        return backbone.parts.splits
    usable = [c for c in backbone.cuts if c.shapes[0][1:] != (1, 1) and packs(c)]
    if not usable:
        return ()
    chosen = {_near(backbone, usable, share) for share in DEFAULT_SHARES}
    return tuple(c.name for c in sorted(chosen, key=lambda c: c.index))


def packs(cut: Cut) -> bool:
    """Whether the maps that cross there can be packed into one."""
    try:
        Packing(cut.shapes)
    except BackboneError:
        return False
    return True


def _near(backbone: Backbone, cuts: Sequence[Cut], share: float) -> Cut:
    """The narrowest cut near a share of the multiply-accumulates, of a single map if it can be; or the nearest."""
    off = {c: abs(backbone.costs.macs_share(c) - share) for c in cuts}
    near = [c for c in cuts if off[c] <= SHARE_REACH] or [min(cuts, key=off.__getitem__)]
    return min(near, key=lambda c: (len(c.maps) > 1, c.elements, off[c]))


def _bundle_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name.removesuffix(".pt2"))


def bar_columns() -> tuple[Any, ...]:
    """Columns of the progress bars that `headrace split`, `repair` and `eval` show."""
    return (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), _Said())


class _Said(ProgressColumn):
    """What a task says about itself in its field `said`, such as speed and loss."""

    def render(self, task: Task) -> Text:
        """Nothing, for most tasks."""
        return Text(str(task.fields.get("said", "")))


def choose(folder: Path, photographs: int, held_out: int, seed: int) -> tuple[list[Path], list[Path]]:
    """Photographs to fit on, and others to measure operating points on.

    Args:
        folder: searched with what is below it.
        photographs: to fit on, at most.
        held_out: to measure on, at most.
        seed: the same one chooses the same photographs.

    Raises:
        DataError: there are too few.
    """
    found = find_pictures(folder)
    if photographs < MIN_PHOTOGRAPHS or len(found) < MIN_PHOTOGRAPHS:
        raise DataError(
            f"{folder} holds {len(found)} photographs, {photographs} are asked for, "
            f"and at least {MIN_PHOTOGRAPHS} are needed; add photographs like those the camera will see"
        )
    random.Random(seed).shuffle(found)
    fitted = min(photographs, max(MIN_PHOTOGRAPHS, len(found) - held_out))
    # With too few for both, what is measured on was also fitted on: better than nothing, and said in the provenance.
    rest = found[fitted : fitted + held_out]
    return found[:fitted], rest or found[:held_out]


def _operating_points(specs: Sequence[SplitSpec], local: bool) -> tuple[OperatingPoint, ...]:
    """Local first (where the device can answer by itself), then every split point's rate levels, then pictures."""
    points = [OperatingPoint(id=0, kind=Kind.LOCAL, accuracy=1.0)] if local else []
    for spec in specs:
        for level in range(spec.rate_levels):
            points.append(OperatingPoint(id=len(points), kind=Kind.FEATURE, split=spec.name, rate_level=level))
    for codec, qualities in IMAGE_QUALITIES.items():
        for quality in qualities:
            points.append(OperatingPoint(id=len(points), kind=Kind.IMAGE, codec=codec, rate_level=quality))
    return tuple(points)


def timed(backbone: Backbone, bundle: Bundle, views: Sequence[View], progress: Progress) -> Bundle:
    """Shares of the uncut model's time, in ONNX Runtime on one core, interleaved; an operating point's with the coding
    of a photograph's packet, at the middle rate level, of some of `views`."""
    bar = progress.add_task("compute shares", total=len(bundle.splits) + 2)
    whole = bundle.task == CLASSIFICATION
    with TemporaryDirectory() as folder:
        paths = {"uncut": Path(folder) / "uncut.onnx"}
        write_onnx(backbone, Only(backbone.uncut) if whole else backbone.traced_part, "scores", paths["uncut"])
        progress.advance(bar)
        for spec in bundle.splits:
            paths[spec.name] = Path(folder) / f"{spec.name}.onnx"
            head = Only(backbone.head(spec.name), Encoder.of(bundle, spec.name))
            write_onnx(backbone.at(spec.name)[0], head, "latent", paths[spec.name])
            progress.advance(bar)
        times = edge_milliseconds(paths)
        coding = {}
        for spec in bundle.splits:
            pictures = [load_pixels(view, bundle.preprocessing_at(spec.name)) for view in views[:CODED]]
            coding[spec.name] = coding_milliseconds(bundle, spec, paths[spec.name], pictures)
        for codec in IMAGE_QUALITIES:
            times[codec] = image_milliseconds(codec, backbone.preprocessing.size)
        progress.advance(bar)
    if not whole:
        # What chooses boxes does not run in ONNX Runtime; its share is taken from PyTorch.
        times["uncut"] /= backbone.costs.traced_share
    share = {name: t / times["uncut"] for name, t in times.items()}
    on_the_edge = {name: s + coding.get(name, 0.0) / times["uncut"] for name, s in share.items()}
    return replace(
        bundle,
        splits=tuple(replace(s, edge_share=share[s.name]) for s in bundle.splits),
        operating_points=tuple(
            # An exit's share is measured with the exit.
            p if p.is_exit else replace(p, edge_share=on_the_edge.get(p.stage, 1.0))
            for p in bundle.operating_points
        ),
    )


def measured_points(
    backbone: Backbone, bundle: Bundle, held_out: Sequence[View], progress: Progress, only: Collection[str] = ()
) -> Bundle:
    """The bundle with bytes and accuracy (see `monotone`) of every operating point, on photographs that were not fitted
    on; of those of `only` some split points if any are given."""
    bar = progress.add_task("operating points", total=len(held_out))
    sent = [p for p in bundle.operating_points if p.kind is not Kind.LOCAL and (not only or p.split in only)]
    reference, measured = measure(backbone, bundle, held_out, sent, lambda n: progress.advance(bar, n))
    points = []
    for point in bundle.operating_points:
        found = measured.get(point.id)
        if found is None:
            points.append(point)
            continue
        median, p95 = np.percentile(found.packet_bytes, (50, 95)).tolist()
        points.append(
            replace(point, bytes_median=median, bytes_p95=p95, accuracy=found.agreement(backbone.task, reference))
        )
    return replace(bundle, operating_points=monotone(points))

"""`headrace split`: from a backbone and a folder of unlabelled photographs to a bundle, without training.

photographs -> features and gradients at each cut -> `fit`: transform, quantiser, tables, slices
held-out photographs -> every operating point -> measured bytes and accuracy
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
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
from torch import Tensor, nn

from .backbones import Backbone, load_backbone
from .bottleneck import Encoder
from .bundle import Bundle, SplitSpec
from .closed_form import fisher_gradients
from .exceptions import DataError
from .export import write_onnx
from .fit import fit_map
from .measure import find_pictures, measure, pixel_batches
from .onnx_time import edge_milliseconds, image_milliseconds
from .operating_point import Kind, OperatingPoint

MIN_PHOTOGRAPHS = 100
IMAGE_QUALITIES: Mapping[str, Sequence[int]] = {"webp": (1, 5, 10, 20, 35, 50, 75, 90), "jpeg": (5, 10, 20, 35, 55, 80)}


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """What to make.

    Attributes:
        backbone: name, as in `backbones.BACKBONES`.
        calibration: folder of photographs; labels are not looked at.
        at: split points; empty for the backbone's usual three.
        photographs: how many are used to fit, at least 100; fewer where the folder does not hold as many besides those
            that are held out.
        held_out: how many others are used to measure the operating points.
        seed: of the choice of photographs and of the draws for the Fisher metric.
    """

    backbone: str
    calibration: Path
    at: tuple[str, ...] = ()
    photographs: int = 300
    held_out: int = 64
    seed: int = 0


DEFAULT_SPLITS = {"efficientnet_lite0": ("blocks.2", "blocks.3", "blocks.5")}


def split(plan: SplitPlan, progress: Progress | None = None, data_note: str = "") -> Bundle:
    """Make a bundle.

    Args:
        plan: what to make.
        progress: where to show progress; None for nowhere.
        data_note: what the provenance says about the photographs.

    Raises:
        DataError: too few photographs.
        BackboneError: unknown backbone or split point, or its weights are missing.
    """
    progress = progress or Progress(disable=True)
    backbone = load_backbone(plan.backbone)
    names = plan.at or DEFAULT_SPLITS.get(plan.backbone, backbone.split_points)
    fit_on, held_out = choose(plan)
    bar = progress.add_task("features", total=len(fit_on))
    features: dict[str, list[Tensor]] = {name: [] for name in names}
    heads = _chain(backbone, names)
    with torch.inference_mode():
        for pixels in pixel_batches(fit_on, backbone.preprocessing):
            reached: Tensor = pixels
            for name, part in heads:
                reached = part(reached)
                features[name].append(reached)
            progress.advance(bar, len(pixels))
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    specs = []
    for name in names:
        bar = progress.add_task(f"{name}: closed form", total=len(fit_on))
        batches = [b.clone() for b in features.pop(name)]
        gradients = fisher_gradients(
            backbone.tail(name),
            batches,
            plan.seed,
            lambda n, b=bar: progress.advance(b, n),  # type: ignore[misc]
        )
        fitted = fit_map(torch.cat(batches), gradients)
        specs.append(SplitSpec(name, fitted.features, fitted.latent_channels, fitted.slices))
        tensors |= {f"{name}/{key}": value for key, value in fitted.arrays.items()}
    bundle = Bundle(
        name=plan.backbone,
        task="classification",
        backbone=backbone.spec,
        preprocessing=backbone.preprocessing,
        labels=backbone.labels,
        splits=tuple(specs),
        operating_points=_operating_points(specs),
        tensors=tensors,
        provenance={
            "command": f"headrace split {plan.backbone} --photographs {plan.photographs} --held-out {plan.held_out} "
            f"--seed {plan.seed}",
            "data": data_note or f"{len(fit_on)} unlabelled photographs, {len(held_out)} others to measure on",
            "seed": plan.seed,
        },
    )
    return measured_points(backbone, _timed(backbone, bundle, progress), held_out, progress).check()


def bar_columns() -> tuple[Any, ...]:
    """Columns of the progress bars that `headrace split`, `repair` and `eval` show."""
    return (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), _Said())


class _Said(ProgressColumn):
    """What a task says about itself in its field `said`, such as speed and loss."""

    def render(self, task: Task) -> Text:
        """Nothing, for most tasks."""
        return Text(str(task.fields.get("said", "")))


def choose(plan: SplitPlan) -> tuple[list[Path], list[Path]]:
    """Photographs to fit on, and others to measure operating points on.

    Raises:
        DataError: there are too few.
    """
    found = find_pictures(plan.calibration)
    if plan.photographs < MIN_PHOTOGRAPHS or len(found) < MIN_PHOTOGRAPHS:
        raise DataError(
            f"{plan.calibration} holds {len(found)} photographs, {plan.photographs} are asked for, "
            f"and at least {MIN_PHOTOGRAPHS} are needed; add photographs like those the camera will see"
        )
    random.Random(plan.seed).shuffle(found)
    fitted = min(plan.photographs, max(MIN_PHOTOGRAPHS, len(found) - plan.held_out))
    # With too few for both, what is measured on was also fitted on: better than nothing, and said in the provenance.
    rest = found[fitted : fitted + plan.held_out]
    return found[:fitted], rest or found[: plan.held_out]


def _chain(backbone: Backbone, names: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The head cut into parts, so that a photograph passes every stage once for all split points."""
    order = [name for name, _ in backbone.stages]
    for name in names:
        backbone.head(name)  # refuses an unknown one
    chain: list[tuple[str, nn.Module]] = []
    begin = 0
    for name in sorted(names, key=order.index):
        end = order.index(name) + 1
        chain.append((name, nn.Sequential(*(m for _, m in backbone.stages[begin:end])).eval()))
        begin = end
    return chain


def _operating_points(specs: Sequence[SplitSpec]) -> tuple[OperatingPoint, ...]:
    """Local first, then every split point's rate levels, then pictures."""
    points = [OperatingPoint(id=0, kind=Kind.LOCAL, accuracy=1.0)]
    for spec in specs:
        for level in range(spec.rate_levels):
            points.append(OperatingPoint(id=len(points), kind=Kind.FEATURE, split=spec.name, rate_level=level))
    for codec, qualities in IMAGE_QUALITIES.items():
        for quality in qualities:
            points.append(OperatingPoint(id=len(points), kind=Kind.IMAGE, codec=codec, rate_level=quality))
    return tuple(points)


def _timed(backbone: Backbone, bundle: Bundle, progress: Progress) -> Bundle:
    """Shares of the uncut model's time, in ONNX Runtime on one core, interleaved."""
    bar = progress.add_task("compute shares", total=len(bundle.splits) + 2)
    with TemporaryDirectory() as folder:
        paths = {"uncut": Path(folder) / "uncut.onnx"}
        write_onnx(backbone, backbone.uncut, "scores", paths["uncut"])
        progress.advance(bar)
        for spec in bundle.splits:
            paths[spec.name] = Path(folder) / f"{spec.name}.onnx"
            head = nn.Sequential(backbone.head(spec.name), Encoder.of(bundle, spec.name))
            write_onnx(backbone, head, "latent", paths[spec.name])
            progress.advance(bar)
        times = edge_milliseconds(paths)
        for codec in IMAGE_QUALITIES:
            times[codec] = image_milliseconds(codec, backbone.preprocessing.size)
        progress.advance(bar)
    share = {name: t / times["uncut"] for name, t in times.items()}
    return replace(
        bundle,
        splits=tuple(replace(s, edge_share=share[s.name]) for s in bundle.splits),
        operating_points=tuple(replace(p, edge_share=share.get(p.stage, 1.0)) for p in bundle.operating_points),
    )


def measured_points(backbone: Backbone, bundle: Bundle, held_out: Sequence[Path], progress: Progress) -> Bundle:
    """The bundle with bytes and accuracy of every operating point, on photographs that were not fitted on."""
    bar = progress.add_task("operating points", total=len(held_out))
    sent = [p for p in bundle.operating_points if p.kind is not Kind.LOCAL]
    reference, measured = measure(backbone, bundle, held_out, sent, lambda n: progress.advance(bar, n))
    points = []
    for point in bundle.operating_points:
        found = measured.get(point.id)
        if found is None:
            points.append(point)
            continue
        median, p95 = np.percentile(found.packet_bytes, (50, 95)).tolist()
        points.append(replace(point, bytes_median=median, bytes_p95=p95, accuracy=found.agreement(reference)))
    return replace(bundle, operating_points=tuple(points))

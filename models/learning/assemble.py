"""From trained networks to split points of a bundle: the closed form on top of every width's latent.

What was learned makes a latent that is cheap and says much; the closed form finds its transform, quantiser steps,
slices and integer tables, width by width, exactly as for features of the backbone. So learned split points are coded,
sent, decoded, repaired and chosen like all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress

from ..backbones import Backbone
from ..bundle import Bundle, LearnedSpec, SplitSpec, rounded
from ..exceptions import DataError
from ..operating_point import MAX_ID, Kind, OperatingPoint
from ..split import fit_splits, measured_points, timed
from .cut import learned_cuts, synthesis_numbers, tensors_of
from .plan import TrainPlan
from .slimmable import STRIDE
from .train import Learned


def split_names(plan: TrainPlan) -> tuple[str, ...]:
    """Names of the split points of a plan, narrowest first."""
    return tuple(f"{plan.name}-{width}" for width in plan.encoder.widths)


def assemble(
    backbone: Backbone,
    bundle: Bundle,
    plan: TrainPlan,
    learned: Learned,
    fit_on: Sequence[Path],
    held_out: Sequence[Path],
    progress: Progress | None = None,
) -> Bundle:
    """The bundle with a split point for every width, in place of those that the plan's name had before.

    Args:
        backbone: the bundle's; it knows the learned cuts afterwards.
        bundle: any; its other split points and operating points stay as they are, and so do their ids.
        plan, learned: what `train.train` was given, and what it gave.
        fit_on, held_out: photographs to fit the closed form on, and to measure the new operating points on.
        progress: where to show progress; None for nowhere.

    Raises:
        DataError: there would be more operating points than a bundle can have.
    """
    progress = progress or Progress(disable=True)
    bundle = without(bundle, plan.name)
    side = backbone.preprocessing.size // STRIDE
    shape = (plan.encoder.latent, side, side)
    numbers = synthesis_numbers(learned.synthesis.shape)
    widths = {
        name: LearnedSpec(plan.name, width, tuple(channels), plan.anchor, numbers)
        for name, (width, channels) in zip(split_names(plan), plan.encoder.widths.items(), strict=True)
    }
    tensors = {**bundle.learned, **tensors_of(plan.name, learned.encoder, learned.synthesis)}
    bundle = bundle.with_learned(tensors)
    # The networks that are fitted on are those that the bundle will hold, in half precision.
    unfitted = [SplitSpec(name, shape, shape[0], (), learned=spec) for name, spec in widths.items()]
    backbone.learned = learned_cuts(replace(bundle, splits=(*bundle.splits, *unfitted)))
    specs, arrays = fit_splits(backbone, list(widths), fit_on, plan.seed, progress)
    specs = [replace(spec, learned=widths[spec.name]) for spec in specs]
    bundle = replace(
        bundle,
        splits=(*bundle.splits, *specs),
        operating_points=(*bundle.operating_points, *_points(bundle, specs)),
        tensors={**bundle.tensors, **rounded(arrays)},
        provenance={**bundle.provenance, plan.name: learned.said},
    ).check()
    return measured_points(backbone, timed(backbone, bundle, progress), held_out, progress, tuple(widths)).check()


def without(bundle: Bundle, name: str) -> Bundle:
    """The bundle without the split points, operating points and tensors that were learned under a name."""
    gone = {s.name for s in bundle.splits if s.learned is not None and s.learned.name == name}

    def stays(key: str) -> bool:
        return not any(key.startswith(f"{split}/") for split in gone)

    return replace(
        bundle,
        splits=tuple(s for s in bundle.splits if s.name not in gone),
        operating_points=tuple(p for p in bundle.operating_points if p.split not in gone),
        tensors={k: v for k, v in bundle.tensors.items() if stays(k)},
        repair={k: v for k, v in bundle.repair.items() if stays(k)},
    ).with_learned({k: v for k, v in bundle.learned.items() if not k.startswith(f"{name}/")})


def _points(bundle: Bundle, specs: Sequence[SplitSpec]) -> list[OperatingPoint]:
    """Operating points of new split points, under the first ids that are free."""
    taken = {p.id for p in bundle.operating_points}
    free = (i for i in range(MAX_ID + 1) if i not in taken)
    wanted = [(spec, level) for spec in specs for level in range(spec.rate_levels)]
    if len(taken) + len(wanted) > MAX_ID + 1:
        raise DataError(
            f"bundle {bundle.name} would have {len(taken) + len(wanted)} operating points, at most {MAX_ID + 1} fit; "
            "train fewer widths"
        )
    width = {spec.name: _share(spec, specs) for spec in specs}
    return [
        OperatingPoint(id=next(free), kind=Kind.FEATURE, split=s.name, width=width[s.name], rate_level=level)
        for s, level in wanted
    ]


def _share(spec: SplitSpec, specs: Sequence[SplitSpec]) -> float:
    """A width as a share of the widest's channels."""
    assert spec.learned is not None
    widest = max(sum(s.learned.channels) for s in specs if s.learned is not None)
    return sum(spec.learned.channels) / widest

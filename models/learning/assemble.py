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
from ..bundle import Bundle, LearnedSpec, SplitSpec
from ..extend import added
from ..extend import without as without_splits
from ..measure import View
from ..split import fit_splits, measured_points, timed
from .cut import learned_cuts, synthesis_numbers, tensors_of
from .plan import TrainPlan
from .slimmable import STRIDE
from .train import Learned


def split_names(plan: TrainPlan) -> tuple[str, ...]:
    """Names of the split points of a plan, narrowest first."""
    return tuple(f"{plan.name}-{width}" for width in plan.encoder.taken)


def assemble(
    backbone: Backbone,
    bundle: Bundle,
    plan: TrainPlan,
    learned: Learned,
    fit_on: Sequence[Path],
    held_out: Sequence[View],
    progress: Progress | None = None,
) -> Bundle:
    """The bundle with a split point for every width, in place of those that the plan's name had before.

    Args:
        backbone: the bundle's; it knows the learned cuts afterwards.
        bundle: any; its other split points stay as they are, and so do the ids of their operating points.
        plan, learned: what `train.train` was given, and what it gave.
        fit_on: photographs to fit the closed form on.
        held_out: photographs, or parts of some, to measure all operating points on, the old ones too: those that one
            bundle holds have to be compared on the same.
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
        for name, (width, channels) in zip(split_names(plan), plan.encoder.taken.items(), strict=True)
    }
    tensors = {
        **bundle.learned,
        **tensors_of(plan.name, learned.encoder, learned.synthesis, learned.tail, plan.tail_kept, plan.eight_bits),
    }
    bundle = bundle.with_learned(tensors)
    # The networks that are fitted on are those that the bundle will hold, in half precision or eight bits.
    unfitted = [SplitSpec(name, shape, shape[0], (), learned=spec) for name, spec in widths.items()]
    backbone.learned = learned_cuts(replace(bundle, splits=(*bundle.splits, *unfitted)))
    levels = {name: plan.distortions[spec.width] for name, spec in widths.items() if spec.width in plan.distortions}
    specs, arrays = fit_splits(backbone, list(widths), fit_on, plan.seed, progress, levels)
    specs = [replace(spec, learned=widths[spec.name]) for spec in specs]
    bundle = added(bundle, specs, arrays, {spec.name: _share(spec, specs) for spec in specs})
    bundle = replace(bundle, provenance={**bundle.provenance, plan.name: learned.said}).check()
    return measured_points(backbone, timed(backbone, bundle, held_out, progress), held_out, progress).check()


def without(bundle: Bundle, name: str) -> Bundle:
    """The bundle without the split points and networks that were learned under a name."""
    gone = {s.name for s in bundle.splits if s.learned is not None and s.learned.name == name}
    kept = {k: v for k, v in bundle.learned.items() if not k.startswith(f"{name}/")}
    return without_splits(bundle, gone).with_learned(kept)


def _share(spec: SplitSpec, specs: Sequence[SplitSpec]) -> float:
    """A width as a share of the widest's channels."""
    assert spec.learned is not None
    widest = max(sum(s.learned.channels) for s in specs if s.learned is not None)
    return sum(spec.learned.channels) / widest

"""More split points for a bundle that is there already: `headrace split --add-to`, and what learning puts into one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from .backbones import Backbone
from .bundle import Bundle, SplitSpec, rounded
from .exceptions import BackboneError, DataError
from .learning.cut import HEAD, own_heads
from .operating_point import MAX_ID, Kind, OperatingPoint
from .repair.resample import own_cut
from .repair.restorer import RESTORE
from .repair.tail import said_without
from .split import SplitPlan, choose, fit_splits, full_name, measured_points, timed
from .zoo.catalogue import backbone_of, in_full


def extended(
    plan: SplitPlan, folder: Path, progress: Progress | None = None, instead_of: str = ""
) -> tuple[Backbone, Bundle]:
    """As `split`, but the split points are added to the bundle in a folder, see `extend`.

    Raises:
        DataError: no split point was named, or as `extend`.
        BackboneError: the bundle is of another backbone, or as `extend`.
        BundleError: the bundle cannot be read.
    """
    if not plan.at:
        raise DataError("name the split points that the bundle gets with --at, see --list")
    bundle = Bundle.load(folder)
    backbone = backbone_of(bundle)
    if (asked := in_full(plan.source.name)) != bundle.backbone.name:
        raise BackboneError(f"the bundle in {folder} is of {bundle.backbone.name}, not of {asked}")
    fit_on, held_out = choose(plan.calibration, plan.photographs, plan.held_out, plan.seed)
    found = extend(backbone, bundle, plan.at, fit_on, held_out, plan.seed, progress, instead_of, plan.distortions)
    names = " ".join([f"--at {name}" for name in plan.at] + ([f"--instead-of {instead_of}"] if instead_of else []))
    names += f" --distortions {','.join(f'{d:g}' for d in plan.distortions)}" if plan.distortions else ""
    said = (
        f"headrace split {plan.source.name} --add-to BUNDLE {names} --photographs {plan.photographs} --seed {plan.seed}"
    )
    before = [bundle.provenance["added"]] if "added" in bundle.provenance else []
    return backbone, replace(found, provenance={**found.provenance, "added": "; ".join([*before, said])})


def extend(
    backbone: Backbone,
    bundle: Bundle,
    names: Sequence[str],
    fit_on: Sequence[Path],
    held_out: Sequence[Path],
    seed: int = 0,
    progress: Progress | None = None,
    instead_of: str = "",
    distortions: Sequence[float] = (),
) -> Bundle:
    """A bundle with more split points, or with some fitted anew; the others and their operating points stay.

    Args:
        backbone: the bundle's.
        bundle: any.
        names: split points; a repair that one of these had is dropped.
        fit_on, held_out: photographs to fit and to measure on.
        seed: of the draws for the Fisher metric.
        progress: where to show progress; None for nowhere.
        instead_of: a split point that leaves the bundle for the one of `names`, which is the same cut on other pixels.
            A light head of its is convolutions and goes over, with the restorer that it learned with.
        distortions: rate levels, see `SplitPlan`.

    Raises:
        BackboneError: a split point is unknown, its maps cannot be packed, or it does not join exactly.
        OperatingPointError: the bundle has no split point that is to leave.
        DataError: there would be more operating points than a bundle can have, or what is to leave is another cut.
    """
    progress = progress or Progress(disable=True)
    names = [full_name(backbone, name) for name in names]
    clips = _leaving(bundle, instead_of, names) if instead_of else None
    for name in names:
        backbone.prove(name)
    backbone.own_heads = {name: head for name, head in backbone.own_heads.items() if name not in names}
    levels = dict.fromkeys(names, distortions)
    specs, arrays = fit_splits(backbone, names, fit_on, seed, progress, levels)
    weights = _going_over(bundle.learned, f"{instead_of}/{HEAD}/", f"{names[0]}/{HEAD}/")
    restorer = _going_over(bundle.repair, f"{instead_of}/{RESTORE}/", f"{names[0]}/{RESTORE}/")
    bundle = added(
        without(bundle, [*names, *([instead_of] if instead_of else [])]),
        [replace(s, clips=clips) for s in specs],
        arrays,
    )
    bundle = replace(bundle.with_learned({**bundle.learned, **weights}), repair={**bundle.repair, **restorer}).check()
    backbone.own_heads = own_heads(bundle)
    return measured_points(backbone, timed(backbone, bundle, held_out, progress), held_out, progress, names).check()


def _leaving(bundle: Bundle, split: str, names: Sequence[str]) -> tuple[int, ...] | None:
    """Clips of the light head of the split point that leaves, None if its head is not light."""
    spec = bundle.split(split)
    if len(names) != 1 or own_cut(names[0]) != own_cut(split) or spec.learned is not None:
        raise DataError(
            f"{', '.join(names)} cannot stand in for {split}: name one split point with --at, at the same cut of the "
            f"backbone's own on other pixels, such as {own_cut(split)}-208px"
        )
    return spec.clips


def _going_over(tensors: Mapping[str, np.ndarray[Any, Any]], before: str, now: str) -> dict[str, np.ndarray[Any, Any]]:
    """Those whose names begin with `before`, under names that begin with `now`."""
    return {now + key.removeprefix(before): value for key, value in tensors.items() if key.startswith(before)}


def without(bundle: Bundle, names: Collection[str]) -> Bundle:
    """The bundle without some split points, their operating points, tensors, heads of their own, repairs and exits, and
    what is said of the repairs."""

    def stays(key: str) -> bool:
        return not any(key.startswith(f"{name}/") for name in names)

    said = said_without(bundle, names)
    provenance = {k: v for k, v in bundle.provenance.items() if k != "repair"}
    provenance |= {"repair": "; ".join(said)} if said else {}
    if lost := [key for key in bundle.learned if any(key.startswith(f"{name}/{HEAD}/") for name in names)]:
        bundle = bundle.with_learned({k: v for k, v in bundle.learned.items() if k not in lost})
    return replace(
        bundle,
        provenance=provenance,
        exit_specs=tuple(s for s in bundle.exit_specs if s.split not in names),
        splits=tuple(s for s in bundle.splits if s.name not in names),
        operating_points=tuple(p for p in bundle.operating_points if p.split not in names),
        tensors={k: v for k, v in bundle.tensors.items() if stays(k)},
        repair={k: v for k, v in bundle.repair.items() if stays(k)},
        narrow_exits={k: v for k, v in bundle.narrow_exits.items() if stays(k)},
    )


def added(
    bundle: Bundle,
    specs: Sequence[SplitSpec],
    arrays: Mapping[str, np.ndarray[Any, Any]],
    widths: Mapping[str, float] | None = None,
) -> Bundle:
    """The bundle with these split points, their tensors, and an operating point for every rate level, under the first
    ids that are free.

    Raises:
        DataError: there would be more operating points than a bundle can have.
    """
    taken = {p.id for p in bundle.operating_points}
    free = (i for i in range(MAX_ID + 1) if i not in taken)
    wanted = [(spec, level) for spec in specs for level in range(spec.rate_levels)]
    if len(taken) + len(wanted) > MAX_ID + 1:
        raise DataError(
            f"bundle {bundle.name} would have {len(taken) + len(wanted)} operating points, at most {MAX_ID + 1} fit; "
            "add fewer split points, or one in place of another (--instead-of)"
        )
    points = [
        OperatingPoint(
            id=next(free),
            kind=Kind.FEATURE,
            split=spec.name,
            width=(widths or {}).get(spec.name, 1.0),
            rate_level=level,
        )
        for spec, level in wanted
    ]
    return replace(
        bundle,
        splits=(*bundle.splits, *specs),
        operating_points=(*bundle.operating_points, *points),
        tensors={**bundle.tensors, **rounded(arrays)},
    )

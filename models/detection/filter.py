"""The neural filter: tells on the device, from features that it has computed anyway, whether a frame can hold anything
of the classes of interest (Matsubara and Levorato, "Neural Compression and Filtering for Edge-assisted Real-time Object
Detection in Challenged Networks", ICPR 2020).

Its network is in `presence`, how it learns in `learner`, the views that it learns from in `scenes`, and on a GPU in
`collage` and `distil`. It is learned from the uncut detector's own answers to views of unlabelled photographs. The
threshold comes from photographs that were not learned from: the k-th smallest score of the n views that hold something,
k = rate (n + 1) rounded down, so that another such view falls below it with a probability of at most the rate (a
conformal quantile; Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005). All that is held out
gives the threshold. What comes of such a one is said by its two parts in turn, the threshold of each on the other
(Vovk, "Cross-conformal predictors", 2015).
"""

from __future__ import annotations

import math
import random
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..backbones import Backbone
from ..bundle import Bundle, FilterSpec
from ..exceptions import DataError
from ..measure import find_pictures
from ..tasks import Detection
from ..zoo.catalogue import backbone_of
from .collage import Collage
from .distil import Views, distil
from .labelled import class_indexes
from .learner import Learner
from .presence import Presence
from .scenes import Part, Seen, look

EPOCHS = 20
BATCH = 64
VIEWS = 150_000
SHARES = (0.2, 0.15)
"""Shares of the photographs that are held out, in two parts; the rest is learned from."""
LEAST = 60
"""Photographs at least."""
LEAST_HELD = 10
"""Frames with and without something of interest that each part of the photographs needs at least."""


class WithFilter(nn.Module):
    """Features -> latent and the filter's score: what a head's graph ends with where a bundle has a filter."""

    def __init__(self, encoder: nn.Module, presence: Presence) -> None:
        super().__init__()
        self.encoder, self.presence = encoder, presence

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(features), self.presence(features)


@dataclass(frozen=True, slots=True)
class FilterPlan:
    """What to learn.

    Attributes:
        classes: names of the classes of interest.
        miss_rate: most that may be missed of the frames that hold one of them, 0..1.
        epochs: passes over the photographs; on a CPU.
        views: views to learn from; on a GPU.
        seed: of their division and order.
        at: split points; none for all. Others have no filter then.
    """

    classes: tuple[str, ...]
    miss_rate: float = 0.02
    epochs: int = EPOCHS
    views: int = VIEWS
    seed: int = 0
    at: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """How a split point's filter did on photographs that neither it nor the threshold came from.

    Attributes:
        missed: share of the frames with something of interest that it would keep on the device; `held`: their number.
        kept: share of the frames without that it keeps there; `empty`: their number.
        cost: multiply-accumulates as a share of the uncut detector's.
    """

    split: str
    missed: float
    held: int
    kept: float
    empty: int
    cost: float

    def __str__(self) -> str:
        return (
            f"{self.split}: keeps {self.kept:.2f} of {self.empty} frames without, misses {self.missed:.3f} of "
            f"{self.held} with something of interest, at {self.cost:.2%} of the uncut detector's multiply-accumulates"
        )


def learn_filter(
    bundle: Bundle,
    folders: Sequence[Path],
    plan: FilterPlan,
    note: Callable[[str, int, int], None] = lambda *_: None,
    work: Path | None = None,
    device: torch.device | None = None,
) -> tuple[Backbone, Bundle, list[Report]]:
    """The backbone, its bundle with a filter at the split points (and another fingerprint), and how each one does.

    Args:
        bundle: of a detector.
        folders: of unlabelled photographs.
        plan: what to learn.
        note: called with what is done, how far, and how far there is to go.
        work: folder for what has been looked at; a run that was killed goes on from there. None keeps it in memory.
        device: where all is computed; on a GPU every view that is learned from is a new one. None for a CPU.

    Raises:
        DataError: the bundle is for another task, a class is unknown, the rate is out of range, or too few photographs
            hold one of the classes.
        OperatingPointError: there is no such split point.
    """
    backbone = backbone_of(bundle)
    if not isinstance(backbone.task, Detection):
        raise DataError(f"bundle {bundle.name} is for {bundle.task}; a filter is learned from a detector's boxes")
    if not 0 < plan.miss_rate < 1:
        raise DataError(f"the miss rate is {plan.miss_rate}; it has to lie between 0 and 1")
    interest = class_indexes(bundle.labels, plan.classes)
    if not interest:
        raise DataError("no class of interest is named; give some with --classes")
    if device is not None and device.type == "cuda" and not torch.cuda.is_available():
        raise DataError("there is no CUDA device here; use --device cpu, or check the driver with nvidia-smi")
    splits = [bundle.split(name) for name in plan.at] or bundle.splits
    paths = [path for folder in folders for path in find_pictures(folder)]
    random.Random(plan.seed).shuffle(paths)
    first, second, learned = division(paths, SHARES)
    if len(paths) < LEAST:
        raise DataError(f"{len(paths)} photographs are too few to learn from; give at least {LEAST}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        filters = {s.name: Presence(s.features[0], max(s.features[1:])) for s in splits}
    parts = [Part(first, 2), Part(second, 2)]
    fresh = device is not None and device.type != "cpu"
    if not fresh:
        parts.append(Part(learned, 4, mirrored=True))
    total = sum(len(part) for part in parts)
    pooled = {name: presence.pooled for name, presence in filters.items()}
    seen = look(backbone, pooled, parts, interest, plan.seed, work, lambda n: note("views", n, total), device)
    slices = _slices(parts)
    for part in slices:
        held = seen.holds[part]
        if held.sum() < LEAST_HELD or (~held).sum() < LEAST_HELD:
            raise DataError(
                f"{int(seen.holds.sum())} of {total} views of {len(paths)} photographs hold one of "
                f"{', '.join(plan.classes)}; more are needed of either kind, or other classes"
            )
    confident = backbone.task.confident
    if fresh:
        assert device is not None
        collage = Collage(learned, backbone.preprocessing.fill, device)
        there = {name: each.to(device) for name, each in filters.items()}
        views, rng = Views(backbone, there, collage, interest), np.random.default_rng((plan.seed, 6))
        show = lambda made, _, __: note("learning", min(made, plan.views), plan.views)  # noqa: E731
        learners = distil(views, there, confident, lambda made: made / plan.views, rng, show)
        filters = {name: learner.finish() for name, learner in learners.items()}
    else:
        for name, presence in filters.items():
            _learn(presence, seen, name, slices[2], confident, plan, partial(note, f"{name}: filter"))
    how = f"--device {device} --views {plan.views}" if fresh else f"--epochs {plan.epochs}"
    said = f"{how} --seed {plan.seed}, from {len(paths)} unlabelled photographs"
    return backbone, *equipped(bundle, backbone, filters, seen, (slices[0], slices[1]), plan, said)


def equipped(
    bundle: Bundle,
    backbone: Backbone,
    filters: Mapping[str, Presence],
    seen: Seen,
    parts: tuple[slice, slice],
    plan: FilterPlan,
    said: str,
) -> tuple[Bundle, list[Report]]:
    """A bundle with filters that have learned, and how each one does.

    Args:
        bundle: any filter of its own is left out.
        backbone: the bundle's.
        filters: by split point, folded.
        seen: views of photographs that were not learned from.
        parts: the two parts of them.
        plan: what was learned.
        said: for the provenance, how and from what.
    """
    tensors, reports = dict(_without_filter(bundle)), []
    both = np.concatenate([np.arange(part.start, part.stop) for part in parts])
    for name, presence in filters.items():
        scores, stays = _scores(presence, seen.pooled[name]), np.zeros(len(seen.holds), bool)
        for part, other in (parts, parts[::-1]):
            stays[other] = scores[other] < conformal_threshold(scores[part][seen.holds[part]], plan.miss_rate)
        limit = conformal_threshold(scores[both][seen.holds[both]], plan.miss_rate)
        reports.append(_report(name, presence, bundle, backbone, stays[both], seen.holds[both]))
        stored = presence.tensors() | {"filter/threshold": np.array([limit], np.float32)}
        tensors |= {f"{name}/{key}": value for key, value in stored.items()}
    named = [f"--classes {shlex.quote(c)}" for c in plan.classes] + [f"--at {name}" for name in plan.at]
    provenance = {
        **bundle.provenance,
        "filter": f"headrace filter {' '.join(named)} --miss-rate {plan.miss_rate:g} {said}",
    }
    spec = FilterSpec(class_indexes(bundle.labels, plan.classes), plan.miss_rate)
    return replace(bundle, tensors=tensors, filter=spec, provenance=provenance).check(), reports


def audit(
    bundle: Bundle, backbone: Backbone, paths: Sequence[Path], labelled: npt.NDArray[np.bool_]
) -> dict[str, list[Report]]:
    """How a bundle's filter does on labelled pictures.

    Args:
        bundle: with a filter.
        backbone: the bundle's.
        paths: pictures.
        labelled: bool [N], which of them hold something of interest by their labels.

    Returns:
        A report a split point, by what holds something of interest: for the uncut `detector`, and by the `labels`.
    """
    assert bundle.filter is not None
    filters = {s.name: Presence.of(bundle, s.name) for s in bundle.splits if bundle.filters(s.name)}
    pooled = {name: each.pooled for name, each in filters.items()}
    seen = look(backbone, pooled, [Part(paths)], bundle.filter.classes, 0)
    stays = {name: _scores(each, seen.pooled[name]) < bundle.filter_threshold(name) for name, each in filters.items()}
    return {
        by: [_report(name, each, bundle, backbone, stays[name], holds) for name, each in filters.items()]
        for by, holds in (("detector", seen.holds), ("labels", labelled))
    }


def conformal_threshold(scores: npt.NDArray[np.float32], rate: float) -> float:
    """The threshold below which another frame that holds something falls with a probability of at most `rate`.

    Args:
        scores: float32 [n] of frames that hold something.
        rate: 0..1; below 1 / (n + 1) nothing can be promised, and the threshold lets everything pass.
    """
    k = math.floor(rate * (len(scores) + 1))
    return float(np.sort(scores)[k - 1]) if k else -math.inf


def division(paths: Sequence[Path], shares: tuple[float, float]) -> tuple[list[Path], list[Path], list[Path]]:
    """Photographs in their drawn order -> two parts that are held out, and those to learn from."""
    ends = (int(shares[0] * len(paths)), int(sum(shares) * len(paths)))
    return list(paths[: ends[0]]), list(paths[ends[0] : ends[1]]), list(paths[ends[1] :])


def _without_filter(bundle: Bundle) -> dict[str, npt.NDArray[Any]]:
    return {key: value for key, value in bundle.tensors.items() if "/filter/" not in key}


def _slices(parts: Sequence[Part]) -> list[slice]:
    ends = list(accumulate(len(part) for part in parts))
    return [slice(end - len(part), end) for end, part in zip(ends, parts, strict=True)]


def _learn(
    presence: Presence,
    seen: Seen,
    name: str,
    part: slice,
    confident: float,
    plan: FilterPlan,
    note: Callable[[int, int], None],
) -> None:
    generator = torch.Generator().manual_seed(plan.seed)
    pooled, places, best = seen.pooled[name][part], seen.places[name][part], torch.from_numpy(seen.best[part])
    learner = Learner(presence, torch.from_numpy(pooled[:512].astype(np.float32)), confident)
    steps = plan.epochs * math.ceil(len(pooled) / BATCH)
    done = 0
    for epoch in range(plan.epochs):
        for chosen in torch.split(torch.randperm(len(pooled), generator=generator), BATCH):
            indexes = chosen.sort().values.numpy()
            frames = torch.from_numpy(pooled[indexes].astype(np.float32))
            learner.step(frames, torch.from_numpy(places[indexes]), best[chosen.sort().values], done / steps)
            done += 1
        note(epoch + 1, plan.epochs)
    learner.finish()


def _scores(presence: Presence, pooled: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        parts = [
            presence.score(torch.from_numpy(pooled[at : at + BATCH].astype(np.float32)))
            for at in range(0, len(pooled), BATCH)
        ]
    scores: npt.NDArray[np.float32] = torch.cat(parts).numpy()
    return scores


def _report(
    name: str,
    presence: Presence,
    bundle: Bundle,
    backbone: Backbone,
    stays: npt.NDArray[np.bool_],
    holds: npt.NDArray[np.bool_],
) -> Report:
    macs = presence.multiply_accumulates(*bundle.split(name).features[1:])
    return Report(
        name,
        float(stays[holds].mean()) if holds.any() else 0.0,
        int(holds.sum()),
        float(stays[~holds].mean()) if (~holds).any() else 0.0,
        int((~holds).sum()),
        macs / max(backbone.costs.all_macs, 1),
    )

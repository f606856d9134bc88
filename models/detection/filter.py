"""The neural filter: tells on the device, from features that it has computed anyway, whether a frame can hold anything
of the classes of interest (Matsubara and Levorato, "Neural Compression and Filtering for Edge-assisted Real-time Object
Detection in Challenged Networks", ICPR 2020).

features [B, C, H, W] --pool to at most 16x16, normalise, 1x1, three 3x3, 1x1--> a logit a place
                                                            logits --log-sum-exp--> score [B]

It is learned from the uncut detector's own answers to views of unlabelled photographs (see `scenes`): every place is
told the best score of the candidates whose centre it holds, the frame the best of all. The threshold comes from
photographs that were not learned from: the k-th smallest score of the n views that hold something, k = rate (n + 1)
rounded down, so that another such view falls below it with a probability of at most the rate (a conformal quantile;
Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005).
"""

from __future__ import annotations

import math
import random
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backbones import Backbone
from ..bundle import Bundle, FilterSpec
from ..exceptions import DataError
from ..measure import find_pictures
from ..tasks import Detection
from ..zoo.catalogue import backbone_of
from .labelled import class_indexes
from .scenes import Part, Seen, look

PLACES = 16
"""Most rows and columns that are looked at; larger maps are pooled."""
HIDDEN = 64
DEPTH = 3
EPOCHS = 20
BATCH = 64
RATE = 3e-3
DECAY = 0.02
PLACES_WEIGHT = 0.3
"""Of the places' losses, beside that of the frame."""
SHARPNESS = 2.0
"""Of a frame's score over that which is learned: 1 would let many doubtful places add up to a sure one."""
SHARES = (0.2, 0.15)
"""Shares of the photographs that give the threshold, and that are for the report; the rest is learned from."""
LEAST = 60
"""Photographs at least."""
LEAST_HELD = 10
"""Frames with and without something of interest that each part of the photographs needs at least."""


class Presence(nn.Module):
    """features float32 [B, C, H, W] -> score float32 [B], higher the likelier something of interest is there."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, channels: int, side: int, hidden: int = HIDDEN, depth: int = DEPTH) -> None:
        """For maps of `channels` and at most `side` rows or columns; `depth` convolutions of `hidden` channels."""
        super().__init__()
        self.factor = -(-side // PLACES)
        wide = channels * (2 if self.factor > 1 else 1)
        self.register_buffer("mean", torch.zeros(wide))
        self.register_buffer("deviation", torch.ones(wide))
        between = [nn.Conv2d(hidden, hidden, 3, padding=1) for _ in range(depth)]
        self.layers = nn.ModuleList([nn.Conv2d(wide, hidden, 1), *between, nn.Conv2d(hidden, 1, 1)])

    def pooled(self, features: Tensor) -> Tensor:
        """What is looked at: maxima and means of `factor` x `factor` places."""
        if self.factor == 1:
            return features
        return torch.cat(
            (functional.max_pool2d(features, self.factor), functional.avg_pool2d(features, self.factor)), 1
        )

    def places(self, pooled: Tensor) -> Tensor:
        """A logit a place, float32 [B, h, w]."""
        hidden = (pooled - self.mean[:, None, None]) / self.deviation[:, None, None]
        for layer in self.layers[:-1]:
            hidden = functional.relu(layer(hidden))
        logits: Tensor = self.layers[-1](hidden)
        return logits[:, 0]

    def forward(self, features: Tensor) -> Tensor:
        return self.places(self.pooled(features)).flatten(1).logsumexp(1)

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """What a bundle holds of it, float16, without the split point's name."""
        return {f"filter/{k.replace('.', '/')}": v.detach().half().numpy() for k, v in self.state_dict().items()}

    @classmethod
    def of(cls, bundle: Bundle, split: str) -> Presence:
        """The bundle's filter at a split point."""
        spec, start = bundle.split(split), f"{split}/filter/"
        state = {
            key.removeprefix(start).replace("/", "."): torch.from_numpy(value.copy()).float()
            for key, value in bundle.tensors.items()
            if key.startswith(start) and not key.endswith("/threshold")
        }
        depth = sum(key.endswith(".weight") for key in state) - 2
        made = cls(spec.features[0], max(spec.features[1:]), len(state["layers.0.weight"]), depth)
        made.load_state_dict(state)
        return made.requires_grad_(False).eval()


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
        epochs: passes over the photographs.
        seed: of their division and order.
    """

    classes: tuple[str, ...]
    miss_rate: float = 0.02
    epochs: int = EPOCHS
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """How a split point's filter did on photographs that neither it nor its threshold was learned from.

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
) -> tuple[Backbone, Bundle, list[Report]]:
    """The backbone, its bundle with a filter at every split point (and another fingerprint), and how each one does.

    Args:
        bundle: of a detector.
        folders: of unlabelled photographs.
        plan: what to learn.
        note: called with what is done, how far, and how far there is to go.
        work: folder for what has been looked at; a run that was killed goes on from there. None keeps it in memory.

    Raises:
        DataError: the bundle is for another task, a class is unknown, the rate is out of range, or too few photographs
            hold one of the classes.
    """
    backbone = backbone_of(bundle)
    if not isinstance(backbone.task, Detection):
        raise DataError(f"bundle {bundle.name} is for {bundle.task}; a filter is learned from a detector's boxes")
    if not 0 < plan.miss_rate < 1:
        raise DataError(f"the miss rate is {plan.miss_rate}; it has to lie between 0 and 1")
    interest = class_indexes(bundle.labels, plan.classes)
    if not interest:
        raise DataError("no class of interest is named; give some with --classes")
    paths = [path for folder in folders for path in find_pictures(folder)]
    random.Random(plan.seed).shuffle(paths)
    filters = {s.name: Presence(s.features[0], max(s.features[1:])) for s in bundle.splits}
    ends = (int(SHARES[0] * len(paths)), int(sum(SHARES) * len(paths)))
    parts = (Part(paths[: ends[0]], 2), Part(paths[ends[0] : ends[1]], 2), Part(paths[ends[1] :], 4, mirrored=True))
    if len(paths) < LEAST:
        raise DataError(f"{len(paths)} photographs are too few to learn from; give at least {LEAST}")
    total = sum(len(part) for part in parts)
    pooled = {name: presence.pooled for name, presence in filters.items()}
    seen = look(backbone, pooled, parts, interest, plan.seed, work, lambda n: note("views", n, total))
    between, last, learned = _slices(parts)
    for part in (between, last, learned):
        held = seen.holds[part]
        if held.sum() < LEAST_HELD or (~held).sum() < LEAST_HELD:
            raise DataError(
                f"{int(seen.holds.sum())} of {total} views of {len(paths)} photographs hold one of "
                f"{', '.join(plan.classes)}; more are needed of either kind, or other classes"
            )
    tensors, reports = dict(_without_filter(bundle)), []
    for name, presence in filters.items():
        _learn(presence, seen, name, learned, backbone.task.confident, plan, partial(note, f"{name}: filter"))
        scores = _scores(presence, seen.pooled[name])
        limit = conformal_threshold(scores[between][seen.holds[between]], plan.miss_rate)
        reports.append(_report(name, presence, bundle, backbone, scores[last] < limit, seen.holds[last]))
        stored = presence.tensors() | {"filter/threshold": np.array([limit], np.float32)}
        tensors |= {f"{name}/{key}": value for key, value in stored.items()}
    provenance = {
        **bundle.provenance,
        "filter": f"headrace filter {' '.join(f'--classes {shlex.quote(c)}' for c in plan.classes)} --miss-rate "
        f"{plan.miss_rate:g} --epochs {plan.epochs} --seed {plan.seed}, from {len(paths)} unlabelled photographs",
    }
    spec = FilterSpec(interest, plan.miss_rate)
    return backbone, replace(bundle, tensors=tensors, filter=spec, provenance=provenance).check(), reports


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
    filters = {s.name: Presence.of(bundle, s.name) for s in bundle.splits}
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        for layer in presence.layers:
            layer.reset_parameters()  # type: ignore[operator]
    pooled = seen.pooled[name][part]
    places, best = (_odds(scores[part], confident) for scores in (seen.places[name], seen.best))
    sample = torch.from_numpy(pooled[:512].astype(np.float32))
    presence.mean.copy_(sample.mean((0, 2, 3)))
    presence.deviation.copy_(sample.std((0, 2, 3)).clamp_min(1e-3))
    # Most places hold nothing.
    nn.init.constant_(presence.layers[-1].bias, -5.0 * SHARPNESS)  # type: ignore[arg-type]
    presence.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(presence.parameters(), RATE, weight_decay=DECAY)
    steps = plan.epochs * math.ceil(len(pooled) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for epoch in range(plan.epochs):
        for chosen in torch.split(torch.randperm(len(pooled), generator=generator), BATCH):
            indexes = chosen.sort().values.numpy()
            logits = presence.places(torch.from_numpy(pooled[indexes].astype(np.float32))) / SHARPNESS
            divergence = functional.binary_cross_entropy_with_logits
            at_places = divergence(logits, places[indexes], reduction="none").sum((1, 2))
            of_frame = divergence(logits.flatten(1).logsumexp(1), best[indexes])
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(of_frame + PLACES_WEIGHT * at_places.mean())
            optimiser.step()
            schedule.step()
        note(epoch + 1, plan.epochs)
    presence.requires_grad_(False).eval()
    # The threshold belongs to the filter as it is stored.
    for value in (*presence.parameters(), *presence.buffers()):
        value.copy_(value.half().float())


def _odds(scores: npt.NDArray[np.float32], confident: float) -> Tensor:
    """Scores as what is learned of them: 1/2 at the score from which a box counts, in odds as far from it as before.

    Told the scores themselves, a filter would learn the few sure objects well and leave open what it has to know,
    whether a doubtful one counts.
    """
    odds: Tensor = torch.from_numpy(np.array(scores)).logit(1e-4) - math.log(confident / (1 - confident))
    return odds.sigmoid()


def _scores(presence: Presence, pooled: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        parts = [
            presence.places(torch.from_numpy(pooled[at : at + BATCH].astype(np.float32))).flatten(1).logsumexp(1)
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
    _, height, width = bundle.split(name).features
    places = (height // presence.factor) * (width // presence.factor)
    macs = places * sum(p.numel() for p in presence.parameters() if p.ndim > 1)
    return Report(
        name,
        float(stays[holds].mean()) if holds.any() else 0.0,
        int(holds.sum()),
        float(stays[~holds].mean()) if (~holds).any() else 0.0,
        int((~holds).sum()),
        macs / max(backbone.costs.all_macs, 1),
    )

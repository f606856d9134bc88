"""A point on every photograph, the row that it makes in tables, and the families that rows are compared by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..baselines.student_file import StudentFacts
from .curves import LIMITS, RATIOS, cheapest, cheapest_shared, key, stated
from .edge_costs import EdgeCosts
from .exits import ExitRow
from .pictures import QUALITIES
from .resampling import Interval, Resampled, bytes_interval, interval

FEATURE = "deep"
"""Family of all our feature points in a row."""
ENTROPIC_STUDENT = "entropic_student"
"""Family of a baseline of that kind; stated as not reached where none was measured."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One operating point on every photograph.

    Attributes:
        name: of the point.
        family: "deep" for ours, a picture codec's or another feature codec's name.
        split: split point of feature codecs, empty for pictures.
        packet_bytes: float64 [photographs], whole packets.
        right: bool [photographs], whether the best class is the photograph's own.
        slice_bytes, entropy_bytes: means of the slices alone, and of the tables' own entropy.
    """

    name: str
    family: str
    split: str
    packet_bytes: npt.NDArray[np.float64]
    right: npt.NDArray[np.bool_]
    slice_bytes: float
    entropy_bytes: float


@dataclass(frozen=True, slots=True)
class Row:
    """One operating point on the labelled photographs.

    Attributes:
        name, family, split: as of `Sample`.
        mean_bytes: whole packets; `slice_bytes` and `entropy_bytes`: the slices alone, and the tables' own entropy.
        top1, relative: share of right answers, and that as a share of the uncut model's.
        relative_low, relative_high: 95 % interval of `relative`.
        head_ms: head and encoder (or picture coding) on one core of this machine; None where it was not timed.
        share_of_uncut: that as a share of the uncut model's time.
        gmac: multiply-accumulates of head and encoder, 10^9; None for pictures.
    """

    name: str
    family: str
    split: str
    mean_bytes: float
    slice_bytes: float
    entropy_bytes: float
    top1: float
    relative: float
    relative_low: float | None
    relative_high: float | None
    head_ms: float | None
    share_of_uncut: float | None
    gmac: float | None


@dataclass(eq=False)
class Measurements:
    """Everything that was measured in one run.

    Attributes:
        samples: of every point.
        uncut_right: bool [photographs].
        costs: of every split point.
        picture_ms: coding of a picture, by codec.
        exits: of answers on the device.
        seed: of the bootstrap.
        prefixes: operating point -> samples of its first 1, 2, ... slices, all but the whole packet.
        learned: what the files of Entropic Student say of themselves.
    """

    samples: Sequence[Sample]
    uncut_right: npt.NDArray[np.bool_]
    costs: EdgeCosts
    picture_ms: Mapping[str, float]
    exits: Sequence[ExitRow] = ()
    seed: int = 0
    prefixes: Mapping[str, Sequence[Sample]] = field(default_factory=dict)
    learned: Sequence[StudentFacts] = ()

    @property
    def uncut_top1(self) -> float:
        """Share of photographs that the uncut model gets right."""
        return float(self.uncut_right.mean())

    @cached_property
    def resampled(self) -> Resampled:
        """The bootstrap of all points."""
        packet_bytes = np.stack([s.packet_bytes for s in self.samples], axis=1)
        right = np.stack([s.right for s in self.samples], axis=1)
        return Resampled(packet_bytes, right, self.uncut_right, seed=self.seed)

    @cached_property
    def rows(self) -> list[Row]:
        """One a sample, in their order."""
        return [self._row(i, sample) for i, sample in enumerate(self.samples)]

    @cached_property
    def families(self) -> dict[str, list[int]]:
        """Family -> indexes of its rows: ours by how much of the uncut model's time they take, pictures, others."""
        shares = {i: row.share_of_uncut for i, row in enumerate(self.rows) if row.family == FEATURE}
        found = {
            name: [i for i, share in shares.items() if share is not None and share <= limit]
            for name, limit in LIMITS.items()
        }
        for name in (*QUALITIES, ENTROPIC_STUDENT, *(r.family for r in self.rows)):
            if name not in found:
                found[name] = [i for i, row in enumerate(self.rows) if row.family == name]
        return found

    @property
    def split_families(self) -> dict[str, dict[str, list[int]]]:
        """Split point -> family that cuts -> indexes of its rows there; a family that is not cut there has none."""
        cutting = tuple(dict.fromkeys(r.family for r in self.rows if r.split))
        splits = tuple(dict.fromkeys(r.split for r in self.rows if r.split))
        return {
            split: {
                family: [i for i, r in enumerate(self.rows) if (r.split, r.family) == (split, family)]
                for family in cutting
            }
            for split in splits
        }

    @cached_property
    def _bytes_at(self) -> dict[tuple[int, ...], dict[str, dict[str, Any]]]:
        return {}

    def bytes_at(self, chosen: Sequence[int]) -> dict[str, dict[str, Any]]:
        """What reaching the ratios takes with the chosen rows: `at` (cheapest measured point), `at_hull` (on the convex
        hull), and the intervals of both, `at_ci` and `at_hull_ci`; each by ratio."""
        if (found := self._bytes_at.get(tuple(chosen))) is not None:
            return found
        found = self._bytes_at[tuple(chosen)] = {"at": {}, "at_hull": {}, "at_ci": {}, "at_hull_ci": {}}
        bytes_ = np.array([self.rows[i].mean_bytes for i in chosen], np.float64)
        relative = np.array([self.rows[i].relative for i in chosen], np.float64)
        again_bytes, again_relative = self.resampled.bytes[:, chosen], self.resampled.relative[:, chosen]
        for ratio in RATIOS:
            for name, of in (("at", cheapest), ("at_hull", cheapest_shared)):
                found[name][key(ratio)] = value = stated(float(of(bytes_, relative, ratio)))
                ends: Interval = (None, None)
                if chosen:
                    ends = bytes_interval(of(again_bytes, again_relative, ratio))
                found[f"{name}_ci"][key(ratio)] = None if value is None and ends == (None, None) else list(ends)
        return found

    def _row(self, index: int, sample: Sample) -> Row:
        top1 = float(sample.right.mean())
        cost = self.costs.splits.get(sample.split) if sample.family == FEATURE else self.costs.beside.get(sample.family)
        head_ms = cost.ms if cost else self.picture_ms.get(sample.family)
        low, high = interval(self.resampled.relative[:, index])
        return Row(
            name=sample.name,
            family=sample.family,
            split=sample.split,
            mean_bytes=float(sample.packet_bytes.mean()),
            slice_bytes=sample.slice_bytes,
            entropy_bytes=sample.entropy_bytes,
            top1=top1,
            # Of whole numbers, so that what reaches a ratio exactly does.
            relative=float(sample.right.sum() / self.uncut_right.sum()) if self.uncut_right.any() else 0.0,
            relative_low=low,
            relative_high=high,
            head_ms=head_ms,
            share_of_uncut=None if head_ms is None else head_ms / self.costs.uncut.ms,
            gmac=cost.gmac if cost else None,
        )

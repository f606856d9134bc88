"""Answers on the device in `headrace eval rd`: how often exits are right, how well they know it, what they keep.

An exit answers all frames (a device that cannot wait), or those of which it is sure enough (frames that need not be
sent); the uncut model's answer stands for all others then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from ..backbones import Backbone
from ..bundle import Bundle
from ..exits.command import exit_scores
from ..exits.confidence import best_two, calibration_error, confidences, surest
from ..exits.costs import ExitCost, exit_costs
from .edge_costs import StageCost
from .resampling import Resampled, interval

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """What an exit says to each photograph: label int64 [N], and how sure it is, float64 [N]."""

    labels: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Kept:
    """What staying on the device from a confidence on comes to.

    Attributes:
        confidence: from which on the exit's answer is taken.
        share: of the photographs that are kept.
        agreement: of those, how many have the uncut model's label.
        relative: top-1 of all, the uncut model answering the others, as a share of the uncut model's.
    """

    confidence: float
    share: float
    agreement: float
    relative: float


@dataclass(frozen=True, slots=True)
class ExitRow:
    """An exit on the labelled photographs.

    Attributes:
        name, split, kind: of its operating point.
        top1, relative: share of right answers, and that as a share of the uncut model's; with the 95 % interval.
        agreement: share of photographs with the uncut model's label.
        surest_top1: on the quarter it is surest about; `surest_relative`: that as a share of the uncut model's top-1 on
            all, `surest_of_uncut`: of its top-1 on the same quarter.
        calibration_error: expected, of its confidence that its label is the uncut model's.
        gmac, ms, beyond: multiply-accumulates and time on one core of the exit alone; `beyond` as a share of the uncut
            model's time.
        share_of_uncut: that share with the head.
        kept: by confidence.
    """

    name: str
    split: str
    kind: str
    top1: float
    relative: float
    relative_low: float | None
    relative_high: float | None
    agreement: float
    surest_top1: float
    surest_relative: float
    surest_of_uncut: float
    calibration_error: float
    gmac: float
    ms: float
    beyond: float
    share_of_uncut: float
    kept: tuple[Kept, ...] = ()


def measure_exits(
    backbone: Backbone, bundle: Bundle, paths: Sequence[Path], note: Callable[[int], None] = lambda _: None
) -> dict[str, Told]:
    """Every exit's answer to every photograph, by the graph that a device runs; by split point.

    `note` is called with the number of photographs done, after each.
    """
    found = {}
    for spec in bundle.exit_specs:
        scores = exit_scores(backbone, spec, paths, note)
        found[spec.split] = Told(scores.argmax(1), confidences(spec, *best_two(scores)))
    return found


def exit_rows(
    backbone: Backbone,
    bundle: Bundle,
    told: Mapping[str, Told],
    truth: npt.NDArray[np.int64],
    uncut: npt.NDArray[np.int64],
    heads: Mapping[str, StageCost],
) -> list[ExitRow]:
    """One row an exit.

    Args:
        backbone, bundle: as measured.
        told: what exits said.
        truth, uncut: the photographs' classes, and the uncut model's labels, int64 [N].
        heads: what head and encoder take, by split point.
    """
    costs = exit_costs(backbone, bundle.exit_specs)
    return [_row(bundle, name, each, truth, uncut, heads[name], costs[name]) for name, each in told.items()]


def _row(
    bundle: Bundle,
    split: str,
    told: Told,
    truth: npt.NDArray[np.int64],
    uncut: npt.NDArray[np.int64],
    head: StageCost,
    cost: ExitCost,
) -> ExitRow:
    right, uncut_right, agrees = told.labels == truth, uncut == truth, told.labels == uncut
    top1, whole = float(right.mean()), max(float(uncut_right.mean()), 1e-9)
    again = Resampled(np.zeros((len(right), 1)), right[:, None], uncut_right)
    low, high = interval(again.relative[:, 0])
    quarter, point = surest(told.confidence), bundle.exit_point(split)
    row = ExitRow(
        name=point.name,
        split=split,
        kind=str(point.kind),
        top1=top1,
        relative=top1 / whole,
        relative_low=low,
        relative_high=high,
        agreement=float(agrees.mean()),
        surest_top1=float(right[quarter].mean()),
        surest_relative=float(right[quarter].mean()) / whole,
        surest_of_uncut=float(right[quarter].sum() / max(uncut_right[quarter].sum(), 1)),
        calibration_error=calibration_error(told.confidence, agrees),
        gmac=cost.gmac,
        ms=cost.ms,
        beyond=cost.share,
        share_of_uncut=head.share_of_uncut + cost.share,
    )
    kept = []
    for least in THRESHOLDS:
        stays = told.confidence >= least
        mixed = np.where(stays, right, uncut_right)
        agreement = float(agrees[stays].mean()) if stays.any() else 1.0
        kept.append(Kept(least, float(stays.mean()), agreement, float(mixed.mean()) / whole))
    return replace(row, kept=tuple(kept))


def exit_summary(rows: Sequence[ExitRow]) -> list[dict[str, Any]]:
    """As `--json` has it."""

    def rounded(values: Mapping[str, Any]) -> dict[str, Any]:
        return {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}

    return [{**rounded(asdict(r)), "kept": [rounded(asdict(k)) for k in r.kept]} for r in rows]


def print_exits(console: Console, rows: Sequence[ExitRow]) -> None:
    """A table of the exits, and one of what they keep; nothing where there are none."""
    if not rows:
        return
    table = Table(
        title="local: answers on the device, nothing sent; surest: the quarter of photographs it is surest about"
    )
    for title in (
        "operating point",
        "relative",
        "95 %",
        "surest",
        "of uncut there",
        "agrees",
        "ECE",
        "/ uncut",
        "exit",
    ):
        table.add_column(title, justify="left" if title == "operating point" else "right")
    for r in rows:
        ends = "" if r.relative_low is None else f"{r.relative_low:.2f}–{r.relative_high:.2f}"
        accuracy = f"{r.surest_relative:.3f}", f"{r.surest_of_uncut:.3f}", f"{r.agreement:.3f}"
        costs = f"{r.calibration_error:.3f}", f"{r.share_of_uncut:.3f}", f"{r.beyond:.3f}"
        table.add_row(r.name, f"{r.relative:.3f}", ends, *accuracy, *costs)
    console.print(table)
    table = Table(title="frames that an exit keeps, the uncut model answering the others")
    for title in ("operating point", "confidence", "kept", "agrees", "relative"):
        table.add_column(title, justify="left" if title == "operating point" else "right")
    for r in rows:
        for k in r.kept:
            table.add_row(r.name, f"{k.confidence:g}", f"{k.share:.3f}", f"{k.agreement:.3f}", f"{k.relative:.3f}")
    console.print(table)

"""What the device computes up to each split point: multiply-accumulates, and time on one core beside the uncut model's.

Head and encoder are one graph, as on the device, run by ONNX Runtime in the same precision as the uncut model; all
graphs take turns. Entropy coding is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ..backbones import SIZED, Backbone
from ..bottleneck import Encoder
from ..bundle import Bundle, head_file
from ..cutting.costs import count_macs
from ..export import Only, write_onnx
from ..onnx_time import edge_milliseconds
from ..tasks import CLASSIFICATION
from .curves import LIMITS

LEARNED = "slim"
"""Names of learned split points begin with it, and go on with their width: `slim-25`, `slim-100`."""
ROUNDS = 100
"""Of 25 rounds medians of a share differ by 0.005 from run to run, which decides whether a head counts as light."""


@dataclass(frozen=True, slots=True)
class StageCost:
    """One graph.

    Attributes:
        gmac: multiply-accumulates of a frame, 10^9.
        ms: one core of this machine.
        share_of_uncut: of the uncut model's time, measured in turn with it.
    """

    gmac: float
    ms: float
    share_of_uncut: float

    def to_dict(self) -> dict[str, float]:
        """As it is reported."""
        return {"gmac": round(self.gmac, 5), "ms": round(self.ms, 3), "share_of_uncut": round(self.share_of_uncut, 4)}


@dataclass(frozen=True, slots=True)
class EdgeCosts:
    """The uncut model, head and encoder of each split point by its name, and encoders of others by their family."""

    uncut: StageCost
    splits: Mapping[str, StageCost]
    beside: Mapping[str, StageCost] = field(default_factory=dict)

    def encoder(self) -> dict[str, Any] | None:
        """The slimmable encoder at its `widest` and `narrowest`, by multiply-accumulates; None where there is none.

        That is the learned one or, where none was learned, the backbone's own first stages at smaller sizes of the
        input, which are one set of weights at several costs too; of these, what is light.
        """
        learned = {name: cost for name, cost in self.splits.items() if is_learned(name)} or {
            name: cost
            for name, cost in self.splits.items()
            if SIZED.fullmatch(name) and cost.share_of_uncut <= LIMITS["light"]
        }
        if not learned:
            return None
        ordered = sorted(learned, key=lambda name: learned[name].gmac)
        ends = {"widest": ordered[-1], "narrowest": ordered[0]}
        return {end: {"split": name, **learned[name].to_dict()} for end, name in ends.items()}


def is_learned(split: str) -> bool:
    """Whether a split point is one width of a learned encoder, and not a cut in closed form."""
    return split.startswith(LEARNED)


def edge_costs(
    bundle: Bundle,
    backbone: Backbone,
    note: Callable[[], None] = lambda: None,
    beside: Mapping[str, nn.Module] | None = None,
) -> EdgeCosts:
    """Count and time every head with its encoder, and the uncut model.

    Args:
        bundle: whole bundle.
        backbone: its own.
        note: called after each graph that was made (one more than there are split points, and those `beside`).
        beside: family -> encoder of others, pixels uint8 [B, S, S, 3] -> latent.
    """
    whole = backbone.task.name == CLASSIFICATION
    with TemporaryDirectory() as folder:
        paths = {"": Path(folder) / "uncut.onnx"}
        write_onnx(backbone, Only(backbone.uncut) if whole else backbone.traced_part, "scores", paths[""])
        macs = {"": count_macs(backbone.uncut, _black(backbone))}
        note()
        for spec in bundle.splits:
            head = Only(backbone.head(spec.name), Encoder.of(bundle, spec.name))
            paths[spec.name] = Path(folder) / head_file(spec.name)
            sized = backbone.at(spec.name)[0]
            write_onnx(sized, head, "latent", paths[spec.name])
            macs[spec.name] = count_macs(head, _black(sized))
            note()
        for family, encoder in (beside or {}).items():
            paths[family] = Path(folder) / f"{family}.onnx"
            write_onnx(backbone, Only(encoder), "latent", paths[family])
            macs[family] = count_macs(encoder, _black(backbone))
            note()
        times = edge_milliseconds(paths, ROUNDS)
    if not whole:
        # What chooses boxes does not run in ONNX Runtime; its share is taken from PyTorch.
        times[""] /= backbone.costs.traced_share
    costs = {name: StageCost(macs[name] / 1e9, ms, ms / times[""]) for name, ms in times.items()}
    others = {family: costs.pop(family) for family in beside or {}}
    return EdgeCosts(costs.pop(""), costs, others)


def _black(backbone: Backbone) -> torch.Tensor:
    size = backbone.preprocessing.size
    return torch.zeros(1, size, size, 3, dtype=torch.uint8)


__all__ = ["LEARNED", "EdgeCosts", "StageCost", "edge_costs", "is_learned"]

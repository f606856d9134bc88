"""What exits compute, beside the uncut model: ONNX Runtime on one core, all graphs in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..backbones import Backbone
from ..bundle_specs import ExitSpec
from ..cutting.costs import count_macs
from ..export import Only, write_onnx
from ..onnx_time import edge_milliseconds
from .graph import classifier, write_classifier, write_exit


@dataclass(frozen=True, slots=True)
class ExitCost:
    """Of one exit.

    Attributes:
        gmac: multiply-accumulates of a frame, 10^9, head and classifier.
        ms: the same on one core of this machine.
        share: that as a share of the uncut model's time.
        classifier_share: the same of the classifier alone.
    """

    gmac: float
    ms: float
    share: float
    classifier_share: float


def exit_costs(backbone: Backbone, specs: Sequence[ExitSpec]) -> dict[str, ExitCost]:
    """Count and time exits of a backbone, by split point."""
    with TemporaryDirectory() as folder:
        paths = {"": Path(folder) / "uncut.onnx", "classifier": Path(folder) / "classifier.onnx"}
        write_onnx(backbone, Only(backbone.uncut), "scores", paths[""])
        write_classifier(backbone, paths["classifier"])
        macs = {}
        for number, spec in enumerate(specs):
            paths[spec.split] = Path(folder) / f"{number}.onnx"
            write_exit(backbone, spec, paths[spec.split])
            black = torch.zeros(1, spec.size, spec.size, 3, dtype=torch.uint8)
            macs[spec.split] = count_macs(backbone.head(spec.split), black) + classifier(backbone)[0].size
        times = edge_milliseconds(paths)
    uncut, last = times[""], times["classifier"]
    return {name: ExitCost(n / 1e9, times[name], times[name] / uncut, last / uncut) for name, n in macs.items()}

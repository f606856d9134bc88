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
from .classifier import classifier
from .graph import write_exit
from .narrow import Answering, narrow_rest


@dataclass(frozen=True, slots=True)
class ExitCost:
    """Of one exit, its head not included.

    Attributes:
        gmac: multiply-accumulates of a frame, 10^9.
        ms: one core of this machine.
        share: of the uncut model's time, measured in turn with it.
    """

    gmac: float
    ms: float
    share: float


def exit_costs(backbone: Backbone, specs: Sequence[ExitSpec]) -> dict[str, ExitCost]:
    """Count and time exits of a backbone, by split point."""
    with TemporaryDirectory() as folder:
        paths = {"": Path(folder) / "uncut.onnx"}
        write_onnx(backbone, Only(backbone.uncut), "scores", paths[""])
        macs = {}
        for number, spec in enumerate(specs):
            paths[spec.split] = Path(folder) / f"{number}.onnx"
            write_exit(backbone, spec, paths[spec.split])
            rest = backbone.tail(spec.split)
            if spec.split in backbone.narrow_exits:
                narrow = narrow_rest(backbone, spec.split, backbone.narrow_exits[spec.split])
                rest = Answering(narrow, *map(torch.from_numpy, classifier(backbone)))
            macs[spec.split] = count_macs(rest, torch.zeros(1, *backbone.shape(spec.split)))
        times = edge_milliseconds(paths)
    return {name: ExitCost(count / 1e9, times[name], times[name] / times[""]) for name, count in macs.items()}

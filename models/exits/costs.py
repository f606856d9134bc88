"""What exits compute, beside the uncut model: ONNX Runtime on one core, all graphs in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from ..backbones import Backbone
from ..bundle import FEATURES
from ..bundle_specs import ExitSpec
from ..cutting.costs import count_macs
from ..edge_half import ASK
from ..export import Only, write_onnx
from ..onnx_time import added_milliseconds, edge_milliseconds
from .classifier import classifier
from .graph import let_ask, write_exit
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
    """Count and time exits of a backbone, by split point: a narrow one by what its head's graph takes longer when it is
    asked, which is how a device runs it."""
    with TemporaryDirectory() as folder:
        paths = {"": Path(folder) / "uncut.onnx"}
        write_onnx(backbone, Only(backbone.uncut), "scores", paths[""])
        macs, asking = {}, {}
        for number, spec in enumerate(specs):
            path = Path(folder) / f"{number}.onnx"
            rest = backbone.tail(spec.split)
            if spec.split in backbone.narrow_exits:
                narrow = narrow_rest(backbone, spec.split, backbone.narrow_exits[spec.split])
                rest = Answering(narrow, *map(torch.from_numpy, classifier(backbone)))
                write_onnx(backbone.at(spec.split)[0], Only(backbone.head(spec.split)), FEATURES, path)
                let_ask(backbone, spec, path)
                asking[spec.split] = path
            else:
                write_exit(backbone, spec, path)
                paths[spec.split] = path
            macs[spec.split] = count_macs(rest, torch.zeros(1, *backbone.shape(spec.split)))
        times = edge_milliseconds(paths)
        taken = {name: (ms, times[""]) for name, ms in times.items()}
        for name, path in asking.items():
            taken[name] = added_milliseconds(path, {ASK: np.array(True)}, paths[""])
    return {
        name: ExitCost(count / 1e9, taken[name][0], taken[name][0] / taken[name][1]) for name, count in macs.items()
    }

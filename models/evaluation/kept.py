"""What a long measurement has found so far, in a folder: a run that was stopped goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..bundle_files import tensors_file
from ..bundle_specs import split_identity
from ..exceptions import DataError
from ..operating_point import Kind
from . import exits
from .edge_costs import EdgeCosts, StageCost
from .samples import Sample


class Kept:
    """Stages of a measurement, each measured once and then read from the folder."""

    def __init__(self, folder: Path | None, *identity: str) -> None:
        """Make the folder if need be.

        Args:
            folder: where stages are kept; None for nowhere, then each is measured.
            identity: of everything that all stages depend on; what was kept under another one is not used.

        Raises:
            DataError: the folder cannot be made.
        """
        self._folder = folder
        self._identity = identity
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(f"{folder} cannot be made ({error}); give --work another folder") from error

    def stage(self, name: str, measure: Callable[[], Any], *identity: str) -> Any:
        """What `measure` gives, which has to be of what JSON can hold; from the folder where it is there.

        Args:
            name: of the stage.
            measure: called if need be.
            identity: of what this stage depends on beside what all do.

        Raises:
            DataError: what was kept cannot be read.
        """
        if self._folder is None:
            return measure()
        digest = hashlib.sha256(json.dumps([name, self._identity, identity]).encode()).hexdigest()[:16]
        path = self._folder / f"{digest}.json"
        if path.is_file():
            try:
                return json.loads(path.read_text())
            except ValueError as error:
                raise DataError(f"{path} is damaged ({error}); delete it, and its stage is measured anew") from error
        found = measure()
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(found))
        unfinished.replace(path)
        return found


def pictures_identity(paths: Sequence[Path]) -> str:
    """Of photographs: their names and sizes."""
    return hashlib.sha256(json.dumps([(p.name, p.stat().st_size) for p in paths]).encode()).hexdigest()


def split_digest(bundle: Bundle, split: str) -> str:
    """Of all that the packets of a split point and their answers depend on, but for the backbone: a bundle that has got
    other split points beside it gives the same."""
    points = [(p.id, p.name) for p in bundle.operating_points if p.kind is Kind.FEATURE and p.split == split]
    spec = bundle.split(split)
    parts = [tensors_file({k: v for k, v in found.items() if k.startswith(f"{split}/")}) for found in
             (bundle.tensors, bundle.repair)]  # fmt: skip
    names = (f"{split}/", f"{spec.learned.name}/" if spec.learned else f"{split}/")
    mine = {k: v for k, v in bundle.learned.items() if k.startswith(names)}
    learned = hashlib.sha256(tensors_file(mine)).hexdigest() if mine else ""
    said = json.dumps([split_identity(spec), points, learned], default=list)
    return hashlib.sha256(said.encode() + b"".join(parts)).hexdigest()


def samples_as_json(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """For `samples_from_json`."""
    return [
        asdict(s) | {"packet_bytes": s.packet_bytes.tolist(), "right": s.right.astype(int).tolist()} for s in samples
    ]


def samples_from_json(found: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """As `samples_as_json` was given them."""
    return [
        Sample(**{**each, "packet_bytes": np.array(each["packet_bytes"]), "right": np.array(each["right"], np.bool_)})
        for each in found
    ]


def costs_as_json(costs: EdgeCosts) -> dict[str, Any]:
    """For `costs_from_json`."""
    several = {"splits": costs.splits, "beside": costs.beside}
    return {"uncut": asdict(costs.uncut)} | {
        part: {name: asdict(each) for name, each in there.items()} for part, there in several.items()
    }


def costs_from_json(found: Mapping[str, Any]) -> EdgeCosts:
    """As `costs_as_json` was given them."""
    splits, beside = (
        {name: StageCost(**each) for name, each in found.get(part, {}).items()} for part in ("splits", "beside")
    )
    return EdgeCosts(StageCost(**found["uncut"]), splits, beside)


def exits_as_json(rows: Sequence[exits.ExitRow]) -> list[dict[str, Any]]:
    """For `exits_from_json`."""
    return [asdict(row) for row in rows]


def exits_from_json(found: Sequence[Mapping[str, Any]]) -> list[exits.ExitRow]:
    """As `exits_as_json` was given them."""
    return [exits.ExitRow(**{**each, "kept": tuple(exits.Kept(**k) for k in each["kept"])}) for each in found]

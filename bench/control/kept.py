"""Measured cells, kept on disk one by one, so that a long run can be taken up where it ended.

cells.jsonl     line 1: what was measured (digest of the operating points, conditions, policies); then a line a cell
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...models.exceptions import DataError
from ...models.operating_point import OperatingPoint
from .cells import POLICIES, Cell, Conditions, Row

KEPT_FILE = "cells.jsonl"
Key = tuple[str, str, float, float]
"""Set and name of the window, deadline and device in seconds."""


class KeptCells:
    """The file, and what an earlier run left in it.

    Args:
        path: of the file.
        points, conditions: what is measured.
        resume: go on with what is there; else it is begun anew.

    Raises:
        DataError: the file was written by a run of something else, or is none of these.
    """

    def __init__(self, path: Path, points: Iterable[OperatingPoint], conditions: Conditions, *, resume: bool) -> None:
        self._path = path
        self._cells: dict[Key, Cell] = {}
        header = {"points": _digest(points), "policies": list(POLICIES)} | _measured_under(conditions)
        if resume and path.is_file():
            self._read(header)
        lines = [json.dumps(header), *(json.dumps(asdict(cell)) for cell in self._cells.values())]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        return len(self._cells)

    def get(self, key: Key) -> Cell | None:
        """The cell, if it was measured."""
        return self._cells.get(key)

    def add(self, cell: Cell) -> None:
        """Keep one more."""
        self._cells[cell.group, cell.trace, cell.deadline_s, cell.device_s] = cell
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(cell)) + "\n")

    def _read(self, header: dict[str, Any]) -> None:
        lines = self._path.read_text(encoding="utf-8").splitlines()
        found = _object(lines[0]) if lines else header
        if found is None:
            raise DataError(f"{self._path} holds no measured cells; remove it, or give another --output")
        if found != header:
            other = sorted(name for name in header.keys() | found.keys() if header.get(name) != found.get(name))
            raise DataError(
                f"{self._path} was measured with other {', '.join(other)}; "
                "run without --resume, or give another --output"
            )
        for line in lines[1:]:
            each = _object(line)
            if each is None:  # the run was ended in the midst of it
                continue
            rows = {name: Row(**row) for name, row in each.pop("rows").items()}
            cell = Cell(**each, rows=rows)
            self._cells[cell.group, cell.trace, cell.deadline_s, cell.device_s] = cell


def _measured_under(conditions: Conditions) -> dict[str, Any]:
    """Conditions that every cell has; its deadline and device are its own."""
    return {name: value for name, value in asdict(conditions).items() if name not in {"deadlines_s", "devices_s"}}


def _digest(points: Iterable[OperatingPoint]) -> str:
    table: Sequence[dict[str, Any]] = [asdict(point) for point in points]
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None

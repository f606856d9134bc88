"""Local exits in a bundle: their place in the manifest, and whether they fit the rest of it.

The server knows nothing of exits, so the fingerprint covers neither them nor their operating points: a device whose
half was exported before a bundle got its exits is served as ever. Readers that do not know `manifest["exits"]` find
the operating points that they know.

    manifest["exits"]     `specs` (`ExitSpec`), `points` (operating points of kind `local`), and where some were learned
                          `learned`, their file's digest, not on the edge, which has their graphs
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .bundle_files import Array, digest, tensors_file
from .bundle_specs import ExitSpec, exit_spec
from .exceptions import BundleError
from .operating_point import OperatingPoint

if TYPE_CHECKING:
    from .bundle import Bundle


def with_exits(
    bundle: Bundle,
    specs: tuple[ExitSpec, ...],
    points: tuple[OperatingPoint, ...],
    narrow: Mapping[str, Mapping[str, Array]],
) -> Bundle:
    """The same with these exits, their operating points and what they learned in place of those that it has."""
    others = tuple(p for p in bundle.operating_points if not p.is_exit)
    learned = {f"{split}/{name}": array for split, each in narrow.items() for name, array in each.items()}
    return replace(bundle, exit_specs=specs, operating_points=(*others, *points), narrow_exits=learned).check()


def exit_fields(bundle: Bundle) -> dict[str, Any]:
    """What the manifest says of exits; nothing where there are none."""
    if not bundle.exit_specs:
        return {}
    points = [p.to_dict() for p in bundle.operating_points if p.is_exit]
    narrow = bundle.narrow_exits
    learned = {"learned": hashlib.sha256(tensors_file(narrow)).digest()} if narrow else {}
    return {"exits": {"specs": [asdict(s) for s in bundle.exit_specs], "points": points, **learned}}


def read_exit_fields(manifest: Mapping[str, Any]) -> tuple[tuple[ExitSpec, ...], tuple[OperatingPoint, ...], bytes]:
    """Specifications, operating points and what `learned` says out of a manifest; empty where it has no exits."""
    given = manifest.get("exits")
    if given is None:
        return (), (), b""
    specs, points = tuple(map(exit_spec, given["specs"])), tuple(map(OperatingPoint.from_dict, given["points"]))
    return specs, points, digest(given["learned"]) if "learned" in given else b""


def check_exits(bundle: Bundle) -> None:
    """Raise BundleError unless every exit has a split point and one operating point."""
    splits, exits = {s.name for s in bundle.splits}, [s.split for s in bundle.exit_specs]
    points = [p.split for p in bundle.operating_points if p.is_exit]
    if sorted(points) != sorted(set(exits)) or len(exits) != len(set(exits)) or not set(exits) <= splits:
        raise BundleError(
            f"bundle {bundle.name}: exits {exits} do not fit its split points and the operating points {points}; "
            "make them anew with `headrace exit`"
        )
    for name, array in bundle.narrow_exits.items():
        if name.partition("/")[0] not in exits or not np.isfinite(array).all():
            raise BundleError(
                f"bundle {bundle.name} is damaged: {name} of its exits; learn it anew with `headrace exit`"
            )
    for spec in bundle.exit_specs:
        if not spec.temperature > 0:
            raise BundleError(f"bundle {bundle.name}: the exit at {spec.split} has temperature {spec.temperature:g}")


def narrow_tensors(bundle: Bundle) -> dict[str, dict[str, Array]]:
    """What exits learned, by split point and then by its own name."""
    found: dict[str, dict[str, Array]] = {}
    for name, array in bundle.narrow_exits.items():
        split, _, own = name.partition("/")
        found.setdefault(split, {})[own] = array
    return found

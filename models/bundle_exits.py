"""Local exits in a bundle: their place in the manifest, and whether they fit the rest of it.

The server knows nothing of exits, so the fingerprint covers neither them nor their operating points: a device whose
half was exported before a bundle got its exits is served as ever. Readers that do not know `manifest["exits"]` find
the operating points that they know.

    manifest["exits"]     `specs` (`ExitSpec`), `points` (operating points of kind `local`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .bundle_specs import ExitSpec, exit_spec
from .exceptions import BundleError
from .operating_point import OperatingPoint

if TYPE_CHECKING:
    from .bundle import Bundle


def exit_fields(bundle: Bundle) -> dict[str, Any]:
    """What the manifest says of exits; nothing where there are none."""
    if not bundle.exit_specs:
        return {}
    points = [p.to_dict() for p in bundle.operating_points if p.is_exit]
    return {"exits": {"specs": [asdict(s) for s in bundle.exit_specs], "points": points}}


def read_exit_fields(manifest: Mapping[str, Any]) -> tuple[tuple[ExitSpec, ...], tuple[OperatingPoint, ...]]:
    """Specifications and operating points out of a manifest; empty where it has no exits."""
    given = manifest.get("exits")
    if given is None:
        return (), ()
    return tuple(map(exit_spec, given["specs"])), tuple(map(OperatingPoint.from_dict, given["points"]))


def check_exits(bundle: Bundle) -> None:
    """Raise BundleError unless every exit has a split point and one operating point."""
    splits, exits = {s.name for s in bundle.splits}, [s.split for s in bundle.exit_specs]
    points = [p.split for p in bundle.operating_points if p.is_exit]
    if sorted(points) != sorted(set(exits)) or len(exits) != len(set(exits)) or not set(exits) <= splits:
        raise BundleError(
            f"bundle {bundle.name}: exits {exits} do not fit its split points and the operating points {points}; "
            "make them anew with `headrace exit`"
        )
    for spec in bundle.exit_specs:
        if not spec.temperature > 0:
            raise BundleError(f"bundle {bundle.name}: the exit at {spec.split} has temperature {spec.temperature:g}")

"""Local exits in a bundle: their place in the manifest, and whether they fit the rest of it.

The server has no use for an exit, so the fingerprint covers neither exits nor their operating points: a device whose
half was exported before a bundle got its exits is served as ever. The manifest states the digest of their file.

    exits.safetensors     whole bundle: `SPLIT/...`, what `exits.network` is built from; the edge has it as graphs
    manifest["exits"]     `digest` of that file, `specs` (`ExitSpec`), `points` (operating points of kind `local`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from .bundle_specs import ExitSpec, exit_spec
from .exceptions import BundleError
from .operating_point import OperatingPoint

if TYPE_CHECKING:
    from .bundle import Bundle

EXITS = "exits.safetensors"


def exit_fields(bundle: Bundle) -> dict[str, Any]:
    """What the manifest says of exits; nothing where there are none."""
    if not bundle.exit_specs:
        return {}
    return {
        "exits": {
            "digest": bundle.exits_digest,
            "specs": [asdict(s) for s in bundle.exit_specs],
            "points": [p.to_dict() for p in bundle.operating_points if p.is_exit],
        }
    }


def read_exit_fields(manifest: Mapping[str, Any]) -> tuple[tuple[ExitSpec, ...], tuple[OperatingPoint, ...], bytes]:
    """Specifications, operating points and digest out of a manifest; empty where it has no exits."""
    given = manifest.get("exits")
    if given is None:
        return (), (), b""
    specs = tuple(exit_spec(s) for s in given["specs"])
    return specs, tuple(OperatingPoint.from_dict(p) for p in given["points"]), bytes(given["digest"])


def check_exits(bundle: Bundle) -> None:
    """Raise BundleError unless every exit has a split point and one operating point, and its tensors are sound."""
    splits, exits = {s.name for s in bundle.splits}, [s.split for s in bundle.exit_specs]
    points = [p.split for p in bundle.operating_points if p.is_exit]
    if sorted(points) != sorted(set(exits)) or len(exits) != len(set(exits)) or not set(exits) <= splits:
        raise BundleError(
            f"bundle {bundle.name}: exits {exits} do not fit its split points and the operating points of {points}; "
            "learn them anew with `headrace exit`"
        )
    for name, array in bundle.exits.items():
        if array.dtype not in (np.int8, np.float16) or not np.isfinite(array.astype(np.float32)).all():
            raise BundleError(
                f"bundle {bundle.name} is damaged: exit tensor {name} is not int8 or float16, or not finite"
            )
    if bundle.exit_specs and not bundle.exits_digest:
        raise BundleError(f"bundle {bundle.name} has exits without what was learned")

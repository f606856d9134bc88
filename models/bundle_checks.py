"""Whether the parts of a bundle fit together: what `Bundle.check` asks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from .bundle_specs import SplitSpec
from .exceptions import BundleError

if TYPE_CHECKING:
    from .bundle import Bundle


def check_learned(bundle: Bundle) -> None:
    """Raise BundleError unless what was learned of encoders is whole and finite."""
    for name, array in bundle.learned.items():
        steps = bundle.learned.get(f"{name}/step")
        if array.dtype == np.int8 and (steps is None or steps.shape != array.shape[:1]):
            raise BundleError(f"bundle {bundle.name} is damaged: learned {name} lacks the steps of its eight bits")
        if array.dtype not in (np.float16, np.int8) or not np.isfinite(array).all():
            raise BundleError(f"bundle {bundle.name} is damaged: learned {name} is not float16, or not finite")
    if any(s.learned or s.clips is not None for s in bundle.splits) and not bundle.learned_digest:
        raise BundleError(f"bundle {bundle.name} has learned split points without what was learned")


def check_repair(bundle: Bundle) -> None:
    """Raise BundleError unless a repair is for split points that are there, and finite."""
    for name, array in bundle.repair.items():
        steps = bundle.repair.get(f"{name}/step")
        whole = array.dtype == np.int8 and steps is not None and steps.shape == array.shape[:1]
        if not (whole or array.dtype == np.float16) or not any(name.startswith(f"{s.name}/") for s in bundle.splits):
            raise BundleError(
                f"bundle {bundle.name} is damaged: repair {name} is not float16 (or in eight bits), or is "
                "for no split point"
            )
        if not np.isfinite(array).all():
            raise BundleError(f"bundle {bundle.name}: repair {name} is not finite; learn it anew")


def check_coding(bundle: Bundle, spec: SplitSpec) -> None:
    """Raise BundleError unless order, tables and slices of a split point fit together."""
    order, tables = bundle.order(spec.name), bundle.tables(spec.name)
    size = math.prod(spec.latent_shape)
    if order.dtype != np.int32 or order.ndim != 1 or len(np.unique(order)) != len(order):
        raise BundleError(f"bundle {bundle.name}: the order of {spec.name} is not int32 without repetition")
    if len(order) and not 0 <= order.min() <= order.max() < size:
        raise BundleError(f"bundle {bundle.name}: the order of {spec.name} does not fit a latent of {size} numbers")
    for level, ends in enumerate(spec.slices):
        indexes = bundle.indexes(spec.name, level)
        if indexes.dtype != np.uint8 or indexes.ndim != 1 or not 1 <= len(indexes) <= len(order):
            raise BundleError(f"bundle {bundle.name}: {spec.name} rate level {level} does not fit its order")
        if indexes.max() >= len(tables):
            raise BundleError(f"bundle {bundle.name}: {spec.name} rate level {level} lacks entropy tables")
        if not ends or list(ends) != sorted(set(ends)) or ends[0] < 1 or ends[-1] != len(indexes):
            raise BundleError(
                f"bundle {bundle.name}: slices {ends} of {spec.name} do not fit {len(indexes)} components"
            )

"""Memory of a process that learns: kept between a step's operations instead of given back.

The GNU C library asks the system for every large block anew and gives it back when it is freed. A step of a
convolutional network on a processor allocates a few hundred maps of some megabytes, and each time the system clears
their pages first: a third to a half of the step.
"""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
"""Parameters of glibc's `mallopt`."""
GROWTH_BYTES = 64 * 2**20
"""By which the heap grows at a time."""


def keep_memory() -> bool:
    """Let this process keep what it frees, from now on.

    Returns:
        Whether the C library can; where it cannot, nothing is changed.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is None:
        return False
    options = ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, GROWTH_BYTES))
    return all(bool(set_option(name, value)) for name, value in options)

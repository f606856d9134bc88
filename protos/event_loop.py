"""The event loop that streams run on: uvloop's where it is installed, asyncio's own elsewhere.

A frame passes some ten turns of event loops on its way, most of them right after a network has filled the caches with
its weights. uvloop's turns are compiled and touch less: in four comparisons of some 220 frames a side, interleaved by
the second, the median overhead (`headrace bench overhead`) was 0.11 to 0.25 ms less.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a program to its end in a new event loop, as `asyncio.run` does."""
    try:
        import uvloop
    except ImportError:  # no wheel for this platform
        return asyncio.run(main)
    result: T = uvloop.run(main)
    return result

"""The event loop that streams run on: uvloop's where it is installed, asyncio's own elsewhere.

A frame passes six turns of event loops on its way, each right after a network has filled the caches with its weights.
uvloop's turns are compiled and touch less: 0.1 to 0.15 ms a frame in an interleaved run (`headrace bench overhead`).
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

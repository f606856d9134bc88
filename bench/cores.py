"""Which cores the demo's processes use: the emulated device has its core for itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator


def all_cores() -> set[int]:
    """The cores that this process may use."""
    return os.sched_getaffinity(0)


def cores_beside_the_edge() -> set[int]:
    """All but the one that an emulated device keeps to (the last); none where there is only one."""
    cores = all_cores()
    return cores - {max(cores)}


def keep_to(pid: int, cores: Collection[int]) -> None:
    """Keep a process that has just begun to these cores; threads that it starts inherit them. None: leave it alone."""
    if cores:
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(pid, cores)


@contextlib.contextmanager
def on_one_core() -> Iterator[int]:
    """Keep the calling thread to the last core, as an emulated device is; yields which."""
    before = all_cores()
    core = max(before)
    os.sched_setaffinity(0, {core})
    try:
        yield core
    finally:
        os.sched_setaffinity(0, before)

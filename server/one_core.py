"""Where the server has one core for all its threads: they take turns, in place of interrupting each other.

A message wakes four threads, one after the other: one of gRPC's that reads the connection, one that hears of what was
read, the event loop, and with a frame a decoder. By the rules for interactive programs each of them interrupts the
tail, for microseconds of work, and the tail then finds caches full of what it does not need; ten times too many
messages cost a fifth of its speed, and what they cost themselves doubles. A tail that is left alone for the length of a
batch finds the messages of that time waiting, and they are handled together. What it costs: a frame is heard of a batch
later, which it had to wait for anyway, and so is one that will be refused.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from contextlib import suppress

SLICE_S = 0.1
"""How long a thread may go on while others wait, in seconds; Linux takes at most 0.1."""

_SET_ATTRIBUTES = {"x86_64": 314, "aarch64": 274}
"""Number of the system call sched_setattr(2), for which glibc has a function only since 2.41."""


def one_core() -> bool:
    """Whether this process has a single core: then nothing is gained by doing two things at a time."""
    return len(os.sched_getaffinity(0)) == 1


def take_turns(slice_s: float = SLICE_S) -> bool:
    """Let the calling thread, and all that it will start, go on until they wait for something or `slice_s` is over.

    First they become threads of the kind that interrupts nobody (sched(7), SCHED_BATCH); other programs may still
    interrupt them, and get their share of the core as before. Then they ask for longer slices, which Linux grants from
    6.12 on (its Documentation/scheduler/sched-eevdf.rst); before that it has no effect.

    Returns:
        Whether slices of that length were granted, as far as can be told.
    """
    number = _SET_ATTRIBUTES.get(platform.machine())
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        if number is not None:
            # struct sched_attr: size, policy, flags, nice, priority, runtime (ns), deadline, period
            nice = os.getpriority(os.PRIO_PROCESS, 0)
            attributes = struct.pack("=IIQiIQQQ", 48, os.SCHED_BATCH, 0, nice, 0, round(slice_s * 1e9), 0, 0)
            return bool(ctypes.CDLL(None, use_errno=True).syscall(number, 0, attributes, 0) == 0)
    return False

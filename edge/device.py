"""The device that computes: this machine as it is, or a slower one that it emulates.

An emulated device is to computing what an emulated link is to the network. Each compute stage is stretched by a factor:
what it took in processor time, times the factor, is what it takes; the rest is slept away. Processor time and not
elapsed time is stretched, so that other programs on this machine don't make the emulated device slower still.
Scaling a captured picture is not stretched: on devices the camera's image processor does it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from .exceptions import ConfigError

T = TypeVar("T")


class Device:
    """Runs compute stages and says how long they took, in seconds."""

    def __init__(
        self,
        factor: float = 1.0,
        *,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.thread_time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Keep the factor by which stages are stretched, 1 for the machine as it is."""
        self.factor = factor
        self._clock, self._cpu_clock, self._sleep = clock, cpu_clock, sleep

    def run(
        self, stage: Callable[[], T], *, stretched: bool = True, sleep: Callable[[float], object] | None = None
    ) -> tuple[T, float]:
        """The stage's result, and the seconds it took: the whole call lasts as long.

        Args:
            stage: what is run.
            stretched: whether the device's factor applies.
            sleep: waits for so many seconds, in place of the device's own way to wait.
        """
        began, cpu_began = self._clock(), self._cpu_clock()
        result = stage()
        if self.factor > 1 and stretched:
            rest = (self._cpu_clock() - cpu_began) * self.factor - (self._clock() - began)
            if rest > 0:
                (sleep or self._sleep)(rest)
        return result, self._clock() - began

    def time(self, stage: Callable[[], T]) -> float:
        """The seconds that `run` would take, without the waiting."""
        began, cpu_began = self._clock(), self._cpu_clock()
        stage()
        if self.factor > 1:
            return (self._cpu_clock() - cpu_began) * self.factor
        return self._clock() - began

    def cpu_time(self, stage: Callable[[], T]) -> float:
        """Processor seconds of the stage on this machine, not stretched."""
        began = self._cpu_clock()
        stage()
        return self._cpu_clock() - began


def pin(cpu: int | None) -> int:
    """Keep every thread of this process to one core; the last allowed one when `cpu` is None. Returns the core.

    Raises:
        ConfigError: the process may not use that core.
    """
    allowed = os.sched_getaffinity(0)
    chosen = max(allowed) if cpu is None else cpu
    if chosen not in allowed:
        raise ConfigError(f"core {chosen} cannot be used; --cpu takes one of {', '.join(map(str, sorted(allowed)))}")
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {chosen})
    return chosen

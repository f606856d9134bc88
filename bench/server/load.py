"""Open-loop load: devices that send when it is time, whatever has become of the frames before.

A frame's latency counts from when it was due, not from when the generator came to it, so that a server (or a generator)
that holds things up cannot make the load lighter or the figures better (Tene's "coordinated omission").
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

Pattern = Literal["poisson", "periodic"]
SETTLE_S = 0.5
"""First part of each measurement, which is offered but not counted."""


CLEAR_S = 30.0
"""Longest that a measurement waits for its last frames, which count as unanswered by then."""


class Target(Protocol):
    """Something that answers frames, as one device sees it."""

    def send(self, frame: int, remaining_ms: int) -> asyncio.Future[bool] | None:
        """Send one of its packets as frame number `frame`; the future says whether it was answered with labels.

        None: it could not even be sent.
        """
        ...


@dataclass(frozen=True, slots=True)
class Load:
    """What is offered.

    Attributes:
        rates: frames a second of each device.
        seconds: how long it is measured.
        deadline_s: from when a frame is due until its answer.
        pattern: times of a device's frames.
        seed: of phases and gaps.
    """

    rates: tuple[float, ...]
    seconds: float
    deadline_s: float
    pattern: Pattern = "poisson"
    seed: int = 0

    @classmethod
    def even(cls, devices: int, rate: float, seconds: float, deadline_s: float, pattern: Pattern = "poisson") -> Load:
        """`rate` frames a second in all, from devices that send alike."""
        return cls((rate / devices,) * devices, seconds, deadline_s, pattern)


@dataclass(slots=True)
class Tally:
    """What became of the frames that were due in the measured time.

    Attributes:
        due: number of frames, by device.
        good: answered with labels within the deadline, by device.
        refused: answered otherwise.
        unsent: that were not sent: too many of the device's were under way, or the server had asked it to wait.
        unanswered: neither answered nor refused long after the deadline.
        latencies: seconds of those that were answered with labels.
        seconds: measured.
        behind_s: worst lag of the generator itself.
    """

    due: list[int]
    good: list[int]
    seconds: float
    refused: int = 0
    unsent: int = 0
    unanswered: int = 0
    behind_s: float = 0.0
    latencies: list[float] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Frames a second that were answered within the deadline."""
        return sum(self.good) / self.seconds

    @property
    def share(self) -> float:
        """Of the frames that were due, the share answered in time."""
        return sum(self.good) / max(1, sum(self.due))

    def p(self, percent: float) -> float:
        """A percentile of the latency in seconds, of what was answered with labels; NaN if nothing was."""
        return float(np.percentile(self.latencies, percent)) if self.latencies else math.nan

    def fairness(self) -> float:
        """Jain's index over the devices' shares in time: 1 when all are alike, 1/n when one has everything (Jain, Chiu,
        Hawe: A quantitative measure of fairness, DEC-TR-301, 1984)."""
        shares = np.array([g / d for g, d in zip(self.good, self.due, strict=True) if d])
        return float(shares.sum() ** 2 / (len(shares) * (shares**2).sum())) if shares.any() else math.nan


def schedule(load: Load) -> list[tuple[float, int]]:
    """When which device's frame is due: seconds from the beginning, settling included, and the device; in order."""
    rng = random.Random(load.seed)
    end = SETTLE_S + load.seconds
    due = [(at, device) for device, rate in enumerate(load.rates) for at in _times(rate, end, load.pattern, rng)]
    return sorted(due)


async def offer(load: Load, targets: Sequence[Target]) -> Tally:
    """Offer the load to as many targets as it has devices, and count."""
    tally = Tally([0] * len(load.rates), [0] * len(load.rates), load.seconds)
    waiting: set[asyncio.Future[bool]] = set()
    began = time.perf_counter() + 0.01
    remaining = round(load.deadline_s * 1e3)
    counting = True

    def answered(future: asyncio.Future[bool], device: int, due: float, counts: bool) -> None:
        waiting.discard(future)
        if not counts or not counting or future.cancelled():
            return
        if future.exception() is not None or not future.result():
            tally.refused += 1
            return
        latency = time.perf_counter() - due
        tally.latencies.append(latency)
        tally.good[device] += latency <= load.deadline_s

    for number, (at, device) in enumerate(schedule(load)):
        due = began + at
        while (ahead := due - time.perf_counter()) > 0.0005:
            await asyncio.sleep(ahead)
        if number % 8 == 0:
            await asyncio.sleep(0)  # behind or not, answers are read
        counts = at >= SETTLE_S
        tally.due[device] += counts
        late_s = time.perf_counter() - due
        tally.behind_s = max(tally.behind_s, late_s)
        left = max(1, remaining - round(late_s * 1e3))
        future = targets[device].send(number, left)
        if future is None:
            tally.unsent += counts
            continue
        waiting.add(future)
        future.add_done_callback(lambda f, d=device, t=due, c=counts: answered(f, d, t, c))  # type: ignore[misc]
    if waiting:
        await asyncio.wait(set(waiting), timeout=2 * load.deadline_s + 1.0)
    tally.unanswered = len(waiting)
    counting = False
    if waiting:  # a server that has no deadlines still works on them; the next measurement is not to pay for that
        await asyncio.wait(set(waiting), timeout=CLEAR_S)
    for future in set(waiting):
        future.cancel()
    await asyncio.sleep(0)
    return tally


def _times(rate: float, end: float, pattern: Pattern, rng: random.Random) -> Iterator[float]:
    if rate <= 0:
        return
    at = rng.uniform(0, 1 / rate) if pattern == "periodic" else rng.expovariate(rate)
    while at < end:
        yield at
        at += 1 / rate if pattern == "periodic" else rng.expovariate(rate)

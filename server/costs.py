"""What things were measured to cost: decoding a packet, a batch of each size, a frame under load. No I/O, no clock.

Whether a frame can still be in time, how many frames fit one batch, and how long a queue is in seconds all follow from
these. They follow the machine: a batch that took longer moves them, one outlier (a machine that was suspended) hardly
does, and what has not been measured for a while is trusted less and less, so that a server which refused everything
because of one bad moment tries again. A batch size that has not been seen lately is taken to be as much slower than at
the warm-up as the size that was seen last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .engine import TailKey

WEIGHT = 0.15
"""Of a new measurement in a running mean."""
OUTLIER = 4.0
"""A measurement counts as at most so many times the running mean."""
DEVIATIONS = 2.0
"""Mean deviations on top of the mean that a frame's time is planned with."""
LIKELY = 0.5
"""The same where several times are added up, which are not all long at once."""
TABLE_S = 0.25
"""How long a table of all sizes is used before it is made anew: a frame that is refused is not worth one."""
PLAN_S = 0.02
"""The same for what every frame asks for, unless something was measured meanwhile."""
TRUSTED_S = 1.0
"""Age from which a measurement counts for less; it halves in each further second."""


@dataclass(slots=True)
class Measured:
    """A running mean in seconds, its mean absolute deviation, and when it was measured last."""

    mean: float
    deviation: float
    at: float

    def add(self, seconds: float, now: float) -> None:
        """One more measurement."""
        seconds = min(seconds, OUTLIER * self.mean) if self.mean > 0 else seconds
        self.deviation += WEIGHT * (abs(seconds - self.mean) - self.deviation)
        self.mean += WEIGHT * (seconds - self.mean)
        self.at = now

    def planned(self, now: float, deviations: float = DEVIATIONS) -> float:
        """What to plan with: above most measurements while they are fresh."""
        planned, age = self.mean + deviations * self.deviation, now - self.at - TRUSTED_S
        return planned if age <= 0 else float(planned * 0.5**age)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the next frames of a tail are planned with, in seconds: until when that holds (it is a time), by how much
    each puts off those behind it, and what it takes when it need not wait; and by batch size, from 1 on, a batch, and
    from one full batch of that size to the next (see `Costs.full_batch_s`)."""

    until: float
    cost: float
    alone: float
    batches: tuple[float, ...]
    full: tuple[float, ...]

    def full_batch_s(self, within_s: float) -> float:
        """See `Costs.full_batch_s`."""
        size = len(self.full) - 1
        while size and self.full[size] > within_s:
            size -= 1
        return self.full[size]


class Costs:
    """Measured durations by tail and batch size. What was never measured costs nothing: it is tried."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._batches: dict[TailKey, dict[int, Measured]] = {}
        self._warm_up: dict[TailKey, Mapping[int, float]] = {}
        self._latest: dict[TailKey, int] = {}
        self._tables: dict[TailKey, tuple[float, list[float]]] = {}
        self._plans: dict[TailKey, Plan] = {}
        self._decode: dict[TailKey, Measured] = {}
        self._pace: dict[TailKey, Measured] = {}

    def know(self, key: TailKey, seconds_of: Mapping[int, float], now: float) -> None:
        """Begin with what a warm-up measured: seconds by batch size."""
        self._batches[key] = {size: Measured(seconds, 0.0, now) for size, seconds in seconds_of.items()}
        self._warm_up[key] = dict(seconds_of)
        self._plans.pop(key, None)

    def forget(self, fingerprint: bytes) -> None:
        """Drop what is known about the tails of a bundle that is no longer served."""
        tables: tuple[dict[TailKey, Any], ...] = (self._batches, self._warm_up, self._latest, self._tables)
        for table in (*tables, self._plans, self._decode, self._pace):
            for key in [k for k in table if k.fingerprint == fingerprint]:
                del table[key]

    def batch_done(self, key: TailKey, size: int, seconds: float, now: float) -> None:
        """A batch of `size` frames took `seconds` of decoder and tail."""
        _add(self._batches.setdefault(key, {}), size, seconds, now)
        self._latest[key] = size
        self._plans.pop(key, None)

    def decoded(self, key: TailKey, seconds: float, now: float) -> None:
        """Decoding one packet for that tail took `seconds`."""
        _add(self._decode, key, seconds, now)
        self._plans.pop(key, None)

    def paced(self, key: TailKey, seconds: float, now: float) -> None:
        """Under load the server answered one frame of that tail every `seconds`."""
        _add(self._pace, key, seconds, now)
        self._plans.pop(key, None)

    def batch_s(self, key: TailKey, size: int, now: float, deviations: float = DEVIATIONS) -> float:
        """Seconds that a batch of `size` >= 1 frames is planned with; between measured sizes on a straight line."""
        known = self._batches.get(key)
        if not known:
            return 0.0
        mine, latest = known.get(size), self._latest.get(key)
        if mine is not None and (latest is None or latest == size or now - mine.at <= TRUSTED_S):
            return mine.planned(now, deviations)
        warm_up = self._warm_up.get(key)
        if warm_up and latest is not None and (then := _between(warm_up, latest)) > 0:
            return known[latest].planned(now, deviations) * _between(warm_up, size) / then
        return _between({n: measured.planned(now, deviations) for n, measured in known.items()}, size)

    def batch_mean_s(self, key: TailKey, size: int) -> float:
        """Seconds that a batch of a measured size took in the mean; 0 if it was never measured."""
        known = self._batches.get(key, {}).get(size)
        return known.mean if known else 0.0

    def fitting(self, key: TailKey, most: int, within_s: float, now: float) -> tuple[int, float]:
        """The largest batch of at most `most` frames that takes no longer than `within_s` (or 1); and its seconds."""
        made, table = self._tables.get(key, (-math.inf, []))
        if now - made > TABLE_S or len(table) < most:
            table = [self.batch_s(key, size, now, LIKELY) for size in range(1, most + 1)]
            self._tables[key] = (now, table)
        for size in range(most, 1, -1):
            if table[size - 1] <= within_s:
                return size, table[size - 1]
        return 1, table[0]

    def full_batch_s(self, key: TailKey, most: int, within_s: float, now: float) -> float:
        """Seconds from one full batch to the next under load, of the largest size for which that is no longer than
        `within_s` (or of 1): what its frames are decoded and served in counts too, as it does in `frame_s`, by which
        the queue before a batch is counted."""
        return self.plan(key, most, now).full_batch_s(within_s)

    def plan(self, key: TailKey, most: int, now: float) -> Plan:
        """What frames are planned with that come now, in batches of at most `most`."""
        plan = self._plans.get(key)
        if plan is None or now > plan.until or len(plan.batches) != most:
            batches = tuple(self.batch_s(key, size, now, LIKELY) for size in range(1, most + 1))
            cost = self.frame_s(key, now)
            full = tuple(max(seconds, (n + 1) * cost) for n, seconds in enumerate(batches))
            plan = self._plans[key] = Plan(now + PLAN_S, cost, self.alone_s(key, now), batches, full)
        return plan

    def alone_s(self, key: TailKey, now: float) -> float:
        """Seconds from here to the result for a frame that need not wait and is not decoded yet."""
        return self.decode_s(key, now) + self.batch_s(key, 1, now)

    def decode_s(self, key: TailKey, now: float) -> float:
        """Seconds that decoding one packet is planned with."""
        known = self._decode.get(key)
        return known.planned(now) if known else 0.0

    def frame_s(self, key: TailKey, now: float) -> float:
        """Seconds by which one more waiting frame of that tail puts off the ones behind it."""
        pace = self._pace.get(key)
        if pace is not None and now - pace.at <= TRUSTED_S:
            return pace.mean
        known = self._batches.get(key)
        if not known:
            return 0.0
        return min(measured.mean / size for size, measured in known.items())


def _between(known: Mapping[int, float], size: int) -> float:
    """Seconds of a size: known, or on a straight line between two that are; beyond them a larger batch in proportion, a
    smaller one as dear as the smallest known."""
    if size in known:
        return known[size]
    below = max((n for n in known if n < size), default=0)
    above = min((n for n in known if n > size), default=0)
    if below and above:
        return known[below] + max(0.0, known[above] - known[below]) * (size - below) / (above - below)
    return known[below] * size / below if below else known[above]


def _add(table: dict[int, Measured] | dict[TailKey, Measured], key: int | TailKey, seconds: float, now: float) -> None:
    known = table.get(key)  # type: ignore[arg-type]
    if known is None:
        table[key] = Measured(seconds, 0.0, now)  # type: ignore[index]
    else:
        known.add(seconds, now)

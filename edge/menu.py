"""What the points cost in every scenario, as arrays that a decision only reads. No I/O, no clock.

Three things are uncertain at once: the link's rate, the packet's size and the compute time. A scenario is one value of
each. The rates' quantiles come from the estimator in rising order; those of size and compute are paired with them in
two fixed shuffled orders (a Latin hypercube), so that 16 scenarios stand for all three at no more cost than one.

Only points that no other one beats are in the arrays, and a last row: to skip the frame, which takes nothing and is
worth nothing. They are looked for when the lookahead is refreshed; in between, a frame's measurement changes one level
for all sizes and one factor for all compute times, which is a product each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..models.operating_point import Kind, OperatingPoint
from .measurement import ComputeTimes, Floats, PacketSizes

Indexes = NDArray[np.intp]
SPREAD_DRIFT = 0.02
SIZE_STEPS, COMPUTE_STEPS, HOLD_STEPS = (7, 5, 3), (5, 3, 7), (3, 7, 5)
"""Candidates for the stride of each shuffle; the first that has no divisor in common with the number of scenarios."""


class Demand(NamedTuple):
    """What a point takes.

    Attributes:
        point: which one.
        seconds, most_seconds: its compute, expected and in the worst scenario.
        bits: its median packet without overhead.
        most_bits: the packet in the worst scenario, with overhead.
    """

    point: int
    seconds: float
    most_seconds: float
    bits: float
    most_bits: float


class Menu:
    """Sizes and compute times of the points worth choosing, by scenario.

    Args:
        points: all operating points.
        stage_of: index of each point's compute stage, [points].
        stages: names of the stages.
        sizes, compute: what is measured.
        overhead_bytes: added to every packet.
        scenarios: how many.

    Attributes:
        kept: indexes of the points in the arrays, [kept]; each has the row of its place here.
        skip: the last row, after theirs.
        stage_of: their stages, [rows]; that of the last row comes after all others.
        accuracy: theirs, float64 [rows].
        is_local: which of them send nothing, bool [rows].
        bits: packets with overhead and wait, float64 [rows, scenarios]; 0 of local points.
        middle_bits: median packets without overhead, float64 [rows].
        seconds: compute, float64 [stages + 1].
        spread: compute as a share of its expectation, float64 [scenarios].
        local: rows of local points.
    """

    def __init__(
        self,
        points: Sequence[OperatingPoint],
        stage_of: Indexes,
        stages: Sequence[str],
        sizes: PacketSizes,
        compute: ComputeTimes,
        *,
        overhead_bytes: int,
        scenarios: int,
    ) -> None:
        self._sizes, self._compute, self._stages = sizes, compute, stages
        self._all_stage_of = stage_of
        self._accuracy = np.array([point.accuracy for point in points])
        self._is_local = np.array([point.kind is Kind.LOCAL for point in points])
        self._overhead_bits = np.where(self._is_local, 0.0, 8.0 * overhead_bytes)
        self._size_z = shuffled_normal(scenarios, SIZE_STEPS, scenarios // 3)
        self._compute_z = shuffled_normal(scenarios, COMPUTE_STEPS, scenarios // 2 + 1)
        self._most_size_z, self._most_compute_z = float(self._size_z.max()), float(self._compute_z.max())
        self._overhead_bits_each = 8.0 * overhead_bytes
        self._versions = (-1, -1)
        self._wait_bits = 0.0
        self.seconds = np.zeros(len(stages) + 1)
        self.spread = np.ones(scenarios)
        self._idle_stages = [*sorted({int(stage_of[index]) for index in np.flatnonzero(self._is_local)}), len(stages)]
        self.keep(np.arange(len(points)))

    def keep(self, kept: Indexes) -> None:
        """Choose among these points from now on."""
        self.kept, self.skip = kept, len(kept)
        self.stage_of = np.append(self._all_stage_of[kept], len(self._stages))
        self.accuracy = np.append(self._accuracy[kept], 0.0)
        self.is_local = np.append(self._is_local[kept], True)
        self._best = int(self.accuracy.argmax())
        self.local = [int(row) for row in np.flatnonzero(self.is_local[:-1])]
        self._best_at = int(kept[self._best])
        self._best_stage = int(self.stage_of[self._best])
        sizes = self._sizes
        self._base = np.append(8.0 * sizes.median[kept], 0.0)
        self._scale, self._spread, self._predicted = (
            np.append(each[kept], 0.0) for each in (sizes.scale, sizes.spread, sizes.predicted)
        )
        self._own_stage_of = np.append(self.stage_of[:-1], 0)
        self._best_bits, self._best_scale = float(self._base[self._best]), float(self._scale[self._best])
        self._best_spread = float(self._spread[self._best])
        self._overhead = np.append(self._overhead_bits[kept], 0.0)[:, None]
        self._is_sent = ~self.is_local[:, None]
        self._added = self._overhead + self._wait_bits * self._is_sent
        self._deviation = math.nan
        self.bits = np.zeros((len(kept) + 1, len(self._size_z)))
        self._scatter = np.ones_like(self.bits)
        self._versions = (-1, -1)
        self.update(self._wait_bits)

    def update(self, wait_bits: float) -> None:
        """Take in what was measured since; `wait_bits` come on top of every packet (see `link_view`)."""
        versions = (self._compute.version, self._sizes.version)
        if versions[0] != self._versions[0]:
            for index, stage in enumerate(self._stages):
                self.seconds[index] = self._compute.seconds(stage)
            np.multiply(self._compute_z, self._compute.scatter, out=self.spread)
            self.spread += 1.0
        resized = versions[1] != self._versions[1]
        if resized:
            deviation = self._sizes.deviation
            if not abs(deviation - self._deviation) <= SPREAD_DRIFT * deviation:
                np.exp(np.multiply.outer(self._spread * deviation, self._size_z), out=self._scatter)
                self._deviation = deviation
            shift = self._scale * (self._sizes.level + self._sizes.own[self._own_stage_of])
            shift += self._sizes.saving * self._predicted
            self.middle_bits = self._base * np.exp(shift)
        if resized or wait_bits != self._wait_bits:
            np.multiply(self._scatter, self.middle_bits[:, None], out=self.bits)
            if wait_bits != self._wait_bits:
                self._added, self._wait_bits = self._overhead + wait_bits * self._is_sent, wait_bits
            self.bits += self._added
        self._versions = versions

    def finish(self, start: float, free: Floats, per_bit: Floats) -> Floats:
        """When the link has sent each row's packet, float64 [rows, scenarios]; of local ones, when it is free.

        Args:
            start: when the core begins, in seconds.
            free: when the link is free, float64 [scenarios].
            per_bit: seconds, float64 [scenarios].
        """
        begin = np.multiply.outer(self.seconds, self.spread)
        begin += start
        np.maximum(begin, free, out=begin)
        for stage in self._idle_stages:
            begin[stage] = free
        finish = self.bits * per_bit
        finish += begin.take(self.stage_of, axis=0)
        return np.asarray(finish, dtype=np.float64)

    def most_accurate(self) -> Demand | None:
        """What the most accurate point takes, from a few numbers and not from the arrays; None if it sends nothing."""
        if self.is_local[self._best]:
            return None
        sizes, compute = self._sizes, self._compute
        seconds = compute.seconds(self._stages[self._best_stage])
        shift = self._best_scale * (sizes.level + float(sizes.own[self._best_stage]))
        shift += sizes.saving * float(self._predicted[self._best])
        bits = self._best_bits * math.exp(shift)
        largest = math.exp(self._best_spread * sizes.deviation * (1.0 + SPREAD_DRIFT) * self._most_size_z)
        return Demand(
            self._best_at,
            seconds,
            seconds * (1.0 + self._most_compute_z * compute.scatter),
            bits,
            bits * largest + self._overhead_bits_each,
        )

    def expected_bytes(self) -> Floats:
        """Mean packet with overhead, float64 [rows]."""
        return np.asarray((self.bits.mean(axis=1) - self._wait_bits * ~self.is_local) / 8.0, dtype=np.float64)


def smallest_probe(points: Sequence[OperatingPoint], seconds: Mapping[str, float], limit_s: float) -> int:
    """Index of the smallest packet that is computed within a limit; else of the smallest that is sent at all; -1 if
    nothing is. `seconds` by stage."""
    sent = [index for index, point in enumerate(points) if point.kind is not Kind.LOCAL]
    quick = [index for index in sent if seconds[points[index].stage] <= limit_s]
    return min(quick or sent, key=lambda index: points[index].bytes_p95, default=-1)


def shuffled(count: int, steps: Sequence[int], offset: int) -> Indexes:
    """0 to count - 1 in a fixed order that has nothing to do with theirs, [count]."""
    step = next((step for step in steps if math.gcd(step, count) == 1), 1)
    return (step * np.arange(count) + offset) % count


def shuffled_normal(count: int, steps: Sequence[int], offset: int) -> Floats:
    """Standard normal quantiles in such an order, float64 [count]."""
    return np.array([NormalDist().inv_cdf((place + 0.5) / count) for place in shuffled(count, steps, offset)])

"""What a choice leaves to the frames after it: the price of spilling. No I/O, no clock.

A frame occupies the core for its compute and the link for its bytes; what is left of both when the next frame is
captured eats that frame's deadline. How much that costs hangs on what the next frames could do instead, so no fixed
price is right: on a slow link a local answer that takes one and a half intervals is well worth its spill every third or
fourth frame, on a fast one never; and a cut that takes two intervals is well worth it where the frame that waits behind
it can be sent as a picture, which takes the core next to nothing.

So the price is computed. For a handful of rates, a small dynamic programme gives the discounted on-time accuracy of
all further frames, as a function of what is left over at a capture:

    V[rate, core left, link left] = max over points of  accuracy x P(in time)  +  discount x V[rate, core', link']

(one of the points: to skip the frame). P(in time) takes the rate to scatter around the row's as it lately did around
the estimate: a plan that is in time by a hair at a steady rate would let the core fall behind, where every stall then
costs several frames. What is left over follows the row's rate alone (four rates in its place were no better).

and a choice is worth its own accuracy plus `discount x V` of the state it leaves, at each scenario's rate (the
approximation that POMDP literature calls QMDP: uncertain now, known afterwards). The programme is solved by value
iteration when the loop is made, and row by row again, from the values it had, when compute times, sizes or the round
trip have drifted.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indexes = NDArray[np.intp]

MIN_RATE_BPS, MAX_RATE_BPS = 1e4, 4e7
FIRST_SWEEPS, REFRESH_SWEEPS, REFRESH_ROUNDS = 40, 6, 4
DRIFT = 0.1
BITS_DRIFT = 0.25
SURPRISE_DRIFT = 0.1
FINER = 4
ROUNDING = 1e-9
CERTAIN: Floats = np.zeros(1)
"""A rate that is as expected."""


class Lookahead:
    """The value of the states that a choice may leave behind.

    Args:
        accuracy: of each point, 0..1, float64 [points].
        is_local: which points send nothing, bool [points].
        stage_of: index of each point's compute stage, [points].
        deadline_s, frame_interval_s: as in the control loop.
        discount: weight of each further frame, 0..1.
        frames_wait: frames that are captured while the core is busy wait for it; else it loses each one that it is
            behind by a whole frame interval.
        rates, core_cells_per_interval, link_cells: size of the table.
    """

    def __init__(
        self,
        accuracy: Floats,
        is_local: NDArray[np.bool_],
        stage_of: Indexes,
        *,
        deadline_s: float,
        frame_interval_s: float,
        discount: float = 0.9,
        frames_wait: bool = False,
        rates: int = 20,
        core_cells_per_interval: int = 5,
        link_cells: int = 16,
    ) -> None:
        self.discount = discount
        self._accuracy = accuracy
        self._is_local = is_local
        self._stage_of = stage_of
        self._deadline = deadline_s
        self._interval = frame_interval_s
        self._rates = np.geomspace(MIN_RATE_BPS, MAX_RATE_BPS, rates)
        # A core that is behind by the whole deadline (or three intervals) is as bad as it gets.
        self._core_step = frame_interval_s / core_cells_per_interval
        self._core_cells = core_cells_per_interval * max(2, min(4, math.ceil(deadline_s / frame_interval_s))) + 1
        self._link_step = (deadline_s + frame_interval_s) / (link_cells - 1)
        self._link_cells = link_cells
        self._begun_cells = self._core_cells if frames_wait else core_cells_per_interval
        self._core_if_skipped = np.maximum(np.arange(self._core_cells) - core_cells_per_interval, 0)
        self.values = np.zeros((rates, self._core_cells, link_cells))
        # The same with more cells, for decisions: a nearest cell costs half of what an interpolation does.
        self._finer_core, self._finer_link = _between(self._core_cells), _between(link_cells).T
        self._fine = np.zeros((rates, len(self._finer_core), self._finer_link.shape[1]))
        self._core_edges = (np.arange(len(self._finer_core) - 1) + 0.5) * (self._core_step / FINER)
        self._rate_edges = np.sqrt(self._rates[1:] * self._rates[:-1])
        self._links_a_second = FINER / self._link_step
        self._shares = np.zeros(0)
        self._seconds: Floats = np.zeros(0)
        self._bits: Floats = np.zeros(0)
        self._there_and_back = math.nan
        self._surprises: Floats = np.zeros(1)
        self._kept: Indexes = np.arange(len(accuracy))
        self.stands_in: Indexes = self._kept
        """For each point itself, if it is kept, or the most accurate kept one that beats it, [points]."""
        self._stale_rows: list[int] = []

    def solve(self, seconds: Floats, bits: Floats, there_and_back_s: float, surprises: Floats = CERTAIN) -> None:
        """Solve for these compute times and packet sizes, float64 [points], this round trip with the server's, and
        equally likely differences of the log-rate from what is expected, ascending, float64 [n]."""
        self._take(seconds, bits, there_and_back_s, surprises)
        for row in range(len(self._rates)):
            self._solve_row(row, FIRST_SWEEPS)
        self._stale_rows.clear()

    def refresh(self, seconds: Floats, bits: Floats, there_and_back_s: float, surprises: Floats = CERTAIN) -> None:
        """Follow drifting inputs: at most one row of the table a call, so that no frame pays for all of it."""
        if not self._stale_rows:
            drifted = (
                np.any(np.abs(seconds - self._seconds) > DRIFT * self._seconds)
                or np.any(np.abs(bits - self._bits) > BITS_DRIFT * self._bits)
                or np.abs(surprises - self._surprises).mean() > SURPRISE_DRIFT
                or abs(there_and_back_s - self._there_and_back) > DRIFT * self._deadline / 2
            )
            if not drifted:
                return
            self._take(seconds, bits, there_and_back_s, surprises)
            self._stale_rows = list(range(len(self._rates))) * REFRESH_ROUNDS
        self._solve_row(self._stale_rows.pop(), REFRESH_SWEEPS)

    @property
    def kept(self) -> Indexes:
        """Indexes of the points that no other one beats, as of the last refresh; replaced, never changed."""
        return self._kept

    def after(self, core_left_s: Floats, stage_of: Indexes, link_left_s: Floats, rates_bps: Floats) -> Floats:
        """Discounted value of the states left behind; read from a table fine enough to need no interpolation.

        Args:
            core_left_s: how long the core is busy after the next capture, float64 [stages].
            stage_of: each row's stage, [rows].
            link_left_s: how long the link is, float64 [rows, scenarios]. Overwritten.
            rates_bps: float64 [scenarios].

        Returns:
            float64 [rows], in accuracies summed over further frames.
        """
        _, cores, links = self._fine.shape
        line = self._core_edges.searchsorted(core_left_s)[:, None] + self._rate_edges.searchsorted(rates_bps) * cores
        line *= links
        link_left_s *= self._links_a_second
        link_left_s += 0.5
        np.maximum(link_left_s, 0.0, out=link_left_s)
        np.minimum(link_left_s, links - 1, out=link_left_s)
        cell = link_left_s.astype(np.intp)
        cell += line.take(stage_of, axis=0)
        # A product with a constant is a mean, several times faster than one over such short rows.
        if len(self._shares) != len(rates_bps):
            self._shares = np.full(len(rates_bps), self.discount / len(rates_bps))
        return np.asarray(self._fine.reshape(-1).take(cell) @ self._shares, dtype=np.float64)

    # ---------------------------------------------------------------------------------------------------------------

    @staticmethod
    def _cell(left_s: Floats, step: float, cells: int) -> tuple[Indexes, Floats]:
        """Lower cell and the part of the way to the next, for linear interpolation."""
        place = np.minimum(np.maximum(left_s * (1 / step), 0.0), cells - 1.0001)
        lower = place.astype(np.intp)
        return lower, np.asarray(place - lower, dtype=np.float64)

    def _take(self, seconds: Floats, bits: Floats, there_and_back_s: float, surprises: Floats) -> None:
        self._surprises = surprises.copy()
        self._seconds, self._bits, self._there_and_back = seconds.copy(), bits.copy(), there_and_back_s
        # A point that another one beats in accuracy, bytes and compute is never needed.
        no_worse = (
            (self._accuracy[:, None] >= self._accuracy)
            & (bits[:, None] <= bits)
            & (seconds[:, None] <= seconds)
            & (self._is_local[:, None] >= self._is_local)
        )
        same = no_worse & no_worse.T
        earlier = np.tri(len(bits), k=-1, dtype=bool).T
        self._kept = np.flatnonzero(~np.any(no_worse & (~same | earlier), axis=0))
        better = np.where(no_worse[self._kept], self._accuracy[self._kept, None], -1.0)
        self.stands_in = self._kept[better.argmax(axis=0)]

    def _chances(self, room: Floats) -> Floats:
        """How likely the link takes no longer than `room` times what is expected, float64 of its shape. Where rates
        scatter no such chance is quite 0 or 1: what was seen lately is not all that there is."""
        count = len(self._surprises)
        if count == 1:
            return np.asarray(room >= math.exp(-float(self._surprises[0])) - ROUNDING, dtype=np.float64)
        shares = (np.arange(count) + 0.5) / count
        return np.interp(np.log(np.maximum(room, ROUNDING)), -self._surprises[::-1], shares)

    def _solve_row(self, row: int, sweeps: int) -> None:
        kept, interval, width = self._kept, self._interval, self._link_cells
        core_left = np.arange(self._begun_cells)[:, None, None] * self._core_step
        link_left = np.arange(width)[None, :, None] * self._link_step
        local = self._is_local[kept]
        ready = core_left + self._seconds[kept]
        begin = np.maximum(ready, link_left)
        finish = np.where(local, link_left, begin + self._bits[kept] / self._rates[row])
        # What the link may take, as a multiple of what it takes at the row's rate.
        room = (self._deadline - self._there_and_back - begin) * (self._rates[row] / np.maximum(self._bits[kept], 1.0))
        reward = self._accuracy[kept] * np.where(local, ready <= self._deadline, self._chances(room))
        core, core_part = self._cell(np.broadcast_to(ready - interval, finish.shape), self._core_step, self._core_cells)
        link, link_part = self._cell(finish - interval, self._link_step, width)
        # Doing nothing with a frame, or losing it to a core that is behind.
        idle_link, idle_part = self._cell(link_left[0, :, 0] - interval, self._link_step, width)
        corner = core * width + link
        weights = [
            (corner, (1 - core_part) * (1 - link_part)),
            (corner + 1, (1 - core_part) * link_part),
            (corner + width, core_part * (1 - link_part)),
            (corner + width + 1, core_part * link_part),
        ]
        value = self.values[row]
        for _ in range(sweeps):
            flat = value.reshape(-1)
            best = reward + self.discount * sum(part * flat[at] for at, part in weights)
            idle = (1 - idle_part) * value[:, idle_link] + idle_part * value[:, np.minimum(idle_link + 1, width - 1)]
            idle *= self.discount
            skipped = idle[self._core_if_skipped]
            np.maximum(skipped[: self._begun_cells], best.max(axis=2), out=skipped[: self._begun_cells])
            value[:] = skipped
        self._fine[row] = self._finer_core @ value @ self._finer_link


def _between(cells: int) -> Floats:
    """Matrix that interpolates `cells` values linearly, with `FINER` steps from one to the next."""
    return np.stack(
        [np.interp(np.arange((cells - 1) * FINER + 1) / FINER, np.arange(cells), one) for one in np.eye(cells)], 1
    )

"""The exact offline optimum: what a clairvoyant could have answered over the same link with the same operating points.

A dynamic programme over the frames, in order of capture. Each is left out, answered locally or sent at one point:

    core      [ start = max(capture, core free) ]--compute-->
    link                                          [ begin = max(ready, link free) ]--the trace-->
    answer                                                                    finish + RTT + service <= deadline

The state before a frame is (when the core is free, when the link is free), its value the sum of accuracies so far. A
frame that would be late is left out instead, which is never worse. Three things keep the states few without changing
the result: times that lie before the next capture are as good as that capture; of two states the one that is later on
both and worth no more is dropped; a point that another one beats on accuracy, bytes and compute is not tried.

States that still differ by less than `cell_s` on both are merged, towards the better in each respect: the result is an
upper bound of the optimum. With `bound="lower"` the one that is worth more is kept as it is: a schedule that exists.
The optimum lies between both; `tests/bench/test_optimum.py` holds how near they are, and compares them with every
schedule there is on small cases. Two further relaxations, both in the optimum's favour: the server serves frames at
once, and a frame may wait for the core behind a newer one, for which the edge would drop it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...models.exceptions import DataError
from ...models.operating_point import Kind, OperatingPoint
from ..links.traces import Trace

Floats = NDArray[np.float64]
CELL_S = 0.001
_ROUNDING_S = 1e-9
"""As in the simulated run, an answer that is late by less is in time."""


@dataclass(frozen=True, slots=True)
class _States:
    """Pareto set before a frame: when core and link are free (s), accuracies summed so far; float64 [states]."""

    core: Floats
    link: Floats
    value: Floats


def offline_optimum(
    points: Sequence[OperatingPoint],
    sizes: ArrayLike,
    compute_s: ArrayLike,
    trace: Trace,
    *,
    delay_s: float,
    deadline_s: float,
    fps: float,
    server_s: float = 0.0,
    overhead_bytes: int = 0,
    cell_s: float = CELL_S,
    bound: Literal["upper", "lower"] = "upper",
) -> float:
    """On-time accuracy of the best schedule, 0..1: mean over all frames.

    Args:
        points, sizes, compute_s, trace, delay_s, deadline_s, fps, server_s, overhead_bytes: as in `simulate.replay`.
        cell_s: states nearer than that are merged.
        bound: which way merging errs.

    Raises:
        DataError: shapes don't fit.
    """
    bytes_of = np.asarray(sizes, dtype=np.float64)
    if not points or bytes_of.ndim != 2 or bytes_of.shape[1] != len(points):
        raise DataError(f"sizes must be [frames, {len(points)} points], not {list(bytes_of.shape)}")
    bytes_of = bytes_of + overhead_bytes
    seconds = np.broadcast_to(np.asarray(compute_s, dtype=np.float64), bytes_of.shape)
    accuracy = np.array([point.accuracy for point in points])
    local = np.array([point.kind is Kind.LOCAL for point in points])
    interval = 1.0 / fps
    sent_due = deadline_s + _ROUNDING_S - 2 * delay_s - server_s
    states = _States(np.zeros(1), np.zeros(1), np.zeros(1))
    for frame in range(len(bytes_of)):
        captured = frame * interval
        tried = _undominated(accuracy, bytes_of[frame], seconds[frame], local)
        grown = [states]
        for index in tried[local[tried]]:
            end = np.maximum(states.core, captured) + seconds[frame, index]
            in_time = end <= captured + deadline_s + _ROUNDING_S
            grown.append(
                _States(end[in_time], states.link[in_time], states.value[in_time] + accuracy[index]),
            )
        if len(sent := tried[~local[tried]]):
            due = captured + sent_due
            ready = np.maximum(states.core, captured)[:, None] + seconds[frame, sent]
            begin = np.maximum(ready, states.link[:, None])
            at, which = np.nonzero(begin < due)
            finish = trace.finish_all(begin[at, which], bytes_of[frame, sent[which]])
            in_time = finish <= due
            at, which = at[in_time], which[in_time]
            grown.append(_States(ready[at, which], finish[in_time], states.value[at] + accuracy[sent[which]]))
        merged = _States(*(np.concatenate([getattr(s, name) for s in grown]) for name in ("core", "link", "value")))
        following = captured + interval
        # No later frame's packet can be ready before that.
        soonest = following + (seconds[frame + 1 :, ~local].min(initial=0.0) if frame + 1 < len(bytes_of) else 0.0)
        clamped = _States(np.maximum(merged.core, following), np.maximum(merged.link, soonest), merged.value)
        states = _prune(clamped, following, soonest, cell_s, bound)
    return float(states.value.max()) / max(len(bytes_of), 1)


def _undominated(accuracy: Floats, sizes: Floats, seconds: Floats, local: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Indexes of the points that no other one beats for this frame; of equal ones the first."""
    no_worse = (
        (accuracy[:, None] >= accuracy)
        & (sizes[:, None] <= sizes)
        & (seconds[:, None] <= seconds)
        & (local[:, None] == local)
    )
    earlier = np.tri(len(sizes), k=-1, dtype=bool).T
    return np.flatnonzero(~np.any(no_worse & (~no_worse.T | earlier), axis=0))


def _prune(states: _States, core_from: float, link_from: float, cell_s: float, bound: str) -> _States:
    """One state a cell, and none that another one beats on both times and the value."""
    row = np.ceil((states.core - core_from) / cell_s - _ROUNDING_S).astype(np.intp)
    column = np.ceil((states.link - link_from) / cell_s - _ROUNDING_S).astype(np.intp)
    rows, columns = int(row.max()) + 1, int(column.max()) + 1
    cell = row * columns + column
    best = np.full(rows * columns, -np.inf)
    np.maximum.at(best, cell, states.value)
    grid = best.reshape(rows, columns)
    # The most that a cell no later on both times is worth, the cell itself left out.
    reached = np.maximum.accumulate(np.maximum.accumulate(grid, axis=0), axis=1)
    beaten = np.full_like(grid, -np.inf)
    beaten[1:] = reached[:-1]
    beaten[:, 1:] = np.maximum(beaten[:, 1:], reached[:, :-1])
    kept = np.flatnonzero(best > beaten.reshape(-1))
    if bound == "upper":
        core, link = np.full(best.shape, np.inf), np.full(best.shape, np.inf)
        np.minimum.at(core, cell, states.core)
        np.minimum.at(link, cell, states.link)
        return _States(core[kept], link[kept], best[kept])
    order = np.lexsort((states.link, states.core, -states.value, cell))
    first = order[np.searchsorted(cell[order], kept)]
    return _States(states.core[first], states.link[first], states.value[first])

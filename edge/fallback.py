"""The answer in reserve: the device answers, too, in case the server is late. No I/O, no clock.

    head --> encoder --> packet --> written ------------------------> answered in time?  `ok`
                            |                                               | no
                            +--> an exit, or the uncut model (the core is free by now) --> its answer, `local`

No link tells before it stalls. Where a quick answer fits on the device between the packet and the deadline, a frame
that is sent is a bet that cannot be lost: with the chance p that the server's answer is in time it is worth

    p x accuracy of the point  +  (1 - p) x accuracy of the answer in reserve

less what the core's time costs the next frame. Few choices come close to being the best; only these are looked at with
each local point in reserve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..models.operating_point import Kind, OperatingPoint
from .lookahead import Lookahead
from .measurement import Floats
from .menu import Menu

Indexes = NDArray[np.intp]
MOST_ROWS = 6
"""So many of the best choices are looked at with something in reserve."""
WORTH = 0.005
"""On-time accuracy by which it must be better."""


class Bet(NamedTuple):
    """A choice with an answer in reserve.

    Attributes:
        row: of the choice, as given.
        reserve: index of the local point that is kept in reserve.
        expected: on-time accuracy of this frame.
    """

    row: int
    reserve: int
    expected: float


class Fallback:
    """Chooses what is kept in reserve.

    Args:
        points: all operating points; local ones can be kept in reserve.
        stage_of: index of each point's compute stage, [points].
        lookahead: the control loop's.
    """

    def __init__(self, points: Sequence[OperatingPoint], stage_of: Indexes, lookahead: Lookahead) -> None:
        local = [index for index, point in enumerate(points) if point.kind is Kind.LOCAL]
        self._local = np.array(local, dtype=np.intp)
        self._stage = stage_of[self._local]
        self._accuracy: Floats = np.array([points[index].accuracy for index in local])
        self._lookahead = lookahead

    def __bool__(self) -> bool:
        """Whether there is anything to keep in reserve."""
        return len(self._local) > 0

    def best(
        self,
        menu: Menu,
        value: Floats,
        expected: Floats,
        on_time: Floats,
        sent_s: Floats,
        rates_bps: Floats,
        left_s: float,
        to_next_s: float,
    ) -> Bet | None:
        """The best choice with something in reserve; None where it is no better than the best one without.

        Args:
            menu: the choices, [rows].
            value: of each without anything in reserve, float64 [rows]; -infinity of those that must not be used.
            expected, on_time: on-time accuracy of this frame, and the chance that it is in time, float64 [rows].
            sent_s: when the link has sent the packet, from the next capture on, float64 [rows, scenarios].
            rates_bps: float64 [scenarios].
            left_s, to_next_s: seconds from now up to the deadline, and up to the next capture.
        """
        enough = float(value.max()) + WORTH
        ready, takes = menu.seconds[menu.stage_of], menu.seconds[self._stage]
        in_time = (takes[:, None] + ready <= left_s) & ~menu.is_local
        bound = value + np.where(in_time, (1.0 - on_time) * self._accuracy[:, None], 0.0).max(axis=0)
        rows = np.argsort(bound)[::-1][:MOST_ROWS]
        rows = rows[bound[rows] > enough]
        local, at = np.nonzero(in_time[:, rows])
        if not len(at):
            return None
        rows = rows[at]
        now_worth = expected[rows] + (1.0 - on_time[rows]) * self._accuracy[local]
        core_left = ready[rows] + takes[local] - to_next_s
        after = self._lookahead.after(core_left, np.arange(len(rows)), sent_s[rows], rates_bps)
        best = int((now_worth + after).argmax())
        total = float(now_worth[best] + after[best])
        return Bet(int(rows[best]), int(self._local[local[best]]), float(now_worth[best])) if total > enough else None

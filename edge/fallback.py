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

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..models.operating_point import Kind, OperatingPoint
from .lookahead import Lookahead
from .measurement import Floats
from .menu import Menu

Indexes = NDArray[np.intp]
MOST_ROWS = 8
"""So many of the best choices are looked at with something in reserve."""
LEAST_P = 0.02
"""A chance smaller than this is no bet."""
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
        self._local = [
            (index, point.accuracy, int(stage_of[index]))
            for index, point in enumerate(points)
            if point.kind is Kind.LOCAL
        ]
        self._most_accurate = max((accuracy for _, accuracy, _ in self._local), default=0.0)
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
        sent: Callable[[], Floats],
        rates_bps: Floats,
        top: float,
        left_s: float,
        to_next_s: float,
    ) -> Bet | None:
        """The best choice with something in reserve; None where it is no better than the best one without.

        Args:
            menu: the choices, [rows].
            value: of each without anything in reserve, float64 [rows]; -infinity of those that must not be used.
            expected, on_time: on-time accuracy of this frame, and the chance that it is in time, float64 [rows].
            sent: gives when the link has sent each packet, from the next capture on, float64 [rows, scenarios].
            rates_bps: float64 [scenarios].
            top: the best value.
            left_s, to_next_s: seconds from now up to the deadline, and up to the next capture.
        """
        enough = top + WORTH
        late = 1.0 - on_time
        bound = late * self._most_accurate
        bound += value
        if bound[bound.argmax()] <= enough:  # on a good link: always (and a third of the time of `max`)
            return None
        seconds = menu.seconds.tolist()
        takes = [(index, accuracy, seconds[stage]) for index, accuracy, stage in self._local]
        fitting = np.zeros(len(seconds))
        for _, accuracy, more in takes:
            np.maximum(fitting, accuracy * (menu.seconds <= left_s - more), out=fitting)
        bound = value + late * fitting[menu.stage_of]
        rows = np.flatnonzero((bound > enough) & (on_time > LEAST_P) & ~menu.is_local)
        if len(rows) > MOST_ROWS:
            rows = rows[bound[rows].argpartition(-MOST_ROWS)[-MOST_ROWS:]]
        rows = rows[menu.middle_bits[rows].argsort()]  # of several that are worth the same, the smallest packet
        # A few numbers are handled one by one in less time than as arrays.
        bets: list[tuple[int, int, float, float]] = []  # row, reserve, worth now, when the core is free again
        for row, stage, now_worth, p in zip(
            rows.tolist(), menu.stage_of[rows].tolist(), expected[rows].tolist(), on_time[rows].tolist(), strict=True
        ):
            bets += [
                (row, index, now_worth + (1.0 - p) * accuracy, seconds[stage] + more)
                for index, accuracy, more in takes
                if seconds[stage] + more <= left_s
            ]
        if not bets:
            return None
        at, reserves, worth, free = zip(*bets, strict=True)
        after = self._lookahead.after(
            np.array(free) - to_next_s, np.arange(len(bets)), sent().take(at, axis=0), rates_bps
        )
        total = np.array(worth) + after
        best = int(total.argmax())
        return Bet(at[best], reserves[best], worth[best]) if total[best] > enough else None

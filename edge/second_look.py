"""The rate, decided once more when a packet turns out too large. No I/O, no clock.

    choose ----> head, encoder ----> coder ----> [ does it fit? ] ----> written
       split point, level              ^                |
                                       +-- other level -+

A packet's size is a guess until it is coded, and a picture with much in it takes half as much again as the one before.
What takes a device's time is the head, and that is done; it is the same for all rate levels of a split point (as
scaling is for all qualities of a picture). So where a packet may be late, the levels are weighed again by the sum that
chose it,

    accuracy x share of scenarios in time  +  what it leaves to the frames after it

with the size that is known now, what it says of the other levels' packets, and the coder's time for coding anew. Once a
frame: what comes out then is sent, or dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .link_view import LinkView
from .lookahead import Lookahead
from .measurement import Floats, PacketSizes
from .menu import SIZE_STEPS, shuffled_normal

Indexes = NDArray[np.intp]
MARGIN = 0.01
"""On-time accuracy by which another level must be better; less is not worth a switch."""
SAME_FRAME = 0.8
"""How much of a packet's surprise (in standard deviations) the other levels' packets of the same frame share."""
LEFT_OVER = 0.6
"""Standard deviation of what is then left, as a share of what it was."""


class LevelTerms(NamedTuple):
    """What a frame may take, and what each packet has on top.

    Attributes:
        deadline_s, frame_interval_s: seconds, as in the control loop.
        overhead_bytes: added to every packet.
        scenarios: how many.
    """

    deadline_s: float
    frame_interval_s: float
    overhead_bytes: int
    scenarios: int


class SecondLook:
    """Weighs the points of one compute stage against each other.

    Args:
        accuracy: of all points, 0..1, float64 [points].
        stage_of: index of each point's compute stage, [points].
        sizes, link, lookahead: the control loop's.
        terms: of all frames.
    """

    def __init__(
        self,
        accuracy: Floats,
        stage_of: Indexes,
        sizes: PacketSizes,
        link: LinkView,
        lookahead: Lookahead,
        terms: LevelTerms,
    ) -> None:
        self._accuracy, self._sizes, self._link, self._lookahead = accuracy, sizes, link, lookahead
        self._deadline_s, self._interval_s, overhead_bytes, scenarios = terms
        self._overhead_bits = 8.0 * overhead_bytes
        self._size_z = shuffled_normal(scenarios, SIZE_STEPS, scenarios // 3)
        self._shares = np.full(scenarios, 1.0 / scenarios)
        members: Sequence[Indexes] = [np.flatnonzero(stage_of == stage) for stage in range(int(stage_of.max()) + 1)]
        self._members = [members[stage] for stage in stage_of.tolist()]

    def better(
        self, now: float, captured_at: float, index: int, size_bytes: int, coder_s: float, reserve: float = 0.0
    ) -> int:
        """The point of the same stage that is worth most for a frame that was coded.

        Args:
            now, captured_at: seconds.
            index: the point that it was coded at.
            size_bytes: what came out.
            coder_s: seconds that coding it again would take.
            reserve: accuracy of the answer that the device has in reserve for it, 0..1.

        Returns:
            Its index; `index` itself unless another one is clearly better than that, and than to drop the frame.
        """
        rows, link = self._members[index], self._link
        due = captured_at + self._deadline_s
        sent = link.sent_if_slow(now, now, 8.0 * size_bytes + self._overhead_bits)
        if len(rows) == 1 or size_bytes <= 0 or sent <= due - link.most_there_and_back_s:
            return index
        own = int(np.flatnonzero(rows == index)[0])
        begin = np.full(len(rows) + 1, now + coder_s)
        begin[own] = begin[-1] = now
        rates = link.scenarios(now)
        per_bit = 1.0 / rates
        free = link.free_for(now, captured_at, per_bit)
        finish = np.empty((len(begin), len(rates)))
        np.maximum(begin[:-1, None], free, out=finish[:-1])
        finish[:-1] += self._bits(rows, own, size_bytes) * per_bit
        finish[-1] = free  # the last row: to drop the frame
        on_time = (finish[:-1] <= due - link.there_and_back_scenarios) @ self._shares
        next_capture = captured_at + self._interval_s
        finish -= next_capture
        value = self._lookahead.after(begin - next_capture, np.arange(len(begin)), finish, rates)
        # A frame that is late or dropped has its answer in reserve.
        value[:-1] += np.maximum(self._accuracy[rows] - reserve, 0.0) * on_time
        best = int(value[:-1].argmax())
        return int(rows[best]) if value[best] > max(value[own], value[-1]) + MARGIN else index

    def _bits(self, rows: Indexes, own: int, size_bytes: int) -> Floats:
        """Packets by scenario, with overhead and wait, float64 [rows, scenarios]."""
        sizes = self._sizes
        expected, scale = sizes.middle(rows), sizes.scale[rows]
        surprise = SAME_FRAME * math.log(size_bytes / expected[own]) / float(scale[own])
        scatter = np.multiply.outer(sizes.spread[rows] * (LEFT_OVER * sizes.deviation), self._size_z)
        packets = expected[:, None] * np.exp(scatter + (scale * surprise)[:, None])
        packets[own] = size_bytes
        return np.asarray(8.0 * packets + (self._overhead_bits + self._link.wait_bits), dtype=np.float64)

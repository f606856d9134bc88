"""When to ask a link that looks dead or too slow whether it still is. No I/O, no clock."""

from __future__ import annotations

import math

from .measurement import Sent

FREE_PROBE = 0.2
"""Probes that take nobody's place go out at this share of the interval."""


class Probing:
    """Intervals between probes: short at first, then doubled up to a longest one, for as long as nothing is heard.

    Args:
        interval_s, longest_s: the first interval, and the last.

    Attributes:
        frame: when the frame that is a probe was captured; None before the first.
    """

    def __init__(self, interval_s: float, longest_s: float) -> None:
        self._interval_s, self._longest_s = interval_s, longest_s
        self.frame: float | None = None
        self.restart()

    def restart(self) -> None:
        """The stream is up (again): nothing is known."""
        self._at = -math.inf  # when the link was last heard of or asked
        self._wait_s = self._interval_s

    def heard(self, now: float, *, after_outage: bool, often: bool) -> None:
        """An answer came: after an outage it says little of the rate, and the next probe is due at once. `often`: the
        link is good enough to be asked at the first interval again."""
        self._at = -math.inf if after_outage else now
        if often:
            self._wait_s = self._interval_s

    def is_due(self, now: float, *, instead_of_nothing: bool, oldest: Sent | None) -> bool:
        """Whether a probe may go out: long enough after the last one, and not while a frame in flight serves as one.

        Args:
            now: seconds.
            instead_of_nothing: the frame would be dropped anyway, and costs nothing but its bytes.
            oldest: frame in flight, if there is one.
        """
        wait = self._wait_s * (FREE_PROBE if instead_of_nothing and oldest is None else 1.0)
        if now < self._at + wait:
            return False
        return oldest is None or now - oldest.ready > self._longest_s

    def sends(self, now: float, captured_at: float, *, oldest: Sent | None) -> None:
        """The frame captured then is a probe; beside one in flight it is the last for the longest interval."""
        self.frame, self._at = captured_at, now
        self._wait_s = self._longest_s if oldest is not None else min(2 * self._wait_s, self._longest_s)

    def takes_late_packet(self, now: float) -> bool:
        """Whether a packet that is ready, and would be late by what is known, is written all the same."""
        if now < self._at + FREE_PROBE * self._wait_s:
            return False
        self._at = now
        self._wait_s = min(2 * self._wait_s, self._longest_s)
        return True

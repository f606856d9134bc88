"""How long frames were on their way, beyond what the fastest of their stream took.

A device says of each frame what remained of its deadline when it was *written*. What it then waits, in the device's
socket, on a link with a long queue, or before a server that is behind with reading, the server would not know: it would
answer frames that are long late, and the more it is behind the more of them. So frames also say when they were written,
by the device's own clock since its Hello, and the least difference to the server's clock that was seen lately stands
for no delay at all. Two durations are compared, never two clocks.
"""

from __future__ import annotations

import math

WINDOW_S = 30.0
"""The least difference is that of the last one to two of these: clocks drift, and a device's stops while it sleeps."""

_WRAPS = 2**32


class Delay:
    """Of the frames of one stream."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._last, self._since_ms = 0, 0  # the device's clock as last said, and how far it went since it first was
        self._least = self._before = math.inf
        self._until = -math.inf

    def of(self, clock_ms: int, received: float) -> int:
        """Milliseconds that a frame was on its way beyond the fastest.

        Args:
            clock_ms: when it was written, by its device, modulo 2**32; 0: not said.
            received: when it was read, seconds of the server's clock.

        Returns:
            At least 0.
        """
        if not clock_ms:
            return 0
        if self._last:
            # From frame to frame: it begins again after 49.7 days, and frames may have overtaken each other.
            self._since_ms += (clock_ms - self._last + _WRAPS // 2) % _WRAPS - _WRAPS // 2
        self._last = clock_ms
        apart = received - self._since_ms / 1e3
        if received >= self._until:
            self._before = self._least if self._until > -math.inf else math.inf
            self._least, self._until = apart, received + WINDOW_S
        elif apart < self._least:
            self._least = apart
        least = self._before if self._before < self._least else self._least
        return round((apart - least) * 1e3)

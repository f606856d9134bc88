"""Frames that the server will not answer: served on the device where there is time, else closed. No I/O, no clock."""

from __future__ import annotations

import math
from collections import deque

from ..models.operating_point import OperatingPoint
from .interfaces import Limits
from .ledger import NO_ANSWER, Frame, Ledger, Outcome
from .on_device import OnDevice
from .reserve import Reserve


class Rescue:
    """Oldest first, since they have the least time."""

    def __init__(self, ledger: Ledger, limits: Limits, own: OnDevice, reserve: Reserve) -> None:
        """Nothing to rescue."""
        self._ledger, self._lossless = ledger, limits.lossless
        self._frames: deque[Frame] = deque()
        self.use(own, reserve)

    def use(self, own: OnDevice, reserve: Reserve) -> None:
        """`own` says what the device can answer in time, `reserve` what it has said already."""
        self._own, self._reserve = own, reserve

    def __len__(self) -> int:
        """How many frames wait for the device."""
        return len(self._frames)

    def add(self, frame: Frame, now: float, reason: str, otherwise: Outcome | None = None) -> None:
        """The server will not answer this frame for `reason`; `otherwise`: its outcome if the device can't either."""
        sent = frame.written_at is not None
        ending = (Outcome.LATE, NO_ANSWER) if sent and otherwise is None else (otherwise or Outcome.DROPPED, reason)
        if self._reserve.serves(frame, now, ending):
            return
        known = frame.pixels is not None or frame.picture is not None
        if known and self._in_time(frame, now) is not None:
            self._frames.append(frame)
        else:
            self._ledger.close(frame, *ending)

    def next(self, now: float) -> tuple[Frame, OperatingPoint] | None:
        """The frame that the device answers next, and at which point; those that are too late by now are closed."""
        while self._frames:
            frame = self._frames.popleft()
            if frame.outcome is not None or frame.ending is None:
                continue
            if (point := self._in_time(frame, now)) is not None:
                return frame, point
            self._ledger.close(frame, *frame.ending)
        return None

    def clear(self) -> None:
        """No frame waits any longer."""
        self._frames.clear()

    def _in_time(self, frame: Frame, now: float) -> OperatingPoint | None:
        return self._own.in_time(math.inf if self._lossless else frame.deadline_at - now)

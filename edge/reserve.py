"""Answers in reserve: computed behind a packet, given where the server's answer is late. No I/O, no clock.

    packet written ──► the device answers, too (its core is free) ──► the server's answer came: forgotten
                                                         └────► the deadline is here, the stream broke, the server
                                                                was too busy, it was not worth sending: given

The control loop says for which frames, and by which local point (`fallback`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .interfaces import Control, Limits, Work
from .ledger import STALE, Frame, Ledger, Outcome
from .on_device import OnDevice

if TYPE_CHECKING:
    from .engine import Encoded, LocalAnswer

EARLY_S = 0.006
"""So long before the deadline it is given: a timer fires late, by what a thread may keep the interpreter (5 ms)."""


class Reserve:
    """Which frames have an answer in reserve, and what becomes of it."""

    def __init__(self, control: Control, ledger: Ledger, limits: Limits, own: OnDevice) -> None:
        """Keep whom to tell; `own` says what local answers take."""
        self._control, self._ledger, self._own = control, ledger, own
        self._active, self._grace_s = limits.fallback and not limits.lossless, limits.grace_s

    def wanted(self, frame: Frame, coded: Encoded, now: float) -> Work | None:
        """What the device computes for the frame now that its packet is made; an exit may have been asked before."""
        frame.reserve, point = coded.own, frame.reserved_by
        if not self._active or frame.reserve is not None or point is None:
            return None
        if self._own.in_time(frame.deadline_at - now, point) != point:
            return None
        frame.reserve_comes = True
        return Work(frame, local=False, reserve=point)

    def came(self, frame: Frame, answer: LocalAnswer, now: float) -> None:
        """The device has answered."""
        frame.reserve, frame.reserve_comes = answer, False
        if frame.reserved_by is not None:
            self._own.took(frame.reserved_by, answer.seconds)
            if answer.prepare_s > 0:
                self._control.on_reserve(frame.reserved_by, answer.seconds)
        if frame.outcome is None and frame.unsent:
            self.serve_unsent(frame, now)

    def give(self, frame: Frame, now: float) -> bool:
        """Answer the frame with what is in reserve; False where nothing is, or it is too late for that."""
        if not self._active or frame.reserve is None or now > frame.deadline_at:
            return False
        if (point := frame.reserve.point or frame.reserved_by) is not None:
            self._control.on_fallback(point, frame.id)
            frame.fell_back_to = point
        frame.labels, frame.confidence, frame.fell_back = frame.reserve.labels, frame.reserve.confidence, True
        self._ledger.answer(frame, Outcome.LOCAL, now)
        return True

    def serve_unsent(self, frame: Frame, now: float) -> None:
        """The frame is not worth sending: what is in reserve is its answer, as soon as it is there."""
        frame.unsent = True
        if not self.give(frame, now) and not frame.reserve_comes:
            self._ledger.close(frame, Outcome.DROPPED, STALE)

    def overdue_at(self, frame: Frame) -> float:
        """When the server's answer to a frame that was sent is no longer waited for."""
        if self._active and frame.reserve is not None:
            return frame.deadline_at - EARLY_S
        return frame.deadline_at + self._grace_s

"""Answers in reserve: computed behind a packet, given where the server's answer is late. No I/O, no clock.

    packet written ──► the device answers, too (its core is free) ──► the server's answer came: forgotten
                                                         └────► the deadline is here, the stream broke, the server
                                                                was too busy, it was not worth sending: given

The control loop says for which frames, and by which local point (`fallback`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .interfaces import Control, Limits, Work
from .ledger import NO_ANSWER, STALE, Frame, Ledger, Outcome
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
        if frame.outcome is None and frame.ending is not None and not self.give(frame, now):
            self._ledger.close(frame, *frame.ending)

    def failed(self, frame: Frame) -> None:
        """The device could not answer. What is on its way to the server is as good as before."""
        frame.reserve_comes = False
        if frame.outcome is None and frame.ending is not None:
            self._ledger.close(frame, *frame.ending)

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

    def serves(self, frame: Frame, now: float, ending: tuple[Outcome, str]) -> bool:
        """The server will not answer: what is in reserve does, as soon as it is there, or else the frame gets this
        outcome for this reason. False where nothing is in reserve and nothing comes."""
        frame.ending = ending
        return self.give(frame, now) or frame.reserve_comes

    def end(self, frame: Frame, now: float, outcome: Outcome, reason: str) -> None:
        """What is in reserve is the frame's answer, as soon as it is there; without it, this is its outcome."""
        if not self.serves(frame, now, (outcome, reason)):
            self._ledger.close(frame, outcome, reason)

    def next_due(self, sent: Iterable[Frame], waiting: Iterable[Frame]) -> float | None:
        """When `tick` is due: the first of these frames is overdue; those that wait to be written are where they have
        an answer in reserve."""
        times = [self._overdue_at(frame) for frame in sent if frame.outcome is None]
        times += [self._overdue_at(frame) for frame in waiting if self._has(frame)]
        return min(times, default=None)

    def tick(self, sent: Iterable[Frame], waiting: Iterable[Frame], now: float) -> None:
        """Give up waiting for answers that are overdue, and for a stream that takes no packet."""
        for frame in sent:
            overdue = frame.outcome is None and now >= self._overdue_at(frame)
            if overdue and not self.give(frame, now):
                self._ledger.close(frame, Outcome.LATE, NO_ANSWER)
        for frame in waiting:
            overdue = self._has(frame) and now >= self._overdue_at(frame)
            if overdue and not self.give(frame, now):
                self._ledger.close(frame, Outcome.DROPPED, STALE)

    def _has(self, frame: Frame) -> bool:
        return self._active and frame.outcome is None and frame.reserve is not None

    def _overdue_at(self, frame: Frame) -> float:
        if self._active and frame.reserve is not None:
            return frame.deadline_at - EARLY_S
        return frame.deadline_at + self._grace_s

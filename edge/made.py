"""What follows a packet that was just made: it is noted, kept on the device, or coded anew. No I/O, no clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .interfaces import Control, Limits, Work
from .ledger import Frame, Ledger, Outcome
from .lessons import Lessons

if TYPE_CHECKING:
    from .engine import Encoded


class Made:
    """Looks at packets before they go to the outbox."""

    def __init__(self, control: Control, ledger: Ledger, limits: Limits) -> None:
        """Keep whom to ask and to tell."""
        self._control, self._ledger, self._lossless = control, ledger, limits.lossless
        self._lessons = Lessons()

    def tell(self) -> None:
        """Tell the control loop what packets took."""
        self._lessons.tell(self._control)

    def note(self, frame: Frame, coded: Encoded) -> None:
        """What it took, and what was seen in the frame on the way."""
        if frame.coded_again:
            frame.timings["again"] = coded.coder_s
        else:
            frame.timings.update(prepare=coded.prepare_s, compute=coded.compute_s, compress=coded.compress_s)
        frame.presence, frame.empty = coded.presence, coded.empty
        frame.confidence = coded.own.confidence if coded.own is not None else None

    def keeps(self, frame: Frame, coded: Encoded, now: float) -> bool:
        """Whether nothing is sent: the filter saw nothing in the frame, or the exit is sure of its answer."""
        if coded.packet or frame.point is None:
            return False
        self._control.on_computed(frame.point, coded.seconds, now)
        if coded.own is None:
            self._control.on_kept(frame.point.accuracy, now)  # what the head saw there counts as seen
            self._ledger.close(frame, Outcome.FILTERED)
        else:
            self._control.on_kept(coded.own.confidence or 0.0, now)
            frame.labels, frame.point = coded.own.labels, coded.own.point
            self._ledger.answer(frame, Outcome.LOCAL, now)
        return True

    def anew(self, frame: Frame, coded: Encoded, now: float, *, connected: bool) -> Work | None:
        """Code the frame anew at another rate level of its split point, where the packet that came out is too large."""
        if frame.point is None or frame.coded_again:
            return None
        self._lessons.add(frame.point, coded, now)
        if coded.again is None or self._lossless or not connected:
            return None
        size = len(coded.packet)
        point = self._control.look_again(now, frame.captured_at, frame.point, size, coded.coder_s, frame.reserved_by)
        if point.id == frame.point.id:
            return None
        frame.point, frame.coded_again, again = point, True, coded.again
        return Work(frame, local=False, again=lambda: again(point))

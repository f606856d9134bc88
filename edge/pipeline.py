"""A frame's way through the edge. Read this file first.

    captured --> waits for the device --> taken up: an operating point is chosen (or the next frame is worth more)
        |                                     |
        | (others take its place)             +-- local --> computed on the device --> `local`, or `late`
        v                                     |
     `dropped`                                +-- feature, image --> encoded --> written --> answered --> `ok`, `late`
                                                                     ^  |  |  |           |
                                        (too large: coded anew, once) --+  |  |           | (not by the deadline, or the
              (nothing in it: `filtered`; the exit is sure of it: `local`) +  |           | stream breaks)
                                               (stale before it is written)   v           v
                          what the exit said, or the device still has time for: `local`; else `dropped`, `late`

This is the core: it knows no clock, no thread and no socket. Events go in as method calls with the time `now`
(seconds, monotonic); what to do next comes out of `take_up` (compute this), `next_to_write` (send this) and
`next_timer` (call `tick` then). `driver` does what it says. Whatever the order of events, the ledger gives each
captured frame one outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from PIL import Image

from ..models.operating_point import Kind, OperatingPoint
from ..protos.messages import Continuation, Result, Status
from .filtering import Filtering
from .holding import Holding
from .interfaces import Control, Limits, Outgoing, Work
from .ledger import BUDGET, BUSY, FULL, NO_ANSWER, OUTAGE, STALE, STOPPED, Frame, Ledger, Outcome
from .made import Made
from .on_device import Keeping, OnDevice
from .outbox import Outbox
from .references import References
from .rescue import Rescue
from .reserve import Reserve
from .taking_up import decide
from .unanswered import Unanswered
from .waiting import Waiting

if TYPE_CHECKING:
    from .engine import Encoded, LocalAnswer


class Pipeline:
    """See the module's docstring."""

    def __init__(
        self,
        control: Control,
        points: Sequence[OperatingPoint],
        limits: Limits,
        ledger: Ledger,
        *,
        local_s: float,
        exits_s: Mapping[str, float] = {},
        filtering: Filtering | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        """Start with nothing captured and no connection.

        Args:
            control: chooses operating points.
            points: what it chooses among; without a `local` one nothing is answered on the device.
            limits: what a frame may take.
            ledger: where frames are entered and closed.
            local_s: seconds that the uncut model is expected to take for an answer, until some have been measured.
            exits_s: the same of exits, by `OperatingPoint.stage`.
            filtering: keeps frames on the device in which there is nothing; None sends all.
            keeping: keeps frames on the device of which an exit is sure; None asks none.
        """
        self._filtering, self._keeping = filtering, keeping
        self._ledger, self.limits, self.connected = ledger, limits, False
        self.trace_of: Callable[[int], bytes] | None = None
        """Where frames are traced: a frame's ids, which are sent with it."""
        self._waiting, self._most_in_flight = Waiting(ledger, limits.most_waiting), limits.max_in_flight
        self._computing: Frame | None = None
        self._outbox = Outbox()
        self._unanswered = Unanswered()
        self._references = References()
        self._holding = Holding(limits.lossless)
        self._next: Work | None = None
        self._take(control, points, local_s, exits_s)
        self._rescue = Rescue(ledger, limits, self._own, self._reserve)

    def use(
        self,
        control: Control,
        points: Sequence[OperatingPoint],
        local_s: float,
        exits_s: Mapping[str, float] = {},
    ) -> None:
        """Go on with another control loop and other operating points: those of a bundle that was fetched anew."""
        self._take(control, points, local_s, exits_s)
        self._rescue.use(self._own, self._reserve)

    def _take(
        self, control: Control, points: Sequence[OperatingPoint], local_s: float, exits_s: Mapping[str, float]
    ) -> None:
        self.control = control
        self._own = OnDevice(points, local_s, exits_s)
        self._made = Made(control, self._ledger, self.limits)
        self._reserve = Reserve(control, self._ledger, self.limits, self._own)

    # A frame's way, in order.

    def captured(self, picture: Image.Image | None, captured_at: float, problem: str = "") -> None:
        """A frame was captured, or could not be because of `problem`."""
        frame = self._ledger.enter(captured_at, self.limits.deadline_s, picture)
        if picture is None:
            self._ledger.close(frame, Outcome.ERROR, problem)
            return
        self._waiting.add(frame, BUSY if self.connected else OUTAGE)

    def take_up(self, now: float) -> Work | None:
        """The device is free: what it computes next, if there is something. Ask again after every event."""
        if self._next is not None:
            work, self._next = self._next, None
            return work
        if self._computing is not None:
            return None
        if (rescued := self._rescue.next(now)) is not None:
            return self._compute(*rescued, now)
        while self._waiting:
            frame = self._waiting.pop()
            if now >= frame.deadline_at and not self.limits.lossless:
                self._ledger.close(frame, Outcome.DROPPED, STALE)
            elif (chosen := self._choose(frame, now)) is not None or frame.outcome is None:
                return chosen
        return None

    def encoded(self, frame: Frame, coded: Encoded, now: float) -> None:
        """The device has made the frame's packet."""
        self._computing = None
        self._made.note(frame, coded)
        self._holding.encoded(coded.seconds)
        if frame.outcome is not None or self._made.keeps(frame, coded, now):
            return
        if (again := self._made.anew(frame, coded, now, connected=self.connected)) is not None:
            self._computing, self._next = frame, again
            return
        frame.packet, frame.pixels = coded.packet, coded.pixels
        if coded.pixels is not None:
            frame.picture = None
        frame.video = coded.video
        if (reserve := self._reserve.wanted(frame, coded, now)) is not None:
            self._computing, self._next = frame, reserve
        if frame.epoch != self._references.epoch:
            self._references.do_without(frame)
        frame.predicted = frame.video is not None and frame.video.alone is not None
        if len(frame.packet) > self.limits.max_packet_bytes:
            most = self.limits.max_packet_bytes
            said = f"its packet of {len(frame.packet)} bytes is over the server's limit of {most}"
            self._ledger.close(frame, Outcome.ERROR, said)
        elif self.connected or self._must_wait:
            self._outbox.add(frame)
        else:
            self._rescue.add(frame, now, OUTAGE)

    def next_to_write(self, now: float) -> Outgoing | Continuation | None:
        """The stream can take something: a leaving frame's next slice, or the next packet that is still worth it."""
        if self._outbox.leaves_in_parts(self._unanswered):
            part = self._outbox.next_part(now)
            if part is not None and part.slice:
                self.control.on_continued(len(part.slice))
            return part
        while (frame := self._outbox.pop()) is not None:
            if frame.outcome is not None:
                continue
            if self._holding.at(now):  # it was made before the server said so
                self._rescue.add(frame, now, FULL)
                continue
            if not self.limits.lossless and not self.control.worth_writing(now, frame.captured_at, len(frame.packet)):
                self._reserve.end(frame, now, Outcome.DROPPED, BUDGET if self.control.spent else STALE)
                continue
            outgoing = self._outbox.begin(frame, self.control.link, self.limits, now)
            size = len(outgoing.packet)
            frame.written_at, frame.packet = now, b""
            frame.sent_bytes += size
            self._unanswered.add(frame)
            self.control.on_written(frame.id, size, now)
            for keeper in (self._filtering, self._keeping):
                if keeper is not None:
                    keeper.on_written(now)
            self._outbox.begun(now)
            return outgoing if self.trace_of is None else replace(outgoing, trace=self.trace_of(frame.id))
        return None

    def answered(self, result: Result, now: float) -> None:
        """The server's result has come; one for a frame that is not on its way is ignored."""
        frame = self._unanswered.take(result.frame_id, now)
        if frame is None or frame.written_at is None:
            return
        self._made.tell()
        server_s = result.timing.total_us / 1e6
        is_ok, video, frame.video = result.status is Status.OK, frame.video, None
        self.control.on_result(frame.id, now, server_s=server_s, queue_depth=result.queue_depth, answered=is_ok)
        whole = video is not None and is_ok and result.slices == video.slices
        if whole and video is not None and video.reference is not None:
            self._references.answered(frame.id, video.reference)
        if result.status is Status.MISSING_REFERENCE:
            self._references.forget(self._outbox)
        if frame.outcome is not None:
            return
        frame.note(result, link_s=max(0.0, now - frame.written_at - server_s))
        if is_ok:
            if frame.empty and self._filtering is not None:
                self._filtering.on_answer(frame.boxes)
            self._ledger.answer(frame, Outcome.OK, now)
        elif result.status is Status.DEADLINE_EXCEEDED:
            self._reserve.end(frame, now, Outcome.LATE, result.message or "the server dropped it: too late")
        elif result.status is Status.MISSING_REFERENCE and video is not None and video.alone is not None:
            frame.video = video
            self._references.do_without(frame)
            self._outbox.add(frame, first=True)
        elif result.status in (Status.RESOURCE_EXHAUSTED, Status.UNAVAILABLE):
            self._holding.told(result.retry_ms, now)
            self._rescue.add(frame, now, result.message or result.status.name.lower(), Outcome.DROPPED)
        else:
            self._ledger.close(frame, Outcome.ERROR, result.message or f"the server said {result.status.name}")

    def answered_locally(self, frame: Frame, answer: LocalAnswer, now: float) -> None:
        """The device has answered by itself."""
        self._computing = None
        if frame.point is not None:
            self._own.took(frame.point, answer.seconds)
            if answer.prepare_s > 0:
                self.control.on_computed(frame.point, answer.seconds, now)
        if frame.outcome is not None:
            return
        frame.timings["prepare"] = frame.timings.get("prepare", 0.0) + answer.prepare_s
        frame.timings["compute"] = answer.compute_s
        frame.labels, frame.confidence = answer.labels, answer.confidence
        self._ledger.answer(frame, Outcome.LOCAL, now)

    def reserved(self, frame: Frame, answer: LocalAnswer, now: float) -> None:
        """The device has answered for a frame that was to be sent, in case the server's answer is late."""
        self._computing = None
        self._reserve.came(frame, answer, now)

    def abandoned(self, frame: Frame, now: float) -> None:
        """The device has stopped making the frame's packet, since there is no stream to send it on."""
        self._computing = None
        if frame.outcome is None:
            self._rescue.add(frame, now, OUTAGE)

    def compute_failed(self, frame: Frame, message: str) -> None:
        """The device could not compute the frame."""
        self._computing = None
        if frame.reserve_comes:
            self._reserve.failed(frame)
        elif frame.outcome is None:
            self._ledger.close(frame, Outcome.ERROR, message)

    # The connection.

    def connect(
        self,
        now: float,
        *,
        max_in_flight: int,
        max_packet_bytes: int,
        round_trip_s: float | None = None,
        references: int = 0,
    ) -> None:
        """The server has greeted us, with its limits; that took `round_trip_s`, if it was timed. It keeps so many
        `references` to predict frames from."""
        self._references.connect(references)
        self.connected = True
        self._holding.connected()
        self._unanswered.connected(now)
        self._most_in_flight = min(self.limits.max_in_flight, max_in_flight)
        self.limits = replace(self.limits, max_packet_bytes=max_packet_bytes)
        self.control.on_connected(now)
        if round_trip_s is not None:
            self.control.on_round_trip(round_trip_s, now)

    def disconnect(self, now: float) -> None:
        """The stream is broken, what is on its way gets no answer: serve it on the device where time allows."""
        self.connected = False
        self._outbox.break_off()
        self._made.tell()
        self.control.on_disconnected(now)
        lost = self._unanswered.take_all()
        if not self._must_wait:
            lost += self._outbox.take_all()
        self._references.forget(self._outbox)
        for frame in lost:
            if frame.outcome is None:
                self._rescue.add(frame, now, OUTAGE)

    def forget_packets(self) -> None:
        """Packets that were made under another bundle cannot be sent any more."""
        for frame in self._outbox.take_all():
            if frame.outcome is None:
                self._ledger.close(frame, Outcome.DROPPED, OUTAGE)

    # Time.

    def next_timer(self) -> float | None:
        """When `tick` is due, if something is waited for."""
        overdue_at = self._reserve.next_due(self._unanswered, self._outbox)
        times = (self.stalls_at(), self._outbox.next_timer, overdue_at)
        return min((at for at in times if at is not None), default=None)

    def tick(self, now: float) -> None:
        """Give up waiting for answers that are overdue; let the next part of a frame leave."""
        self._outbox.tick(now)
        self._reserve.tick(self._unanswered, self._outbox, now)

    def stalls_at(self) -> float | None:
        """When the stream counts as hanging, unless an answer comes before; None while nothing is on its way."""
        return self._unanswered.stalls_at(self.limits.stall_s)

    def finish(self) -> None:
        """Give every frame that is still open its outcome; nothing is waited for any more."""
        for frame in self._ledger.open_frames():
            if frame.written_at is not None:
                self._ledger.close(frame, Outcome.LATE, NO_ANSWER)
            else:
                self._ledger.close(frame, Outcome.DROPPED, STOPPED)
        self._waiting.clear()
        self._next = None
        self._rescue.clear()
        self._outbox = Outbox()

    @property
    def wants_frame(self) -> bool:
        """Whether a frame captured now would be taken up at once; asked when frames are captured on demand."""
        idle = not self._waiting and self._computing is None and not self._rescue
        return idle and self.in_flight < self._most_in_flight and self._ready_to_serve

    @property
    def has_packets(self) -> bool:
        """Whether `next_to_write` may have something."""
        return self._outbox.has_some

    @property
    def in_flight(self) -> int:
        """Frames that are written, or ready to be, and have no answer."""
        return len(self._unanswered) + len(self._outbox)

    # How it decides.

    @property
    def _must_wait(self) -> bool:
        """Whether packets are kept until there is a stream again, since nothing may be dropped."""
        return self.limits.lossless and not self._own

    @property
    def _ready_to_serve(self) -> bool:
        """On demand nothing may be dropped: without a connection frames wait, unless the device can answer them."""
        return self.connected or bool(self._own)

    def _choose(self, frame: Frame, now: float) -> Work | None:
        if not self.connected and not self._own:
            if self.limits.lossless:
                self._waiting.put_back(frame)
            else:
                self._ledger.close(frame, Outcome.DROPPED, OUTAGE)
            return None
        self._made.tell()
        choice = self.control.choose(now, frame.captured_at, compute_free_at=now)
        if choice.skip and not self.limits.lossless:
            self._ledger.close(frame, Outcome.DROPPED, BUSY if self.connected else OUTAGE)
            return None
        point, reason = decide(
            choice,
            self._own,
            self.limits,
            frame.deadline_at - now,
            connected=self.connected,
            room=self.in_flight < self._most_in_flight,
            outage=self.control.in_outage(now),
            held=self._holding.when_ready(now),
            spent=self.control.spent,
        )
        if point is not None:
            frame.reserved_by = choice.reserve if point is choice.point else None
            return self._compute(frame, point, now)
        if reason:
            self._ledger.close(frame, Outcome.DROPPED, reason)
        else:
            self._waiting.put_back(frame)
        return None

    def _compute(self, frame: Frame, point: OperatingPoint, now: float) -> Work:
        self._computing, frame.point, frame.epoch = frame, point, self._references.epoch
        frame.timings.setdefault("wait", now - frame.captured_at)
        local = point.kind is Kind.LOCAL
        filtered = self._filtering is not None and not local and not self._filtering.must_send(now)
        earlier = None
        if self._references.active and point.kind is Kind.FEATURE:
            earlier = self._references.earlier(frame.id, point.split, self.in_flight)
        sure = self._keeping.sure(now) if self._keeping is not None and point.kind is Kind.FEATURE else None
        return Work(frame, local, filtered, earlier, sure)

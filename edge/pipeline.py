"""A frame's way through the edge. Read this file first.

    captured --> waits for the device --> taken up: an operating point is chosen
        |                                     |
        | (a newer frame takes its place)     +-- local --> computed on the device --> `local`, or `late`
        v                                     |
     `dropped`                                +-- feature, image --> encoded --> written --> answered --> `ok`, `late`
                                                   (nothing in it) |   |           |
                                                        `filtered` <   |           |
                                   (stale before it is written) `dropped`          | (the stream breaks)
                                                                                   v
                                                  answered on the device if there is time, else `late`

This is the core: it knows no clock, no thread and no socket. Events go in as method calls with the time `now`
(seconds, monotonic); what to do next comes out of `take_up` (compute this), `next_to_write` (send this) and
`next_timer` (call `tick` then). `driver` does what it says. Whatever the order of events, the ledger gives each
captured frame one outcome.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from PIL import Image

from ..models.operating_point import Kind, OperatingPoint
from ..protos.messages import Continuation, Result, Status
from .filtering import Filtering
from .interfaces import Control, Limits, Outgoing, Work
from .ledger import BUSY, FULL, NO_ANSWER, OUTAGE, STALE, STOPPED, Frame, Ledger, Outcome
from .lessons import Lessons
from .parts import Parts
from .references import References

if TYPE_CHECKING:
    from .engine import Encoded, LocalAnswer

MOST_HELD_MS = 10_000
"""Longest delay that a server is granted: a broken one must not silence a device."""

LOCAL_GAIN = 0.3
"""Weight of the newest local answer in the estimate of what the next one takes."""


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
        filtering: Filtering | None = None,
    ) -> None:
        """Start with nothing captured and no connection.

        Args:
            control: chooses operating points.
            points: what it chooses among; without a `local` one nothing is answered on the device.
            limits: what a frame may take.
            ledger: where frames are entered and closed.
            local_s: seconds that a local answer is expected to take, until some have been measured.
            filtering: keeps frames on the device in which there is nothing; None sends all.
        """
        self._filtering = filtering
        self._ledger, self.limits, self.connected = ledger, limits, False
        self.trace_of: Callable[[int], bytes] | None = None
        """Where frames are traced: a frame's ids, which are sent with it."""
        self._waiting: Frame | None = None
        self._computing: Frame | None = None
        self._outbox: deque[Frame] = deque()
        self._parts: Parts | None = None
        self._unanswered: dict[int, Frame] = {}
        self._rescue: deque[Frame] = deque()
        self._references = References()
        self._lessons = Lessons()
        self._again: Work | None = None
        self._last_answer_at = float("-inf")
        self._held_until, self._encode_s = float("-inf"), 0.0
        self.use(control, points, local_s)

    def use(self, control: Control, points: Sequence[OperatingPoint], local_s: float) -> None:
        """Go on with another control loop and other operating points: those of a bundle that was fetched anew."""
        self.control = control
        self._lessons.clear()
        self._local = next((p for p in points if p.kind is Kind.LOCAL), None)
        self._local_s = local_s

    # A frame's way, in order.

    def captured(self, picture: Image.Image | None, captured_at: float, problem: str = "") -> None:
        """A frame was captured, or could not be because of `problem`. It takes the place of one that still waits."""
        frame = self._ledger.enter(captured_at, self.limits.deadline_s, picture)
        if picture is None:
            self._ledger.close(frame, Outcome.ERROR, problem)
            return
        if self._waiting is not None:
            self._ledger.close(self._waiting, Outcome.DROPPED, BUSY if self.connected else OUTAGE)
        self._waiting = frame

    def take_up(self, now: float) -> Work | None:
        """The device is free: what it computes next, if there is something. Ask again after every event."""
        if self._again is not None:
            work, self._again = self._again, None
            return work
        if self._computing is not None:
            return None
        while self._rescue:
            frame = self._rescue.popleft()
            if self._in_time_locally(frame, now):
                return self._compute(frame, self._local, now)
            self._close_unserved(frame, OUTAGE)
        frame_or_none, self._waiting = self._waiting, None
        if frame_or_none is None:
            return None
        frame = frame_or_none
        if now >= frame.deadline_at and not self.limits.lossless:
            self._ledger.close(frame, Outcome.DROPPED, STALE)
            return None
        return self._choose(frame, now)

    def encoded(self, frame: Frame, coded: Encoded, now: float) -> None:
        """The device has made the frame's packet."""
        self._computing = None
        if frame.coded_again:
            frame.timings["again"] = coded.coder_s
        else:
            frame.timings.update(prepare=coded.prepare_s, compute=coded.compute_s, compress=coded.compress_s)
            self._encode_s = coded.seconds
        frame.presence, frame.empty = coded.presence, coded.empty
        if frame.outcome is not None or frame.point is None:
            return
        if not coded.packet:
            self.control.on_computed(frame.point, coded.seconds, now)
            self._ledger.close(frame, Outcome.FILTERED)
            return
        if not frame.coded_again:
            self._lessons.add(frame.point, coded, now)
        if (again := self._look_again(frame, coded, now)) is not None:
            self._computing, self._again = frame, again
            return
        frame.packet, frame.pixels = coded.packet, coded.pixels
        if coded.pixels is not None:
            frame.picture = None
        frame.video = coded.video
        if frame.epoch != self._references.epoch:
            self._make_key_frame(frame)
        frame.predicted = frame.video is not None and frame.video.alone is not None
        if len(frame.packet) > self.limits.max_packet_bytes:
            self._ledger.close(
                frame,
                Outcome.ERROR,
                f"its packet of {len(frame.packet)} bytes is over the server's limit of {self.limits.max_packet_bytes}",
            )
        elif self.connected or self._must_wait:
            self._outbox.append(frame)
        else:
            self._rescue_or_close(frame, now, OUTAGE)

    def next_to_write(self, now: float) -> Outgoing | Continuation | None:
        """The stream can take something: the next slice of a frame that leaves in parts, or the next packet that is
        still worth it."""
        parts = self._parts
        if parts is not None and parts.frame.id in self._unanswered:
            continuation = parts.next_to_write(now, self._outbox)
            self._parts = None if parts.done else parts
            return continuation
        if parts is not None:  # the server's patience was shorter: it has answered from what it had
            parts.give_up()
            self._parts = None
        while self._outbox:
            frame = self._outbox.popleft()
            size = len(frame.packet)
            if now < self._held_until and not self.limits.lossless:  # it was made before the server said so
                self._rescue_or_close(frame, now, FULL)
                continue
            if not self.limits.lossless and not self.control.worth_writing(now, frame.captured_at, size):
                self._ledger.close(frame, Outcome.DROPPED, STALE)
                continue
            remaining_ms = 0 if self.limits.lossless else max(1, round((frame.deadline_at - now) * 1000))
            outgoing = Outgoing(frame.packet, remaining_ms)
            if self.limits.cut_short and not self.limits.lossless:
                self._parts = Parts.of(frame, self.control, now)
            if self._parts is not None:
                outgoing = self._parts.first(now, remaining_ms)
                size = len(outgoing.packet)
            if self.limits.say_size:
                outgoing = replace(outgoing, size=frame.size)
            frame.written_at, frame.packet = now, b""
            frame.sent_bytes += size
            self._unanswered[frame.id] = frame
            self.control.on_written(frame.id, size, now)
            if self._filtering is not None:
                self._filtering.on_written(now)
            if self._parts is not None:
                self._parts.wait(now)
            return outgoing if self.trace_of is None else replace(outgoing, trace=self.trace_of(frame.id))
        return None

    def answered(self, result: Result, now: float) -> None:
        """The server's result has come; one for a frame that is not on its way is ignored."""
        frame = self._unanswered.pop(result.frame_id, None)
        if frame is None or frame.written_at is None:
            return
        self._last_answer_at = now
        self._lessons.tell(self.control)
        server_s = result.timing.total_us / 1e6
        self.control.on_result(frame.id, now, server_s=server_s, queue_depth=result.queue_depth)
        video, frame.video = frame.video, None
        whole = video is not None and result.status is Status.OK and result.slices == video.slices
        if whole and video is not None and video.reference is not None:
            self._references.answered(frame.id, video.reference)
        if result.status is Status.MISSING_REFERENCE:
            self._forget_references()
        if frame.outcome is not None:
            return
        frame.note(result, link_s=max(0.0, now - frame.written_at - server_s))
        if result.status is Status.OK:
            if frame.empty and self._filtering is not None:
                self._filtering.on_answer(frame.boxes)
            self._close_answered(frame, Outcome.OK, now)
        elif result.status is Status.DEADLINE_EXCEEDED:
            self._ledger.close(frame, Outcome.LATE, result.message or "the server dropped it: too late")
        elif result.status is Status.MISSING_REFERENCE and video is not None and video.alone is not None:
            frame.video = video
            self._make_key_frame(frame)
            self._outbox.appendleft(frame)
        elif result.status in (Status.RESOURCE_EXHAUSTED, Status.UNAVAILABLE):
            # The server is full, and says when to come again: until then frames are answered here, or dropped unsent.
            self._held_until = max(self._held_until, now + min(result.retry_ms, MOST_HELD_MS) / 1e3)
            self._rescue_or_close(frame, now, result.message or result.status.name.lower(), Outcome.DROPPED)
        else:
            self._ledger.close(frame, Outcome.ERROR, result.message or f"the server said {result.status.name}")

    def answered_locally(self, frame: Frame, answer: LocalAnswer, now: float) -> None:
        """The device has answered by itself."""
        self._computing = None
        self._local_s += LOCAL_GAIN * (answer.compute_s + max(answer.prepare_s, 0.0) - self._local_s)
        if self._local is not None and answer.prepare_s > 0:
            self.control.on_computed(self._local, answer.seconds, now)
        if frame.outcome is not None:
            return
        frame.timings["prepare"] = frame.timings.get("prepare", 0.0) + answer.prepare_s
        frame.timings["compute"] = answer.compute_s
        frame.labels = answer.labels
        self._close_answered(frame, Outcome.LOCAL, now)

    def abandoned(self, frame: Frame, now: float) -> None:
        """The device has stopped making the frame's packet, since there is no stream to send it on."""
        self._computing = None
        if frame.outcome is None:
            self._rescue_or_close(frame, now, OUTAGE)

    def compute_failed(self, frame: Frame, message: str) -> None:
        """The device could not compute the frame."""
        self._computing = None
        if frame.outcome is None:
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
        self._held_until = float("-inf")
        self.connected, self._last_answer_at = True, now
        self._server_in_flight = max_in_flight
        self.limits = replace(self.limits, max_packet_bytes=max_packet_bytes)
        self.control.on_connected(now)
        if round_trip_s is not None:
            self.control.on_round_trip(round_trip_s, now)

    def disconnect(self, now: float) -> None:
        """The stream is broken, what is on its way gets no answer: serve it on the device where time allows."""
        self.connected, self._parts = False, None
        self._lessons.tell(self.control)
        self.control.on_disconnected(now)
        lost = list(self._unanswered.values())
        self._unanswered.clear()
        if not self._must_wait:
            lost += self._outbox
            self._outbox.clear()
        self._forget_references()
        for frame in lost:
            if frame.outcome is None:
                self._rescue_or_close(frame, now, OUTAGE)

    def forget_packets(self) -> None:
        """Packets that were made under another bundle cannot be sent any more."""
        while self._outbox:
            self._ledger.close(self._outbox.popleft(), Outcome.DROPPED, OUTAGE)

    # Time.

    def next_timer(self) -> float | None:
        """When `tick` is due, if something is waited for."""
        times = [f.deadline_at + self.limits.grace_s for f in self._first_unanswered()]
        part_at = self._parts.next_timer if self._parts is not None else None
        times += [at for at in (self.stalls_at(), part_at) if at is not None]
        return min(times, default=None)

    def tick(self, now: float) -> None:
        """Give up waiting for answers that are overdue by the grace period; let the next part of a frame leave."""
        if self._parts is not None:
            self._parts.tick(now)
        for frame in list(self._unanswered.values()):
            if frame.outcome is None and now >= frame.deadline_at + self.limits.grace_s:
                self._ledger.close(frame, Outcome.LATE, NO_ANSWER)

    def stalls_at(self) -> float | None:
        """When the stream counts as hanging, unless an answer comes before; None while nothing is on its way."""
        oldest = next(iter(self._unanswered.values()), None)
        if oldest is None or oldest.written_at is None:
            return None
        return max(oldest.written_at, self._last_answer_at) + self.limits.stall_s

    def finish(self) -> None:
        """Give every frame that is still open its outcome; nothing is waited for any more."""
        for frame in self._ledger.open_frames():
            if frame.written_at is not None:
                self._ledger.close(frame, Outcome.LATE, NO_ANSWER)
            else:
                self._ledger.close(frame, Outcome.DROPPED, STOPPED)
        self._waiting, self._parts, self._again = None, None, None
        self._rescue.clear()
        self._outbox.clear()

    @property
    def wants_frame(self) -> bool:
        """Whether a frame captured now would be taken up at once; asked when frames are captured on demand."""
        idle = self._waiting is None and self._computing is None and not self._rescue
        return idle and self.in_flight < self._cap and self._ready_to_serve

    @property
    def has_packets(self) -> bool:
        """Whether `next_to_write` may have something."""
        return bool(self._outbox) or (self._parts is not None and self._parts.due)

    @property
    def in_flight(self) -> int:
        """Frames that are written, or ready to be, and have no answer."""
        return len(self._unanswered) + len(self._outbox)

    # How it decides.

    _server_in_flight = 2**31

    @property
    def _cap(self) -> int:
        return min(self.limits.max_in_flight, self._server_in_flight)

    @property
    def _must_wait(self) -> bool:
        """Whether packets are kept until there is a stream again, since nothing may be dropped."""
        return self.limits.lossless and self._local is None

    @property
    def _ready_to_serve(self) -> bool:
        """On demand nothing may be dropped: without a connection frames wait, unless the device can answer them."""
        return self.connected or self._local is not None

    def _choose(self, frame: Frame, now: float) -> Work | None:
        if not self.connected and self._local is None:
            if self.limits.lossless:
                self._waiting = frame
            else:
                self._ledger.close(frame, Outcome.DROPPED, OUTAGE)
            return None
        self._lessons.tell(self.control)
        choice = self.control.choose(now, frame.captured_at, compute_free_at=now)
        # What is begun now is sent when it is coded.
        held = not self.limits.lossless and now + self._encode_s < self._held_until
        remote = choice.point.kind is not Kind.LOCAL and self.connected and not held
        if remote and self.in_flight < self._cap and (choice.p_on_time > 0 or choice.probe or self.limits.lossless):
            return self._compute(frame, choice.point, now)
        if remote and self.limits.lossless:
            self._waiting = frame
            return None
        # What waited too long for a local answer makes room for a fresh frame, if that would be answered in time. And
        # where no local answer ever is, the device stays free for the moment at which the link carries something again.
        local_helps, link_may_help = (
            self._local_s <= self.limits.deadline_s,
            self.connected and (held or choice.p_on_time <= 0),
        )
        wasted = (local_helps or link_may_help) and not self._in_time_locally(frame, now)
        if self._local is not None and not wasted:
            return self._compute(frame, self._local, now)
        if not self.connected or self.control.in_outage(now):
            reason = OUTAGE
        elif held:
            reason = FULL
        else:
            reason = BUSY if remote and self.in_flight >= self._cap else STALE
        self._ledger.close(frame, Outcome.DROPPED, reason)
        return None

    def _look_again(self, frame: Frame, coded: Encoded, now: float) -> Work | None:
        """Code the frame anew at another rate level of its split point, where the packet that came out is too large."""
        if frame.coded_again or coded.again is None or frame.point is None or self.limits.lossless:
            return None
        if not self.connected:
            return None
        size = len(coded.packet)
        point = self.control.look_again(now, frame.captured_at, frame.point, size, coded.coder_s)
        if point.id == frame.point.id:
            return None
        frame.point, frame.coded_again, again = point, True, coded.again
        return Work(frame, local=False, again=lambda: again(point))

    def _compute(self, frame: Frame, point: OperatingPoint | None, now: float) -> Work:
        self._computing, frame.point, frame.epoch = frame, point, self._references.epoch
        frame.timings.setdefault("wait", now - frame.captured_at)
        local = point is self._local
        filtered = self._filtering is not None and not local and not self._filtering.must_send(now)
        earlier = None
        if self._references.active and point is not None and point.kind is Kind.FEATURE:
            earlier = self._references.earlier(frame.id, point.split, self.in_flight)
        return Work(frame, local, filtered, earlier)

    def _forget_references(self) -> None:
        """The server keeps nothing any more of what was sent so far: what waits to be sent must do without."""
        self._references.forget()
        for frame in self._outbox:
            self._make_key_frame(frame)

    def _make_key_frame(self, frame: Frame) -> None:
        """What was predicted from a frame that is gone is coded anew, by itself."""
        frame.epoch = self._references.epoch
        if frame.video is not None and frame.video.alone is not None:
            frame.video, frame.predicted = frame.video.alone(), False
            frame.packet = frame.video.packet

    def _in_time_locally(self, frame: Frame, now: float) -> bool:
        return self._local is not None and (self.limits.lossless or now + self._local_s <= frame.deadline_at)

    def _rescue_or_close(self, frame: Frame, now: float, reason: str, otherwise: Outcome | None = None) -> None:
        """Let the device answer what the server will not; oldest first, since they have the least time."""
        known = frame.pixels is not None or frame.picture is not None
        if known and self._in_time_locally(frame, now):
            self._rescue.append(frame)
        elif otherwise is not None:
            self._ledger.close(frame, otherwise, reason)
        else:
            self._close_unserved(frame, reason)

    def _close_unserved(self, frame: Frame, reason: str) -> None:
        if frame.written_at is not None:
            self._ledger.close(frame, Outcome.LATE, NO_ANSWER)
        else:
            self._ledger.close(frame, Outcome.DROPPED, reason)

    def _close_answered(self, frame: Frame, outcome: Outcome, now: float) -> None:
        frame.latency_s = now - frame.captured_at
        self._ledger.close(frame, outcome if now <= frame.deadline_at else Outcome.LATE)

    def _first_unanswered(self) -> list[Frame]:
        """The open frame that is overdue first; frames are written in the order in which they were captured."""
        return next(([f] for f in self._unanswered.values() if f.outcome is None), [])

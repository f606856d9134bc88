"""The answer in reserve: computed behind the packet, given once where the server's answer does not come in time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from headrace.edge.engine import Encoded, LocalAnswer
from headrace.edge.interfaces import Outgoing, Work
from headrace.edge.ledger import Frame, Outcome
from headrace.edge.reserve import EARLY_S
from headrace.models.bitstream import Packet
from headrace.models.operating_point import Kind, OperatingPoint
from headrace.protos.messages import Label, Status

from .rig import FEATURE, PICTURE, PIXELS, Choice, Rig, ok

EXIT = OperatingPoint(5, Kind.LOCAL, "small", accuracy=0.6)
ANSWER = LocalAnswer((Label(7, 0.8),), 0.001, 0.004, 0.7, EXIT)


def coded(frame: int) -> Encoded:
    packet = Packet(FEATURE.id, frame, (b"x" * 80,)).to_bytes()
    return Encoded(packet, PIXELS, 0.01, 0.02, 0.03)


class Betting(Rig):
    """A pipeline whose control loop wants the exit's answer in reserve; deadline 0.25 s."""

    def __init__(self, points: tuple[OperatingPoint, ...] = (FEATURE, EXIT), **limits: object) -> None:
        super().__init__(points, local_s=0.01, **limits)
        self.control.choice = Choice(FEATURE, reserve=EXIT)

    def ready(self) -> Frame:
        """A frame whose packet is made at 1.06 and not written, while the device computes the answer in reserve."""
        self.pipeline.captured(PICTURE, 1.0)
        work = self.pipeline.take_up(1.0)
        assert work is not None
        self.pipeline.encoded(work.frame, coded(work.frame.id), 1.06)
        behind = self.pipeline.take_up(1.06)
        assert behind is not None and behind.reserve is EXIT
        return work.frame

    def sent(self, now: float = 1.0) -> Work:
        """A frame up to the wire; the work that is left to do for it."""
        self.pipeline.captured(PICTURE, now)
        work = self.pipeline.take_up(now)
        assert work is not None and work.reserve is None
        self.pipeline.encoded(work.frame, coded(work.frame.id), now + 0.06)
        assert self.pipeline.next_to_write(now + 0.06) is not None, "the packet goes first"
        behind = self.pipeline.take_up(now + 0.06)
        assert behind is not None and behind.reserve is EXIT and behind.frame is work.frame
        assert self.pipeline.take_up(now + 0.06) is None, "the device has one core"
        return behind

    def asked(self, now: float = 1.0) -> Frame:
        """A frame that is sent and has its answer in reserve."""
        work = self.sent(now)
        self.pipeline.reserved(work.frame, ANSWER, now + 0.07)
        return work.frame


def test_the_servers_answer_is_better():
    rig = Betting()
    rig.asked()
    rig.pipeline.answered(ok(0), 1.2)
    (frame,) = rig.closed
    assert (frame.outcome, frame.labels[0].index, frame.fell_back) == (Outcome.OK, 3, False)
    assert ("reserve", EXIT.name, 0.005) in rig.control.heard and not any(h[0] == "fallback" for h in rig.control.heard)


def test_without_one_by_the_deadline_the_exits_is_given():
    rig = Betting()
    rig.asked()
    due = rig.pipeline.next_timer()
    assert due == pytest.approx(1.25 - EARLY_S)
    rig.pipeline.tick(due - 0.001)
    assert not rig.closed
    rig.pipeline.tick(due)
    (frame,) = rig.closed
    assert (frame.outcome, frame.labels[0].index, frame.confidence) == (Outcome.LOCAL, 7, 0.7)
    assert frame.fell_back and frame.fell_back_to is EXIT and frame.point is FEATURE
    assert frame.sent_bytes > 80 and frame.latency_s < 0.25
    assert rig.control.heard[-1] == ("fallback", EXIT.name)


def test_an_answer_that_comes_after_that_is_learned_from_and_changes_nothing():
    rig = Betting()
    rig.asked()
    rig.pipeline.tick(1.249)
    rig.pipeline.answered(ok(0), 1.4)
    assert rig.outcomes() == [(0, Outcome.LOCAL, "")]
    assert ("result", 0, 1.4, 0.007) in rig.control.heard


def test_a_timer_that_fires_too_late_gives_nothing():
    rig = Betting()
    rig.asked()
    rig.pipeline.tick(1.26)
    assert rig.outcomes() == [(0, Outcome.LATE, "no answer")]


def test_one_that_is_not_there_yet_is_no_answer():
    rig = Betting()
    work = rig.sent()
    rig.pipeline.tick(1.249)
    assert not rig.closed, "it may come in the next moment"
    rig.pipeline.tick(1.0 + 0.25 + rig.pipeline.limits.grace_s)
    assert rig.outcomes() == [(0, Outcome.LATE, "no answer")]
    rig.pipeline.reserved(work.frame, ANSWER, 2.5)
    assert len(rig.closed) == 1


def test_a_frame_that_is_not_worth_sending_is_answered_when_the_exit_has():
    rig = Betting()
    rig.control.worth = False
    rig.pipeline.captured(PICTURE, 1.0)
    work = rig.pipeline.take_up(1.0)
    rig.pipeline.encoded(work.frame, coded(0), 1.06)
    assert rig.pipeline.next_to_write(1.06) is None and not rig.closed
    behind = rig.pipeline.take_up(1.06)
    rig.pipeline.reserved(behind.frame, ANSWER, 1.07)
    (frame,) = rig.closed
    assert (frame.outcome, frame.fell_back, frame.sent_bytes) == (Outcome.LOCAL, True, 0)


@pytest.mark.parametrize("status", [Status.RESOURCE_EXHAUSTED, Status.UNAVAILABLE])
def test_a_server_that_is_too_busy_costs_no_answer(status):
    rig = Betting()
    rig.asked()
    rig.pipeline.answered(ok(0, status, "busy"), 1.1)
    assert rig.outcomes() == [(0, Outcome.LOCAL, "")]


def test_a_broken_stream_costs_no_answer():
    rig = Betting()
    rig.asked()
    rig.pipeline.disconnect(1.1)
    assert rig.outcomes() == [(0, Outcome.LOCAL, "")]
    rig.pipeline.finish()
    assert len(rig.closed) == 1 and rig.ledger.open == 0


@pytest.mark.parametrize("limits", [{"fallback": False}, {"lossless": True}])
def test_none_is_kept_where_none_is_wanted(limits):
    rig = Betting(**limits)
    rig.pipeline.captured(PICTURE, 1.0)
    work = rig.pipeline.take_up(1.0)
    rig.pipeline.encoded(work.frame, coded(0), 1.06)
    rig.pipeline.next_to_write(1.06)
    assert rig.pipeline.take_up(1.06) is None


def test_none_is_computed_that_would_be_late():
    rig = Betting()
    rig.pipeline.captured(PICTURE, 1.0)
    work = rig.pipeline.take_up(1.0)
    rig.pipeline.encoded(work.frame, coded(0), 1.245)
    rig.pipeline.next_to_write(1.245)
    assert rig.pipeline.take_up(1.245) is None


def test_what_an_exit_said_before_the_packet_was_made_is_not_asked_again():
    rig = Betting()
    rig.pipeline.captured(PICTURE, 1.0)
    work = rig.pipeline.take_up(1.0)
    rig.pipeline.encoded(work.frame, replace(coded(0), own=ANSWER), 1.06)
    rig.pipeline.next_to_write(1.06)
    assert rig.pipeline.take_up(1.06) is None
    rig.pipeline.tick(1.248)
    assert rig.outcomes() == [(0, Outcome.LOCAL, "")]


def test_an_end_in_between_gives_it_its_outcome():
    rig = Betting()
    work = rig.sent()
    rig.pipeline.finish()
    rig.pipeline.reserved(work.frame, ANSWER, 1.1)
    assert rig.outcomes() == [(0, Outcome.LATE, "no answer")]


# While it is being computed, something happens to the frame ----------------------------------------------------------

ENDS = [
    ("the stream breaks", (Outcome.LATE, "no answer")),
    ("the server is full", (Outcome.DROPPED, "queue full")),
    ("the server finds it late", (Outcome.LATE, "too late")),
]


def happens(rig: Betting, what: str, now: float) -> None:
    if what == "the stream breaks":
        rig.pipeline.disconnect(now)
    elif what == "the server is full":
        rig.pipeline.answered(ok(0, Status.RESOURCE_EXHAUSTED, "queue full"), now)
    else:
        rig.pipeline.answered(ok(0, Status.DEADLINE_EXCEEDED, "too late"), now)


@pytest.mark.parametrize(("what", "ending"), ENDS)
def test_what_is_being_computed_is_waited_for(what, ending):
    rig = Betting()
    work = rig.sent()
    happens(rig, what, 1.16)
    assert rig.pipeline.take_up(1.16) is None and not rig.closed, "it is not computed a second time"
    rig.pipeline.reserved(work.frame, ANSWER, 1.17)
    assert rig.outcomes() == [(0, Outcome.LOCAL, "")] and work.frame.fell_back


@pytest.mark.parametrize(("what", "ending"), ENDS)
def test_where_it_comes_too_late_the_frame_ends_as_it_would_have_without(what, ending):
    rig = Betting()
    work = rig.sent()
    happens(rig, what, 1.16)
    rig.pipeline.reserved(work.frame, ANSWER, 1.26)
    assert rig.outcomes() == [(0, *ending)]


@pytest.mark.parametrize(("what", "ending"), ENDS)
def test_where_it_fails_the_frame_ends_as_it_would_have_without(what, ending):
    rig = Betting()
    work = rig.sent()
    happens(rig, what, 1.16)
    rig.pipeline.compute_failed(work.frame, "the exit cannot be run")
    assert rig.outcomes() == [(0, *ending)]


def test_where_it_fails_the_servers_answer_is_as_good_as_before():
    rig = Betting()
    work = rig.sent()
    rig.pipeline.compute_failed(work.frame, "the exit cannot be run")
    assert not rig.closed
    rig.pipeline.answered(ok(0), 1.12)
    assert rig.outcomes() == [(0, Outcome.OK, "")]


def test_where_it_fails_before_the_packet_is_written_that_still_is():
    rig = Betting()
    frame = rig.ready()
    rig.pipeline.compute_failed(frame, "the exit cannot be run")
    outgoing = rig.pipeline.next_to_write(1.1)
    assert isinstance(outgoing, Outgoing) and len(outgoing.packet) > 80


def test_it_is_given_although_a_frame_without_one_was_sent_before():
    rig = Betting()
    rig.control.choice = Choice(FEATURE)
    rig.send(1.0)
    rig.control.choice = Choice(FEATURE, reserve=EXIT)
    work = rig.sent(1.1)
    rig.pipeline.reserved(work.frame, ANSWER, 1.17)
    assert rig.pipeline.next_timer() == pytest.approx(1.35 - EARLY_S), "not that of the frame before: 1.25 and grace"
    rig.pipeline.tick(1.35 - EARLY_S)
    assert rig.outcomes() == [(1, Outcome.LOCAL, "")]


def test_it_is_given_while_the_stream_takes_no_packet():
    rig = Betting()
    rig.pipeline.reserved(rig.ready(), ANSWER, 1.07)
    due = rig.pipeline.next_timer()
    assert due == pytest.approx(1.25 - EARLY_S)
    rig.pipeline.tick(due)
    assert rig.outcomes() == [(0, Outcome.LOCAL, "")]
    assert rig.pipeline.next_to_write(1.3) is None and rig.pipeline.next_timer() is None


def test_a_frame_that_waits_for_the_device_in_vain_ends_for_the_servers_reason():
    rig = Betting(points=(FEATURE, EXIT))
    rig.control.choice = Choice(FEATURE)
    rig.send(1.0)
    rig.control.choice = Choice(EXIT)
    rig.pipeline.captured(PICTURE, 1.07)
    busy = rig.pipeline.take_up(1.07)
    assert busy is not None and busy.local
    rig.pipeline.answered(ok(0, Status.RESOURCE_EXHAUSTED, "queue full"), 1.1)
    rig.pipeline.answered_locally(busy.frame, ANSWER, 1.26)
    assert rig.pipeline.take_up(1.26) is None
    assert rig.outcomes() == [(1, Outcome.LOCAL, ""), (0, Outcome.DROPPED, "queue full")]


def test_an_answer_at_a_point_that_the_next_bundle_lacks_still_counts():
    rig = Betting()
    rig.control.choice = Choice(EXIT)
    rig.pipeline.captured(PICTURE, 1.0)
    work = rig.pipeline.take_up(1.0)
    assert work is not None and work.local
    rig.pipeline.use(rig.control, (FEATURE,), 0.1)
    rig.pipeline.answered_locally(work.frame, ANSWER, 1.05)
    assert rig.outcomes() == [(0, Outcome.LOCAL, "")]

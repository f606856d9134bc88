"""The pipeline's core in virtual time: one outcome a frame whatever happens, and what a broken stream leads to."""

from __future__ import annotations

import pytest
from headrace.edge.exceptions import LedgerError
from headrace.edge.interfaces import Work
from headrace.edge.ledger import Outcome
from headrace.protos.messages import Result, Status
from hypothesis import given, settings
from hypothesis import strategies as st

from .rig import FEATURE, LOCAL, PICTURE, PIXELS, Choice, Rig, ok


def test_a_frame_goes_there_and_back():
    rig = Rig()
    rig.pipeline.captured(PICTURE, 1.0)
    work = rig.pipeline.take_up(1.01)
    assert rig.pipeline.take_up(1.02) is None, "the device has one core"
    rig.encode(work, 1.07)
    out = rig.pipeline.next_to_write(1.08)
    assert (len(out.packet), out.remaining_ms) == (100, 170)
    assert rig.pipeline.in_flight == 1
    rig.pipeline.answered(ok(0), 1.2)
    (frame,) = rig.closed
    assert frame.outcome is Outcome.OK
    assert frame.latency_s == pytest.approx(0.2)
    assert frame.sent_bytes == 100
    assert frame.labels[0].index == 3
    expected = {"wait": 0.01, "prepare": 0.01, "compute": 0.02, "compress": 0.03, "link": 0.113, "server": 0.007}
    expected |= {"queue": 0.001, "decode": 0.002, "tail": 0.003}
    assert frame.timings == pytest.approx(expected)
    assert [h[0] for h in rig.control.heard] == ["connected", "written", "computed", "coded", "result"]
    assert rig.control.heard[2][2] == pytest.approx(0.06)


def test_an_answer_after_the_deadline_is_late_and_keeps_its_labels():
    rig = Rig()
    rig.send(0.0)
    rig.pipeline.answered(ok(0), 0.3)
    assert rig.outcomes() == [(0, Outcome.LATE, "")]
    assert rig.closed[0].labels


def test_the_newest_frame_takes_the_place_of_one_that_waits():
    rig = Rig()
    for i in range(3):
        rig.pipeline.captured(PICTURE, i * 0.1)
    assert rig.outcomes() == [(0, Outcome.DROPPED, "busy"), (1, Outcome.DROPPED, "busy")]
    assert rig.pipeline.take_up(0.2).frame.id == 2


def test_a_frame_that_is_not_worth_it_is_dropped_before_it_is_written():
    rig = Rig()
    rig.pipeline.captured(PICTURE, 0.0)
    rig.encode(rig.pipeline.take_up(0.0), 0.1)
    rig.control.worth = False
    assert rig.pipeline.next_to_write(0.2) is None
    assert rig.outcomes() == [(0, Outcome.DROPPED, "stale")]
    assert rig.closed[0].sent_bytes == 0


def test_the_server_s_limit_on_frames_in_flight_is_kept():
    rig = Rig()
    rig.pipeline.connect(0.0, max_in_flight=1, max_packet_bytes=2**20)
    rig.send(0.0)
    rig.pipeline.captured(PICTURE, 0.01)
    assert rig.pipeline.take_up(0.01).local, "the device answers what cannot be sent"


def test_a_packet_over_the_server_s_limit_is_an_error():
    rig = Rig()
    rig.pipeline.connect(0.0, max_in_flight=4, max_packet_bytes=99)
    rig.pipeline.captured(PICTURE, 0.0)
    rig.encode(rig.pipeline.take_up(0.0), 0.1)
    assert rig.closed[0].outcome is Outcome.ERROR
    assert "limit of 99" in rig.closed[0].reason


def test_when_the_stream_breaks_frames_in_flight_are_answered_locally_as_far_as_time_allows():
    rig = Rig(local_s=0.1)
    for i in range(4):
        rig.send(i * 0.06)
    rig.pipeline.disconnect(0.2)
    # Frame 0 was due at 0.25: too late. Frame 1 is due at 0.31, 2 at 0.37, 3 at 0.43.
    assert rig.outcomes() == [(0, Outcome.LATE, "no answer")]
    work = rig.pipeline.take_up(0.2)
    assert (work.frame.id, work.local) == (1, True)
    assert work.frame.pixels is PIXELS, "what was prepared is not prepared again"
    rig.answer(work, 0.3)
    work = rig.pipeline.take_up(0.3)
    assert work.frame.id == 3, "frame 2 would be late by now, and gives way"
    rig.answer(work, 0.4)
    assert rig.outcomes()[1:] == [
        (1, Outcome.LOCAL, ""),
        (2, Outcome.LATE, "no answer"),
        (3, Outcome.LOCAL, ""),
    ]


def test_a_packet_that_is_ready_when_the_stream_is_down_is_answered_locally_or_dropped():
    rig = Rig(local_s=0.1)
    rig.pipeline.captured(PICTURE, 0.0)
    work = rig.pipeline.take_up(0.0)
    rig.pipeline.disconnect(0.05)
    rig.encode(work, 0.1)
    assert rig.pipeline.take_up(0.1).frame.id == 0
    rig = Rig(local_s=0.2)
    rig.pipeline.captured(PICTURE, 0.0)
    work = rig.pipeline.take_up(0.0)
    rig.pipeline.disconnect(0.05)
    rig.encode(work, 0.1)
    assert rig.outcomes() == [(0, Outcome.DROPPED, "outage")]


def test_what_was_abandoned_when_the_stream_broke_is_answered_locally_if_there_is_time():
    for now, outcomes in ((0.1, []), (0.2, [(0, Outcome.DROPPED, "outage")])):
        rig = Rig(local_s=0.1)
        rig.pipeline.captured(PICTURE, 0.0)
        work = rig.pipeline.take_up(0.0)
        rig.pipeline.disconnect(now)
        rig.pipeline.abandoned(work.frame, now)
        assert rig.outcomes() == outcomes
        again = rig.pipeline.take_up(now)
        assert (again is not None and again.local and again.frame.picture is PICTURE) == (outcomes == [])


def test_lossless_packets_wait_for_the_next_stream_if_the_device_cannot_answer():
    rig = Rig(points=(FEATURE,), lossless=True)
    rig.pipeline.captured(PICTURE, 0.0)
    rig.encode(rig.pipeline.take_up(0.0), 0.1)
    rig.pipeline.disconnect(0.1)
    rig.pipeline.connect(5.0, max_in_flight=4, max_packet_bytes=1000)
    assert rig.pipeline.next_to_write(5.0) is not None
    rig.pipeline.captured(PICTURE, 6.0)
    work = rig.pipeline.take_up(6.0)
    rig.pipeline.disconnect(6.0)
    rig.encode(work, 6.1)
    assert rig.pipeline.has_packets
    rig.pipeline.forget_packets()
    assert [o[1:] for o in rig.outcomes()] == [(Outcome.LATE, "no answer"), (Outcome.DROPPED, "outage")]


def test_without_a_connection_new_frames_are_answered_locally_and_those_that_waited_too_long_make_room():
    rig = Rig(local_s=0.15, connected=False)
    rig.control.choice = Choice(LOCAL)
    rig.pipeline.captured(PICTURE, 0.0)
    work = rig.pipeline.take_up(0.0)
    rig.pipeline.captured(PICTURE, 0.01)
    rig.answer(work, 0.15)
    assert rig.pipeline.take_up(0.15) is None, "at 0.01 + 0.25 it would be late; the next frame is fresher"
    rig.pipeline.captured(PICTURE, 0.2)
    assert rig.pipeline.take_up(0.2).frame.id == 2
    assert rig.outcomes() == [(0, Outcome.LOCAL, ""), (1, Outcome.DROPPED, "outage")]


def test_a_device_that_is_always_too_slow_still_computes_so_that_it_is_measured_again():
    rig = Rig(local_s=0.4, connected=False)
    rig.control.choice = Choice(LOCAL)
    rig.pipeline.captured(PICTURE, 0.0)
    work = rig.pipeline.take_up(0.0)
    rig.answer(work, 0.4)
    assert rig.outcomes() == [(0, Outcome.LATE, "")]


def test_a_device_that_is_too_slow_to_answer_stays_free_while_there_is_a_stream():
    """It would answer 0.15 s late, and what is captured meanwhile not at all, though the link may be back by then."""
    rig = Rig(local_s=0.4)
    rig.control.choice = Choice(LOCAL, p_on_time=0.0)
    rig.pipeline.captured(PICTURE, 0.0)
    assert rig.pipeline.take_up(0.0) is None
    assert rig.outcomes() == [(0, Outcome.DROPPED, "stale")]
    rig.control.choice = Choice(LOCAL, p_on_time=0.1)  # what the loop thinks possible is tried
    rig.pipeline.captured(PICTURE, 0.1)
    assert rig.pipeline.take_up(0.1).local


def test_a_fixed_remote_point_drops_frames_in_an_outage():
    rig = Rig(points=(FEATURE,), connected=False)
    rig.pipeline.captured(PICTURE, 0.0)
    assert rig.pipeline.take_up(0.0) is None
    assert rig.outcomes() == [(0, Outcome.DROPPED, "outage")]


def test_what_cannot_be_in_time_is_not_computed_unless_it_is_a_probe():
    rig = Rig(points=(FEATURE,))
    rig.control.choice = Choice(FEATURE, p_on_time=0.0)
    rig.pipeline.captured(PICTURE, 0.0)
    assert rig.pipeline.take_up(0.0) is None
    assert rig.outcomes() == [(0, Outcome.DROPPED, "stale")]
    rig.control.choice = Choice(FEATURE, p_on_time=0.0, probe=True)
    rig.pipeline.captured(PICTURE, 0.1)
    assert rig.pipeline.take_up(0.1) is not None


def test_a_server_that_says_nothing_leaves_frames_late_after_the_grace_period():
    rig = Rig(grace_s=1.0, stall_s=3.0)
    rig.send(0.0)
    assert rig.pipeline.next_timer() == pytest.approx(1.25)
    rig.pipeline.tick(1.24)
    assert rig.outcomes() == []
    rig.pipeline.tick(1.25)
    assert rig.outcomes() == [(0, Outcome.LATE, "no answer")]
    assert rig.pipeline.next_timer() == rig.pipeline.stalls_at() == pytest.approx(3.0)
    # The answer comes all the same: the control loop learns from it, the ledger stays as it is.
    rig.pipeline.answered(ok(0), 2.0)
    assert rig.control.heard[-1][:2] == ("result", 0)
    assert rig.outcomes() == [(0, Outcome.LATE, "no answer")]
    assert rig.pipeline.next_timer() is None


@pytest.mark.parametrize(
    ("status", "outcome", "reason"),
    [
        (Status.DEADLINE_EXCEEDED, Outcome.LATE, "said so"),
        (Status.INVALID, Outcome.ERROR, "said so"),
        (Status.INTERNAL, Outcome.ERROR, "said so"),
        (Status.UNSPECIFIED, Outcome.ERROR, "said so"),
        (Status.RESOURCE_EXHAUSTED, Outcome.DROPPED, "said so"),
        (Status.UNAVAILABLE, Outcome.DROPPED, "said so"),
    ],
)
def test_what_the_server_says_decides_the_outcome(status, outcome, reason):
    rig = Rig(points=(FEATURE,))
    rig.send(0.0)
    rig.pipeline.answered(ok(0, status, "said so"), 0.1)
    assert rig.outcomes() == [(0, outcome, reason)]


def test_a_frame_that_a_full_server_refuses_is_answered_locally_if_there_is_time():
    rig = Rig(local_s=0.1)
    rig.send(0.0)
    rig.pipeline.answered(ok(0, Status.RESOURCE_EXHAUSTED), 0.05)
    work = rig.pipeline.take_up(0.05)
    rig.answer(work, 0.15)
    assert rig.outcomes() == [(0, Outcome.LOCAL, "")]
    assert rig.closed[0].sent_bytes == 100, "its bytes were spent all the same"


def full(frame_id: int, retry_ms: int) -> Result:
    return Result(frame_id, Status.RESOURCE_EXHAUSTED, "full", retry_ms=retry_ms)


def test_nothing_is_sent_while_a_full_server_asks_to_wait():
    rig = Rig(points=(FEATURE,))
    rig.send(0.0)
    rig.pipeline.answered(full(0, 500), 0.1)
    rig.pipeline.captured(PICTURE, 0.2)
    assert rig.pipeline.take_up(0.2) is None and not rig.pipeline.has_packets
    assert rig.outcomes() == [(0, Outcome.DROPPED, "full"), (1, Outcome.DROPPED, "server full")]
    assert rig.closed[1].sent_bytes == 0
    rig.send(0.65)  # the time is over
    assert rig.pipeline.in_flight == 1
    rig.pipeline.answered(full(2, 10**9), 0.7)
    rig.pipeline.connect(0.8, max_in_flight=16, max_packet_bytes=2**20)
    rig.send(0.9)  # another server asks for nothing
    assert rig.pipeline.in_flight == 1


def test_the_device_answers_by_itself_while_a_full_server_asks_to_wait():
    rig = Rig(local_s=0.1)
    rig.send(0.0)
    rig.send(0.05)
    work = None
    rig.pipeline.captured(PICTURE, 0.1)
    being_coded = rig.pipeline.take_up(0.1)
    rig.pipeline.answered(full(0, 300), 0.22)
    rig.encode(being_coded, 0.23)
    assert rig.pipeline.next_to_write(0.23) is None, "it was being coded when the server said so"
    work = rig.pipeline.take_up(0.23)
    assert work.frame.id == 2 and work.local
    rig.answer(work, 0.33)
    rig.pipeline.captured(PICTURE, 0.35)
    work = rig.pipeline.take_up(0.35)
    assert work.local, "whatever the control loop would choose"


def test_a_short_delay_is_over_when_the_packet_is_coded():
    rig = Rig(points=(FEATURE,))
    rig.send(0.0)
    rig.pipeline._holding.encoded(0.05)
    rig.pipeline.answered(full(0, 40), 0.1)
    rig.pipeline.captured(PICTURE, 0.1)
    work = rig.pipeline.take_up(0.1)
    assert work is not None and not work.local


def test_lossless_waits_instead_of_dropping():
    rig = Rig(lossless=True, max_in_flight=1)
    assert rig.pipeline.wants_frame
    rig.send(0.0)
    assert not rig.pipeline.wants_frame
    rig.control.worth = False
    rig.pipeline.answered(ok(0), 9.0)
    assert rig.pipeline.wants_frame
    rig.pipeline.captured(PICTURE, 9.0)
    rig.encode(rig.pipeline.take_up(20.0), 20.0)
    out = rig.pipeline.next_to_write(20.0)
    assert out.remaining_ms == 0, "the server must not drop it either"


def test_a_frame_that_cannot_be_read_or_computed_is_an_error_of_its_own():
    rig = Rig()
    rig.pipeline.captured(None, 0.0, "picture.png is damaged")
    rig.pipeline.captured(PICTURE, 0.1)
    rig.pipeline.compute_failed(rig.pipeline.take_up(0.1).frame, "head.onnx cannot be run")
    assert rig.outcomes() == [
        (0, Outcome.ERROR, "picture.png is damaged"),
        (1, Outcome.ERROR, "head.onnx cannot be run"),
    ]


def test_the_ledger_refuses_a_second_outcome():
    rig = Rig()
    frame = rig.send(0.0)
    rig.ledger.close(frame, Outcome.LATE)
    with pytest.raises(LedgerError, match="frame 0 is late already"):
        rig.ledger.close(frame, Outcome.OK)


CONNECTION = ("connect", "disconnect", "tick")
EVENTS = st.sampled_from(
    ["capture", "broken", "take", "done", "failed", "write", "ok", "refused", "invalid", *CONNECTION]
)
CHOICES = st.sampled_from(
    [Choice(FEATURE), Choice(LOCAL), Choice(FEATURE, 0.0), Choice(FEATURE, 0.0, True), Choice(LOCAL, 0.0)]
)
STEPS = st.lists(
    st.tuples(EVENTS, st.sampled_from([0.0, 0.01, 0.1, 0.5, 2.0]), CHOICES, st.booleans(), st.integers(0, 7)),
    max_size=80,
)


@settings(max_examples=400, deadline=None)
@given(STEPS, st.booleans(), st.booleans(), st.integers(1, 4))
def test_whatever_happens_each_captured_frame_gets_exactly_one_outcome(  # noqa: PLR0912
    steps, lossless, with_local, cap
):
    rig = Rig(
        points=(FEATURE, LOCAL) if with_local else (FEATURE,), connected=False, lossless=lossless, max_in_flight=cap
    )
    pipeline, now, captured = rig.pipeline, 0.0, 0
    work: Work | None = None
    for event, dt, choice, flag, number in steps:
        now += dt
        rig.control.choice, rig.control.worth = choice, flag
        rig.control.parts, rig.control.room = number > 1, 40 * number
        if event in ("capture", "broken"):
            captured += 1
            pipeline.captured(PICTURE if event == "capture" else None, now, "broken")
        elif event == "take":
            taken = pipeline.take_up(now)
            assert taken is None or work is None, "one frame at a time"
            work = taken or work
        elif event in ("done", "failed") and work is not None:
            current, work = work, None
            if event == "failed" and flag:
                pipeline.compute_failed(current.frame, "failed")
            elif event == "failed":
                pipeline.abandoned(current.frame, now)
            elif current.local:
                rig.answer(current, now)
            else:
                rig.encode(current, now, slices=1 + number % 5)
        elif event == "write":
            pipeline.next_to_write(now)
        elif event in ("ok", "refused", "invalid"):
            status = {"ok": Status.OK, "refused": Status.RESOURCE_EXHAUSTED, "invalid": Status.INVALID}[event]
            pipeline.answered(ok(max(0, captured - number), status), now)
        elif event == "connect":
            pipeline.connect(now, max_in_flight=3, max_packet_bytes=2**20)
        elif event == "disconnect":
            pipeline.disconnect(now)
        elif event == "tick":
            pipeline.tick(now)
        assert rig.ledger.adds_up()
        assert rig.ledger.captured == captured
        if event == "tick":
            timer = pipeline.next_timer()
            assert timer is None or timer > now or timer == pipeline.stalls_at()
    pipeline.finish()
    if work is not None and not work.local:
        rig.encode(work, now)  # what was being computed when everything ended changes nothing
    assert sorted(f.id for f in rig.closed) == list(range(captured))
    assert rig.ledger.open == 0
    assert sum(rig.ledger.outcomes.values()) == captured
    assert rig.ledger.sent_bytes == sum(f.sent_bytes for f in rig.closed)
    assert rig.control.held == 0

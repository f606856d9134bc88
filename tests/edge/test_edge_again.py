"""A frame whose packet came out too large is coded anew, once, and has one outcome whatever happens meanwhile."""

from __future__ import annotations

from dataclasses import replace

from headrace.edge.engine import Encoded
from headrace.edge.interfaces import Work
from headrace.edge.ledger import Outcome
from headrace.models.bitstream import Packet
from headrace.models.operating_point import Kind, OperatingPoint

from .rig import FEATURE, LOCAL, PICTURE, PIXELS, Rig, ok

COARSER = replace(FEATURE, id=2, rate_level=1, accuracy=0.8)
ELSE = OperatingPoint(3, Kind.FEATURE, "stage.2", accuracy=0.7)


def coded(frame: int, point: OperatingPoint, size: int, seconds: float = 0.03) -> Encoded:
    """What the engine gives; coding it again makes a packet of 40 bytes."""
    packet = Packet(point.id, frame, (b"x" * size,)).to_bytes()
    return Encoded(packet, PIXELS, 0.01, 0.02, seconds, again=lambda other: coded(frame, other, 40, 0.004))


class Anew(Rig):
    """A pipeline whose control loop wants the next packet coarser."""

    def __init__(self, **limits: object) -> None:
        super().__init__((FEATURE, COARSER, LOCAL), **limits)
        self.control.again = COARSER

    def first(self, now: float) -> Work:
        """A frame up to its first packet, of 400 bytes and some."""
        self.pipeline.captured(PICTURE, now)
        work = self.pipeline.take_up(now)
        assert work is not None and work.again is None
        self.pipeline.encoded(work.frame, coded(work.frame.id, FEATURE, 400), now + 0.06)
        return work


def test_it_is_coded_at_the_other_level_and_sent_so():
    rig = Anew()
    first = rig.first(1.0)
    assert rig.control.heard[-1][0] == "coded anew?" and rig.control.heard[-1][1] > 400
    assert rig.pipeline.next_to_write(1.07) is None, "the large packet is not sent"
    work = rig.pipeline.take_up(1.07)
    assert work is not None and work.again is not None and work.frame is first.frame
    assert rig.pipeline.take_up(1.07) is None, "the device has one core"
    rig.pipeline.encoded(work.frame, work.again(), 1.08)
    assert rig.pipeline.take_up(1.08) is None, "once is enough, whatever the loop says"
    sent = rig.pipeline.next_to_write(1.08)
    assert sent is not None and Packet.from_bytes(sent.packet).operating_point == COARSER.id
    rig.pipeline.answered(ok(0), 1.15)
    assert rig.outcomes() == [(0, Outcome.OK, "")]
    (frame,) = rig.closed
    assert frame.point is COARSER and frame.coded_again
    assert (frame.timings["compress"], frame.timings["again"]) == (0.03, 0.004)


def test_the_control_loop_learns_from_the_first_packet_alone():
    rig = Anew()
    rig.first(1.0)
    work = rig.pipeline.take_up(1.07)
    rig.pipeline.encoded(work.frame, work.again(), 1.08)
    rig.pipeline.next_to_write(1.08)
    rig.pipeline.answered(ok(0), 1.15)
    learned = [heard for heard in rig.control.heard if heard[0] in ("computed", "coded")]
    assert [name for name, *_ in learned] == ["computed", "coded"]
    assert learned[0][1] == FEATURE.name and learned[1][1] > 400


def test_a_newer_frame_waits_and_a_broken_stream_loses_nothing():
    rig = Anew()
    rig.first(1.0)
    rig.pipeline.captured(PICTURE, 1.1)
    rig.pipeline.disconnect(1.11)
    work = rig.pipeline.take_up(1.11)
    assert work.again is not None
    rig.pipeline.abandoned(work.frame, 1.12)
    rig.pipeline.finish()
    assert sorted(frame.id for frame in rig.closed) == [0, 1]
    assert rig.ledger.open == 0


def test_what_is_lossless_or_cannot_be_coded_again_is_sent_as_it_is():
    rig = Anew(lossless=True)
    rig.first(1.0)
    assert rig.pipeline.next_to_write(1.07) is not None
    rig = Anew()
    rig.pipeline.captured(PICTURE, 1.0)
    work = rig.pipeline.take_up(1.0)
    rig.pipeline.encoded(work.frame, replace(coded(0, FEATURE, 400), again=None), 1.06)
    assert rig.pipeline.next_to_write(1.07) is not None


def test_an_end_in_between_gives_it_its_outcome():
    rig = Anew()
    rig.first(1.0)
    rig.pipeline.finish()
    assert [outcome for _, outcome, _ in rig.outcomes()] == [Outcome.DROPPED]
    assert rig.pipeline.take_up(1.1) is None

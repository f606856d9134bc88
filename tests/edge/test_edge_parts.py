"""Frames that leave slice by slice: when the rest follows, and when it is given up."""

from __future__ import annotations

import zlib

import numpy as np
from headrace.edge.controller import ControlLoop
from headrace.edge.engine import Encoded
from headrace.edge.interfaces import Limits, Outgoing
from headrace.edge.ledger import Frame, Ledger, Outcome
from headrace.edge.pipeline import Pipeline
from headrace.models.bitstream import Packet
from headrace.models.operating_point import Kind, OperatingPoint
from headrace.protos.messages import Continuation, Result, Status, Timing
from PIL import Image

POINT = OperatingPoint(3, Kind.FEATURE, "stage.1", bytes_median=4000, bytes_p95=4400, accuracy=0.9, edge_share=0.1)
PICTURE = Image.new("RGB", (4, 4))
SLICES = tuple(bytes([i]) * 1000 for i in range(4))
FIRST_BYTES = len(Packet(POINT.id, 0, SLICES[:1]).to_bytes())


class Edge:
    """The real pipeline and control loop, a link of a known rate, and a server that answers at once."""

    def __init__(self, rate_bps: float, deadline_s: float = 0.4, **limits: bool) -> None:
        self.closed: list[Frame] = []
        self.control = ControlLoop([POINT], deadline_s=deadline_s, frame_interval_s=0.1, uncut_s=0.1)
        ledger = Ledger(self.closed.append)
        self.pipeline = Pipeline(self.control, [POINT], Limits(deadline_s=deadline_s, **limits), ledger, local_s=1.0)
        self.pipeline.connect(0.0, max_in_flight=16, max_packet_bytes=2**20)
        self.rate_bps, self.now, self.free = rate_bps, 0.0, 0.0
        for frame in range(12):  # whole frames first, until the rate is known
            self.control.on_written(10_000 + frame, 1000, self.now)
            self.now += 8 * 1040 / rate_bps + 0.03
            self.control.on_result(10_000 + frame, self.now, server_s=0.0, queue_depth=0)

    def capture(self) -> Frame:
        """A frame with a packet of four slices of 1000 bytes, ready to be written."""
        self.pipeline.captured(PICTURE, self.now)
        work = self.pipeline.take_up(self.now)
        assert work is not None
        packet = Packet(POINT.id, work.frame.id, SLICES)
        self.pipeline.encoded(work.frame, Encoded(packet.to_bytes(), np.zeros((4, 4, 3), np.uint8), 0, 0, 0), self.now)
        return work.frame

    def write(self) -> Outgoing | Continuation | None:
        return self.pipeline.next_to_write(self.now)

    def wait(self) -> None:
        """Until the next timer."""
        due = self.pipeline.next_timer()
        assert due is not None and due >= self.now
        self.now = due
        self.pipeline.tick(due)


def test_on_a_fast_link_a_frame_leaves_whole() -> None:
    edge = Edge(8e6)
    edge.capture()
    out = edge.write()
    assert isinstance(out, Outgoing)
    assert (len(Packet.from_bytes(out.packet).slices), out.slices_to_come) == (4, 0)
    assert edge.write() is None


def test_on_a_slow_link_its_slices_leave_as_the_link_takes_them() -> None:
    edge = Edge(400e3)
    frame = edge.capture()
    began = edge.now
    out = edge.write()
    assert isinstance(out, Outgoing)
    assert (Packet.from_bytes(out.packet).slices, out.slices_to_come) == (SLICES[:1], 3)
    assert 0 < out.patience_ms < out.remaining_ms
    assert frame.sent_bytes == FIRST_BYTES
    left = []
    for _ in range(3):
        assert edge.write() is None, "the link is still busy with what it has"
        assert not edge.pipeline.has_packets
        edge.wait()
        assert edge.pipeline.has_packets
        part = edge.write()
        assert isinstance(part, Continuation) and not part.cut
        assert part.crc == zlib.crc32(part.slice)
        left.append(part.slice)
    assert tuple(left) == SLICES[1:]
    assert edge.write() is None and frame.sent_bytes == FIRST_BYTES + 3000
    # 1 KB takes 20 ms; a hopeful link is asked a little sooner.
    assert 0.03 <= edge.now - began <= 0.065
    result = Result(frame.id, Status.OK, timing=Timing(0, 0, 0, 0), slices=4)
    edge.pipeline.answered(result, began + 0.08)
    assert (frame.outcome, frame.slices) == (Outcome.OK, 4)


def test_the_rest_is_given_up_when_the_link_hangs() -> None:
    """No answer comes, and the censored bound says that the rate has fallen: the answer would be late."""
    edge = Edge(400e3)
    frame = edge.capture()
    assert isinstance(edge.write(), Outgoing)
    edge.now += 0.3
    edge.pipeline.tick(edge.now)
    part = edge.write()
    assert part == Continuation(frame.id, cut=True)
    assert edge.write() is None and frame.sent_bytes == FIRST_BYTES


def test_the_rest_is_given_up_when_the_next_frame_would_be_late() -> None:
    edge = Edge(400e3, deadline_s=0.16)
    first = edge.capture()
    assert isinstance(edge.write(), Outgoing)
    # 20 ms for the slice under way, 60 for the rest, 80 for the next frame and 30 there and back are over its 160.
    second = edge.capture()
    part = edge.write()
    assert part == Continuation(first.id, cut=True)
    out = edge.write()
    assert isinstance(out, Outgoing) and Packet.from_bytes(out.packet).frame_id == second.id


def test_a_frame_that_is_answered_from_its_prefix_sends_no_more() -> None:
    edge = Edge(400e3)
    frame = edge.capture()
    assert isinstance(edge.write(), Outgoing)
    edge.now += 0.05
    edge.pipeline.answered(Result(frame.id, Status.OK, timing=Timing(0, 0, 0, 0), slices=1), edge.now)
    assert (frame.outcome, frame.slices, frame.sent_bytes) == (Outcome.OK, 1, FIRST_BYTES)
    assert edge.write() is None
    edge.capture()
    assert isinstance(edge.write(), Outgoing)


def test_what_is_held_back_counts_in_the_choice_for_the_next_frame() -> None:
    edge = Edge(400e3)
    edge.capture()
    assert isinstance(edge.write(), Outgoing)
    behind = edge.control.choose(edge.now, edge.now, compute_free_at=edge.now).expected_latency_s
    edge.control.link.on_held(0)
    alone = edge.control.choose(edge.now, edge.now, compute_free_at=edge.now).expected_latency_s
    assert abs(behind - alone - 8 * 3000 / 400e3) < 0.01


def test_whole_frames_can_be_asked_for() -> None:
    edge = Edge(400e3, cut_short=False)
    edge.capture()
    out = edge.write()
    assert isinstance(out, Outgoing) and out.slices_to_come == 0

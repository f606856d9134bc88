"""The pipeline with everything around it played by a test."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from headrace.edge.engine import Encoded, LocalAnswer
from headrace.edge.interfaces import Limits, Work
from headrace.edge.ledger import Frame, Ledger, Outcome
from headrace.edge.pipeline import Pipeline
from headrace.models.bitstream import Packet
from headrace.models.operating_point import Kind, OperatingPoint
from headrace.protos.messages import Label, Result, Status, TailOutput, Timing
from PIL import Image

FEATURE = OperatingPoint(0, Kind.FEATURE, "stage.1", accuracy=0.9)
LOCAL = OperatingPoint(1, Kind.LOCAL, accuracy=1.0)
PICTURE = Image.new("RGB", (4, 4))
PIXELS = np.zeros((4, 4, 3), np.uint8)


@dataclass
class Choice:
    point: OperatingPoint
    p_on_time: float = 1.0
    probe: bool = False
    reserve: OperatingPoint | None = None
    skip: bool = False


@dataclass
class Scripted:
    """A control loop that does as it is told, and writes down what it hears."""

    choice: Choice = field(default_factory=lambda: Choice(FEATURE))
    worth: bool = True
    outage: bool = False
    parts: bool = False
    room: int | None = None
    held: int = 0
    spent: bool = False
    again: OperatingPoint | None = None
    heard: list[tuple] = field(default_factory=list)

    def choose(self, now, captured_at, *, compute_free_at):
        return self.choice

    def in_outage(self, now):
        return self.outage

    def worth_writing(self, now, captured_at, size_bytes):
        return self.worth

    def look_again(self, now, captured_at, point, size_bytes, coder_s, reserve=None):
        self.heard.append(("coded anew?", size_bytes, coder_s))
        return self.again or point

    def in_parts(self, now, size_bytes):
        return self.parts

    def fits(self, now, captured_at, size_bytes):
        return self.room is None or size_bytes <= self.room

    def next_part_at(self, now):
        return now + 0.05

    def patience_s(self, now, captured_at, size_bytes):
        return 0.125

    @property
    def link(self):
        return self

    def continued(self, frame_id, size_bytes):
        self.heard.append(("continued", frame_id, size_bytes))

    def on_held(self, size_bytes):
        self.held = size_bytes

    def on_computed(self, point, seconds, now):
        self.heard.append(("computed", point.name, seconds))

    def on_reserve(self, reserve, seconds):
        self.heard.append(("reserve", reserve.name, seconds))

    def on_kept(self, accuracy, now):
        self.heard.append(("kept", accuracy))

    def on_fallback(self, reserve, frame_id):
        self.heard.append(("fallback", reserve.name))

    def on_coded(self, point, size_bytes):
        self.heard.append(("coded", size_bytes))

    def on_predicted(self, share):
        self.heard.append(("predicted", share))

    def on_continued(self, size_bytes):
        self.heard.append(("continued", size_bytes))

    def on_written(self, frame_id, size_bytes, now):
        self.heard.append(("written", frame_id, now))

    def on_result(self, frame_id, now, *, server_s, queue_depth, answered=True):
        self.heard.append(("result", frame_id, now, server_s))

    def on_round_trip(self, seconds, now):
        self.heard.append(("round trip", seconds))

    def on_connected(self, now):
        self.heard.append(("connected",))

    def on_disconnected(self, now):
        self.heard.append(("disconnected",))


class Rig:
    """A pipeline with everything around it played by the test."""

    def __init__(self, points=(FEATURE, LOCAL), local_s=0.1, connected=True, **limits) -> None:
        self.closed: list[Frame] = []
        self.ledger = Ledger(self.closed.append)
        self.control = Scripted()
        self.pipeline = Pipeline(self.control, points, Limits(**limits), self.ledger, local_s=local_s)
        if connected:
            self.pipeline.connect(0.0, max_in_flight=16, max_packet_bytes=2**20)

    def encode(self, work: Work, now: float, size: int = 100, slices: int = 1) -> None:
        """A packet of `size` bytes, or a few less where the slices are to be of one length."""
        assert not work.local
        point, frame = work.frame.point.id, work.frame.id
        each = (size - len(Packet(point, frame, (b"",) * slices).to_bytes())) // slices
        packet = Packet(point, frame, tuple(bytes([i]) * each for i in range(slices)))
        self.pipeline.encoded(work.frame, Encoded(packet.to_bytes(), PIXELS, 0.01, 0.02, 0.03), now)

    def answer(self, work: Work, now: float) -> None:
        assert work.local
        self.pipeline.answered_locally(work.frame, LocalAnswer((Label(1, 0.5),), 0.0, 0.1), now)

    def send(self, now: float) -> Frame:
        """One frame from capture to the wire."""
        self.pipeline.captured(PICTURE, now)
        work = self.pipeline.take_up(now)
        assert work is not None
        self.encode(work, now)
        assert self.pipeline.next_to_write(now) is not None
        return work.frame

    def outcomes(self) -> list[tuple[int, Outcome | None, str]]:
        return [(f.id, f.outcome, f.reason) for f in self.closed]


def ok(frame_id: int, status: Status = Status.OK, message: str = "") -> Result:
    outputs = (TailOutput("classification", (Label(3, 0.9),)),) if status is Status.OK else ()
    return Result(frame_id, status, message, outputs, Timing(1000, 2000, 3000, 7000), 5)

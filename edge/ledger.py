"""Ledger: every captured frame has exactly one outcome, and the sums add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from PIL import Image

from ..models.operating_point import OperatingPoint
from ..protos.messages import Box, ClassMap, Label, Result, Status
from .encoder import VideoPacket
from .engine import LocalAnswer, Pixels
from .exceptions import LedgerError


class Outcome(StrEnum):
    """What became of a frame."""

    OK = "ok"
    """The server's answer came within the deadline."""
    LATE = "late"
    """An answer came after the deadline, or a frame that was sent got none."""
    LOCAL = "local"
    """The device's own answer came within the deadline."""
    DROPPED = "dropped"
    """Nothing was computed, or nothing was sent; the reason says why."""
    FILTERED = "filtered"
    """Not worth sending: the filter saw nothing of interest in it."""
    ERROR = "error"
    """Something is wrong with the frame, the device or the server; the reason says what."""


STALE, BUSY, OUTAGE, NO_ANSWER, STOPPED, FULL = "stale", "busy", "outage", "no answer", "stopped", "server full"
BUDGET = "budget"
"""Reasons of `dropped` and `late` frames."""

ON_TIME = frozenset({Outcome.OK, Outcome.LOCAL})


@dataclass(slots=True, eq=False)
class Frame:
    """One captured frame on its way. Times are seconds of the monotonic clock, durations seconds.

    Attributes:
        id: 0..2**32-1, counted from the first captured frame.
        picture: as captured; None once it is prepared, or if it could not be read.
        pixels: uint8 [S, S, 3] as prepared; None before.
        point: the operating point that was chosen for it.
        packet: its bytes while they wait to be sent.
        video: more about its packet, until it is answered, where the server keeps frames to predict others from.
        predicted: its packet was predicted from an earlier frame's.
        coded_again: its first packet was too large, and it was coded at another level.
        epoch: of the stream on which that one is kept.
        sent_bytes: bytes that were sent for it.
        timings: durations by stage: wait, prepare, compute, compress, again, link, server, queue, decode,
            tail.
        size: width and height of the picture as captured.
        presence: the filter's score; None where none was computed.
        reserved_by: the local point whose answer is to be kept in reserve, in case the server's is late.
        reserve: that answer; `reserve_comes` until it is there.
        ending: outcome and reason that it gets unless the device still answers it; None while the server may.
        fell_back: it was answered with what was in reserve; `fell_back_to`: at which local point.
        confidence: how sure the exit is of its answer, 0..1; None where no exit was asked.
        empty: the filter saw nothing in it; if it was sent nevertheless, it was for an audit or to keep the link alive.
        shown: the picture as captured, kept to the end where somebody wants to see it.
        outcome, reason, latency_s: known when it is closed; the latency is that of an answer.
        slices: how many the server answered from.
        tails: names of the tails that answered; one packet may be answered by several.
        labels, boxes, class_map: the answer, whichever the task gives; boxes in pixels of the backbone's input, or of
            the captured frame if they are `placed`.
    """

    id: int
    captured_at: float
    deadline_at: float
    picture: Image.Image | None = None
    pixels: Pixels | None = None
    point: OperatingPoint | None = None
    packet: bytes = b""
    video: VideoPacket | None = None
    predicted: bool = False
    coded_again: bool = False
    epoch: int = 0
    sent_bytes: int = 0
    written_at: float | None = None
    timings: dict[str, float] = field(default_factory=dict)
    outcome: Outcome | None = None
    reason: str = ""
    latency_s: float | None = None
    labels: tuple[Label, ...] = ()
    boxes: tuple[Box, ...] = ()
    placed: bool = False
    tails: tuple[str, ...] = ()
    class_map: ClassMap | None = None
    queue_depth: int = 0
    slices: int = 0
    size: tuple[int, int] = (0, 0)
    presence: float | None = None
    empty: bool = False
    reserved_by: OperatingPoint | None = None
    reserve: LocalAnswer | None = None
    reserve_comes: bool = False
    ending: tuple[Outcome, str] | None = None
    fell_back: bool = False
    fell_back_to: OperatingPoint | None = None
    confidence: float | None = None
    shown: Image.Image | None = None

    def note(self, result: Result, *, link_s: float) -> None:
        """What the server answered and what it took; `link_s`: seconds there and back."""
        self.queue_depth, self.slices = result.queue_depth, result.slices
        timing, outputs = result.timing, result.outputs if result.status is Status.OK else ()
        self.timings.update(
            link=link_s,
            server=timing.total_us / 1e6,
            queue=timing.queue_us / 1e6,
            decode=timing.decode_us / 1e6,
            tail=timing.tail_us / 1e6,
        )
        self.labels = tuple(label for output in outputs for label in output.labels)
        self.boxes = tuple(box for output in outputs for box in output.boxes)
        self.tails = tuple(output.tail for output in outputs)
        self.placed = any(output.captured for output in outputs)
        self.class_map = next((o.class_map for o in outputs if o.class_map is not None), None)


class Ledger:
    """Counts captured frames and their outcomes."""

    def __init__(self, on_closed: Callable[[Frame], None], keep_pictures: bool = False) -> None:
        """`on_closed` is called with every frame when its outcome is known, with its picture if they are kept."""
        self._on_closed, self._keep_pictures = on_closed, keep_pictures
        self.captured = 0
        self.outcomes: Counter[Outcome] = Counter()
        self.sent_bytes = 0
        self._open: dict[int, Frame] = {}

    @property
    def open(self) -> int:
        """Captured frames that have no outcome yet."""
        return len(self._open)

    def open_frames(self) -> list[Frame]:
        """Those frames, oldest first."""
        return list(self._open.values())

    def enter(self, captured_at: float, deadline_s: float, picture: Image.Image | None) -> Frame:
        """A new frame."""
        frame = Frame(self.captured % 2**32, captured_at, captured_at + deadline_s, picture)
        if picture is not None:
            frame.size = picture.size
            frame.shown = picture if self._keep_pictures else None
        self.captured += 1
        self._open[frame.id] = frame
        return frame

    def answer(self, frame: Frame, outcome: Outcome, now: float) -> None:
        """An answer is there: close the frame with `outcome`, or as late."""
        frame.latency_s = now - frame.captured_at
        self.close(frame, outcome if now <= frame.deadline_at else Outcome.LATE)

    def close(self, frame: Frame, outcome: Outcome, reason: str = "") -> None:
        """Give the frame its outcome.

        Raises:
            LedgerError: it has one already.
        """
        if self._open.pop(frame.id, None) is not frame:
            raise LedgerError(f"frame {frame.id} is {frame.outcome} already and would become {outcome} too")
        frame.outcome, frame.reason = outcome, reason
        frame.picture, frame.pixels, frame.packet = None, None, b""
        self.outcomes[outcome] += 1
        self.sent_bytes += frame.sent_bytes
        self._on_closed(frame)

    def adds_up(self) -> bool:
        """Whether every captured frame is either open or has one outcome."""
        return self.captured == self.open + self.outcomes.total()

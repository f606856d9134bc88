"""What the pipeline is given and what it gives out: the control loop it asks, its limits, its wishes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..models.operating_point import OperatingPoint
from .ledger import Frame
from .references import Earlier

if TYPE_CHECKING:
    from .engine import Encoded


class Chosen(Protocol):
    """What the control loop says about a frame."""

    @property
    def point(self) -> OperatingPoint:
        """The operating point to use."""
        ...

    @property
    def p_on_time(self) -> float:
        """Probability that the answer is in time, 0..1."""
        ...

    @property
    def probe(self) -> bool:
        """Sent to learn about the link: worth it even if its answer would be late."""
        ...

    @property
    def reserve(self) -> OperatingPoint | None:
        """The local point whose answer is kept in reserve, in case the server's is late."""
        ...

    @property
    def skip(self) -> bool:
        """The device is to take up the next frame in place of this one."""
        ...


class PartsLink(Protocol):
    """What a frame that leaves in parts asks of the link; see `link_view.LinkView`."""

    def in_parts(self, now: float, size_bytes: int) -> bool: ...
    def fits(self, now: float, captured_at: float, size_bytes: int) -> bool: ...
    def next_part_at(self, now: float) -> float: ...
    def patience_s(self, now: float, captured_at: float, size_bytes: int) -> float: ...
    def continued(self, frame_id: int, size_bytes: int) -> None: ...
    def on_held(self, size_bytes: int) -> None: ...


class Control(Protocol):
    """The control loop as the pipeline uses it; see `controller.ControlLoop`."""

    @property
    def link(self) -> PartsLink: ...
    def choose(self, now: float, captured_at: float, *, compute_free_at: float) -> Chosen: ...
    def in_outage(self, now: float) -> bool: ...
    @property
    def spent(self) -> bool: ...
    def on_computed(self, point: OperatingPoint, seconds: float, now: float) -> None: ...
    def on_reserve(self, reserve: OperatingPoint, seconds: float) -> None: ...
    def on_fallback(self, reserve: OperatingPoint, frame_id: int) -> None: ...
    def on_kept(self, accuracy: float, now: float) -> None: ...
    def on_coded(self, point: OperatingPoint, size_bytes: float) -> None: ...
    def on_predicted(self, share: float) -> None: ...
    def look_again(
        self,
        now: float,
        captured_at: float,
        point: OperatingPoint,
        size_bytes: int,
        coder_s: float,
        reserve: OperatingPoint | None = None,
    ) -> OperatingPoint: ...
    def worth_writing(self, now: float, captured_at: float, size_bytes: int) -> bool: ...
    def on_written(self, frame_id: int, size_bytes: int, now: float) -> None: ...
    def on_continued(self, size_bytes: int) -> None: ...
    def on_result(
        self, frame_id: int, now: float, *, server_s: float, queue_depth: int, answered: bool = True
    ) -> None: ...
    def on_round_trip(self, seconds: float, now: float) -> None: ...
    def on_connected(self, now: float) -> None: ...
    def on_disconnected(self, now: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What a frame may take.

    Attributes:
        deadline_s: from capture to answer.
        grace_s: how long after its deadline an answer is waited for.
        stall_s: frames that wait so long while nothing at all is answered mean that the stream hangs.
        max_in_flight: most frames that are written and not answered.
        max_packet_bytes: most that the server takes in one packet.
        cut_short: on a slow link send a frame's slices one by one, so that its rest can be given up.
        fallback: frames that are sent may have an answer of the device in reserve.
        say_size: tell the server how large frames were captured, so that boxes come back in their pixels.
        most_waiting: so many captured frames wait for the device at most, and the oldest is taken up first; 1: only the
            newest does.
        lossless: take frames only as fast as they can be served, drop none, wait for every answer.
    """

    deadline_s: float = 0.25
    grace_s: float = 1.0
    stall_s: float = 3.0
    max_in_flight: int = 16
    max_packet_bytes: int = 2**20
    most_waiting: int = 1
    lossless: bool = False
    cut_short: bool = True
    fallback: bool = True
    say_size: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """What the device has to compute next.

    Attributes:
        frame: this frame, at its operating point.
        local: the answer is computed on the device.
        filtered: no packet is wanted if the filter sees nothing in it.
        earlier: what it can be predicted from, where the server keeps frames.
        sure: no packet is wanted if the exit at its split point is at least so sure of its answer, 0..1; None: it is
            not asked before the packet is made.
        again: its head is computed, and all that is left is to code it anew, which this does.
        reserve: its packet is made, and all that is left is the answer in reserve, by this local point.
    """

    frame: Frame
    local: bool
    filtered: bool = False
    earlier: Earlier | None = None
    sure: float | None = None
    again: Callable[[], Encoded] | None = None
    reserve: OperatingPoint | None = None


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What has to be sent next: a packet, whole or its first slices. Times in ms.

    Attributes:
        packet: its bytes.
        remaining_ms: of the deadline; 0 for none.
        slices_to_come: that follow as continuations.
        patience_ms: how long the server shall wait for them.
        trace: the frame's trace and span id, where it is traced.
        size: width and height of the captured frame, where the answer hangs on it; else 0.
    """

    packet: bytes
    remaining_ms: int
    slices_to_come: int = 0
    patience_ms: int = 0
    trace: bytes = b""
    size: tuple[int, int] = (0, 0)

"""What crosses the wire, as plain values; `messages.py` turns them into protobuf messages and back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Status(IntEnum):
    """How the server answered a frame; the numbers are those of the wire."""

    UNSPECIFIED = 0
    OK = 1
    DEADLINE_EXCEEDED = 2
    RESOURCE_EXHAUSTED = 3
    INVALID = 4
    INTERNAL = 5
    UNAVAILABLE = 6
    MISSING_REFERENCE = 7


@dataclass(frozen=True, slots=True)
class Hello:
    """The edge's first message: fingerprint (32 bytes), packet version, device name, client version, whether it can
    send predicted frames, and whether it reads several results of one response."""

    fingerprint: bytes
    packet_version: int
    device: str = ""
    client_version: str = ""
    predicts: bool = False
    several: bool = False


@dataclass(frozen=True, slots=True)
class Welcome:
    """The server's answer to Hello: what it serves, its limits (bytes, frames without a result), and how many of the
    stream's last frames it keeps to predict others from."""

    fingerprint: bytes
    max_packet_bytes: int
    max_in_flight: int
    server_version: str = ""
    bundle: str = ""
    operating_points: tuple[int, ...] = ()
    references: int = 0


@dataclass(frozen=True, slots=True)
class Frame:
    """A packet's bytes, and times in ms.

    Attributes:
        packet: with all slices, or the first ones.
        remaining_ms: what remains of its deadline; 0: none.
        slices_to_come: how many follow, each as a `Continuation`.
        patience_ms: how long the server waits for them before it answers without.
        trace: the frame's trace id (16 bytes) and span id (8), or nothing when it is not traced.
        width, height: of the frame as it was captured, in pixels; 0: not said.
        clock_ms: since the device's Hello, when it was written, modulo 2**32; 0: not said.
    """

    packet: bytes
    remaining_ms: int = 0
    slices_to_come: int = 0
    patience_ms: int = 0
    trace: bytes = b""
    width: int = 0
    height: int = 0
    clock_ms: int = 0


@dataclass(frozen=True, slots=True)
class Continuation:
    """The next slice of a frame and its CRC-32, or (`cut`) the word that no more will come."""

    frame_id: int
    slice: bytes = b""
    crc: int = 0
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Label:
    """Class index and score 0..1."""

    index: int
    score: float


@dataclass(frozen=True, slots=True)
class Box:
    """Class index, score 0..1, corners in pixels; of what, `TailOutput.captured` says."""

    index: int
    score: float
    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, slots=True)
class ClassMap:
    """A class for every pixel of the backbone's input: a PNG of one byte a pixel (`models.class_map`)."""

    width: int
    height: int
    png: bytes


@dataclass(frozen=True, slots=True)
class TailOutput:
    """What one tail made of a packet: labels or boxes, best first, or a class map.

    Boxes are in pixels of the captured frame where `captured` says so, else in those of the backbone's input.
    """

    tail: str
    labels: tuple[Label, ...] = ()
    boxes: tuple[Box, ...] = ()
    class_map: ClassMap | None = None
    captured: bool = False


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations on the server in microseconds: waiting, entropy decoding, decoder and tail, and all from receipt on."""

    queue_us: int = 0
    decode_us: int = 0
    tail_us: int = 0
    total_us: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to one frame. `queue_depth`: frames waiting on the server; `slices`: how many it was answered from;
    `retry_ms`: when it makes sense to send again, where queues are full (0: not known)."""

    frame_id: int
    status: Status
    message: str = ""
    outputs: tuple[TailOutput, ...] = ()
    timing: Timing = Timing()
    queue_depth: int = 0
    slices: int = 0
    retry_ms: int = 0

"""Messages as plain values: the only module that imports the generated message classes.

Edge and server see the frozen dataclasses below; the functions turn them into protobuf messages and back. gRPC's own
classes (`HeadraceStub`, `HeadraceServicer`, ...) are passed on for the modules that speak it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import cast

from google.protobuf.message import DecodeError

from . import headrace_pb2 as pb
from .headrace_pb2_grpc import HeadraceServicer, HeadraceStub, add_HeadraceServicer_to_server

SERVICE = "headrace.v1.Headrace"
"""Full name of the service, as health checks name it."""

StreamRequest = pb.StreamRequest
StreamResponse = pb.StreamResponse
InferRequest = pb.InferRequest
ResultMessage = pb.Result
FrameMessage = pb.Frame
GetBundleRequest = pb.GetBundleRequest
BundleChunk = pb.BundleChunk


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
    """The edge's first message: fingerprint (32 bytes), packet version, device name, client version, and whether it can
    send predicted frames."""

    fingerprint: bytes
    packet_version: int
    device: str = ""
    client_version: str = ""
    predicts: bool = False


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


def hello_request(hello: Hello) -> pb.StreamRequest:
    """Hello as the stream's first request."""
    return pb.StreamRequest(
        hello=pb.Hello(
            fingerprint=hello.fingerprint,
            packet_version=hello.packet_version,
            device=hello.device,
            client_version=hello.client_version,
            predicts=hello.predicts,
        )
    )


def frame_request(frame: Frame) -> pb.StreamRequest:
    """A frame as a request of the stream."""
    request = pb.StreamRequest()
    message = request.frame
    message.packet, message.remaining_ms = frame.packet, frame.remaining_ms
    message.slices_to_come, message.patience_ms = frame.slices_to_come, frame.patience_ms
    message.trace, message.width, message.height = frame.trace, frame.width, frame.height
    message.clock_ms = frame.clock_ms
    return request


def continuation_request(c: Continuation) -> pb.StreamRequest:
    """A continuation as a request of the stream."""
    return pb.StreamRequest(continuation=pb.Continuation(frame_id=c.frame_id, slice=c.slice, crc=c.crc, cut=c.cut))


def read_request(request: pb.StreamRequest) -> Hello | Frame | Continuation | None:
    """What a stream request holds; None when it holds nothing that is known."""
    kind = request.WhichOneof("message")
    if kind == "frame":
        f = request.frame
        return Frame(f.packet, f.remaining_ms, f.slices_to_come, f.patience_ms, f.trace, f.width, f.height, f.clock_ms)
    if kind == "continuation":
        c = request.continuation
        return Continuation(c.frame_id, c.slice, c.crc, c.cut)
    if kind == "hello":
        h = request.hello
        return Hello(h.fingerprint, h.packet_version, h.device, h.client_version, h.predicts)
    return None


def welcome_response(welcome: Welcome) -> pb.StreamResponse:
    """Welcome as the stream's first response."""
    return pb.StreamResponse(
        welcome=pb.Welcome(
            fingerprint=welcome.fingerprint,
            max_packet_bytes=welcome.max_packet_bytes,
            max_in_flight=welcome.max_in_flight,
            server_version=welcome.server_version,
            bundle=welcome.bundle,
            operating_points=welcome.operating_points,
            references=welcome.references,
        )
    )


def whole_frame(request: pb.StreamRequest) -> pb.Frame | None:
    """The message of a request that is a frame whose slices are all here, as it came; None for every other request."""
    if request.WhichOneof("message") != "frame":
        return None
    message = request.frame
    return None if message.slices_to_come else message


def refusal_response(
    frame_id: int, status: Status, text: str, total_us: int, queue_depth: int, retry_ms: int
) -> pb.StreamResponse:
    """The result of a refused frame as a response of the stream: only what such a one holds."""
    response = pb.StreamResponse()
    message = response.result
    message.frame_id, message.status, message.message = frame_id, cast("pb.Status", int(status)), text
    message.timing.total_us, message.queue_depth, message.retry_ms = total_us, queue_depth, retry_ms
    return response


def result_response(result: Result, total_us: int | None = None) -> pb.StreamResponse:
    """A result as a response of the stream; `total_us` in place of what its timing holds."""
    response = pb.StreamResponse()
    _fill(response.result, result, total_us)
    return response


def read_response(response: pb.StreamResponse) -> Welcome | Result | None:
    """What a stream response holds; None when it holds neither."""
    kind = response.WhichOneof("message")
    if kind == "result":
        return read_result(response.result)
    if kind == "welcome":
        w = response.welcome
        return Welcome(
            w.fingerprint,
            w.max_packet_bytes,
            w.max_in_flight,
            w.server_version,
            w.bundle,
            tuple(w.operating_points),
            w.references,
        )
    return None


def result_message(result: Result, total_us: int | None = None) -> pb.Result:
    """A result as its message; `total_us` in place of what its timing holds."""
    message = pb.Result()
    _fill(message, result, total_us)
    return message


def _fill(message: pb.Result, result: Result, total_us: int | None) -> None:
    # Field by field: a frame waits for this, and built from nested messages that are copied it takes twice as long.
    message.frame_id = result.frame_id
    message.status = cast("pb.Status", int(result.status))
    message.message = result.message
    for output in result.outputs:
        added = message.outputs.add()
        added.tail, added.captured = output.tail, output.captured
        for label in output.labels:
            of_label = added.labels.add()
            of_label.index, of_label.score = label.index, label.score
        for box in output.boxes:
            of_box = added.boxes.add()
            of_box.index, of_box.score = box.index, box.score
            of_box.left, of_box.top, of_box.right, of_box.bottom = box.left, box.top, box.right, box.bottom
        if output.class_map is not None:
            class_map = output.class_map
            added.class_map.width, added.class_map.height = class_map.width, class_map.height
            added.class_map.png = class_map.png
    timing, ours = message.timing, result.timing
    timing.queue_us, timing.decode_us, timing.tail_us = ours.queue_us, ours.decode_us, ours.tail_us
    timing.total_us = ours.total_us if total_us is None else total_us
    message.queue_depth, message.slices, message.retry_ms = result.queue_depth, result.slices, result.retry_ms


def read_result(message: pb.Result) -> Result:
    """The inverse of `result_message`; a status of a later version reads as UNSPECIFIED."""
    try:
        status = Status(message.status)
    except ValueError:
        status = Status.UNSPECIFIED
    t = message.timing
    return Result(
        message.frame_id,
        status,
        message.message,
        tuple([_output(output) for output in message.outputs]),
        Timing(t.queue_us, t.decode_us, t.tail_us, t.total_us),
        message.queue_depth,
        message.slices,
        message.retry_ms,
    )


def _output(message: pb.TailOutput) -> TailOutput:
    class_map = None
    if message.HasField("class_map"):
        class_map = ClassMap(message.class_map.width, message.class_map.height, message.class_map.png)
    return TailOutput(
        message.tail,
        tuple([Label(x.index, x.score) for x in message.labels]),
        tuple([Box(b.index, b.score, b.left, b.top, b.right, b.bottom) for b in message.boxes]),
        class_map,
        message.captured,
    )


def result_of(data: bytes) -> Result:
    """A result from its message's bytes.

    Raises:
        DecodeError: they are none.
    """
    return read_result(pb.Result.FromString(data))


def infer_request(fingerprint: bytes, frame: Frame) -> pb.InferRequest:
    """The unary request for one packet under the bundle of that fingerprint."""
    return pb.InferRequest(
        fingerprint=fingerprint,
        frame=pb.Frame(
            packet=frame.packet,
            remaining_ms=frame.remaining_ms,
            trace=frame.trace,
            width=frame.width,
            height=frame.height,
        ),
    )


__all__ = [
    "SERVICE",
    "Box",
    "BundleChunk",
    "ClassMap",
    "Continuation",
    "DecodeError",
    "Frame",
    "FrameMessage",
    "GetBundleRequest",
    "HeadraceServicer",
    "HeadraceStub",
    "Hello",
    "InferRequest",
    "Label",
    "Result",
    "ResultMessage",
    "Status",
    "StreamRequest",
    "StreamResponse",
    "TailOutput",
    "Timing",
    "Welcome",
    "add_HeadraceServicer_to_server",
    "continuation_request",
    "frame_request",
    "hello_request",
    "infer_request",
    "read_request",
    "read_response",
    "read_result",
    "refusal_response",
    "result_message",
    "result_of",
    "result_response",
    "welcome_response",
    "whole_frame",
]

"""Messages as plain values: the only module that imports the generated message classes.

Edge and server see the frozen dataclasses of `values.py`, which this module passes on; its functions turn them into
protobuf messages and back. gRPC's own classes (`HeadraceStub`, `HeadraceServicer`, ...) are passed on for the modules
that speak it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from google.protobuf.message import DecodeError

from . import headrace_pb2 as pb
from .headrace_pb2_grpc import HeadraceServicer, HeadraceStub, add_HeadraceServicer_to_server
from .values import (
    Box,
    ClassMap,
    Continuation,
    Frame,
    Hello,
    Label,
    Result,
    Status,
    TailOutput,
    Timing,
    Welcome,
)

SERVICE = "headrace.v1.Headrace"
"""Full name of the service, as health checks name it."""

StreamRequest = pb.StreamRequest
StreamResponse = pb.StreamResponse
InferRequest = pb.InferRequest
ResultMessage = pb.Result
FrameMessage = pb.Frame
GetBundleRequest = pb.GetBundleRequest
BundleChunk = pb.BundleChunk


def micros(seconds: float) -> int:
    """Microseconds as the wire holds them, at most 2**32 - 1."""
    return min(round(seconds * 1e6), 2**32 - 1)


def hello_request(hello: Hello) -> pb.StreamRequest:
    """Hello as the stream's first request."""
    return pb.StreamRequest(
        hello=pb.Hello(
            fingerprint=hello.fingerprint,
            packet_version=hello.packet_version,
            device=hello.device,
            client_version=hello.client_version,
            predicts=hello.predicts,
            several=hello.several,
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
        return Hello(h.fingerprint, h.packet_version, h.device, h.client_version, h.predicts, h.several)
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


def refusal_message(
    message: pb.Result, frame_id: int, status: Status, text: str, queue_depth: int, retry_ms: int
) -> None:
    """Fill in the result of a refused frame: only what such a one holds, but for its time on the server."""
    message.frame_id, message.status, message.message = frame_id, cast("pb.Status", int(status)), text
    message.queue_depth, message.retry_ms = queue_depth, retry_ms


def result_response(result: Result, total_us: int | None = None) -> pb.StreamResponse:
    """A result as a response of the stream; `total_us` in place of what its timing holds."""
    response = pb.StreamResponse()
    fill_result(response.result, result, total_us)
    return response


def read_response(response: pb.StreamResponse) -> Welcome | Result | None:
    """What a stream response holds; None when it holds neither, or several results (see `results_of`)."""
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


def results_of(response: pb.StreamResponse) -> Sequence[Result]:
    """The results that a stream response holds: one, several, or none."""
    kind = response.WhichOneof("message")
    if kind == "results":
        return [read_result(message) for message in response.results.results]
    return [read_result(response.result)] if kind == "result" else []


def result_message(result: Result, total_us: int | None = None) -> pb.Result:
    """A result as its message; `total_us` in place of what its timing holds."""
    message = pb.Result()
    fill_result(message, result, total_us)
    return message


def fill_result(message: pb.Result, result: Result, total_us: int | None = None) -> None:
    """Write a result into its message; `total_us` in place of what its timing holds."""
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
    "fill_result",
    "frame_request",
    "hello_request",
    "infer_request",
    "micros",
    "read_request",
    "read_response",
    "read_result",
    "refusal_message",
    "result_message",
    "result_of",
    "result_response",
    "results_of",
    "welcome_response",
    "whole_frame",
]

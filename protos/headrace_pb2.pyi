from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATUS_UNSPECIFIED: _ClassVar[Status]
    STATUS_OK: _ClassVar[Status]
    STATUS_DEADLINE_EXCEEDED: _ClassVar[Status]
    STATUS_RESOURCE_EXHAUSTED: _ClassVar[Status]
    STATUS_INVALID: _ClassVar[Status]
    STATUS_INTERNAL: _ClassVar[Status]
    STATUS_UNAVAILABLE: _ClassVar[Status]
    STATUS_MISSING_REFERENCE: _ClassVar[Status]
STATUS_UNSPECIFIED: Status
STATUS_OK: Status
STATUS_DEADLINE_EXCEEDED: Status
STATUS_RESOURCE_EXHAUSTED: Status
STATUS_INVALID: Status
STATUS_INTERNAL: Status
STATUS_UNAVAILABLE: Status
STATUS_MISSING_REFERENCE: Status

class Hello(_message.Message):
    __slots__ = ("fingerprint", "packet_version", "device", "client_version", "predicts", "several")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PACKET_VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CLIENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    PREDICTS_FIELD_NUMBER: _ClassVar[int]
    SEVERAL_FIELD_NUMBER: _ClassVar[int]
    fingerprint: bytes
    packet_version: int
    device: str
    client_version: str
    predicts: bool
    several: bool
    def __init__(self, fingerprint: _Optional[bytes] = ..., packet_version: _Optional[int] = ..., device: _Optional[str] = ..., client_version: _Optional[str] = ..., predicts: _Optional[bool] = ..., several: _Optional[bool] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("fingerprint", "max_packet_bytes", "max_in_flight", "server_version", "bundle", "operating_points", "references")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MAX_PACKET_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    OPERATING_POINTS_FIELD_NUMBER: _ClassVar[int]
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    fingerprint: bytes
    max_packet_bytes: int
    max_in_flight: int
    server_version: str
    bundle: str
    operating_points: _containers.RepeatedScalarFieldContainer[int]
    references: int
    def __init__(self, fingerprint: _Optional[bytes] = ..., max_packet_bytes: _Optional[int] = ..., max_in_flight: _Optional[int] = ..., server_version: _Optional[str] = ..., bundle: _Optional[str] = ..., operating_points: _Optional[_Iterable[int]] = ..., references: _Optional[int] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("packet", "remaining_ms", "slices_to_come", "patience_ms", "trace", "width", "height", "clock_ms")
    PACKET_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    SLICES_TO_COME_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_MS_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    CLOCK_MS_FIELD_NUMBER: _ClassVar[int]
    packet: bytes
    remaining_ms: int
    slices_to_come: int
    patience_ms: int
    trace: bytes
    width: int
    height: int
    clock_ms: int
    def __init__(self, packet: _Optional[bytes] = ..., remaining_ms: _Optional[int] = ..., slices_to_come: _Optional[int] = ..., patience_ms: _Optional[int] = ..., trace: _Optional[bytes] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., clock_ms: _Optional[int] = ...) -> None: ...

class Continuation(_message.Message):
    __slots__ = ("frame_id", "slice", "crc", "cut")
    FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    CRC_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    frame_id: int
    slice: bytes
    crc: int
    cut: bool
    def __init__(self, frame_id: _Optional[int] = ..., slice: _Optional[bytes] = ..., crc: _Optional[int] = ..., cut: _Optional[bool] = ...) -> None: ...

class StreamRequest(_message.Message):
    __slots__ = ("hello", "frame", "continuation")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    CONTINUATION_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    frame: Frame
    continuation: Continuation
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ..., continuation: _Optional[_Union[Continuation, _Mapping]] = ...) -> None: ...

class StreamResponse(_message.Message):
    __slots__ = ("welcome", "result", "results")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    result: Result
    results: Results
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., results: _Optional[_Union[Results, _Mapping]] = ...) -> None: ...

class Results(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Result]
    def __init__(self, results: _Optional[_Iterable[_Union[Result, _Mapping]]] = ...) -> None: ...

class Label(_message.Message):
    __slots__ = ("index", "score")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    index: int
    score: float
    def __init__(self, index: _Optional[int] = ..., score: _Optional[float] = ...) -> None: ...

class Box(_message.Message):
    __slots__ = ("index", "score", "left", "top", "right", "bottom")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    BOTTOM_FIELD_NUMBER: _ClassVar[int]
    index: int
    score: float
    left: float
    top: float
    right: float
    bottom: float
    def __init__(self, index: _Optional[int] = ..., score: _Optional[float] = ..., left: _Optional[float] = ..., top: _Optional[float] = ..., right: _Optional[float] = ..., bottom: _Optional[float] = ...) -> None: ...

class ClassMap(_message.Message):
    __slots__ = ("width", "height", "png")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    PNG_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    png: bytes
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ..., png: _Optional[bytes] = ...) -> None: ...

class TailOutput(_message.Message):
    __slots__ = ("tail", "labels", "boxes", "class_map", "captured")
    TAIL_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    BOXES_FIELD_NUMBER: _ClassVar[int]
    CLASS_MAP_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_FIELD_NUMBER: _ClassVar[int]
    tail: str
    labels: _containers.RepeatedCompositeFieldContainer[Label]
    boxes: _containers.RepeatedCompositeFieldContainer[Box]
    class_map: ClassMap
    captured: bool
    def __init__(self, tail: _Optional[str] = ..., labels: _Optional[_Iterable[_Union[Label, _Mapping]]] = ..., boxes: _Optional[_Iterable[_Union[Box, _Mapping]]] = ..., class_map: _Optional[_Union[ClassMap, _Mapping]] = ..., captured: _Optional[bool] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_us", "decode_us", "tail_us", "total_us")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    DECODE_US_FIELD_NUMBER: _ClassVar[int]
    TAIL_US_FIELD_NUMBER: _ClassVar[int]
    TOTAL_US_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    decode_us: int
    tail_us: int
    total_us: int
    def __init__(self, queue_us: _Optional[int] = ..., decode_us: _Optional[int] = ..., tail_us: _Optional[int] = ..., total_us: _Optional[int] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("frame_id", "status", "message", "outputs", "timing", "queue_depth", "slices", "retry_ms")
    FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    QUEUE_DEPTH_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    RETRY_MS_FIELD_NUMBER: _ClassVar[int]
    frame_id: int
    status: Status
    message: str
    outputs: _containers.RepeatedCompositeFieldContainer[TailOutput]
    timing: Timing
    queue_depth: int
    slices: int
    retry_ms: int
    def __init__(self, frame_id: _Optional[int] = ..., status: _Optional[_Union[Status, str]] = ..., message: _Optional[str] = ..., outputs: _Optional[_Iterable[_Union[TailOutput, _Mapping]]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., queue_depth: _Optional[int] = ..., slices: _Optional[int] = ..., retry_ms: _Optional[int] = ...) -> None: ...

class InferRequest(_message.Message):
    __slots__ = ("fingerprint", "frame")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    fingerprint: bytes
    frame: Frame
    def __init__(self, fingerprint: _Optional[bytes] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ...) -> None: ...

class GetBundleRequest(_message.Message):
    __slots__ = ("fingerprint", "splits")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SPLITS_FIELD_NUMBER: _ClassVar[int]
    fingerprint: bytes
    splits: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, fingerprint: _Optional[bytes] = ..., splits: _Optional[_Iterable[str]] = ...) -> None: ...

class BundleChunk(_message.Message):
    __slots__ = ("fingerprint", "name", "size", "sha256", "data", "files_left")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    FILES_LEFT_FIELD_NUMBER: _ClassVar[int]
    fingerprint: bytes
    name: str
    size: int
    sha256: bytes
    data: bytes
    files_left: int
    def __init__(self, fingerprint: _Optional[bytes] = ..., name: _Optional[str] = ..., size: _Optional[int] = ..., sha256: _Optional[bytes] = ..., data: _Optional[bytes] = ..., files_left: _Optional[int] = ...) -> None: ...

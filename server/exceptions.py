"""What can go wrong on the server.

HeadraceError
└── ServerError
    ├── SettingsError         a flag, an environment variable or the configuration file cannot be used
    ├── StartError            the server cannot start: an address is taken, no bundle, a device is missing
    ├── EdgeHalfError         an edge half cannot be exported
    └── FrameError            one frame is not answered with labels; carries the status of its result
        ├── ExpiredError      DEADLINE_EXCEEDED: its deadline passed before inference
        ├── FullError         RESOURCE_EXHAUSTED: too many frames wait, or too many of this stream
        ├── InvalidError      INVALID: the packet cannot be decoded
        ├── NoReferenceError  MISSING_REFERENCE: the frame that it is predicted from is not kept
        ├── DrainingError     UNAVAILABLE: the server takes no more frames
        └── InferenceError    INTERNAL: the tail failed; it is the server's fault
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from ..models.exceptions import HeadraceError
from ..protos.messages import Status


class Reason(StrEnum):
    """Why a frame was refused; the label of `headrace_server_rejected_total`."""

    DRAINING = "draining"
    DEADLINE = "deadline"
    OVERLOAD = "overload"
    QUEUE_FULL = "queue_full"
    DEVICE_FULL = "device_full"
    PUSHED_OUT = "pushed_out"
    IN_FLIGHT = "in_flight"
    INVALID = "invalid"
    REFERENCE = "reference"


class ServerError(HeadraceError):
    """Base of every error that the server raises on purpose."""


class SettingsError(ServerError):
    """A flag, an environment variable or the configuration file cannot be used."""


class StartError(ServerError):
    """The server cannot start."""


class EdgeHalfError(ServerError):
    """An edge half cannot be exported."""


class FrameError(ServerError):
    """One frame is not answered with labels. Its text goes to the edge, with the status.

    Attributes:
        status: of its result.
        reason: why it was refused; None where it was not refused but failed.
        retry_s: after how many seconds it makes sense to send again; 0: not known.
    """

    status: ClassVar[Status] = Status.INTERNAL
    reason: Reason | None = None

    def __init__(self, text: str, *, retry_s: float = 0.0, reason: Reason | None = None) -> None:
        """`reason` where the class has none of its own."""
        super().__init__(text)
        self.retry_s = retry_s
        self.reason = reason or self.reason


class ExpiredError(FrameError):
    """The frame's deadline passed before inference, or would pass during it."""

    status = Status.DEADLINE_EXCEEDED
    reason = Reason.DEADLINE


class FullError(FrameError):
    """Too many frames wait, or too many of this device or stream."""

    status = Status.RESOURCE_EXHAUSTED
    reason = Reason.QUEUE_FULL


class InvalidError(FrameError):
    """The packet cannot be decoded."""

    status = Status.INVALID
    reason = Reason.INVALID


class NoReferenceError(FrameError):
    """The frame that the packet is predicted from is not kept, or not any more."""

    status = Status.MISSING_REFERENCE
    reason = Reason.REFERENCE


class DrainingError(FrameError):
    """The server, or this bundle's part of it, takes no more frames."""

    status = Status.UNAVAILABLE
    reason = Reason.DRAINING


class InferenceError(FrameError):
    """The tail failed."""

    status = Status.INTERNAL

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
        ├── DrainingError     UNAVAILABLE: the server takes no more frames
        └── InferenceError    INTERNAL: the tail failed; it is the server's fault
"""

from __future__ import annotations

from typing import ClassVar

from ..models.exceptions import HeadraceError
from ..protos.messages import Status


class ServerError(HeadraceError):
    """Base of every error that the server raises on purpose."""


class SettingsError(ServerError):
    """A flag, an environment variable or the configuration file cannot be used."""


class StartError(ServerError):
    """The server cannot start."""


class EdgeHalfError(ServerError):
    """An edge half cannot be exported."""


class FrameError(ServerError):
    """One frame is not answered with labels. Its text goes to the edge, with the status."""

    status: ClassVar[Status] = Status.INTERNAL


class ExpiredError(FrameError):
    """The frame's deadline passed before inference."""

    status = Status.DEADLINE_EXCEEDED


class FullError(FrameError):
    """Too many frames wait, or too many of this stream."""

    status = Status.RESOURCE_EXHAUSTED


class InvalidError(FrameError):
    """The packet cannot be decoded."""

    status = Status.INVALID


class DrainingError(FrameError):
    """The server takes no more frames."""

    status = Status.UNAVAILABLE


class InferenceError(FrameError):
    """The tail failed."""

    status = Status.INTERNAL

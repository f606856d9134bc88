"""What can go wrong on the edge.

HeadraceError
└── EdgeError
    ├── ConfigError               a setting has a value that cannot be used
    ├── SourceError               a video, picture, folder or camera cannot be read (also a DataError)
    ├── EngineError               an ONNX half cannot be loaded or run
    │   └── AbandonedError        it was stopped halfway, since its result is of no use any more
    ├── StreamError               the connection to the server failed or broke; tried again with backoff
    │   └── RefusedError          the server refuses this edge for good
    │       └── FingerprintRefusedError   because it holds another bundle (also a FingerprintError)
    ├── FetchError                what the server sent as an edge half was not accepted
    └── LedgerError               a frame would get a second outcome: a defect of the edge itself
"""

from __future__ import annotations

from ..models.exceptions import DataError, FingerprintError, HeadraceError


class EdgeError(HeadraceError):
    """Base of the edge's own errors."""


class ConfigError(EdgeError):
    """A setting has a value that cannot be used."""


class SourceError(EdgeError, DataError):
    """A video, picture, folder or camera cannot be read."""


class EngineError(EdgeError):
    """An ONNX half cannot be loaded or run."""


class AbandonedError(EngineError):
    """A computation was stopped halfway, since its result is of no use any more."""


class StreamError(EdgeError):
    """The connection to the server failed or broke. Tried again with backoff."""


class RefusedError(StreamError):
    """The server refuses this edge for good; trying again would change nothing."""


class FingerprintRefusedError(RefusedError, FingerprintError):
    """The server holds another bundle than the edge."""


class FetchError(EdgeError):
    """What the server sent as an edge half was not accepted; nothing of it was kept."""


class LedgerError(EdgeError):
    """A frame would get a second outcome. This is a defect of the edge itself."""

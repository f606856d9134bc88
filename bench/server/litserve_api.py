"""The tail behind LitServe, whose workers are spawned and import this module."""

from __future__ import annotations

import base64
from typing import Any

import litserve as ls

from .hosts import Tail


class Api(ls.LitAPI):  # type: ignore[misc]
    """A batched API: packets as base64 in JSON."""

    def setup(self, device: str) -> None:  # noqa: ARG002
        """Called in the worker."""
        self.tail = Tail()

    def decode_request(self, request: dict[str, str]) -> bytes:
        """JSON to packet."""
        return base64.b64decode(request["packet"])

    def predict(self, packets: list[bytes]) -> list[Any]:
        """A batch."""
        return self.tail(packets)

    def encode_response(self, labels: Any) -> dict[str, Any]:
        """Labels to JSON."""
        return {"labels": labels}

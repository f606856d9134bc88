"""Operating points: what can be chosen for a frame, and what each choice was measured to cost and to give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from .exceptions import BundleError

MAX_ID = 127
"""Identifiers fit one msgpack byte, so that the header keeps its size."""


class Kind(StrEnum):
    """Where a frame is computed and what is sent for it."""

    FEATURE = "feature"
    """Head and encoder on the edge; entropy-coded symbols are sent."""
    IMAGE = "image"
    """JPEG or WebP is sent; the server runs the uncut model."""
    LOCAL = "local"
    """All on the device, by the uncut model or by an exit behind a head; nothing is sent."""


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """One choice for a frame, with what it was measured to cost and give.

    Attributes:
        id: 0..127, unique in a bundle; this is what a packet carries.
        kind: see `Kind`.
        split: name of the split point; of a `local` one, where its exit is, or "" for the uncut model; "" for images.
        width: share of the slimmable encoder that is executed, 0 < width <= 1 (1 where it is not slimmable).
        rate_level: index into the split's gains (`feature`), or the image codec's quality 0..100 (`image`).
        codec: "webp" or "jpeg" (`image` only, else "").
        bytes_median, bytes_p95: whole packets as they were measured, in bytes (0 for `local`).
        accuracy: share of held-out photographs for which the answer equals the uncut model's, 0..1.
        edge_share: the edge's compute, entropy coding included, as a share of the uncut model's time; a start value
            until the device has been measured.
    """

    id: int
    kind: Kind
    split: str = ""
    width: float = 1.0
    rate_level: int = 0
    codec: str = ""
    bytes_median: float = 0.0
    bytes_p95: float = 0.0
    accuracy: float = 0.0
    edge_share: float = 1.0

    @property
    def name(self) -> str:
        """Short text for people and for metric labels, such as `blocks.3@4`, `webp@30`, `local` or `exit@blocks.3`."""
        if self.kind is Kind.FEATURE:
            return f"{self.split}@{self.rate_level}"
        if self.kind is Kind.IMAGE:
            return f"{self.codec}@{self.rate_level}"
        return self.stage

    @property
    def stage(self) -> str:
        """What the edge computes for it; points of one stage share their compute time (`blocks.3`, `webp`, `local`)."""
        if self.is_exit:
            return f"exit@{self.split}"
        return self.split or self.codec or "local"

    @property
    def is_exit(self) -> bool:
        """Whether the device answers from a split point's features, without the rest of the uncut model."""
        return self.kind is Kind.LOCAL and bool(self.split)

    @property
    def is_uncut(self) -> bool:
        """Whether the device answers with the uncut model."""
        return self.kind is Kind.LOCAL and not self.split

    def identity(self) -> dict[str, Any]:
        """What the fingerprint covers: all but the measured values."""
        return {
            "id": self.id,
            "kind": str(self.kind),
            "split": self.split,
            "width": self.width,
            "rate_level": self.rate_level,
            "codec": self.codec,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for msgpack; the inverse of `from_dict`."""
        return asdict(self) | {"kind": str(self.kind)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> OperatingPoint:
        """Read what `to_dict` wrote.

        Raises:
            BundleError: a field is missing, unknown or out of range.
        """
        try:
            point = cls(**{**fields, "kind": Kind(fields["kind"])})
        except (TypeError, ValueError, KeyError) as error:
            raise BundleError(f"operating point {dict(fields)!r} cannot be read: {error}") from error
        if not 0 <= point.id <= MAX_ID:
            raise BundleError(f"operating point {point.name} has id {point.id}; ids are 0..{MAX_ID}")
        return point

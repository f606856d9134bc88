"""What a program needs of an emulated link, whatever emulates it, and what such a link says has passed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Protocol

RECORD_BIN_S = 0.1


@dataclass(slots=True)
class SideCounts:
    """What one side of a link has seen since it was opened.

    Attributes:
        packets, bytes: what passed the bottleneck (a proxy counts chunks of a stream and their payload).
        lost: packets lost at random (a proxy cannot lose any: chunks that it held for a round trip instead).
        overflowed: packets dropped because the queue was full.
        queue_bytes_max: the most that waited at once.
        queue_s_max: the longest that a packet waited for its turn, in seconds.
    """

    packets: int = 0
    bytes: int = 0
    lost: int = 0
    overflowed: int = 0
    queue_bytes_max: int = 0
    queue_s_max: float = 0.0


@dataclass(slots=True)
class LinkRecord:
    """What passed when: bytes by bins of `bin_s` seconds since the schedule's beginning; and counts by side."""

    bin_s: float = RECORD_BIN_S
    up: dict[int, int] = field(default_factory=dict)
    down: dict[int, int] = field(default_factory=dict)
    connections: int = 0
    up_counts: SideCounts = field(default_factory=SideCounts)
    down_counts: SideCounts = field(default_factory=SideCounts)

    def to_json(self) -> str:
        """One JSON object."""
        sides = {
            name: [[round(b * self.bin_s, 3), n] for b, n in sorted(side.items())]
            for name, side in (("up", self.up), ("down", self.down))
        }
        counts = {"up_counts": asdict(self.up_counts), "down_counts": asdict(self.down_counts)}
        return json.dumps({"bin_s": self.bin_s, "connections": self.connections, **sides, **counts})

    @classmethod
    def from_json(cls, text: str) -> LinkRecord:
        """The inverse of `to_json`."""
        read = json.loads(text)
        up, down = ({round(at / read["bin_s"]): n for at, n in read[name]} for name in ("up", "down"))
        counts = [SideCounts(**read[f"{name}_counts"]) for name in ("up", "down")]
        return cls(read["bin_s"], up, down, read["connections"], *counts)


class EmulatedLink(Protocol):
    """An emulated link between an edge and a server.

    Attributes:
        kind: name of the mechanism, to be printed.
        address: "host:port" that the edge connects to.
        server_host: the address that the server must listen on.
        edge_prefix, server_prefix: what to put before a command so that it runs at that end.
    """

    kind: str
    address: str
    server_host: str
    edge_prefix: tuple[str, ...]
    server_prefix: tuple[str, ...]

    def begin(self, ago_s: float = 0.0) -> None:
        """Start the schedule, as of so many seconds ago; until then its first rate holds."""

    def set_rate(self, up_bps: float) -> None:
        """Leave the schedule: this rate from now on, 0 being an outage both ways."""

    def record(self) -> LinkRecord:
        """What has passed so far; complete once the link is closed."""

    async def close(self) -> None:
        """Cut all connections, and remove whatever the link made on this machine."""

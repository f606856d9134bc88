"""The demo's scenario: frames, deadline, device and link; and what a real run of it gives."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..links.record import LinkRecord
from ..links.schedule import Phase, RateSchedule
from ..links.spec import LinkSpec
from .tally import FrameRecord

FPS = 10.0
DEADLINE_MS = 250.0
DEVICE_UNCUT_MS = 150.0
DELAY_S = 0.012
PHASES = tuple(
    Phase(seconds, mbps)
    for mbps, seconds in (
        (8, 5),
        (4, 4),
        (2, 4),
        (1, 4),
        (0.5, 4),
        (0.25, 4),
        (0.1, 4),
        (0, 4),
        (0.5, 2.5),
        (2, 2),
        (8, 2.5),
    )
)
"""40 s; the last rate holds on."""
LINK = LinkSpec(up=RateSchedule.of_phases(PHASES), delay_s=DELAY_S, queue_bytes=32 * 1024)


@dataclass
class Streamed:
    """What the real run gave.

    Attributes:
        frames: in order of their outcomes.
        lines: the same as the edge wrote them.
        summary: the edge's last line.
        link: what passed the link.
        link_kind: the mechanism.
        server_away_s: from when until when there was no server, in seconds since the first frame.
    """

    frames: list[FrameRecord] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    link: LinkRecord = field(default_factory=LinkRecord)
    link_kind: str = ""
    server_away_s: list[tuple[float, float]] = field(default_factory=list)

    def complaints(self) -> list[str]:
        """Sums that do not add up; empty when all do."""
        found = []
        captured, outcomes = self.summary["frames"], self.summary["outcomes"]
        if sum(outcomes.values()) != captured:
            found.append(f"the outcomes sum to {sum(outcomes.values())}, but {captured} frames were captured")
        if sorted(f.frame for f in self.frames) != list(range(captured)):
            found.append(f"{len(self.frames)} frames have a line, but {captured} were captured")
        for outcome, count in outcomes.items():
            if count != (lines := sum(f.outcome == outcome for f in self.frames)):
                found.append(f"the summary has {count} frames {outcome}, their lines {lines}")
        return found


def write_frames(path: Path, streamed: Streamed) -> None:
    """The edge's lines, one JSON object a line, in order of the frames."""
    lines = sorted(streamed.lines, key=lambda line: line["frame"])
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))

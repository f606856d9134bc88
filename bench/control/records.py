"""What became of the frames of a simulated run."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

OUTCOMES = ("ok", "late", "local", "dropped")


@dataclass(frozen=True, slots=True)
class FrameRecord:
    """What became of one captured frame.

    Attributes:
        frame: its number, from 0.
        captured_s: virtual time.
        outcome: `ok`, `late`, `local` or `dropped`, as on the edge's output.
        reason: why it was dropped or is late without an answer, else "".
        point: index of the operating point that was chosen, or -1.
        latency_s: capture to answer; infinite where there was none.
        bytes: packet size if it was written, else 0.
        score: 1 (or the share given in `agree`) if the answer is in time and right, else 0.
        probe: it was a probe.
    """

    frame: int
    captured_s: float
    outcome: str
    reason: str = ""
    point: int = -1
    latency_s: float = math.inf
    bytes: int = 0
    score: float = 0.0
    probe: bool = False


@dataclass(frozen=True, slots=True)
class Replay:
    """All frames of one run, in order of capture; the outcomes sum to the frames."""

    records: list[FrameRecord]
    outcomes: dict[str, int] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        """Frames captured."""
        return len(self.records)

    @property
    def on_time(self) -> float:
        """Share of captured frames that were answered within the deadline, 0..1."""
        return (self.outcomes["ok"] + self.outcomes["local"]) / max(self.frames, 1)

    @property
    def score(self) -> float:
        """On-time accuracy: mean over all captured frames of right answers in time, 0..1."""
        return sum(record.score for record in self.records) / max(self.frames, 1)

    @property
    def bytes(self) -> int:
        """Bytes written in all."""
        return sum(record.bytes for record in self.records)

    @property
    def bytes_per_frame(self) -> float:
        """Bytes written per captured frame."""
        return self.bytes / max(self.frames, 1)

    @property
    def switches(self) -> int:
        """How often the point changed from one computed frame to the next."""
        chosen = [record.point for record in self.records if record.point >= 0]
        return sum(a != b for a, b in itertools.pairwise(chosen))

"""Frames as the demo counts them, measured or replayed, and what is stated about a run of them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OUTCOMES = ("ok", "late", "local", "dropped", "filtered", "error")
ON_TIME = frozenset({"ok", "local"})


@dataclass(frozen=True, slots=True)
class FrameRecord:
    """One captured frame and what became of it.

    Attributes:
        frame: index among the captured frames.
        captured_s: when it was captured, in seconds since the first frame.
        outcome: one of `OUTCOMES`.
        point: name of its operating point, "" when none was chosen.
        bytes: what was sent for it.
        labels: class indices of the answer, best first, at most five; empty without an answer.
        text: its first label in words.
        latency_ms: capture to answer; None without an answer.
        rate_kbps: what the edge believed the link's rate to be; None when unknown.
        timings_ms: durations by stage.
        reason: why, where the outcome alone does not say.
        connected: whether the stream stood.
    """

    frame: int
    captured_s: float
    outcome: str
    point: str = ""
    bytes: int = 0
    labels: tuple[int, ...] = ()
    text: str = ""
    latency_ms: float | None = None
    rate_kbps: float | None = None
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    connected: bool = True

    @classmethod
    def from_line(cls, line: Mapping[str, Any], first_captured_s: float = 0.0) -> FrameRecord:
        """Read a line of `headrace edge`; times are moved so that the first frame is captured at 0."""
        labels = line["labels"]
        return cls(
            frame=line["frame"],
            captured_s=line["captured_s"] - first_captured_s,
            outcome=line["outcome"],
            point=line["point"] or "",
            bytes=line["bytes"],
            labels=tuple(each["index"] for each in labels),
            text=labels[0]["label"] if labels else "",
            latency_ms=line["latency_ms"],
            rate_kbps=line["rate_kbps"],
            timings_ms=line["timings_ms"],
            reason=line["reason"],
            connected=line["connected"],
        )

    @property
    def on_time(self) -> bool:
        """Whether it was answered within its deadline."""
        return self.outcome in ON_TIME


@dataclass(frozen=True, slots=True)
class Tally:
    """What is stated about a run.

    Attributes:
        name: of the run.
        measured: by real processes over the emulated link, else replayed in virtual time.
        captured: frames; the outcomes sum to it.
        outcomes: frames by outcome.
        on_time: share of captured frames that were answered within the deadline.
        agree_first, agree_five: of the frames answered in time, the share for which the uncut model's label is the
            answer, or among its five best.
        agree_first_all, agree_five_all: the same of all captured frames; one without an answer in time agrees with
            nothing.
        bytes_per_frame: all bytes sent, over captured frames.
        latency_ms: median latency of the frames answered in time; None without any.
    """

    name: str
    measured: bool
    captured: int
    outcomes: Mapping[str, int]
    on_time: float
    agree_first: float
    agree_five: float
    agree_first_all: float
    agree_five_all: float
    bytes_per_frame: float
    latency_ms: float | None


def tally(name: str, frames: Sequence[FrameRecord], uncut: Sequence[int], *, measured: bool) -> Tally:
    """Count a run.

    Args:
        name: for the table.
        frames: the captured frames, each once, in any order.
        uncut: the uncut model's label of every frame, by its index.
        measured: see `Tally`.

    Raises:
        ValueError: a frame is missing or there twice, or has an unknown outcome.
    """
    indexes = sorted(f.frame for f in frames)
    if indexes != list(range(len(frames))) or len(uncut) < len(frames):
        raise ValueError(f"{name}: not every captured frame has exactly one outcome, or its uncut label")
    counts = Counter(f.outcome for f in frames)
    if unknown := set(counts) - set(OUTCOMES):
        raise ValueError(f"{name}: unknown outcomes {', '.join(sorted(unknown))}")
    answered = [f for f in frames if f.on_time]
    first = sum(f.labels[:1] == (uncut[f.frame],) for f in answered)
    five = sum(uncut[f.frame] in f.labels[:5] for f in answered)
    captured, timely = max(1, len(frames)), max(1, len(answered))
    latencies = [f.latency_ms for f in answered if f.latency_ms is not None]
    return Tally(
        name=name,
        measured=measured,
        captured=len(frames),
        outcomes={outcome: counts[outcome] for outcome in OUTCOMES},
        on_time=len(answered) / captured,
        agree_first=first / timely,
        agree_five=five / timely,
        agree_first_all=first / captured,
        agree_five_all=five / captured,
        bytes_per_frame=sum(f.bytes for f in frames) / captured,
        latency_ms=statistics.median(latencies) if latencies else None,
    )

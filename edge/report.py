"""Report: what the edge says about its frames. One JSON line a frame on standard output, and a summary at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, TextIO

from .ledger import ON_TIME, Frame, Ledger, Outcome
from .local import MAX_LABELS

STAGES = ("wait", "prepare", "compute", "compress", "link", "server", "queue", "decode", "tail")
"""Stages of a frame's timings, in its order: until it is taken up; scaling; head and encoder, picture coding or the
uncut model; entropy coding; there and back less the server's time; the server's time, and of that waiting, decoding
and tail."""


class Report:
    """Writes lines; each is flushed, so that a reader sees a frame when its outcome is known."""

    def __init__(self, out: TextIO, labels: Sequence[str], began: float) -> None:
        """Keep where lines go.

        Args:
            out: usually standard output.
            labels: names of the classes.
            began: when capturing began, on the clock of the frames' times.
        """
        self._out, self.labels, self.began = out, labels, began
        self.unread = False
        """Whether the reader has gone; nothing is written any more then."""

    def frame(
        self, frame: Frame, *, deadline_s: float, in_flight: int, rate_bps: float | None, connected: bool
    ) -> None:
        """The line of a frame that has its outcome."""
        labels = [
            {
                "index": label.index,
                "label": self.labels[label.index] if label.index < len(self.labels) else "",
                "score": round(label.score, 5),
            }
            for label in frame.labels[:MAX_LABELS]
        ]
        self._write(
            {
                "event": "frame",
                "frame": frame.id,
                "outcome": frame.outcome,
                "reason": frame.reason,
                "captured_s": round(frame.captured_at - self.began, 6),
                "point": frame.point.name if frame.point else None,
                "kind": frame.point.kind if frame.point else None,
                "bytes": frame.sent_bytes,
                "slices": frame.slices,
                "labels": labels,
                "latency_ms": None if frame.latency_s is None else _ms(frame.latency_s),
                "deadline_ms": round(deadline_s * 1000, 3),
                "timings_ms": {name: _ms(frame.timings[name]) for name in STAGES if name in frame.timings},
                "queue_depth": frame.queue_depth,
                "in_flight": in_flight,
                "rate_kbps": round(rate_bps / 1000, 1) if rate_bps is not None and math.isfinite(rate_bps) else None,
                "connected": connected,
            }
        )

    def summary(self, ledger: Ledger, now: float) -> None:
        """The last line; `on_time` counts the frames that were answered within the deadline, `ok` and `local`."""
        self._write(
            {
                "event": "summary",
                "frames": ledger.captured,
                "outcomes": {str(each): ledger.outcomes[each] for each in Outcome},
                "on_time": sum(ledger.outcomes[each] for each in ON_TIME),
                "bytes": ledger.sent_bytes,
                "duration_s": round(now - self.began, 3),
            }
        )

    def _write(self, line: dict[str, Any]) -> None:
        if self.unread:
            return
        try:
            self._out.write(json.dumps(line, separators=(",", ":")) + "\n")
            self._out.flush()
        except BrokenPipeError:
            self.unread = True


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)

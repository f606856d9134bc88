"""Report: what the edge says about its frames. One JSON line a frame on standard output, and a summary at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TextIO

import numpy as np

from ..models.bundle import Preprocessing
from ..models.class_map import decode_class_map
from ..models.exceptions import HeadraceError
from ..models.preprocessing import placement
from .filtering import Audits
from .ledger import ON_TIME, Frame, Ledger, Outcome
from .local import MAX_LABELS

STAGES = ("wait", "prepare", "compute", "compress", "again", "link", "server", "queue", "decode", "tail")
"""Stages of a frame's timings, in its order: until it is taken up; scaling; head and encoder, picture coding or the
uncut model; entropy coding; there and back less the server's time; the server's time, and of that waiting, decoding
and tail."""


class Report:
    """Writes lines; each is flushed, so that a reader sees a frame when its outcome is known."""

    def __init__(
        self, out: TextIO, labels: Sequence[str], began: float, preprocessing: Preprocessing | None = None
    ) -> None:
        """Keep where lines go.

        Args:
            out: usually standard output.
            labels: names of the classes.
            began: when capturing began, on the clock of the frames' times.
            preprocessing: says where a frame lies in the backbone's input, for boxes; None leaves them as they come.
        """
        self._out, self.labels, self.began = out, labels, began
        self.preprocessing = preprocessing
        self.unread = False
        """Whether the reader has gone; nothing is written any more then."""

    def frame(
        self, frame: Frame, *, deadline_s: float, in_flight: int, rate_bps: float | None, connected: bool
    ) -> None:
        """The line of a frame that has its outcome."""
        labels = [
            {"index": x.index, "label": self._label(x.index), "score": round(x.score, 5)}
            for x in frame.labels[:MAX_LABELS]
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
                "predicted": frame.predicted,
                "coded_again": frame.coded_again,
                "fallback": frame.fell_back,
                "fallback_point": frame.fell_back_to.name if frame.fell_back_to else None,
                "slices": frame.slices,
                "labels": labels,
                **self._boxes(frame),
                **self._class_map(frame),
                **({} if frame.presence is None else {"presence": round(frame.presence, 3), "empty": frame.empty}),
                **({} if frame.confidence is None else {"confidence": round(frame.confidence, 4)}),
                "latency_ms": None if frame.latency_s is None else _ms(frame.latency_s),
                "deadline_ms": round(deadline_s * 1000, 3),
                "timings_ms": {name: _ms(frame.timings[name]) for name in STAGES if name in frame.timings},
                "queue_depth": frame.queue_depth,
                "in_flight": in_flight,
                "rate_kbps": round(rate_bps / 1000, 1) if rate_bps is not None and math.isfinite(rate_bps) else None,
                "connected": connected,
            }
        )

    def summary(self, ledger: Ledger, now: float, audits: Audits | None = None) -> None:
        """The last line; `on_time` counts the frames that were answered within the deadline, `ok` and `local`.

        With a filter, `audits` says in how many frames it saw nothing that were sent and answered nevertheless, and in
        how many of those the server found something of interest.
        """
        self._write(
            {
                "event": "summary",
                "frames": ledger.captured,
                "outcomes": {str(each): ledger.outcomes[each] for each in Outcome},
                "on_time": sum(ledger.outcomes[each] for each in ON_TIME),
                "bytes": ledger.sent_bytes,
                "duration_s": round(now - self.began, 3),
                **({"audits": asdict(audits)} if audits else {}),
            }
        )

    def _label(self, index: int) -> str:
        return self.labels[index] if index < len(self.labels) else ""

    def _boxes(self, frame: Frame) -> dict[str, Any]:
        """Boxes in pixels of the captured frame, also where a detector found none; nothing for other answers."""
        if not frame.boxes and "detection" not in frame.tails:
            return {}
        boxes = []
        for box, corners in zip(frame.boxes, frame_corners(frame, self.preprocessing), strict=True):
            label, place = self._label(box.index), [round(x, 1) for x in corners]
            boxes.append({"index": box.index, "label": label, "score": round(box.score, 5), "box": place})
        return {"boxes": boxes}

    def _class_map(self, frame: Frame) -> dict[str, Any]:
        """Size and share of each class of a segmentation; nothing for answers that are none."""
        if frame.class_map is None:
            return {}
        try:
            counts = np.bincount(decode_class_map(frame.class_map.png).ravel())
        except HeadraceError as error:
            return {"class_map": {"error": str(error)}}
        present = [(int(i), counts[i] / counts.sum()) for i in np.argsort(-counts, kind="stable") if counts[i]]
        classes = [{"index": i, "label": self._label(i), "share": round(float(share), 5)} for i, share in present]
        return {"class_map": {"width": frame.class_map.width, "height": frame.class_map.height, "classes": classes}}

    def _write(self, line: dict[str, Any]) -> None:
        if self.unread:
            return
        try:
            self._out.write(json.dumps(line, separators=(",", ":")) + "\n")
            self._out.flush()
        except BrokenPipeError:
            self.unread = True


def frame_corners(frame: Frame, how: Preprocessing | None) -> list[tuple[float, float, float, float]]:
    """Left, top, right, bottom of a frame's boxes in pixels of the captured frame, within it.

    Args:
        frame: its boxes are in pixels of the backbone's input, unless the server has placed them.
        how: says where the frame lies in that; None leaves the boxes as they are.
    """
    corners = [(box.left, box.top, box.right, box.bottom) for box in frame.boxes]
    if how is None or frame.placed or not all(frame.size):
        return corners
    place = placement(*frame.size, how)
    return [place.within(each, frame.size) for each in corners]


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)

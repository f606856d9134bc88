"""The demo's second part: a detector on the street video, boxes drawn into a video file.

The same server answers for two bundles at once. Every frame that is answered in time is compared with the uncut
detector on the same frame: F1 of boxes with a score of at least 0.3, a box being the same from an overlap of 0.5 on.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from ...edge.frames import open_sources
from ...edge.ledger import Frame
from ...edge.report import frame_corners
from ...models.bundle import MANIFEST, Bundle
from ...models.exceptions import BackboneError, HeadraceError
from ...models.measure import BATCH
from ...models.preprocessing import prepare
from ...models.tasks import Boxes, Detection
from ...models.zoo.catalogue import backbone_of
from ...models.zoo.darknet import find_weights
from ...protos.messages import Box
from .. import material
from ..cores import all_cores, cores_beside_the_edge
from ..links.process import LinkProcess
from ..links.schedule import Phase, RateSchedule
from ..links.spec import LinkSpec
from ..processes import Process
from .tally import OUTCOMES

BUNDLE = Path(__file__).parents[2] / "models" / "bundles" / "yolov2_tiny"
FPS = 5.0
FRAMES = 40
DEADLINE_MS = 500.0
MBPS, DELAY_S = 0.5, 0.012
VIDEO = "detection.mp4"


@dataclass
class Detected:
    """What the edge said of the frames; `f1` and the uncut detector's `boxes` are filled in by `compare`."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    f1: float | None = None
    boxes: int = 0

    def summary(self) -> dict[str, Any]:
        """Plain values for summary.json."""
        counts = Counter(line["outcome"] for line in self.lines)
        answered = [line for line in self.lines if line["outcome"] == "ok"]
        sent = [line["bytes"] for line in self.lines if line["bytes"]]
        return {
            "frames": len(self.lines),
            "outcomes": {outcome: counts[outcome] for outcome in OUTCOMES},
            "fps": FPS,
            "deadline_ms": DEADLINE_MS,
            "mbps": MBPS,
            "bytes_a_frame": round(statistics.fmean(sent), 1) if sent else 0.0,
            "points": dict(Counter(line["point"] for line in answered)),
            "f1": None if self.f1 is None else round(self.f1, 4),
            "uncut_boxes": self.boxes,
        }


def bundle() -> Bundle | None:
    """The bundle of a detector; None where there is none, or the detector's weights are not installed."""
    if not (BUNDLE / MANIFEST).is_file():
        return None
    try:
        find_weights()
    except BackboneError:
        return None
    return Bundle.load(BUNDLE)


async def stream(server: str, half: Path, output: Path) -> Detected:
    """Run an edge with the detector's half on the street video, over a narrow link.

    Args:
        server: host:port.
        half: folder of the edge half.
        output: folder for the rendered video and the log.

    Raises:
        HeadraceError: the edge ended before its time.
    """
    spec = LinkSpec(up=RateSchedule.of_phases([Phase(3600, MBPS)]), delay_s=DELAY_S, queue_bytes=32 * 1024)
    link = await LinkProcess.start(server, spec, record=output / "detection-link.json", cores=cores_beside_the_edge())
    flags = {
        "server": link.address,
        "bundle": half,
        "source": [str(material.video())],
        "fps": FPS,
        "max_frames": FRAMES,
        "deadline_ms": DEADLINE_MS,
        "kinds": "feature",
        "render": output / VIDEO,
    }
    found = Detected()
    edge = await Process.start("edge", flags, output / "detection.log", all_cores())
    try:
        async for line in edge.lines():
            if line.get("event") == "frame":
                if not found.lines:
                    link.begin()
                found.lines.append(line)
        code = await edge.wait()
    finally:
        await edge.stop()
        await link.close()
    if code != 0:
        raise HeadraceError(f"the detector's edge ended with code {code}:\n{edge.log_end()}")
    return found


def compare(detector: Bundle, found: Detected) -> None:
    """Fill in the agreement with the uncut detector, over all frames that were answered in time."""
    backbone, answered = backbone_of(detector), {x["frame"]: x for x in found.lines if x["outcome"] == "ok"}
    task, uncut = backbone.task, backbone.uncut
    assert isinstance(task, Detection)
    (video,) = open_sources([str(material.video())])
    pictures = [p for p in itertools.islice(video.frames(), FRAMES) if isinstance(p, Image.Image)]
    asked = [i for i in sorted(answered) if i < len(pictures)]
    hits = mine = theirs = 0
    with torch.inference_mode():
        for at in range(0, len(asked), BATCH):
            chosen = asked[at : at + BATCH]
            pixels = np.stack([prepare(pictures[i], detector.preprocessing) for i in chosen])
            for i, answer in zip(chosen, task.answers(uncut(torch.from_numpy(pixels))), strict=True):
                assert isinstance(answer, Boxes)
                counts = task.matches(_told(answered[i]), _in_picture(answer, pictures[i].size, detector))
                hits, mine, theirs = hits + counts[0], mine + counts[1], theirs + counts[2]
    found.boxes = theirs
    found.f1 = 2 * hits / (mine + theirs) if mine + theirs else None


def say(console: Console, found: Detected, output: Path) -> None:
    """Print what came of it."""
    said = found.summary()
    agreement = "no boxes to compare" if said["f1"] is None else f"F1 {said['f1']:.2f}"
    console.print(
        f"Detection on the street video, {said['frames']} frames over {MBPS:g} Mbit/s: "
        f"{said['outcomes']['ok']} answered in time, {said['bytes_a_frame']:.0f} bytes a frame; against the uncut "
        f"detector at an overlap of 0.5: {agreement} ({said['uncut_boxes']} boxes). Boxes drawn: {output / VIDEO}",
        highlight=False,
        soft_wrap=True,
    )


def _told(line: dict[str, Any]) -> Boxes:
    boxes = line.get("boxes", ())
    return Boxes(
        tuple(b["index"] for b in boxes), tuple(b["score"] for b in boxes), tuple(tuple(b["box"]) for b in boxes)
    )


def _in_picture(answer: Boxes, size: tuple[int, int], detector: Bundle) -> Boxes:
    found = zip(answer.indexes, answer.scores, answer.corners, strict=True)
    frame = Frame(0, 0.0, 0.0, boxes=tuple(Box(i, s, *corners) for i, s, corners in found), size=size)
    return Boxes(answer.indexes, answer.scores, tuple(frame_corners(frame, detector.preprocessing)))

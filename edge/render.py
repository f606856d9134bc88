"""Render: `--render out.mp4`, the captured frames with their answers drawn on them, by PyAV.

It draws and encodes in a thread of its own, in the order of capture: a frame waits until those before it have their
outcomes. Boxes of a frame without an answer are those of the last one that had some, in grey.
"""

from __future__ import annotations

import colorsys
import queue
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import structlog
from PIL import Image, ImageDraw, ImageFont

from ..models.bundle import Preprocessing
from .exceptions import ConfigError
from .ledger import Frame
from .report import frame_corners

log = structlog.get_logger(__name__)

SHOWN_SCORE = 0.3
"""Boxes with a lower score are not drawn."""
MOST_BEHIND = 64
"""Frames that wait to be drawn; more of them are left out of the video rather than kept in memory."""
SMALLEST = 320
"""Frames narrower than this are drawn enlarged, so that text can be read."""
CODECS = ("libx264", "mpeg4")
_GREY = (150, 150, 150)
_COLOURS = {"ok": (80, 200, 120), "local": (90, 150, 250), "filtered": (190, 190, 190), "late": (240, 190, 60)}
_OTHER_COLOUR = (240, 90, 90)


class Render:
    """Draws frames into a video file; one is opened with the size of the first frame."""

    def __init__(self, path: Path, fps: float, labels: Sequence[str], how: Preprocessing) -> None:
        """Keep where frames go; nothing is written before the first one.

        Args:
            path: video file; its suffix says the container (.mp4, .mkv, .avi, ...).
            fps: frames per second.
            labels: names of the classes.
            how: says where a frame lies in the backbone's input.

        Raises:
            ConfigError: the folder is not there, or no container is known by that suffix.
        """
        if not path.parent.is_dir():
            raise ConfigError(f"--render {path}: {path.parent} is no folder; make it first")
        try:
            self._container: Any = av.open(str(path), "w")
        except (ValueError, OSError, av.FFmpegError) as error:
            raise ConfigError(f"--render {path} cannot be written ({error}); give a file such as out.mp4") from error
        self.labels, self.preprocessing = labels, how
        self.left_out = 0
        self._fps = Fraction(fps).limit_denominator(1000)
        self._stream: Any = None
        self._next_id = 0
        self._waiting: dict[int, Callable[[], None]] = {}
        self._held: list[tuple[tuple[float, float, float, float], int]] = []
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="render", daemon=True)
        self._thread.start()

    def frame(self, frame: Frame) -> None:
        """A frame has its outcome; one that could not be read is left out."""
        picture = frame.shown
        frame.shown = None
        if picture is None or self._jobs.qsize() + len(self._waiting) >= MOST_BEHIND:
            self.left_out += picture is not None
            self._waiting[frame.id] = lambda: None
        else:
            boxes = frame_corners(frame, self.preprocessing)
            self._waiting[frame.id] = lambda: self._draw(picture, frame, boxes)
        while (job := self._waiting.pop(self._next_id, None)) is not None:
            self._jobs.put(job)
            self._next_id += 1

    def close(self) -> None:
        """Write what is left and close the file; all frames have their outcomes."""
        self._jobs.put(None)
        self._thread.join()
        if self.left_out:
            log.warning("the rendered video lacks frames: they came faster than they were drawn", frames=self.left_out)

    def _run(self) -> None:
        failed = False
        while (job := self._jobs.get()) is not None:
            try:
                if not failed:
                    job()
            except (OSError, ValueError, av.FFmpegError) as error:
                failed = True
                log.error("the rendered video breaks off", reason=str(error))
        try:
            if self._stream is not None and not failed:
                self._container.mux(self._stream.encode())
            self._container.close()
        except (OSError, ValueError, av.FFmpegError) as error:
            log.error("the rendered video is not complete", reason=str(error))

    def _draw(self, picture: Image.Image, frame: Frame, boxes: Sequence[tuple[float, float, float, float]]) -> None:
        scale = max(1, -(-SMALLEST // picture.width))
        canvas = picture.convert("RGB")
        if scale > 1:
            canvas = canvas.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(canvas)
        font = ImageFont.load_default(max(11, canvas.height // 28))
        found = [(b, x.index, x.score) for b, x in zip(boxes, frame.boxes, strict=True) if x.score >= SHOWN_SCORE]
        if frame.latency_s is not None:
            self._held = [(b, index) for b, index, _ in found]
            for corners, index, score in reversed(found):
                colour = _class_colour(index)
                draw.rectangle([x * scale for x in corners], outline=colour, width=2)
                text = f"{self._label(index)} {score:.2f}"
                left, top = max(0.0, corners[0] * scale), max(0.0, corners[1] * scale)
                draw.rectangle(draw.textbbox((left, top), text, font=font), fill=colour)
                draw.text((left, top), text, fill=(0, 0, 0), font=font)
        else:
            for corners, _ in self._held:
                draw.rectangle([x * scale for x in corners], outline=_GREY, width=1)
        self._caption(draw, frame, canvas.height, font)
        self._write(canvas)

    def _caption(self, draw: ImageDraw.ImageDraw, frame: Frame, height: int, font: Any) -> None:
        said = [str(frame.outcome), frame.point.name if frame.point else "", f"{frame.sent_bytes} B"]
        if frame.latency_s is not None:
            said.append(f"{frame.latency_s * 1000:.0f} ms")
        if frame.labels:
            said.append(self._label(frame.labels[0].index))
        text = "  ".join(x for x in said if x)
        box = draw.textbbox((4, 0), text, font=font)
        top = height - box[3] - 4
        draw.rectangle((0, top - 2, box[2] + 6, height), fill=(0, 0, 0))
        draw.text((4, top), text, fill=_COLOURS.get(str(frame.outcome), _OTHER_COLOUR), font=font)

    def _write(self, canvas: Image.Image) -> None:
        if self._stream is None:
            codec = next((c for c in CODECS if c in av.codecs_available), CODECS[-1])
            self._stream = self._container.add_stream(codec, rate=self._fps)
            # 4:2:0 needs even sides.
            self._stream.width, self._stream.height = canvas.width // 2 * 2, canvas.height // 2 * 2
            self._stream.pix_fmt = "yuv420p"
            self._stream.thread_count = 1
        size = (self._stream.width, self._stream.height)
        if canvas.size != size:
            # Frames of another size are fitted in, with black around them.
            fitted = canvas.copy()
            fitted.thumbnail(size)
            canvas = Image.new("RGB", size)
            canvas.paste(fitted, ((size[0] - fitted.width) // 2, (size[1] - fitted.height) // 2))
        self._container.mux(self._stream.encode(_to_video(canvas)))

    def _label(self, index: int) -> str:
        return self.labels[index] if index < len(self.labels) else str(index)


_to_video: Callable[[Image.Image], Any] = av.VideoFrame.from_image


def _class_colour(index: int) -> tuple[int, int, int]:
    """Colours far apart for neighbouring classes: steps of the golden angle around the circle of hues."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.65, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)

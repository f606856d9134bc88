"""What a frame can be predicted from: the edge's account of the frames that the server keeps. No I/O, no clock.

    sent --> answered OK from all slices --> kept by both sides --> pushed out by the frames answered after it

The server keeps the last frames in the order of its results, which is the order in which they are read here. A frame
is predicted only from one that will still be kept when it comes, whatever becomes of the frames before it that have no
answer yet. When the stream breaks nothing is kept any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..models.bitstream import MAX_BACK
from ..models.temporal import Reference

if TYPE_CHECKING:
    from .ledger import Frame

MOST_KEPT = 16
"""However many more the server keeps."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """What a frame is predicted from.

    Attributes:
        reference: a frame that the server keeps; None: there is none, and it has to be a key frame.
        back: how many frame ids before it that frame was.
        epoch: of the stream on which this holds.
    """

    reference: Reference | None
    back: int
    epoch: int


class References:
    """The frames that the server keeps of this stream."""

    def __init__(self) -> None:
        """None, and the server keeps none."""
        self.epoch = 0
        """Rises when what was kept before is gone: what was predicted under an older one cannot be decoded."""
        self._keep = 0
        self._frames: deque[tuple[int, Reference]] = deque()

    def connect(self, keep: int) -> None:
        """A new stream, of which the server keeps the last `keep` frames."""
        self.forget()
        self._keep = keep

    def forget(self, waiting: Iterable[Frame] = ()) -> None:
        """Nothing is kept any more of what was sent so far; frames that wait to be sent must do without."""
        self.epoch += 1
        self._frames.clear()
        for frame in waiting:
            self.do_without(frame)

    @property
    def active(self) -> bool:
        """Whether the server keeps frames."""
        return self._keep > 0

    def answered(self, frame_id: int, reference: Reference) -> None:
        """A frame was answered from all of its slices."""
        if self._keep:
            self._frames.append((frame_id, reference))
            while len(self._frames) > min(self._keep, MOST_KEPT):
                self._frames.popleft()

    def earlier(self, frame_id: int, split: str, unanswered: int) -> Earlier:
        """What a frame can be predicted from: the newest frame of its split point that is sure to be kept.

        Args:
            frame_id: of the frame.
            split: its split point.
            unanswered: frames that are sent before it and have no answer yet.
        """
        for answered_since, (earlier_id, reference) in enumerate(reversed(self._frames)):
            back = (frame_id - earlier_id) % 2**32
            if answered_since + unanswered >= self._keep or back > MAX_BACK:
                break
            if reference.split == split:
                return Earlier(reference, back, self.epoch)
        return Earlier(None, 0, self.epoch)

    def do_without(self, frame: Frame) -> None:
        """Code the frame anew by itself, if it was predicted from one that is gone."""
        frame.epoch = self.epoch
        if frame.video is not None and frame.video.alone is not None:
            frame.video, frame.predicted = frame.video.alone(), False
            frame.packet = frame.video.packet

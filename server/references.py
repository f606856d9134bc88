"""What a stream's later frames can be predicted from: the last frames that were answered from all of their slices.

The edge knows which ones are kept: they go in in the order in which their results are written, which is the order in
which it reads them, and it predicts only from a frame whose result it has read and which nothing under way pushes out.
So a frame that was lost, dropped, refused, cut short or too late is never predicted from.
"""

from __future__ import annotations

from collections import OrderedDict

from ..models.temporal import Reference


class References:
    """Of one stream. Belongs to one event loop."""

    def __init__(self, keep: int) -> None:
        """Keep the last `keep` frames; 0 for none."""
        self.keep = keep
        self._frames: OrderedDict[int, Reference] = OrderedDict()

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._frames)

    def find(self, frame_id: int) -> Reference | None:
        """What is kept of a frame."""
        return self._frames.get(frame_id)

    def add(self, frame_id: int, reference: Reference) -> None:
        """Keep a frame whose result is about to be written, in place of the one that has been kept for longest."""
        self._frames.pop(frame_id, None)
        self._frames[frame_id] = reference
        while len(self._frames) > self.keep:
            self._frames.popitem(last=False)

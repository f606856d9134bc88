"""Placing: boxes in pixels of the captured frame, for edges that say how large it was.

The bundle's preprocessing says how a frame was scaled and where it lies in the backbone's input; with the frame's size
that is all that is needed to go back. Who does not say the size gets boxes in pixels of the backbone's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..models.bundle import Preprocessing
from ..models.preprocessing import Placement, placement
from ..protos.messages import Box, TailOutput

MAX_SIDE = 65_535
"""Most pixels of a side that a frame may say it has."""


def placed(outputs: Sequence[TailOutput], size: tuple[int, int], how: Preprocessing) -> tuple[TailOutput, ...]:
    """Outputs with their boxes in pixels of the captured frame, within it.

    Args:
        outputs: boxes in pixels of the backbone's input.
        size: width and height of the captured frame; with a side of 0, or of more than `MAX_SIDE`, nothing is changed.
        how: the bundle's preprocessing.
    """
    if not all(0 < side <= MAX_SIDE for side in size) or not any(output.boxes for output in outputs):
        return tuple(outputs)
    place = placement(*size, how)
    return tuple(
        replace(o, boxes=tuple(_in_frame(b, place, size) for b in o.boxes), captured=True) if o.boxes else o
        for o in outputs
    )


def _in_frame(box: Box, place: Placement, size: tuple[int, int]) -> Box:
    return Box(box.index, box.score, *place.within((box.left, box.top, box.right, box.bottom), size))

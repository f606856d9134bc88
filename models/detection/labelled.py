"""Pictures whose boxes are known, and the names of COCO's classes.

    DIR/images/.../NAME.jpg      a picture
    DIR/labels/.../NAME.txt      a line a box: class, centre x, centre y, width, height, as shares of the picture (YOLO)
    DIR/classes.txt              names of the classes, one a line; COCO's 80 where there is no such file

A labels file may also lie beside its picture. A picture without one counts as empty if the folder has labels at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..exceptions import DataError
from ..measure import find_pictures
from ..preprocessing import UNREADABLE

_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
COCO = tuple(_NAMES.split(","))
"""COCO's 80 classes in the order in which YOLO's labels count them."""
_ALSO = {"aeroplane": "airplane", "motorbike": "motorcycle", "sofa": "couch", "tvmonitor": "tv"}
"""What Darknet calls them."""

Corners = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Labelled:
    """A picture and its boxes.

    Attributes:
        path: of the picture.
        size: width and height in pixels.
        indexes: the detector's class of each box.
        corners: left, top, right, bottom of each box in pixels of the picture.
    """

    path: Path
    size: tuple[int, int]
    indexes: tuple[int, ...]
    corners: tuple[Corners, ...]


def labelled_boxes(folder: Path, names: Sequence[str], limit: int = 0) -> list[Labelled]:
    """Pictures with their boxes, sorted by path.

    Args:
        folder: see the module's docstring.
        names: of the detector's classes; a labelled class that it does not know is left out.
        limit: take at most this many, evenly spread; 0 for all.

    Raises:
        DataError: there are no labels, one cannot be read, or the detector knows none of the classes.
    """
    known = known_classes(_class_names(folder), names)
    if not known:
        raise DataError(f"the detector knows none of the classes of {folder}; name them in {folder / 'classes.txt'}")
    pictures = find_pictures(folder)
    if not any(_labels_of(path).is_file() for path in pictures):
        raise DataError(
            f"{folder} holds no labels; put YOLO's text files (class cx cy w h) into labels/ beside images/"
        )
    if limit and len(pictures) > limit:
        pictures = [pictures[i] for i in np.linspace(0, len(pictures) - 1, limit).astype(int)]
    return [_read(path, known) for path in pictures]


def known_classes(theirs: Sequence[str], ours: Sequence[str]) -> Mapping[int, int]:
    """Index of each of their classes that is among ours -> our index; names are compared as COCO writes them."""
    index = {_plain(name): i for i, name in enumerate(ours)}
    return {i: index[_plain(name)] for i, name in enumerate(theirs) if _plain(name) in index}


def class_indexes(names: Sequence[str], asked: Sequence[str]) -> tuple[int, ...]:
    """Indexes of the classes asked for by name, in any order.

    Raises:
        DataError: one is unknown.
    """
    found = {_plain(name): i for i, name in enumerate(names)}
    for name in asked:
        if _plain(name) not in found:
            raise DataError(f"the detector has no class {name!r}; it has {', '.join(names)}")
    return tuple(sorted({found[_plain(name)] for name in asked}))


def _plain(name: str) -> str:
    lower = " ".join(name.lower().replace("_", " ").split())
    spaced = {"diningtable": "dining table", "pottedplant": "potted plant"}.get(lower, lower)
    return _ALSO.get(spaced, spaced)


def _class_names(folder: Path) -> Sequence[str]:
    path = folder / "classes.txt"
    if not path.is_file():
        return COCO
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def _labels_of(picture: Path) -> Path:
    """The labels file: the last folder called images becomes labels; without one, beside the picture."""
    parts = list(picture.with_suffix(".txt").parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts)


def _read(picture: Path, known: Mapping[int, int]) -> Labelled:
    try:
        with Image.open(picture) as opened:
            width, height = opened.size
    except UNREADABLE as error:
        raise DataError(f"{picture} cannot be read as a picture ({error}); remove it or save it anew") from error
    path = _labels_of(picture)
    indexes, corners = [], []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else (), 1):
        if not line.strip():
            continue
        try:
            first, *numbers = line.split()
            cx, cy, w, h = (float(x) for x in numbers[:4])
            if not (int(first) >= 0 and all(0 <= x <= 1 for x in (cx, cy, w, h))):
                raise ValueError("out of range")
        except ValueError as error:
            raise DataError(
                f"{path} line {number} is {line.strip()!r}; it should be a class and four shares of the picture "
                "0..1 (cx cy w h)"
            ) from error
        if int(first) in known:
            indexes.append(known[int(first)])
            half_w, half_h = w * width / 2, h * height / 2
            corners.append((cx * width - half_w, cy * height - half_h, cx * width + half_w, cy * height + half_h))
    return Labelled(picture, (width, height), tuple(indexes), tuple(corners))

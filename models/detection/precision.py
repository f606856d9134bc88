"""COCO's average precision of boxes, by faster-coco-eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..bundle import Preprocessing
from ..exceptions import DataError
from ..extras import how_to_install
from ..preprocessing import placement
from ..tasks import Answer, Boxes
from .labelled import Labelled


class Precision(NamedTuple):
    """mAP over overlaps of 0.5 to 0.95, and mAP50 at an overlap of 0.5; both 0..1."""

    map: float
    map50: float


class Judge:
    """Judges answers for the same labelled pictures again and again.

    Raises:
        DataError: faster-coco-eval is not installed, or no picture has a box.
    """

    def __init__(self, pictures: Sequence[Labelled], how: Preprocessing) -> None:
        """`how` says where a picture lies in the detector's input."""
        try:
            from faster_coco_eval import COCO, COCOeval_faster
        except ImportError as error:
            raise DataError(f"faster-coco-eval is missing; {how_to_install('server')}") from error
        if not any(p.indexes for p in pictures):
            raise DataError("none of the pictures has a box of a class that the detector knows")
        self._evaluation: Any = COCOeval_faster
        self._placements = [placement(*p.size, how) for p in pictures]
        boxes = [(i, k, b) for i, p in enumerate(pictures) for k, b in zip(p.indexes, p.corners, strict=True)]
        self._truth: Any = COCO(
            {
                "info": {},
                "images": [{"id": i, "width": p.size[0], "height": p.size[1]} for i, p in enumerate(pictures)],
                "categories": [{"id": k, "name": str(k)} for k in sorted({k for _, k, _ in boxes})],
                "annotations": [
                    {"id": n, "image_id": i, "category_id": k, "iscrowd": 0, **_rectangle(b)}
                    for n, (i, k, b) in enumerate(boxes, 1)
                ],
            }
        )

    def __call__(self, answers: Sequence[Answer]) -> Precision:
        """Precision of one answer a picture, boxes in pixels of the detector's input."""
        known = set(self._truth.getCatIds())
        found = []
        for i, (answer, place) in enumerate(zip(answers, self._placements, strict=True)):
            assert isinstance(answer, Boxes)
            for k, score, corners in zip(answer.indexes, answer.scores, answer.corners, strict=True):
                if k in known:
                    found.append(
                        {"image_id": i, "category_id": k, "score": score, **_rectangle(place.to_picture(*corners))}
                    )
        if not found:
            return Precision(0.0, 0.0)
        evaluation = self._evaluation(
            self._truth, self._truth.loadRes(found), iouType="bbox", print_function=lambda *_: None
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return Precision(float(evaluation.stats[0]), float(evaluation.stats[1]))


def _rectangle(corners: tuple[float, float, float, float]) -> dict[str, Any]:
    left, top, right, bottom = corners
    return {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}

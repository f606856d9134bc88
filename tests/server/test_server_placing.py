"""Boxes come back in pixels of the captured frame, for whoever says how large it was."""

import pytest
from headrace.models.bundle import Preprocessing
from headrace.models.preprocessing import placement
from headrace.protos import messages
from headrace.protos.messages import Box, Frame, Label, Result, Status, TailOutput
from headrace.server.placing import MAX_SIDE, placed

LETTERBOX = Preprocessing(320, 320, 0.0, 255.0, "letterbox")
STRETCH = Preprocessing(300, 300, 0.0, 255.0, "stretch")
OUTPUTS = (
    TailOutput("detection", boxes=(Box(2, 0.75, 10, 50, 110, 90),)),
    TailOutput("classification", (Label(1, 1),)),
)


def test_a_letterbox_is_undone():
    """640x480 into 320: half the size, 40 pixels down."""
    boxes, labels = placed(OUTPUTS, (640, 480), LETTERBOX)
    assert boxes.boxes == (Box(2, 0.75, 20, 20, 220, 100),) and boxes.captured
    assert labels is OUTPUTS[1], "what has no boxes is left alone"


def test_a_stretch_is_undone():
    (boxes, _) = placed(OUTPUTS, (600, 150), STRETCH)
    assert boxes.boxes == (Box(2, 0.75, 20, 25, 220, 45),)


def test_what_lies_in_the_bars_is_cut_off():
    outside = (TailOutput("detection", boxes=(Box(0, 0.5, -5, 0, 330, 320),)),)
    ((box,),) = (o.boxes for o in placed(outside, (640, 480), LETTERBOX))
    assert (box.left, box.top, box.right, box.bottom) == (0, 0, 640, 480)


def test_a_box_that_lies_in_a_bar_has_no_area():
    outside = (TailOutput("detection", boxes=(Box(0, 0.5, 10, 0, 60, 5), Box(0, 0.5, 10, 315, 60, 320))),)
    ((above, below),) = (o.boxes for o in placed(outside, (640, 240), LETTERBOX))
    assert (above.top, above.bottom) == (0, 0) and (below.top, below.bottom) == (240, 240)
    assert all(box.left < box.right for box in (above, below))


@pytest.mark.parametrize("size", [(0, 0), (640, 0), (MAX_SIDE + 1, 10), (10, 2**32 - 1)])
def test_without_a_size_boxes_stay_as_they_are(size):
    assert placed(OUTPUTS, size, LETTERBOX) == OUTPUTS


@pytest.mark.parametrize("size", [(1, MAX_SIDE), (MAX_SIDE, 1), (1, 1)])
@pytest.mark.parametrize("how", [LETTERBOX, STRETCH, Preprocessing(64, 56, 0.0, 1.0)])
def test_extreme_sizes_give_boxes_within_the_frame(size, how):
    (found, _) = placed(OUTPUTS, size, how)
    assert placement(*size, how).across > 0
    for box in found.boxes:
        assert box.left >= 0 and box.right <= size[0] and box.top >= 0 and box.bottom <= size[1]


def test_size_and_word_of_it_travel():
    frame = Frame(b"packet", 7, 2, 3, width=640, height=480)
    assert messages.read_request(messages.frame_request(frame)) == frame
    asked = messages.infer_request(b"f" * 32, frame).frame
    assert (asked.width, asked.height) == (640, 480)
    result = Result(1, Status.OK, outputs=placed(OUTPUTS, (640, 480), LETTERBOX))
    told = messages.read_result(messages.result_message(result)).outputs
    assert [o.captured for o in told] == [True, False]

"""What the edge predicts frames from, event by event and in exact numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from headrace.edge.controller import ControlLoop
from headrace.edge.encoder import VideoPacket
from headrace.edge.engine import Encoded
from headrace.edge.ledger import Outcome
from headrace.edge.measurement import PacketSizes
from headrace.edge.references import MOST_KEPT, Earlier, References
from headrace.models.operating_point import Kind, OperatingPoint
from headrace.models.temporal import Reference
from headrace.protos.messages import Status

from .rig import FEATURE, PICTURE, PIXELS, Rig, ok


def reference(mark: int, split: str = FEATURE.split) -> Reference:
    return Reference(split, 0, np.array([mark], np.int16), np.array([mark], np.int32))


def kept(account: References, frame_id: int, unanswered: int = 0, split: str = FEATURE.split) -> int | None:
    """How far back what frame `frame_id` is predicted from lies; None for a key frame."""
    return account.earlier(frame_id, split, unanswered).back or None


def test_the_newest_answered_frame_is_taken() -> None:
    account = References()
    account.connect(8)
    assert kept(account, 5) is None
    account.answered(5, reference(5))
    account.answered(7, reference(7))
    assert kept(account, 8) == 1
    assert account.earlier(8, FEATURE.split, 0).reference.symbols.tolist() == [7]


def test_frames_under_way_may_push_it_out() -> None:
    account = References()
    account.connect(3)
    account.answered(0, reference(0))
    assert kept(account, 3, unanswered=2) == 3
    assert kept(account, 4, unanswered=3) is None


def test_one_of_another_split_point_is_of_no_use_but_counts() -> None:
    account = References()
    account.connect(2)
    account.answered(0, reference(0))
    account.answered(1, reference(1, "other"))
    assert kept(account, 2) == 2
    assert kept(account, 2, unanswered=1) is None
    assert kept(account, 2, split="other") == 1
    account.answered(2, reference(2, "other"))
    assert kept(account, 3) is None


def test_one_too_far_back_is_not_taken_and_ids_begin_again() -> None:
    account = References()
    account.connect(8)
    account.answered(0, reference(0))
    assert kept(account, 31) == 31
    assert kept(account, 32) is None
    account.answered(2**32 - 1, reference(1))
    assert kept(account, 3) == 4


def test_nothing_is_kept_after_the_stream_broke_or_without_a_server_that_keeps() -> None:
    account = References()
    assert not account.active
    account.answered(0, reference(0))
    assert kept(account, 1) is None
    account.connect(8)
    account.answered(1, reference(1))
    epoch = account.epoch
    account.forget()
    assert kept(account, 2) is None
    assert account.active
    assert account.epoch > epoch


def test_what_is_kept_is_bounded_whatever_the_server_says() -> None:
    account = References()
    account.connect(10**6)
    for frame_id in range(100):
        account.answered(frame_id, reference(frame_id))
    assert kept(account, 100, split=FEATURE.split) == 1
    assert len(account._frames) == MOST_KEPT


# --- the pipeline ----------------------------------------------------------------------------------------------------


class VideoRig(Rig):
    """A pipeline on a stream whose frames the server keeps."""

    def __init__(self, references: int = 8, **limits) -> None:
        super().__init__(connected=False, **limits)
        self.connect(references)

    def connect(self, references: int = 8, now: float = 0.0) -> None:
        self.pipeline.connect(now, max_in_flight=16, max_packet_bytes=2**20, references=references)

    def capture(self, now: float):
        self.pipeline.captured(PICTURE, now)
        return self.pipeline.take_up(now)

    def coded(self, work, now: float, alone_bytes: float = 100.0) -> None:
        """A key frame of 100 bytes, or a predicted frame of 40."""
        frame_id = work.frame.id
        key = VideoPacket(b"k" * 100, 4, reference(frame_id), alone_bytes)
        video = key
        if work.earlier is not None and work.earlier.reference is not None:
            video = VideoPacket(b"p" * 40, 4, reference(frame_id), alone_bytes, lambda: key)
        self.pipeline.encoded(work.frame, Encoded(video.packet, PIXELS, 0.01, 0.02, 0.03, video=video), now)

    def sent(self, now: float) -> bytes:
        """One frame from capture to the wire: what is written."""
        work = self.capture(now)
        self.coded(work, now)
        return self.pipeline.next_to_write(now).packet

    def result(self, frame_id: int, now: float, status: Status = Status.OK, slices: int = 4) -> None:
        self.pipeline.answered(replace(ok(frame_id, status), slices=slices), now)


def test_a_frame_is_predicted_once_one_was_answered() -> None:
    rig = VideoRig()
    assert rig.sent(0.0)[:1] == b"k"
    assert rig.sent(0.1)[:1] == b"k"  # the first one has no answer yet
    rig.result(0, 0.15)
    assert rig.sent(0.2)[:1] == b"p"
    rig.result(1, 0.21)
    rig.result(2, 0.22)
    assert [f.predicted for f in rig.closed] == [False, False, True]
    assert [f.sent_bytes for f in rig.closed] == [100, 100, 40]
    assert {f.outcome for f in rig.closed} == {Outcome.OK}


@pytest.mark.parametrize(
    ("status", "slices"), [(Status.OK, 3), (Status.RESOURCE_EXHAUSTED, 0), (Status.DEADLINE_EXCEEDED, 0)]
)
def test_a_frame_that_was_cut_short_or_not_answered_is_never_predicted_from(status, slices) -> None:
    rig = VideoRig()
    rig.sent(0.0)
    rig.result(0, 0.05, status, slices)
    assert rig.sent(0.1)[:1] == b"k"


def test_an_answer_that_came_late_is_a_reference_all_the_same() -> None:
    rig = VideoRig(deadline_s=0.1, grace_s=0.1)
    rig.sent(0.0)
    rig.pipeline.tick(0.3)
    assert rig.outcomes() == [(0, Outcome.LATE, "no answer")]
    rig.result(0, 0.35)
    assert rig.sent(0.4)[:1] == b"p"


def test_a_new_stream_begins_with_a_key_frame() -> None:
    rig = VideoRig()
    rig.sent(0.0)
    rig.result(0, 0.05)
    rig.pipeline.disconnect(0.1)
    rig.connect(now=0.2)
    assert rig.sent(0.3)[:1] == b"k"
    rig.result(1, 0.35)
    assert rig.sent(0.4)[:1] == b"p"


def test_a_frame_whose_stream_broke_while_it_was_computed_is_coded_anew() -> None:
    rig = VideoRig(lossless=True)
    rig.sent(0.0)
    rig.result(0, 0.05)
    work = rig.capture(0.1)
    assert work.earlier.reference is not None
    rig.pipeline.disconnect(0.12)
    rig.connect(now=0.13)
    rig.coded(work, 0.15)
    assert rig.pipeline.next_to_write(0.15).packet[:1] == b"k"
    rig.result(1, 0.2)
    assert [f.predicted for f in rig.closed] == [False, False]


def test_a_packet_that_waits_for_the_next_stream_is_coded_anew() -> None:
    rig = VideoRig(lossless=True)
    rig.pipeline.use(rig.control, (FEATURE,), 0.1)  # nothing can be answered on the device: packets wait
    rig.sent(0.0)
    rig.result(0, 0.05)
    rig.coded(rig.capture(0.1), 0.1)
    rig.pipeline.disconnect(0.12)
    rig.connect(now=0.2)
    assert rig.pipeline.next_to_write(0.2).packet[:1] == b"k"


def test_where_the_reference_is_missing_the_frame_is_sent_again_and_has_one_outcome() -> None:
    rig = VideoRig()
    rig.sent(0.0)
    rig.result(0, 0.02)
    assert rig.sent(0.05)[:1] == b"p"
    waiting = rig.capture(0.06)
    rig.coded(waiting, 0.06)
    rig.result(1, 0.07, Status.MISSING_REFERENCE, 0)
    again = [rig.pipeline.next_to_write(0.07).packet for _ in range(2)]
    assert [packet[:1] for packet in again] == [b"k", b"k"]  # and so is the frame that waited behind it
    assert rig.sent(0.08)[:1] == b"k"
    for frame_id in (1, 2, 3):
        rig.result(frame_id, 0.1)
    assert rig.outcomes() == [(i, Outcome.OK, "") for i in range(4)]
    assert [f.sent_bytes for f in rig.closed] == [100, 140, 100, 100]
    assert rig.ledger.adds_up()
    assert rig.sent(0.12)[:1] == b"p"


def test_where_it_is_too_late_to_send_it_again_it_is_dropped() -> None:
    rig = VideoRig()
    rig.sent(0.0)
    rig.result(0, 0.02)
    rig.sent(0.05)
    rig.result(1, 0.07, Status.MISSING_REFERENCE, 0)
    rig.control.worth = False
    assert rig.pipeline.next_to_write(0.07) is None
    assert rig.outcomes()[-1] == (1, Outcome.DROPPED, "stale")


def test_a_server_that_keeps_nothing_gets_frames_as_before() -> None:
    rig = VideoRig(references=0)
    assert rig.capture(0.0).earlier is None


# --- the control loop ------------------------------------------------------------------------------------------------

POINTS = (
    OperatingPoint(0, Kind.LOCAL, accuracy=0.5),
    OperatingPoint(1, Kind.FEATURE, "a", rate_level=0, bytes_median=1000, bytes_p95=1200, accuracy=0.9),
    OperatingPoint(2, Kind.IMAGE, codec="webp", rate_level=30, bytes_median=3000, bytes_p95=4000, accuracy=0.9),
)


def sizes() -> PacketSizes:
    return PacketSizes(POINTS, np.array([0, 1, 2]), 3)


def test_sizes_follow_the_share_of_predicted_frames_for_features_alone() -> None:
    measured = sizes()
    assert measured.quantile(0.0).tolist() == [0.0, 1000.0, 3000.0]
    measured.predict(0.5)
    assert measured.quantile(0.0).tolist() == pytest.approx([0.0, 1000 * 0.5**0.25, 3000.0])
    measured.predict(0.5)
    assert measured.saving == pytest.approx(math.log(0.5) * (1 - 0.75**2))
    for _ in range(60):
        measured.predict(0.5)
    assert measured.quantile(0.0).tolist() == pytest.approx([0.0, 500.0, 3000.0], rel=1e-6)
    version = measured.version
    measured.forget_predictions()
    assert measured.version > version
    assert measured.quantile(0.0).tolist() == [0.0, 1000.0, 3000.0]


def test_the_level_is_that_of_key_frames() -> None:
    """What the camera sees makes key frames larger or smaller; predicting does not pass for that."""
    predicted, alone = sizes(), sizes()
    for _ in range(10):
        predicted.add(1, 1100.0)
        predicted.predict(0.4)
        alone.add(1, 1100.0)
    assert predicted.level == alone.level
    assert predicted.deviation == alone.deviation


def test_the_loop_expects_smaller_packets_until_the_stream_breaks() -> None:
    loop = ControlLoop(POINTS, deadline_s=0.25, frame_interval_s=0.1, uncut_s=0.1)

    def expected() -> float:
        return float(loop._sizes.quantile(0.0)[1])

    for _ in range(60):
        loop.on_coded(POINTS[1], 1000.0)
        loop.on_predicted(0.4)
    assert expected() == pytest.approx(400.0, rel=1e-6)
    loop._menu.update(0.0)
    row = int(np.flatnonzero(loop._menu.kept == 1)[0])
    assert loop._menu.middle_bits[row] == pytest.approx(8 * 400.0, rel=1e-6)
    loop.on_disconnected(1.0)
    assert expected() == pytest.approx(1000.0, rel=1e-6)


def test_what_is_learned_of_a_packet() -> None:
    rig = VideoRig()
    rig.sent(0.0)
    rig.result(0, 0.05)
    work = rig.capture(0.1)
    rig.coded(work, 0.1, alone_bytes=80.0)
    rig.pipeline.next_to_write(0.1)
    rig.control.heard.clear()
    rig.result(1, 0.15)
    assert ("coded", 80.0) in rig.control.heard
    assert ("predicted", 0.5) in rig.control.heard


def test_earlier_is_what_the_engine_is_given() -> None:
    rig = VideoRig()
    rig.sent(0.0)
    rig.result(0, 0.05)
    earlier = rig.capture(0.1).earlier
    assert isinstance(earlier, Earlier)
    assert (earlier.back, earlier.reference.symbols.tolist()) == (1, [0])

"""What replays begin with: compute times as they were measured; and the overhead's arithmetic."""

from __future__ import annotations

import json

import pytest
from headrace.bench import overhead
from headrace.bench.demo.references import compute_times, server_seconds
from headrace.bench.demo.tally import FrameRecord
from headrace.models.exceptions import HeadraceError
from headrace.models.operating_point import Kind, OperatingPoint

POINTS = (
    OperatingPoint(0, Kind.LOCAL),
    OperatingPoint(1, Kind.FEATURE, "blocks.3", rate_level=0),
    OperatingPoint(2, Kind.FEATURE, "blocks.3", rate_level=1),
    OperatingPoint(3, Kind.IMAGE, rate_level=30, codec="webp"),
)


def frame(number: int, point: str, compute_ms: float, server_ms: float = 20.0) -> FrameRecord:
    timings = {"prepare": 5.0, "compute": compute_ms, "compress": 10.0, "server": server_ms}
    return FrameRecord(number, number / 10, "ok", point, 100, (1,), timings_ms=timings)


def test_compute_times_are_medians_and_every_frames_deviation() -> None:
    frames = [frame(i, f"blocks.3@{i % 2}", 85.0 if i != 4 else 185.0) for i in range(12)]
    frames[6] = FrameRecord(6, 0.6, "dropped")
    frames[7] = frame(7, "webp@30", 500.0)  # too few of its stage to say anything
    found = compute_times(frames, POINTS, {"blocks.3": 0.9, "webp": 0.06, "local": 0.15})
    assert found.median_s == pytest.approx({"blocks.3": 0.1, "webp": 0.06, "local": 0.15})
    assert found.deviation == pytest.approx([1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1])


def test_features_of_a_stage_that_was_hardly_used_take_as_much_longer_as_those_of_others_do() -> None:
    frames = [frame(i, "blocks.3@0", 85.0) for i in range(12)]
    points = (*POINTS, OperatingPoint(4, Kind.FEATURE, "blocks.2"))
    found = compute_times(frames, points, {"blocks.3": 0.08, "blocks.2": 0.06, "webp": 0.06, "local": 0.15})
    assert found.median_s == pytest.approx({"blocks.3": 0.1, "blocks.2": 0.075, "webp": 0.06, "local": 0.15})


def test_a_frame_that_computed_nothing_takes_the_deviation_before_it() -> None:
    frames = [frame(i, "blocks.3@0", 85.0 if i < 10 else 135.0) for i in range(11)] + [FrameRecord(11, 1.1, "dropped")]
    assert compute_times(frames, POINTS, {}).deviation[-2:] == pytest.approx((1.5, 1.5))


def test_the_servers_time_is_that_of_answered_frames() -> None:
    assert server_seconds([frame(0, "webp@30", 1, 10), frame(1, "webp@30", 1, 30), frame(2, "webp@30", 1, 31)]) == 0.03
    assert server_seconds([FrameRecord(0, 0.0, "dropped")]) == 0.02


def line(latency_ms: float | None, sent: int = 100) -> dict[str, object]:
    timings = {"wait": 1.0, "prepare": 2.0, "compute": 8.0, "compress": 1.0, "link": 3.0, "server": 9.0, "queue": 1.0}
    return {"latency_ms": latency_ms, "bytes": sent, "timings_ms": {**timings, "decode": 1.0, "tail": 7.0}}


def test_overhead_is_what_computing_does_not_explain(tmp_path) -> None:
    assert overhead.overhead_ms(line(21.5)) == 2.5  # type: ignore[arg-type]
    found = overhead.summarise([line(20.0 + i / 100) for i in range(100)])  # type: ignore[misc]
    assert found["median_ms"] == pytest.approx(1.495)
    assert found["p99_ms"] == pytest.approx(1.98)
    assert found["compute_ms"] == 19
    assert json.loads(json.dumps(found))["frames"] == 100


@pytest.mark.parametrize("lines", [[], [line(20.0), line(None)], [line(20.0, 0)]], ids=["none", "unanswered", "local"])
def test_overhead_of_frames_without_a_servers_answer_is_an_error(lines) -> None:
    with pytest.raises(HeadraceError, match="not answered by the server"):
        overhead.summarise(lines)

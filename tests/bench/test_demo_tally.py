"""What is stated about a run: outcomes that sum to the frames, shares of the right totals."""

from __future__ import annotations

import pytest
from headrace.bench.demo.scenario import Streamed
from headrace.bench.demo.tally import OUTCOMES, FrameRecord, tally
from headrace.edge.ledger import Outcome

LINE = {
    "event": "frame",
    "frame": 3,
    "outcome": "ok",
    "reason": "",
    "captured_s": 1.25,
    "point": "blocks.3@4",
    "kind": "feature",
    "bytes": 1234,
    "labels": [{"index": 7, "label": "cock", "score": 0.5}, {"index": 8, "label": "hen", "score": 0.4}],
    "latency_ms": 87.1,
    "deadline_ms": 250,
    "timings_ms": {"compute": 60.0, "server": 20.0},
    "queue_depth": 0,
    "in_flight": 1,
    "rate_kbps": None,
    "connected": True,
}
RUN = [
    FrameRecord(0, 0.0, "ok", "webp@30", 3000, (1, 2, 3), latency_ms=100),
    FrameRecord(1, 0.1, "ok", "webp@30", 3000, (2, 1, 3), latency_ms=200),
    FrameRecord(2, 0.2, "local", "local", 0, (1,), latency_ms=150),
    FrameRecord(3, 0.3, "late", "webp@30", 2000, (1,), latency_ms=400),
    FrameRecord(4, 0.4, "dropped"),
]


def test_outcomes_are_those_of_the_edge() -> None:
    assert set(OUTCOMES) == set(Outcome)


def test_a_line_of_the_edge_is_read() -> None:
    record = FrameRecord.from_line(LINE, 1.0)
    assert (record.frame, record.captured_s, record.labels, record.text) == (3, 0.25, (7, 8), "cock")
    assert record.on_time
    nothing = FrameRecord.from_line({**LINE, "point": None, "labels": [], "latency_ms": None, "outcome": "dropped"})
    assert (nothing.point, nothing.labels, nothing.text, nothing.on_time) == ("", (), "", False)


def test_shares_are_of_what_they_say() -> None:
    found = tally("x", RUN, [1, 1, 1, 1, 1], measured=True)
    assert found.captured == sum(found.outcomes.values()) == 5
    assert found.outcomes == {"ok": 2, "late": 1, "local": 1, "dropped": 1, "filtered": 0, "error": 0}
    assert found.on_time == 3 / 5
    assert (found.agree_first, found.agree_five) == (2 / 3, 1)  # the late answer counts for nothing
    assert (found.agree_first_all, found.agree_five_all) == (2 / 5, 3 / 5)
    assert found.bytes_per_frame == 8000 / 5
    assert found.latency_ms == 150


def test_a_run_without_an_answer_is_all_zero() -> None:
    found = tally("x", [FrameRecord(0, 0.0, "dropped")], [1], measured=False)
    assert (found.on_time, found.agree_first, found.agree_five_all, found.latency_ms) == (0, 0, 0, None)


@pytest.mark.parametrize(
    "frames",
    [RUN[1:], [*RUN, RUN[0]], [FrameRecord(0, 0.0, "vanished")]],
    ids=["missing", "twice", "unknown outcome"],
)
def test_frames_that_do_not_add_up_are_refused(frames) -> None:
    with pytest.raises(ValueError, match="outcome"):
        tally("x", frames, [1] * 9, measured=True)


def test_the_demo_complains_of_sums_that_do_not_add_up() -> None:
    outcomes = {"ok": 2, "late": 1, "local": 1, "dropped": 1, "filtered": 0, "error": 0}
    good = Streamed(frames=RUN, summary={"frames": 5, "outcomes": outcomes})
    assert good.complaints() == []
    assert Streamed(frames=RUN[:4], summary=good.summary).complaints()
    assert Streamed(frames=RUN, summary={"frames": 6, "outcomes": outcomes}).complaints()
    assert Streamed(frames=RUN, summary={"frames": 5, "outcomes": {**outcomes, "ok": 1, "late": 2}}).complaints()

"""The demo itself, short; and with its server killed."""

from __future__ import annotations

import json

import pytest
from headrace.bench import overhead
from headrace.bench.demo import run as demo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("kill_server_at", [0.0, 2.0], ids=["undisturbed", "killed"])
def test_the_demo_accounts_for_every_frame(tmp_path, capsys, kill_server_at):
    frames = 220 if kill_server_at else 60
    assert demo.run(tmp_path, kill_server_at=kill_server_at, frames=frames) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["sums_add_up"]
    assert summary["frames"] == frames
    assert [run["name"].partition(",")[0] for run in summary["runs"]] == [
        "Headrace",
        "Headrace",
        "WebP only",
        "local only",
        "best fixed",
    ]
    for run in summary["runs"]:
        assert sum(run["outcomes"].values()) == frames
    lines = [json.loads(line) for line in (tmp_path / "frames.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(frames))
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    assert f"The outcomes of {frames} captured frames sum to {frames}." in capsys.readouterr().out
    if kill_server_at:
        ((died, back),) = summary["server_away_s"]
        away = [line for line in lines if died + 0.5 < line["captured_s"] - lines[0]["captured_s"] < back - 0.5]
        assert any(line["outcome"] == "local" for line in away)
        assert not any(line["outcome"] == "ok" for line in away)
        assert any(line["outcome"] == "ok" for line in lines if line["captured_s"] - lines[0]["captured_s"] > back)


def test_the_overhead_is_measured(tmp_path):
    file = tmp_path / "overhead.json"
    assert overhead.run(60, file) == 0
    found = json.loads(file.read_text())
    assert found["frames"] == 60
    assert 0 < found["median_ms"] <= found["p99_ms"]

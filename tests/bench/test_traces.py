"""Trace readers and the cumulative-bytes arithmetic, in exact numbers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from headrace.bench.links.traces import Format, Trace, read_trace
from headrace.models.exceptions import DataError
from hypothesis import given, settings
from hypothesis import strategies as st


def write(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text, encoding="utf-8")
    return path


def test_steps_carry_and_finish() -> None:
    trace = Trace.steps([(1.0, 8000), (1.0, 0), (1.0, 16_000)])
    assert trace.duration_s == 3.0
    assert trace.mean_bps == pytest.approx(8000)
    assert [trace.carried(t) for t in (0.0, 0.5, 1.0, 2.0, 2.5, 3.0)] == [0, 500, 1000, 1000, 2000, 3000]
    assert trace.finish(0.5, 250) == pytest.approx(0.75)
    assert trace.finish(0.5, 500) == pytest.approx(1.0)  # the last byte before the outage
    assert trace.finish(0.5, 501) == pytest.approx(2.0005)
    assert trace.finish(1.5, 1000) == pytest.approx(2.5)
    assert trace.finish(1.5, 0) == 1.5
    assert [trace.rate_at(t) for t in (0.0, 0.99, 1.5, 2.5, 3.2, 4.5)] == [8000, 8000, 0, 16_000, 8000, 0]


def test_trace_loops() -> None:
    trace = Trace.steps([(1.0, 8000), (1.0, 0)])
    assert trace.carried(5.0) == pytest.approx(3000)
    assert trace.finish(0.0, 3000) == pytest.approx(5.0)
    assert trace.finish(0.0, 2500) == pytest.approx(4.5)
    assert trace.finish(7.5, 1) == pytest.approx(8.001)


def test_window_wraps_and_scaling_scales() -> None:
    trace = Trace.steps([(1.0, 8000), (1.0, 16_000)])
    window = trace.window(1.5, 1.0)
    assert window.duration_s == pytest.approx(1.0)
    assert (window.rate_at(0.25), window.rate_at(0.75)) == (16_000, 8000)
    assert trace.scaled(0.5).mean_bps == pytest.approx(6000)


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.tuples(st.floats(0.01, 5), st.one_of(st.just(0.0), st.floats(1e3, 1e8))), min_size=1, max_size=8),
    start=st.floats(0, 50),
    size=st.floats(1, 1e6),
)
def test_finish_is_the_inverse_of_carried(steps: list[tuple[float, float]], start: float, size: float) -> None:
    steps = [*steps, (0.5, 1e5)]
    trace = Trace.steps(steps)
    end = trace.finish(start, size)
    assert end >= start
    assert trace.carried(end) - trace.carried(start) == pytest.approx(size, rel=1e-6, abs=0.05)


def test_mahimahi_packet_times(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, "1\n1\n5\n10\n"))
    assert trace.duration_s == pytest.approx(0.010)
    assert trace.carried(0.010) == pytest.approx(6000)
    assert trace.finish(0.0, 1500) == pytest.approx(0.0005)
    assert trace.finish(0.0, 3001) == pytest.approx(0.004, abs=1e-5)
    assert trace.finish(0.0, 4500) == pytest.approx(0.005)
    assert trace.finish(0.0, 9000) == pytest.approx(0.011)  # into the second loop


def test_second_and_millisecond_lines_say_the_same(tmp_path: Path) -> None:
    seconds = read_trace(write(tmp_path, "0.0 2.0\n5.0 1.0\n10.0 0.5\n"))
    millis = read_trace(write(tmp_path, "0 2000\n5000 1000\n10000 500\n"), "ms-kbit")
    for trace in (seconds, millis):
        assert trace.duration_s == pytest.approx(15.0)
        assert [trace.rate_at(t) for t in (1, 6, 11)] == pytest.approx([2e6, 1e6, 5e5])


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("", None),
        ("\n\n", None),
        ("abc\n", None),
        ("1 2 3\n", None),
        ("1\n2 3\n", None),
        ("5\n1\n", None),
        ("1.5\n", "mahimahi"),
        ("0 1\n", "mahimahi"),
        ("-1 2\n", None),
        ("0 nan\n", None),
        ("0 0\n1 0\n", None),
        ("99999999999999\n", None),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path: Path, text: str, form: Format | None) -> None:
    path = write(tmp_path, text)
    with pytest.raises(DataError, match="trace"):
        read_trace(path, form)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_trace(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read_trace(tmp_path / "binary")


@pytest.mark.parametrize("steps", [[], [(0.0, 1.0)], [(1.0, -1.0)], [(1.0, 0.0)], [(1e9, 1.0)], [(1.0, float("inf"))]])
def test_impossible_schedules_are_refused(steps: list[tuple[float, float]]) -> None:
    with pytest.raises(DataError):
        Trace.steps(steps)


def test_recorded_traces_read() -> None:
    folder = os.environ.get("HEADRACE_DATA")
    if not folder:
        pytest.skip("HEADRACE_DATA is not set: no recorded trace was read; set it to the folder that holds traces/")
    paths = [path for path in sorted(Path(folder, "traces").glob("*/*")) if path.suffix in {".up", ".down", ".log"}]
    assert paths
    for path in paths:
        trace = read_trace(path)
        assert 1e3 < trace.mean_bps < 1e9, path
        assert trace.duration_s > 30, path

"""A link's description: its ranges, its way into another process, and a user's flags."""

from __future__ import annotations

import math

import pytest
from headrace.bench.links.emulate_spec import LinkFlags
from headrace.bench.links.schedule import RateSchedule
from headrace.bench.links.spec import LinkSpec
from headrace.bench.links.traces import Trace
from headrace.models.exceptions import DataError


@pytest.mark.parametrize(
    "values",
    [
        {"up": -1.0},
        {"up": math.nan},
        {"down": -1.0},
        {"delay_s": -0.1},
        {"delay_s": math.nan},
        {"jitter_s": 61},
        {"loss": 1.0},
        {"loss": -0.01},
        {"loss": math.nan},
        {"queue_bytes": 1000},
        {"queue_bytes": 2**31},
    ],
)
def test_what_is_no_link_is_refused(values):
    with pytest.raises(DataError, match="a link's"):
        LinkSpec(**values)


def test_a_description_survives_json():
    trace = Trace.steps([(0.5, 1e6), (0.25, 0.0)], "a trace")
    spec = LinkSpec(trace, RateSchedule([(0, math.inf), (2, 0)]), 0.02, 0.003, 0.01, 9000, 7)
    read = LinkSpec.from_json(spec.to_json())
    assert isinstance(read.up, Trace)
    assert isinstance(read.down, RateSchedule)
    assert [side.tolist() for side in read.up.pieces] == [side.tolist() for side in trace.pieces]
    assert read.down.steps == ((0, math.inf), (2, 0))
    assert (read.delay_s, read.jitter_s, read.loss, read.queue_bytes, read.seed) == (0.02, 0.003, 0.01, 9000, 7)
    assert "a trace" in spec.describe()
    plain = LinkSpec()
    assert LinkSpec.from_json(plain.to_json()) == plain


def test_down_has_the_outages_of_up_unless_it_is_described():
    steps = RateSchedule([(0, 1e6), (1, 0), (2, 1e6)])
    assert LinkSpec(steps).rates("down").finish(1.5, 8e9) == 2
    assert LinkSpec(steps, 8e6).rates("down").finish(1.5, 8e6) == 2.5
    assert LinkSpec(steps, 8e6).down_beside(0.0, 1.5) == 0
    assert LinkSpec(steps, 8e6).down_beside(1e6, 1.5) == 8e6
    assert LinkSpec(steps).down_beside(1e6, 1.5) == math.inf


def test_seeds_differ_by_side_and_repeat():
    one, other = LinkSpec(seed=1), LinkSpec(seed=2)
    assert one.dice("up").random() == LinkSpec(seed=1).dice("up").random()
    assert len({one.dice("up").random(), one.dice("down").random(), other.dice("up").random()}) == 3


def test_flags_describe_a_link(tmp_path):
    mahimahi, lines = tmp_path / "m.up", tmp_path / "s.log"
    mahimahi.write_text("1\n2\n4\n")
    lines.write_text("0 2000\n500 1000\n")
    spec = LinkFlags(up_trace=mahimahi, down_mbps=3, delay_ms=20, jitter_ms=2, loss=0.02, queue_bytes=9000).spec()
    assert isinstance(spec.up, Trace)
    assert spec.up.mean_bps == pytest.approx(9e6)
    assert (spec.down, spec.delay_s, spec.jitter_s, spec.loss) == (3e6, 0.02, 0.002, 0.02)
    both = LinkFlags(trace=lines, trace_format="ms-kbit").spec()
    assert isinstance(both.up, Trace)
    assert isinstance(both.down, Trace)
    assert both.up.mean_bps == both.down.mean_bps == pytest.approx(1.5e6)
    assert LinkFlags().spec() == LinkSpec()
    assert LinkFlags(up_mbps=0).spec().up == 0
    assert LinkFlags(phases="8:4,0:2").spec().rates("up").rate(5) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"up_mbps": 1, "phases": "1:2"}, "--up-mbps and --phases"),
        ({"phases": "8"}, "MBITS:SECONDS"),
        ({"up_mbps": -1}, "at least 0"),
        ({"trace_format": "pcap", "trace": "here"}, "no trace format 'pcap'"),
        ({"trace": "missing"}, "cannot be read"),
        ({"trace": "here", "down_mbps": 1}, "--trace and --down-mbps"),
    ],
)
def test_flags_that_describe_none_are_refused(tmp_path, flags, words):
    (tmp_path / "here").write_text("1\n")
    if "trace" in flags:
        flags = flags | {"trace": tmp_path / flags["trace"]}
    with pytest.raises(DataError, match=words):
        LinkFlags(**flags).spec()

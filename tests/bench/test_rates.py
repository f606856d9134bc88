"""Capacity as a function of time, in exact numbers."""

from __future__ import annotations

import math

import pytest
from headrace.bench.links.rates import TraceRates, as_rates
from headrace.bench.links.schedule import RateSchedule
from headrace.bench.links.traces import Trace

TRACE = Trace.steps([(1, 0), (1, 8e6), (1, 4e6)])


def test_a_trace_repeats_from_its_beginning_on():
    rates = TraceRates(TRACE, 10)
    assert [rates.rate(t) for t in (0, 10, 11.5, 12.5, 13.5, 14.5)] == [8e6, 0, 8e6, 4e6, 0, 8e6]
    assert rates.finish(9, 4e6) == 9.5  # its first rate above 0, before it begins
    assert rates.finish(9.5, 8e6) == pytest.approx(11.5)  # half before, an outage, half behind
    assert rates.finish(12, 5e6) == pytest.approx(14.125)
    assert rates.shifted(5).finish(14.5, 8e6) == pytest.approx(16.5)


def test_a_trace_is_left_for_good_and_its_past_stays():
    rates = TraceRates(TRACE, 10).changed(12.5, 0)
    assert rates.finish(11, 10e6) == pytest.approx(12.5)
    assert rates.finish(11, 10.1e6) == math.inf
    again = rates.changed(20, 1e6)
    assert again.finish(11, 11e6) == pytest.approx(21)
    assert again.finish(15, 1e6) == pytest.approx(21)  # what came during the outage waits for its end
    assert TraceRates(TRACE, 10).changed(5, 2e6).finish(4, 10e6) == pytest.approx(6)
    late = TraceRates(TRACE, 10).changed(10_012.5, 1e6)
    assert late.finish(10_011.5, 3e6) == pytest.approx(10_013.5)


def test_without_limit_but_with_the_outages():
    rates = TraceRates(TRACE, 10).outages_only()
    assert rates.finish(9.9, 1e12) == 9.9
    assert rates.finish(10.2, 1e12) == pytest.approx(11)
    assert rates.finish(11.3, 1e12) == 11.3
    assert rates.changed(11, 0.0).finish(10.5, 1) == math.inf
    assert rates.rate(11.5) == math.inf


def test_constant_steps_and_traces_are_rates():
    assert as_rates(1e6).finish(3, 2e6) == 5
    assert as_rates(math.inf).finish(3, 2e6) == 3
    assert as_rates(0.0).finish(3, 1) == math.inf
    assert as_rates(RateSchedule([(0, 1e6), (1, 2e6)])).finish(0, 3e6) == 2
    assert as_rates(TRACE).finish(0, 8e6) == pytest.approx(2)

"""What is known of the link: waits for its turn count as bits, probes come at doubling intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from headrace.edge.choice import ControlSettings
from headrace.edge.link_view import MOST_WAIT_BITS, LinkView
from headrace.edge.measurement import Sent
from headrace.edge.probing import FREE_PROBE, Probing

ROUND_TRIP, SERVER, INTERVAL = 0.03, 0.01, 0.1


def run(view: LinkView, sizes: list[int], transmit_s: list[float]) -> float:
    """Frames one after another, each over an idle link; returns the time after the last."""
    at = 0.0
    for number, (size, taken) in enumerate(zip(sizes, transmit_s, strict=True)):
        at = number * INTERVAL
        view.written(number, size, at)
        view.acknowledged(number, at + taken + ROUND_TRIP + SERVER, SERVER)
    return at + INTERVAL


def make() -> LinkView:
    view = LinkView(ControlSettings(overhead_bytes=0), deadline_s=0.1, smallest_bytes=100)
    view.on_round_trip(ROUND_TRIP, 0.0)
    return view


def test_steady_link_has_no_turns_to_wait_for() -> None:
    view = make()
    sizes = [1000 + 400 * (n % 5) for n in range(100)]
    run(view, sizes, [8 * size / 1e6 for size in sizes])
    assert view.wait_bits == 0.0


def test_wait_for_a_turn_is_told_from_a_low_rate() -> None:
    """Half of the frames leave at once, half wait 40 ms; then 1 Mbit/s. A frame that is three times as large takes not
    three times as long."""
    rng = np.random.default_rng(0)
    sizes = [int(size) for size in rng.integers(800, 1200, 200)]
    waits = 0.04 * rng.integers(0, 2, 200)
    view = make()
    now = run(view, sizes, [8 * size / 1e6 + wait for size, wait in zip(sizes, waits, strict=True)])
    assert 1000 < view.wait_bits <= MOST_WAIT_BITS
    per_bit = 1 / view.scenarios(now)
    small, large = ((8.0 * size + view.wait_bits) * per_bit for size in (1000, 3000))
    assert np.all(large / small < 2.5)


def test_what_is_under_way_waits_too() -> None:
    view = make()
    view.written(0, 1000, 0.0)
    view.written(1, 1000, 0.0)
    assert view.free(np.array([1e-6]))[0] == pytest.approx(0.016)
    view.wait_bits = 5000.0
    assert view.free(np.array([1e-6]))[0] == pytest.approx(0.026)
    assert view.answer_if_fast(0.0, 1000) > 0.026


def test_probes_come_at_doubling_intervals_until_something_is_heard() -> None:
    probing = Probing(1.0, 5.0)
    sent = []
    for now in np.arange(0.0, 20.0, 0.1):
        if probing.is_due(now, instead_of_nothing=False, oldest=None):
            probing.sends(now, now, oldest=None)
            sent.append(round(float(now), 1))
    assert sent == [0.0, 2.0, 6.0, 11.0, 16.0]
    assert probing.frame == pytest.approx(16.0)
    probing.heard(20.0, after_outage=False, often=True)
    assert not probing.is_due(20.9, instead_of_nothing=False, oldest=None)
    assert probing.is_due(21.05, instead_of_nothing=False, oldest=None)
    # In place of a frame that would be dropped, sooner.
    assert probing.is_due(20.0 + FREE_PROBE, instead_of_nothing=True, oldest=None)
    probing.heard(22.0, after_outage=True, often=False)
    assert probing.is_due(22.0, instead_of_nothing=False, oldest=None)


def test_frame_in_flight_is_the_probe_for_the_longest_interval() -> None:
    probing = Probing(1.0, 5.0)
    out = Sent(0, 8000.0, 10.0)
    assert not probing.is_due(14.9, instead_of_nothing=True, oldest=out)
    assert probing.is_due(15.1, instead_of_nothing=True, oldest=out)
    probing.sends(15.1, 15.1, oldest=out)
    assert not probing.is_due(20.0, instead_of_nothing=False, oldest=out)
    assert probing.is_due(20.2, instead_of_nothing=False, oldest=out)


def test_nothing_is_known_before_the_first_answer() -> None:
    view = make()
    assert view.rate_bps(0.0) == math.inf
    assert view.oldest is None
    assert not view.in_outage(100.0)

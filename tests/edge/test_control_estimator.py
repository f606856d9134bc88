"""The rate's distribution: censored bound, application-limited samples, age, the end of an outage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from headrace.edge.estimator import RateEstimator, censored_bound
from headrace.edge.measurement import DeliverySample


def busy(rate_bps: float, bits: float = 12_000) -> DeliverySample:
    return DeliverySample(bits, bits / rate_bps, limited=False)


def idle(rate_bps: float, bits: float = 12_000) -> DeliverySample:
    return DeliverySample(bits, bits / rate_bps, limited=True)


def settled(rate_bps: float, samples: int = 40) -> tuple[RateEstimator, float]:
    estimator = RateEstimator()
    for number in range(samples):
        estimator.add(busy(rate_bps), now=number / 10)
    return estimator, (samples - 1) / 10


def test_unknown_link_is_wide_and_the_first_sample_is_believed() -> None:
    estimator = RateEstimator(prior_bps=1e6)
    rates = estimator.scenarios(now=0.0)
    assert not estimator.known
    assert rates[0] < 0.2e6
    assert rates[-1] > 5e6
    estimator.add(busy(200_000), now=0.0)
    assert estimator.median_bps == pytest.approx(200_000)


def test_scenarios_are_ascending_and_narrow_down_on_a_steady_link() -> None:
    estimator, now = settled(1e6)
    rates = estimator.scenarios(now)
    assert np.all(np.diff(rates) >= 0)
    assert rates[0] == pytest.approx(1e6, rel=0.1)
    assert rates[-1] == pytest.approx(1e6, rel=0.1)


def test_distribution_holds_the_errors_that_were_made() -> None:
    estimator = RateEstimator()
    for number in range(64):
        estimator.add(busy(2e6 if number % 2 else 0.5e6), now=number / 10)
    rates = estimator.scenarios(6.3)
    assert rates[0] < 0.6e6
    assert rates[-1] > 1.6e6


def test_one_odd_sample_is_smoothed_and_a_new_level_is_followed() -> None:
    estimator = RateEstimator()
    for number in range(40):  # a link that scatters by a fifth
        estimator.add(busy(1e6 * (1.2 if number % 2 else 1 / 1.2)), now=number / 10)
    before = estimator.median_bps
    estimator.add(busy(0.8e6), now=4.0)
    assert estimator.median_bps > 0.88 * before
    for number in range(3):
        estimator.add(busy(50_000), now=4.1 + number / 10)
    assert estimator.median_bps < 100_000


def test_imprecise_limited_sample_raises_but_hardly_lowers() -> None:
    """1 ms of transmission, as seen through a round trip that is known to some milliseconds, is next to nothing."""
    estimator, now = settled(1e6)
    estimator.add(idle(0.5e6, bits=500), now + 0.1)
    assert estimator.median_bps == pytest.approx(1e6)
    estimator.add(idle(0.5e6, bits=2000), now + 0.2)
    limited_falls_to = estimator.median_bps
    counted, now = settled(1e6)
    counted.add(busy(0.5e6, bits=2000), now + 0.2)
    assert counted.median_bps < limited_falls_to < 1e6
    raised, now = settled(0.1e6)
    raised.add(DeliverySample(12_000, 0.0, limited=True), now + 0.1)  # at least 12,000 bits in 3 ms: 4 Mbit/s
    assert raised.median_bps > 0.4e6


def test_precise_limited_sample_counts_like_any_other() -> None:
    estimator, now = settled(1e6)
    estimator.add(idle(50_000), now + 0.1)
    assert estimator.median_bps < 0.4e6


def test_no_scenario_is_above_the_censored_bound() -> None:
    estimator, now = settled(8e6)
    bound = censored_bound(12_000, out_s=0.1)
    assert bound == pytest.approx(120_000)
    rates = estimator.scenarios(now, bound)
    assert rates[-1] <= 120_000
    # Not all of them at the very bound: that would be to say that the frame is through this instant.
    assert rates[0] < 0.5 * rates[-1]
    assert np.all(np.diff(rates) >= 0)


def test_bound_that_says_nothing_new_changes_nothing() -> None:
    estimator, now = settled(1e6)
    assert censored_bound(12_000, out_s=0.0) == math.inf
    assert censored_bound(12_000, out_s=-0.1) == math.inf
    np.testing.assert_array_equal(estimator.scenarios(now, 2e6), estimator.scenarios(now))


def test_uncertainty_grows_with_age_and_stays_finite() -> None:
    estimator, now = settled(1e6)
    width = [float(np.ptp(np.log(estimator.scenarios(now + age)))) for age in (0.0, 1.0, 10.0, 1e6)]
    assert width == sorted(width)
    assert width[2] > 5 * width[0]
    assert width[3] < 12


def test_an_old_estimate_is_doubted_upwards() -> None:
    estimator, now = settled(1e5)
    assert np.median(estimator.scenarios(now + 5.0)) > 1.2e5


def test_after_forget_it_is_as_careful_as_at_the_start() -> None:
    estimator, now = settled(20e6)
    estimator.forget()
    assert not estimator.known
    assert estimator.scenarios(now)[0] < 0.2e6
    estimator.add(busy(2e6), now + 1)
    assert estimator.median_bps == pytest.approx(2e6)

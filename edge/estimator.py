"""What the link will deliver next: a distribution of its rate, not a number. No I/O, no clock.

The logarithm of the rate is followed by an exponentially weighted mean. How far the next sample lay from it is kept as
an empirical distribution, tails included; its quantiles around the mean are the *scenarios* that the choice is made
over. Two things bend them:

- **the censored bound**: a frame that the link has been sending for t without an end in sight says that the rate is at
  most bits / t. That is known before the acknowledgement comes, and on a link that collapses it is the only sign.
- **age**: the longer ago the last sample, the wider the distribution (a random walk of the log-rate).
"""

from __future__ import annotations

import math
from collections import deque
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from .measurement import DeliverySample

Floats = NDArray[np.float64]


class RateEstimator:
    """Distribution of the link's rate in bits a second, as equally likely scenarios.

    Args:
        prior_bps: median before anything is known.
        prior_spread: standard deviation of the log-rate then.
        gain: weight of a precise new sample in the mean of the log-rate.
        walk: standard deviation of the log-rate's random walk per square root of a second.
        resolution_s: transmission times of this size are lost in jitter; a limited sample of transmission time t gets
            the weight t / (t + resolution_s).
        scenarios: how many.
        window: how many residuals the empirical distribution holds.
    """

    START_RESIDUALS = (-0.7, -0.4, -0.2, -0.1, 0.0, 0.1, 0.2, 0.4)
    """What the empirical distribution holds before there is one: links fall faster than they rise."""

    def __init__(
        self,
        *,
        prior_bps: float = 1e6,
        prior_spread: float = 1.2,
        gain: float = 0.6,
        walk: float = 0.3,
        resolution_s: float = 0.003,
        scenarios: int = 16,
        window: int = 64,
    ) -> None:
        self.gain = gain
        self.walk = walk
        self.resolution_s = resolution_s
        self._prior_spread = prior_spread
        self._mean = math.log(prior_bps)
        self._known = False
        self._sampled_at = -math.inf
        self._residuals: deque[float] = deque(self.START_RESIDUALS, maxlen=window)
        shares = (np.arange(scenarios) + 0.5) / scenarios
        self._normal = np.array([NormalDist().inv_cdf(share) for share in shares])
        self._shares = shares
        self._quantiles = self._read_quantiles()

    @property
    def known(self) -> bool:
        """Whether a sample has come in since the start or since the last `forget`."""
        return self._known

    @property
    def median_bps(self) -> float:
        """The middle of the distribution, bounds left out."""
        return math.exp(self._mean)

    def add(self, sample: DeliverySample, now: float) -> None:
        """Take in one acknowledged frame."""
        rate = sample.rate_bps(self.resolution_s)
        log_rate = math.log(max(rate, 1.0))
        # How much of the measured time is transmission, and not the error of the round trip that was taken off.
        weight = sample.transmit_s / (sample.transmit_s + self.resolution_s) if sample.limited else 1.0
        if not self._known:
            self._mean, self._known = log_rate, True
        else:
            spread_by_age = self._age_spread(now)
            residual = log_rate - self._mean
            if sample.limited:
                # It took no longer than that: a lower bound, however imprecise the sample is.
                floor = math.log(max(sample.bits / (sample.transmit_s + self.resolution_s), 1.0))
                self._mean = max(self._mean, self._mean + self.gain * (floor - self._mean))
            gain = weight * min(1.0, self.gain + spread_by_age**2)
            self._mean += gain * (log_rate - self._mean)
            if weight >= 0.5:
                self._residuals.append(residual)
                self._quantiles = self._read_quantiles()
        self._sampled_at = now

    def forget(self) -> None:
        """The link may be another one now (a reconnection, the end of an outage): keep the mean, trust it little."""
        self._known = False

    def scenarios(self, now: float, bound_bps: float = math.inf) -> Floats:
        """Equally likely rates in bits a second, ascending, float64 [scenarios], none above the censored bound."""
        if self._known:
            log_rates = self._mean + self._quantiles + self._normal * self._age_spread(now)
        else:
            log_rates = self._mean + self._normal * self._prior_spread
        return np.minimum(np.exp(log_rates), max(bound_bps, 1.0))

    def _age_spread(self, now: float) -> float:
        return min(self.walk * math.sqrt(max(now - self._sampled_at, 0.0)), self._prior_spread)

    def _read_quantiles(self) -> Floats:
        ordered = np.sort(np.fromiter(self._residuals, dtype=np.float64))
        places = self._shares * len(ordered) - 0.5
        return np.asarray(np.interp(places, np.arange(len(ordered)), ordered), dtype=np.float64)


def censored_bound(bits: float, out_s: float) -> float:
    """The most that the rate can be when `bits` bits have been on the link for `out_s` seconds and are not all sent."""
    return bits / out_s if out_s > 0 else math.inf

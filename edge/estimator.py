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
        level_change: a sample this many standard deviations off is the link's new level, not noise; the gain rises
            towards it.
        walk: standard deviation of the log-rate's random walk per square root of a second.
        optimism: how many of those standard deviations an old estimate is raised by. While nothing is sent, nothing
            is learnt, and a pessimistic estimate would stay for ever; so it is doubted in the direction that is tried.
        lindy: see `scenarios`; 1 is Lindy's law.
        resolution_s: transmission times of this size are lost in jitter; a limited sample of transmission time t gets
            the weight t / (t + resolution_s).
        useless_bps: samples under this are outages, which the usual rate is not made of.
        scenarios: how many.
        window: how many residuals the empirical distribution holds.
    """

    START_RESIDUALS = (-0.4, -0.2, -0.1, 0.0, 0.1, 0.2)
    """What the empirical distribution holds before there is one: links fall faster than they rise."""

    LEAST_SPREAD = 0.02
    USUAL_GAIN = 0.05
    USUAL_AFTER_S, MOST_USUAL = 2.0, 0.4
    """As an estimate ages, up to this share of the scenarios go back to the rate that the link usually has."""

    def __init__(
        self,
        *,
        prior_bps: float = 1e6,
        prior_spread: float = 1.2,
        gain: float = 0.4,
        walk: float = 0.2,
        optimism: float = 0.5,
        lindy: float = 0.5,
        level_change: float = 10.0,
        resolution_s: float = 0.003,
        useless_bps: float = 0.0,
        scenarios: int = 16,
        window: int = 32,
    ) -> None:
        self.gain = gain
        self.walk = walk
        self.optimism = optimism
        self.level_change = level_change
        self.lindy = lindy
        self.resolution_s = resolution_s
        self._prior_spread = prior_spread
        self._prior_mean = math.log(prior_bps)
        self._mean = self._prior_mean
        self._known = False
        self.useless_bps = useless_bps
        self._settled = 0
        self._usual = self._prior_mean
        self._sampled_at = -math.inf
        self._residuals: deque[float] = deque(self.START_RESIDUALS, maxlen=window)
        shares = (np.arange(scenarios) + 0.5) / scenarios
        self._normal = np.array([NormalDist().inv_cdf(share) for share in shares])
        self._shares = shares
        self._log_shares = np.log(shares)
        self._lowest_log_share = float(self._log_shares[0])
        self._quantiles = self._read_quantiles()

    @property
    def known(self) -> bool:
        """Whether a sample has come in since the start or since the last `forget`."""
        return self._known

    @property
    def median_bps(self) -> float:
        """The middle of the distribution, bounds left out."""
        return math.exp(self._mean)

    @property
    def spread(self) -> float:
        """Standard deviation of the log-rate around what was expected, robust."""
        return self._spread

    @property
    def surprises(self) -> Floats:
        """By how much the next sample's log-rate may differ from what is expected, equally likely values, ascending,
        float64 [scenarios]; replaced, never changed."""
        return self._quantiles

    def add(self, sample: DeliverySample, now: float) -> None:
        """Take in one acknowledged frame."""
        rate = sample.rate_bps(self.resolution_s)
        log_rate = math.log(max(rate, 1.0))
        # How much of the measured time is transmission, and not the error of the round trip that was taken off.
        weight = sample.transmit_s / (sample.transmit_s + self.resolution_s) if sample.limited else 1.0
        if not self._known:
            self._mean, self._known, self._settled = log_rate, True, 0
        else:
            residual = log_rate - self._mean
            # Noise is smoothed, a change of level is followed at once.
            surprise = abs(residual) / (self.level_change * math.hypot(self._spread, self._age_spread(now), 0.1))
            gain = min(1.0, max(self.gain + self._age_spread(now) ** 2, min(surprise, 0.9)))
            too_short = sample.transmit_s < self.resolution_s
            updated = self._mean if too_short else self._mean + weight * gain * residual
            if sample.limited or too_short:
                # It took no longer than that: a lower bound, however imprecise the sample is.
                floor = math.log(max(sample.bits / (sample.transmit_s + self.resolution_s), 1.0))
                updated = max(updated, self._mean + gain * (floor - self._mean))
            self._mean = updated
            self._settled += 1
            if weight >= 0.5 and not too_short and self._settled > 2:
                self._residuals.append(residual)
                self._quantiles = self._read_quantiles()
        if rate > self.useless_bps:
            self._usual += self.USUAL_GAIN * (log_rate - self._usual)
        self._sampled_at = now

    def forget(self) -> None:
        """The link may be another one now (a reconnection, the end of an outage): be as careful as at the start."""
        self._mean = min(self._mean, self._prior_mean)
        self._known = False

    def scenarios(self, now: float, bound_bps: float = math.inf) -> Floats:
        """Equally likely rates in bits a second, ascending, float64 [scenarios], none above the censored bound.

        What is over the bound is moved below it, not onto it: that would be to say that the frame is through this
        instant. How far below grows with how wrong the estimate turned out to be, up to a share of Lindy's law (what
        has taken t so far takes about as long again).
        """
        if self._known:
            # Independent causes of error: variances add, and the empirical shape is stretched to the sum.
            stretch = math.sqrt(1.0 + (self._age_spread(now) / self._spread) ** 2)
            log_rates = self._mean + self.optimism * self._age_spread(now) + self._quantiles * stretch
            # What has not been looked at for a while may be as it usually is.
            share = min(self.MOST_USUAL, 1.0 - math.exp((self._sampled_at - now) / self.USUAL_AFTER_S))
            usual = int(len(log_rates) * share + 0.5)
            if usual > 0 and self._usual > log_rates[-1]:
                log_rates[-usual:] = self._usual
        else:
            log_rates = self._mean + self._normal * self._prior_spread
        log_bound = math.log(max(bound_bps, 1.0))
        excess = log_rates - log_bound
        if excess[-1] <= 0.0:
            return np.asarray(np.exp(log_rates), dtype=np.float64)
        moved = log_bound + self._log_shares * np.minimum(np.maximum(excess, 0.0), self.lindy)
        return np.sort(np.exp(np.where(excess > 0.0, moved, log_rates)))

    def slowest_bps(self, now: float, bound_bps: float = math.inf) -> float:
        """A rate that none of the `scenarios` lies under, without working them out; 0 while nothing is known."""
        if not self._known:
            return 0.0
        age = self._age_spread(now)
        log_rate = self._mean + self.optimism * age + self._lowest * math.sqrt(1.0 + (age / self._spread) ** 2)
        if bound_bps < math.inf:
            log_rate = min(log_rate, math.log(max(bound_bps, 1.0)) + self._lowest_log_share * self.lindy)
        return math.exp(log_rate)

    def _age_spread(self, now: float) -> float:
        return min(self.walk * math.sqrt(max(now - self._sampled_at, 0.0)), self._prior_spread)

    def _read_quantiles(self) -> Floats:
        ordered = np.sort(np.fromiter(self._residuals, dtype=np.float64))
        quarter = len(ordered) // 4
        # Robust standard deviation. No link is as steady as the last few samples of a steady one.
        self._spread = float(ordered[-1 - quarter] - ordered[quarter]) / 1.35 + self.LEAST_SPREAD
        places = self._shares * len(ordered) - 0.5
        quantiles = np.interp(places, np.arange(len(ordered)), ordered) + self.LEAST_SPREAD * self._normal
        self._lowest = float(quantiles[0])
        return np.asarray(quantiles, dtype=np.float64)


def censored_bound(bits: float, out_s: float) -> float:
    """The most that the rate can be when `bits` bits have been on the link for `out_s` seconds and are not all sent."""
    return bits / out_s if out_s > 0 else math.inf

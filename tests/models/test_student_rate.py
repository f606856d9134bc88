"""The rate is steered to what is asked for, and beta stays within its bounds."""

from __future__ import annotations

import math

import pytest
import torch
from headrace.models.baselines import student_rate
from headrace.models.baselines.student_rate import HEADER, Steering

CPU = torch.device("cpu")


def steered(lag: float, power: float, at_first: float, target: int = 1000, steps: int = 1000) -> tuple[Steering, float]:
    """Steer something whose bits fall with a power of beta, and follow it only after a share `lag` of the learning; the
    steering, and in the end its bits over those asked for."""
    steering = Steering([target], CPU)
    wanted = 8.0 * (target - HEADER)
    start = float(steering.beta(0))
    bits = at_first * wanted
    for step in range(steps):
        settled = at_first * wanted * (float(steering.beta(0)) / start) ** -power
        bits = math.exp(math.log(bits) + (math.log(settled) - math.log(bits)) / max(lag * steps, 1))
        steering.follow({0: torch.tensor(bits)}, step / steps)
    return steering, bits / wanted


@pytest.mark.parametrize("lag", [0.0, 0.01, 0.03])
@pytest.mark.parametrize("power", [0.4, 0.8, 1.2])
@pytest.mark.parametrize("at_first", [0.6, 2.0, 8.0])
def test_the_rate_ends_where_it_was_asked_for(lag, power, at_first):
    _, ratio = steered(lag, power, at_first)
    assert ratio == pytest.approx(1.0, abs=0.12)


def test_beta_is_bounded_where_the_rate_cannot_be_reached():
    steering, ratio = steered(0.0, 0.0, 50.0)
    beta = float(steering.beta(0))
    assert ratio == pytest.approx(50.0) and beta == pytest.approx(
        300 * student_rate.WORTH / (8 * (1000 - HEADER)), rel=1e-3
    )
    nothing = Steering([1000], CPU)
    for step in range(1000):
        nothing.follow({0: torch.tensor(0.0)}, step / 1000)
    assert torch.isfinite(nothing.beta(0)) and float(nothing.beta(0)) == pytest.approx(beta / 1200, rel=1e-3)


def test_a_process_that_stood_still_moves_beta_no_further_than_a_long_step():
    steering = Steering([1000, 2000], CPU)
    steering.follow({0: torch.tensor(1e9)}, 0.1)
    before = steering.log_betas.clone()
    steering.follow({0: torch.tensor(1e9)}, 0.6)
    moved = (steering.log_betas - before).tolist()
    assert moved == pytest.approx([student_rate.GAIN * student_rate.LONGEST, 0.0])


def test_divided_students_begin_with_the_same_share_of_the_loss():
    steering = Steering([1000, 4000], CPU)
    steering.log_betas[1] += 1.0
    steering.divide(1)
    assert torch.allclose(steering.log_betas.exp() * steering.wanted, (steering.beta(1) * steering.wanted[1]).expand(2))

"""The parts of what a learned encoder's loss is made of: surrogate of quantiser and coder, and the metric."""

import pytest
import torch
from headrace.models.learning.metric import Nats
from headrace.models.learning.surrogate import Surrogate, cosine_matrix, laplace_bits


def test_the_cosine_transform_is_orthonormal():
    matrix = cosine_matrix(14)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(14), atol=1e-6, rtol=0)


def test_bits_are_those_of_the_distribution():
    """Over all integers the probabilities sum to 1, and every one costs its logarithm."""
    values = torch.arange(-200, 201).float()
    for scale in (0.05, 0.7, 5.0):
        bits = laplace_bits(values, torch.tensor(scale))
        assert float((2.0**-bits).sum()) == pytest.approx(1, abs=1e-3)
    far = torch.tensor([1e4], requires_grad=True)
    (slope,) = torch.autograd.grad(laplace_bits(far, torch.tensor(0.01)).sum(), far)
    assert torch.isfinite(slope).all() and float(slope) > 0


def test_rounding_at_a_fine_gain_loses_little():
    surrogate = Surrogate(1, 3, 4).eval()
    latent = torch.randn(2, 3, 4, 4)
    noise = torch.zeros_like(latent)
    fine, bits = surrogate(latent, torch.tensor([1000.0, 1000.0]), 0, noise, True)
    torch.testing.assert_close(fine, latent, atol=2e-3, rtol=0)
    _, fewer = surrogate(latent, torch.tensor([1.0, 1.0]), 0, noise, True)
    assert (fewer < bits).all()


def test_the_metric_of_white_gradients_is_the_squared_error():
    gradients = torch.randn(4000, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.1
    errors = torch.randn(5, 3, 4, 4)
    wanted = 0.5 * 0.01 * errors.square().flatten(1).sum(1)
    torch.testing.assert_close(Nats(gradients)(errors), wanted, rtol=0.1, atol=0)

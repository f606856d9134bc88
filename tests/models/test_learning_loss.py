"""The parts of what a learned encoder's loss is made of: surrogate of quantiser and coder, and the metric."""

import pytest
import torch
from headrace.models.learning.metric import Nats
from headrace.models.learning.surrogate import Surrogate, cosine_matrix


def test_the_cosine_transform_is_orthonormal():
    matrix = cosine_matrix(14)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(14), atol=1e-6, rtol=0)


def test_bits_are_what_an_ideal_coder_would_take():
    """Of Gaussian latents: the entropy of the rounded values; and far values have a gradient that takes them back."""
    surrogate = Surrogate(1, 2, 4)
    torch.manual_seed(0)
    for _ in range(300):  # until the running scales know them
        latent = torch.randn(64, 2, 4, 4) * torch.tensor([0.3, 5.0])[:, None, None]
        surrogate(latent, torch.ones(64), 0, True)
    _, bits = surrogate.eval()(latent, torch.ones(64), 0, True)
    edges = torch.arange(-40, 41).double()
    wanted = 0.0
    for deviation in (0.3, 5.0):
        exact = torch.distributions.Normal(0.0, deviation)
        mass = exact.cdf(edges + 0.5) - exact.cdf(edges - 0.5)
        wanted += 16 * float(-(mass * mass.clamp_min(1e-300).log2()).sum())
    assert float(bits.mean()) == pytest.approx(wanted, rel=0.05)
    far = torch.full((1, 2, 4, 4), 8.0, requires_grad=True)
    (slope,) = torch.autograd.grad(surrogate.train()(far, torch.ones(1), 0, False)[1].sum(), far)
    assert torch.isfinite(slope).all() and float(slope.sum()) > 0


def test_rounding_at_a_fine_gain_loses_little():
    surrogate = Surrogate(1, 3, 4).eval()
    latent = torch.randn(2, 3, 4, 4)
    fine, bits = surrogate(latent, torch.tensor([1000.0, 1000.0]), 0, True)
    torch.testing.assert_close(fine, latent, atol=2e-3, rtol=0)
    _, fewer = surrogate(latent, torch.tensor([1.0, 1.0]), 0, True)
    assert (fewer < bits).all()


def test_the_metric_of_white_gradients_is_the_squared_error():
    gradients = torch.randn(4000, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.1
    errors = torch.randn(5, 3, 4, 4)
    wanted = 0.5 * 0.01 * errors.square().flatten(1).sum(1)
    torch.testing.assert_close(Nats(gradients)(errors), wanted, rtol=0.1, atol=0)

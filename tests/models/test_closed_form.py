import pytest
import torch
from headrace.models.closed_form import (
    MAX_SIDE,
    RIDGE,
    along,
    fisher_gradients,
    fit_closed_form,
    metric_roots,
)
from headrace.models.tasks import Classification
from torch import nn


def random_root(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(size, size, generator=generator) + size**0.5 * torch.eye(size)


def separable(count: int, shape: tuple[int, int, int], seed: int, mean: float = 0.0):
    """Noise [count, *shape] whose covariance is a Kronecker product, and the matrices that made it."""
    generator = torch.Generator().manual_seed(seed)
    roots = [random_root(size, generator) for size in shape]
    maps = torch.randn(count, *shape, generator=generator)
    for axis, root in enumerate(roots):
        maps = along(maps, root, axis)
    return maps + mean, roots


SHAPES = [(6, 5, 4), (7, 1, 1), (4, 9, 1), (1, 3, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_decoder_undoes_encoder(shape):
    features, _ = separable(60, shape, 0, mean=3)
    form = fit_closed_form(features, separable(60, shape, 1)[0])
    restored = form.encode(features) / form.weights
    for axis, decoder in enumerate(form.decoders):
        restored = along(restored, decoder, axis)
    assert torch.allclose(restored + form.mean, features, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_components_are_uncorrelated(shape):
    """Of features whose covariance is a Kronecker product, as the method assumes."""
    features, _ = separable(6000, shape, 2)
    form = fit_closed_form(features, separable(6000, shape, 3)[0])
    latent = form.encode(features).flatten(1)
    correlation = torch.corrcoef(latent.T) if latent.shape[1] > 1 else torch.eye(1)
    assert (correlation - torch.eye(len(correlation))).abs().max() < 0.08


def test_channels_come_in_order_of_importance():
    features, _ = separable(3000, (6, 5, 4), 4)
    form = fit_closed_form(features, separable(3000, (6, 5, 4), 5)[0])
    energy = (form.encode(features) / form.weights).square().mean((0, 2, 3))
    assert (energy.diff() < 0).all()


def test_the_metric_is_found_in_gradients_of_that_metric():
    gradients, roots = separable(20000, (5, 4, 3), 6)
    for found, root in zip(metric_roots(gradients), roots, strict=True):
        expected = root @ root.T / (root @ root.T).diagonal().mean()
        metric = (found.T @ found).float() - RIDGE * torch.eye(len(found))
        assert (metric - expected).abs().max() < 0.05 * expected.abs().max()


def test_squared_error_between_latents_is_error_under_the_metric():
    features, _ = separable(200, (5, 4, 3), 7)
    gradients, _ = separable(500, (5, 4, 3), 8)
    form = fit_closed_form(features, gradients)
    disturbance = torch.randn(1, 5, 4, 3, generator=torch.Generator().manual_seed(9))
    moved = form.encode(disturbance + form.mean) / form.weights
    expected = disturbance
    for axis, root in enumerate(metric_roots(gradients)):
        expected = along(expected, root, axis)
    assert torch.isclose(moved.square().sum(), expected.square().sum(), rtol=1e-3)


def test_weights_are_nearly_one_where_the_metric_is_the_product_that_it_is_taken_for():
    """But for the ridge, which makes directions that hardly matter weigh a little less."""
    features, _ = separable(200, (5, 4, 3), 7)
    as_assumed = fit_closed_form(features, separable(20000, (5, 4, 3), 8)[0]).weights
    assert 0.7 < float(as_assumed.min()) < float(as_assumed.max()) < 1.3
    gradients = torch.randn(20000, 5, 4, 3, generator=torch.Generator().manual_seed(9))
    gradients[:, 0, 0, 0] *= 10
    assert fit_closed_form(features, gradients).weights.max() > 1.3


def test_sensitivities_foretell_what_a_disturbance_does():
    """Half the squared disturbance times the sensitivities is half the mean square of its product with a gradient."""
    features, gradients = separable(200, (5, 4, 3), 10)[0], separable(5000, (5, 4, 3), 11)[0] * 1e-3
    form = fit_closed_form(features, gradients)
    for at in ((0, 0, 0), (2, 1, 1), (4, 3, 2)):
        latent = torch.zeros(1, 5, 4, 3)
        latent[(0, *at)] = 2.0
        disturbance = latent / form.weights
        for axis, decoder in enumerate(form.decoders):
            disturbance = along(disturbance, decoder, axis)
        does = (gradients * disturbance).sum((1, 2, 3)).square().mean()
        assert torch.isclose(does, 4 * form.sensitivities[at], rtol=1e-3)


def test_sides_that_are_too_long_are_left_as_they_are():
    generator = torch.Generator().manual_seed(12)
    maps = torch.randn(3, 2, MAX_SIDE + 1, 2, generator=generator)
    form = fit_closed_form(maps, maps.clone())
    assert torch.equal(form.encoders[1], torch.eye(MAX_SIDE + 1))
    assert not torch.equal(form.encoders[2], torch.eye(2))


def test_features_that_never_change_and_gradients_of_nothing_are_borne():
    form = fit_closed_form(torch.ones(10, 3, 2, 2), torch.zeros(10, 3, 2, 2))
    assert all(torch.isfinite(m).all() for m in (*form.encoders, *form.decoders, form.weights, form.sensitivities))
    assert not form.encode(torch.ones(1, 3, 2, 2)).any()


def test_the_fisher_metric_is_that_of_a_linear_softmax():
    """For logits W f, the Fisher information of f is W^T (diag p - p p^T) W; random signs give it in the mean."""
    generator = torch.Generator().manual_seed(13)
    weight = torch.randn(4, 3, generator=generator)
    tail = nn.Sequential(nn.Flatten(), nn.Linear(3, 4, bias=False), nn.Softmax(1))
    tail[1].weight.data = weight
    features = torch.full((20000, 3, 1, 1), 0.3)
    p = torch.softmax(weight @ torch.full((3,), 0.3), 0)
    exact = weight.T @ (torch.diag(p) - torch.outer(p, p)) @ weight
    done = []
    batches = [features[:10000], features[10000:]]
    gradients = fisher_gradients(lambda f: (tail(f),), batches, 0, Classification().probe, done.append)
    assert done == [10000, 10000]
    flat = gradients.flatten(1)
    assert torch.allclose(flat.T @ flat / len(flat), exact, atol=0.05 * float(exact.diagonal().max()))


def test_no_photographs_are_refused():
    with pytest.raises(ValueError, match="no photographs"):
        fisher_gradients(lambda f: (f,), [], 0, Classification().probe)

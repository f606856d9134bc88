import torch
from headrace.models.closed_form import RIDGE, fisher_metric, fit_closed_form
from headrace.models.tasks import Classification
from torch import nn

GENERATOR = torch.Generator().manual_seed(0)


def random_case(channels: int = 6):
    mix = torch.randn(channels, channels, generator=GENERATOR)
    features = torch.einsum("nchw,dc->ndhw", torch.randn(40, channels, 5, 4, generator=GENERATOR), mix) + 3
    root = torch.randn(channels, channels, generator=GENERATOR)
    return features, root @ root.T + torch.eye(channels)


def test_decoder_undoes_encoder():
    form = fit_closed_form(*random_case())
    assert torch.allclose(form.decoder @ form.encoder, torch.eye(6), atol=1e-4)


def test_components_are_uncorrelated_and_ordered():
    features, metric = random_case()
    form = fit_closed_form(features, metric)
    flat = features.permute(1, 0, 2, 3).flatten(1)
    latent = form.encoder @ (flat - form.mean[:, None])
    covariance = latent @ latent.T / latent.shape[1]
    assert torch.allclose(covariance, torch.diag(form.variances), atol=1e-3 * float(form.variances[0]))
    assert (form.variances.diff() <= 0).all()


def test_squared_error_between_latents_is_error_under_the_metric():
    features, metric = random_case()
    form = fit_closed_form(features, metric)
    disturbance = torch.randn(6, generator=GENERATOR)
    latent = form.encoder @ disturbance
    assert torch.isclose(latent @ latent, disturbance @ metric @ disturbance, rtol=1e-3)


def test_the_fisher_metric_is_that_of_a_linear_softmax():
    """For logits W f, the Fisher information of f is W^T (diag p - p p^T) W; drawn labels give it in the mean."""
    weight = torch.randn(4, 3, generator=GENERATOR)
    tail = nn.Sequential(nn.Flatten(), nn.Linear(3, 4, bias=False), nn.Softmax(1))
    tail[1].weight.data = weight
    features = torch.zeros(20000, 3, 1, 1)
    p = torch.full((4,), 0.25)
    exact = weight.T @ (torch.diag(p) - torch.outer(p, p)) @ weight
    exact = exact / exact.diagonal().mean()
    done = []
    batches = [features[:10000], features[10000:]]
    metric = fisher_metric(lambda f: (tail(f),), batches, 0, done.append, Classification().likelihood)
    assert done == [10000, 10000]
    assert torch.allclose(metric - RIDGE * torch.eye(3), exact, atol=0.05)

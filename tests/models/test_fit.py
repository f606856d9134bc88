"""One map, fitted: maps, vectors and tokens alike go through quantiser, coder and decoder and come back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from headrace.models.bottleneck import Decoder, Encoder
from headrace.models.bundle import BackboneSpec, Bundle, Preprocessing, SplitSpec
from headrace.models.codec import Codec
from headrace.models.fit import DISTORTIONS, MOST_BYTES, fit_map
from headrace.models.operating_point import Kind, OperatingPoint


def smooth(count: int, shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    """Maps whose channels and places are alike, as those of networks are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(shape[0], shape[0], generator=generator) * torch.logspace(0, -1, shape[0])
    maps = torch.einsum("nchw,dc->ndhw", torch.randn(count, *shape, generator=generator), mix)
    return maps + torch.randn(count, shape[0], 1, 1, generator=generator) * 3 + 1


def bundle_of(features: torch.Tensor, gradients: torch.Tensor) -> Bundle:
    fitted = fit_map(features, gradients)
    return Bundle(
        name="fitted",
        task="classification",
        backbone=BackboneSpec("none", "none", "00"),
        preprocessing=Preprocessing(16, 16, 127.0, 128.0),
        labels=("x",),
        splits=(SplitSpec("cut", fitted.features, fitted.latent_channels, fitted.slices),),
        operating_points=tuple(
            OperatingPoint(id=i, kind=Kind.FEATURE, split="cut", rate_level=i) for i in range(len(fitted.slices))
        ),
        tensors={f"cut/{key}": value for key, value in fitted.arrays.items()},
    ).check()


def sent(bundle: Bundle, features: torch.Tensor, level: int) -> tuple[torch.Tensor, float]:
    """Features as they are restored behind real packets, and mean bytes of these."""
    codec, point = Codec(bundle), bundle.operating_point(level)
    packets = [codec.compress(latent, point, 0) for latent in Encoder.of(bundle, "cut")(features).numpy()]
    symbols = torch.from_numpy(np.stack([codec.decompress(p) for p in packets]))
    gain = torch.from_numpy(bundle.gain("cut", level)).expand(len(symbols), -1)
    return Decoder.of(bundle, "cut")(symbols, gain), float(np.mean([len(p.to_bytes()) for p in packets]))


@pytest.mark.parametrize("shape", [(12, 6, 5), (40, 1, 1), (10, 17, 1), (3, 2, 2), (2, 1, 1)])
def test_every_shape_of_map_goes_through_real_packets(shape):
    features, gradients = smooth(120, shape, 0), smooth(120, shape, 1) * 0.05
    bundle = bundle_of(features, gradients)
    others = smooth(30, shape, 0)
    errors, sizes = [], []
    for level in range(bundle.splits[0].rate_levels):
        restored, size = sent(bundle, others, level)
        assert restored.shape == others.shape
        errors.append(float((restored - others).square().mean()))
        sizes.append(size)
    assert errors[0] < errors[-1]
    assert sizes[0] > sizes[-1]
    assert errors[0] < 0.5 * float(others.var())


def test_rate_levels_disturb_the_answer_as_they_say():
    features, gradients = smooth(150, (12, 6, 5), 2), smooth(150, (12, 6, 5), 3) * 0.005
    bundle = bundle_of(features, gradients)
    for level in (0, 5, 9):
        error = sent(bundle, features[:64], level)[0] - features[:64]
        does = torch.einsum("nchw,mchw->nm", error, gradients).square().mean() / 2
        assert 0.6 < float(does) / DISTORTIONS[level] < 1.7


def test_each_slice_says_more():
    features, gradients = smooth(150, (12, 6, 5), 4), smooth(150, (12, 6, 5), 5) * 0.05
    bundle = bundle_of(features, gradients)
    codec, point = Codec(bundle), bundle.operating_point(2)
    latents = Encoder.of(bundle, "cut")(features[:40])
    gain = torch.from_numpy(bundle.gain("cut", 2))
    packets = [codec.compress(latent, point, 0) for latent in latents.numpy()]
    errors = []
    for count in range(1, 5):
        symbols = torch.from_numpy(np.stack([codec.decompress(p.prefix(count)) for p in packets]))
        errors.append(float((symbols / gain[:, None, None] - latents).square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.7 * float(latents.square().sum())


def test_places_that_answer_alike_are_cheaper_together():
    """A tail that sums over places: patterns that cancel in the sum are left out, and bytes fall to a fraction."""
    features = smooth(150, (8, 6, 6), 6)
    summed = torch.randn(150, 8, 1, 1, generator=torch.Generator().manual_seed(7)).expand(-1, -1, 6, 6) * 0.02
    alike = summed + torch.randn(150, 8, 6, 6, generator=torch.Generator().manual_seed(8)) * 1e-3
    apart = torch.randn(150, 8, 6, 6, generator=torch.Generator().manual_seed(9)) * 0.02
    bytes_alike, bytes_apart = (sent(bundle_of(features, g), features[:20], 3)[1] for g in (alike, apart))
    assert bytes_alike < 0.6 * bytes_apart


def test_channels_that_say_nothing_are_not_kept():
    features = smooth(150, (20, 4, 4), 10)
    features[:, 5:] = features[:, :15] * 1e-4
    fitted = fit_map(features, smooth(150, (20, 4, 4), 11) * 0.05)
    assert fitted.latent_channels <= 8
    assert fitted.arrays["encoder"].shape == (fitted.latent_channels, 20)


def test_a_map_that_never_changes_is_still_a_map():
    features = torch.ones(100, 3, 2, 2)
    bundle = bundle_of(features, torch.zeros(100, 3, 2, 2))
    restored, _ = sent(bundle, features[:3], 0)
    assert torch.allclose(restored, features[:3], atol=1e-5)


def test_the_encoder_is_the_form_that_was_fitted():
    features, gradients = smooth(120, (6, 5, 4), 12), smooth(120, (6, 5, 4), 13)
    bundle = bundle_of(features, gradients)
    latent = Encoder.of(bundle, "cut")(features)
    gain = torch.ones(len(features), latent.shape[1])
    full = latent.shape[1] == 6
    restored = Decoder.of(bundle, "cut")(latent, gain)
    assert not full or torch.allclose(restored, features, atol=1e-3)
    assert torch.allclose(latent.mean(0), torch.zeros_like(latent[0]), atol=1e-3)
    assert replace(bundle, provenance={"x": 1}).fingerprint == bundle.fingerprint


def test_no_rate_level_outgrows_a_packet():
    """A wide map of which nothing may be lost: the steps are held, the levels still differ, every slice can be sent."""
    features, gradients = smooth(12, (24, 64, 64), 6), smooth(12, (24, 64, 64), 7) * 0.005
    bundle = bundle_of(features, gradients)
    sizes = [sent(bundle, features[:4], level)[1] for level in (0, 5, 9)]
    assert MOST_BYTES / 2 < sizes[0] < 1.2 * MOST_BYTES
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.8 * sizes[0]

"""Going on from the networks that a bundle holds, and what else learning on takes: later maps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from headrace.models.backbones import Backbone
from headrace.models.exceptions import BackboneError, DataError
from headrace.models.learning.album import Album
from headrace.models.learning.cut import tensors_of
from headrace.models.learning.plan import TrainPlan
from headrace.models.learning.resume import resume
from headrace.models.learning.slimmable import SlimmableEncoder
from headrace.models.learning.synthesis import Synthesis, SynthesisShape
from headrace.models.learning.team import Team
from headrace.models.learning.train import train
from headrace.models.learning.views import Teacher, Views
from headrace.models.measure import find_pictures
from headrace.models.repair.deltas import Deltas, with_deltas
from headrace.models.zoo.catalogue import load_backbone
from headrace.models.zoo.sources import Source
from torch import Tensor

ANCHOR = "blocks.2.0"
LATER = ("blocks.4", "global_pool")
WIDTHS = {"25": (4, 8, 8, 8, 8, 8, 8, 40), "50": (2, 8, 8, 16, 8, 16, 16, 40), "100": (2, 16, 8, 24, 8, 24, 24, 40)}
CPU = torch.device("cpu")
Networks = tuple[SlimmableEncoder, Synthesis, Deltas]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(Source("timm/tf_efficientnet_lite0", seed=1, size=64))


def networks(backbone: Backbone, seed: int, rank: int = 4, blocks: tuple[int, int] = (1, 1)) -> Networks:
    torch.manual_seed(seed)
    shape = SynthesisShape(12, (40, 8, 8), 2, ((16, 8, blocks[0]), (8, 8, blocks[1])))
    spread = torch.eye(40) + 0.1 * torch.randn(40, 40)
    return (
        SlimmableEncoder(WIDTHS, 12),
        Synthesis(shape, torch.randn(40), spread),
        Deltas(backbone.tail(ANCHOR), rank, seed),
    )


@pytest.fixture(scope="module")
def learned(backbone) -> Networks:
    """Networks that have learned something: statistics, scales, offsets and changes are not what they begin as."""
    encoder, synthesis, tail = networks(backbone, 1)
    with torch.no_grad():
        for parameter in [*encoder.parameters(), *synthesis.parameters(), *tail.parameters()]:
            parameter.add_(0.1 * torch.randn(parameter.shape))
        for width in WIDTHS:
            for _ in range(20):
                synthesis(encoder(torch.randn(8, 3, 64, 64), width))
    return encoder.eval(), synthesis.eval(), tail


def answers(networks: tuple[SlimmableEncoder, Synthesis, torch.nn.Module], pixels: Tensor, width: str) -> list[Tensor]:
    encoder, synthesis, tail = networks
    with torch.inference_mode():
        latent = encoder(pixels, width)
        features = synthesis(latent)
        return [latent, features, *tail(features)]


def test_networks_that_are_gone_on_from_give_what_the_bundles_give(backbone, learned):
    """At every width, though statistics were taken from other pixels and other random weights were there before."""
    begun, tensors = networks(backbone, 2, rank=5), tensors_of("slim", *learned)
    resume(tensors, "slim", *begun, torch.randn(16, 3, 64, 64))
    changes = {k.removeprefix("slim/tail/"): torch.from_numpy(v).float() for k, v in tensors.items() if "/tail/" in k}
    held = (*learned[:2], with_deltas(backbone.tail(ANCHOR), changes))
    for part in begun[:2]:
        part.eval()
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    for width in WIDTHS:
        for mine, theirs in zip(answers(begun, pixels, width), answers(held, pixels, width), strict=True):
            # The bundle's numbers have half precision.
            assert float((mine - theirs).abs().max()) < 1e-2 * float(theirs.abs().max()), width


def test_in_training_they_give_nearly_the_same(backbone, learned):
    begun = networks(backbone, 2)
    pixels = torch.randn(32, 3, 64, 64)
    resume(tensors_of("slim", *learned), "slim", *begun, pixels)
    for part in begun[:2]:
        part.train()
    trained = answers(begun, pixels, "100")
    for mine, theirs in zip(trained[:2], answers(learned, pixels, "100")[:2], strict=True):
        assert float((mine - theirs).abs().mean()) < 2e-2 * float(theirs.abs().mean())


def test_a_synthesis_may_grow_and_begins_as_the_smaller_one(backbone, learned):
    tensors, pixels = tensors_of("slim", *learned), torch.randn(8, 3, 64, 64)
    begun = networks(backbone, 2, blocks=(3, 2))
    resume(tensors, "slim", *begun, pixels)
    for part in begun[:2]:
        part.eval()
    for mine, theirs in zip(answers(begun, pixels, "50")[:2], answers(learned, pixels, "50")[:2], strict=True):
        assert float((mine - theirs).abs().max()) < 1e-2 * float(theirs.abs().max())
    synthesis = begun[1].train()
    before = synthesis(begun[0](pixels, "50").detach())
    optimiser = torch.optim.Adam(synthesis.parameters(), 1e-2)
    for _ in range(3):  # the first step moves the last normalisation, the next ones what is before it
        optimiser.zero_grad()
        synthesis(begun[0](pixels, "50").detach()).square().mean().backward()
        optimiser.step()
    new = synthesis.layers[3]
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in new.parameters()), "new blocks learn"
    assert float((synthesis(begun[0](pixels, "50").detach()) - before).detach().abs().max()) > 0


def test_a_synthesis_does_not_shrink(backbone, learned):
    grown = networks(backbone, 3, blocks=(2, 1))
    with pytest.raises(DataError, match="2 blocks of 16 channels in place of 1 or fewer"):
        resume(tensors_of("slim", *grown), "slim", *networks(backbone, 2), torch.randn(2, 3, 64, 64))


def test_networks_in_eight_bits_are_gone_on_from(backbone, learned, monkeypatch):
    monkeypatch.setattr("headrace.models.learning.eight_bits.LEAST", 64)
    tensors, pixels = tensors_of("slim", *learned, kept=1.0, eight_bits=True), torch.randn(8, 3, 64, 64)
    assert any(value.dtype == np.int8 for value in tensors.values())
    begun = networks(backbone, 2)
    resume(tensors, "slim", *begun, pixels)
    for part in begun[:2]:
        part.eval()
    latent, features = answers(begun, pixels, "100")[:2]
    wanted = answers(learned, pixels, "100")
    assert float((latent - wanted[0]).abs().max()) < 1e-2 * float(wanted[0].abs().max())
    assert float((features - wanted[1]).square().mean()) < 1e-3 * float(wanted[1].square().mean())


def test_other_networks_are_refused(backbone, learned):
    tensors = tensors_of("slim", *learned)
    pixels = torch.randn(2, 3, 64, 64)
    with pytest.raises(DataError, match="'thin' are not those of the plan"):
        resume(tensors, "thin", *networks(backbone, 2), pixels)
    encoder, synthesis, _ = networks(backbone, 2)
    without_changes = Deltas(backbone.tail(ANCHOR), 0, 0)
    with pytest.raises(DataError, match="not changed at this rank"):
        resume(tensors, "slim", encoder, synthesis, without_changes, pixels)


def test_a_plan_that_begins_with_a_bundle_needs_its_networks(backbone, noise_pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("headrace.models.learning.train.FITTED", 20)
    file = tmp_path / "plan.toml"
    text = (Path(__file__).parent / "slim_plan.toml").read_text()
    file.write_text(
        'begin = "bundle"\n' + text.replace('"input"', '"blocks.2.0"').replace("tail_rank = 2", "tail_rank = 3")
    )
    plan = TrainPlan.load(file)
    paths, team = find_pictures(noise_pictures), Team(0, 1, CPU)
    with pytest.raises(DataError, match="no networks 'slim' to go on from"):
        train(backbone, plan, paths, tmp_path, team)


def test_a_tail_gives_later_maps_beside_its_answer(backbone):
    x = torch.rand(2, *backbone.shape(ANCHOR))
    beside = backbone.tail_beside(ANCHOR, LATER)
    with torch.inference_mode():
        scores, middle, pooled = beside(x)
        (plain,) = backbone.tail(ANCHOR)(x)
        (wanted,) = backbone.between(ANCHOR, LATER[0])(x)
    torch.testing.assert_close(scores, plain)
    torch.testing.assert_close(middle, wanted)
    assert pooled.shape == (2, *backbone.shape(LATER[1]))
    assert set(beside.state_dict()) == set(backbone.tail(ANCHOR).state_dict()), "changes of one fit the other"
    with pytest.raises(BackboneError, match=r"blocks\.1 is not behind blocks\.2\.0"):
        backbone.tail_beside(ANCHOR, ("blocks.1",))


def test_the_uncut_models_later_maps_are_targets(backbone, noise_pictures, tmp_path):
    """On both sides: what a GPU's album gives, and what the ring on disk keeps."""
    paths = find_pictures(noise_pictures)[:8]
    ring = Views(paths, Teacher(backbone, ANCHOR, tmp_path, CPU, LATER), backbone, 16, 0, tmp_path)
    ring.fill()
    album = Album(paths, backbone, ANCHOR, CPU, LATER)
    for views in (ring, album):
        pixels, features, found = views.batch(np.random.default_rng(0), 6)
        with torch.inference_mode():
            wanted = backbone.tail_beside(ANCHOR, LATER)(*backbone.head(ANCHOR)(pixels))
        assert len(found) == 3 and len(features) == 6
        for mine, exact in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, exact, atol=0.06 * float(exact.abs().max()), rtol=0)  # bfloat16

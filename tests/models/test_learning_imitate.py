"""Another encoder learns the latent of one that a bundle has, and becomes a split point beside it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from headrace.models.bottleneck import Decoder, Encoder
from headrace.models.bundle import Bundle
from headrace.models.codec import Codec
from headrace.models.exceptions import DataError
from headrace.models.learning.assemble import assemble
from headrace.models.learning.cut import learned_cuts
from headrace.models.learning.imitate import Imitation, Imitator, began, imitate, with_imitation
from headrace.models.learning.plan import TrainPlan
from headrace.models.learning.slimmable import PlainEncoder, SlimmableEncoder
from headrace.models.learning.synthesis import Synthesis, SynthesisShape
from headrace.models.learning.team import Team
from headrace.models.learning.train import Learned
from headrace.models.measure import find_pictures, load_pixels
from headrace.models.repair.deltas import Deltas
from headrace.models.split import fit
from headrace.models.zoo.catalogue import backbone_of, load_backbone
from headrace.models.zoo.sources import Source

MOBILE = (2, 8, 8, 16, 8, 16, 16, 12)
FUSED = (2, 8, 12, 8, 16, 16, 12)
LATENT = 10
OF = "slim-100"
ALONE = Team(0, 1, torch.device("cpu"))
SHORT = Imitation(OF, "fused", FUSED, steps=90, batch=8, rate=1e-2, average=0.9)


@pytest.fixture(scope="module")
def photographs(noise_pictures) -> list[Path]:
    return find_pictures(noise_pictures)


@pytest.fixture(scope="module")
def base(photographs, tmp_path_factory) -> Bundle:
    """One learned width, of random weights."""
    torch.manual_seed(4)
    backbone = load_backbone(Source("timm/test_resnet", seed=3, size=64))
    file = tmp_path_factory.mktemp("plan") / "plan.toml"
    file.write_text((Path(__file__).parent / "slim_plan.toml").read_text())
    plan = TrainPlan.load(file)
    plan = plan.model_copy(
        update={"encoder": plan.encoder.model_copy(update={"latent": LATENT, "widths": {"100": MOBILE}})}
    )
    synthesis = Synthesis(
        SynthesisShape(LATENT, (3, 64, 64), 16, ((16, 8, 1), (8, 8, 1))), torch.zeros(3), torch.eye(3)
    )
    encoder = SlimmableEncoder(plan.encoder.widths, LATENT)
    for _ in range(20):
        encoder(torch.randn(8, 3, 64, 64), "100")
    learned = Learned(encoder.eval(), synthesis.eval(), Deltas(backbone.tail("input"), 2, 0), "nothing")
    with pytest.MonkeyPatch.context() as patch:
        for module in ("split", "learning.assemble"):
            patch.setattr(f"headrace.models.{module}.timed", lambda backbone, bundle, progress: bundle)
        bundle = fit(backbone, ("layer2",), photographs[:60], photographs[60:68])
        return assemble(backbone_of(bundle), bundle, plan, learned, photographs[:60], photographs[60:68])


@pytest.fixture(scope="module")
def encoder(base, photographs, tmp_path_factory) -> SlimmableEncoder:
    return imitate(backbone_of(base), base, SHORT, photographs, tmp_path_factory.mktemp("work"), ALONE)


def test_it_begins_with_the_layers_that_are_alike():
    """The stem in front, and everything from the second bottleneck on; a fused convolution and what follows it not."""
    teacher, pixels = PlainEncoder(MOBILE, LATENT), torch.randn(8, 3, 64, 64)

    def student(channels: tuple[int, ...]) -> SlimmableEncoder:
        return SlimmableEncoder({"fused": channels}, LATENT)

    fused, same = student(FUSED), student(MOBILE)
    assert began(fused, teacher, pixels) == 1 + 3 + 3 + 1
    for mine, theirs in ((0, 0), *((-i, -i) for i in range(1, 8))):
        assert torch.equal(fused.layers("fused")[mine].weight, teacher.layers[theirs].weight)
    assert began(same, teacher, pixels) == len(teacher.layers)
    with torch.no_grad():
        torch.testing.assert_close(same.eval()(pixels, "fused"), teacher(pixels), rtol=1e-3, atol=1e-3)
    assert began(student((2, 8, 12, 8, 16, 16, 16)), teacher, pixels) == 1  # its last map is wider


def test_the_fused_form_is_one_network_while_it_learns_and_when_it_is_run():
    slimmable = SlimmableEncoder({"fused": FUSED}, LATENT).eval()
    plain = PlainEncoder(FUSED, LATENT)
    with torch.no_grad():
        for mine, theirs in zip(plain.layers, slimmable.layers("fused"), strict=True):
            scale, bias = theirs.normalisation("fused")
            mine.weight.copy_(theirs.weight * scale[:, None, None, None])
            mine.bias.copy_(bias)
        pixels = torch.randn(2, 3, 64, 64)
        latent = plain(pixels)
        assert latent.shape == (2, LATENT, 4, 4)
        torch.testing.assert_close(latent, slimmable(pixels, "fused"), rtol=1e-4, atol=1e-4)


def test_imitating_brings_the_latent_nearer(base, encoder, photographs, tmp_path):
    """On views that were not learned from, which are those of negative steps."""
    cut = learned_cuts(base)[OF]
    imitator = Imitator(backbone_of(base), cut.encoder, SHORT, photographs, ALONE, tmp_path)
    with torch.no_grad():
        at_first = float(imitator.loss(-9))
        imitator.encoder.eval()
        imitator.encoder.load_state_dict(encoder.state_dict())
        learned = float(imitator.loss(-9))
    assert learned < 0.7 * at_first, (learned, at_first)


def test_killed_and_resumed_ends_as_one_that_was_not(base, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr("headrace.models.learning.descent.SAVE_SECONDS", 0.0)
    few, original, calls = replace(SHORT, steps=8), torch.optim.AdamW.step, 0

    class KilledError(Exception):
        pass

    def step(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KilledError
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(KilledError):
        imitate(backbone_of(base), base, few, photographs, tmp_path / "killed", ALONE)
    resumed = imitate(backbone_of(base), base, few, photographs, tmp_path / "killed", ALONE)
    assert calls == 5 + 4
    whole = imitate(backbone_of(base), base, few, photographs, tmp_path / "whole", ALONE)
    for mine, theirs in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_it_becomes_a_split_point_beside_the_others(base, encoder, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr("headrace.models.learning.imitate.timed", lambda backbone, bundle, progress: bundle)
    made = with_imitation(backbone_of(base), base, SHORT, encoder, photographs[:60], photographs[60:68])
    assert [s.name for s in made.splits] == [*(s.name for s in base.splits), "slim-fused"]
    before = {p.name: p for p in base.operating_points}
    assert all(next(p for p in made.operating_points if p.name == name) == each for name, each in before.items())
    assert "of slim-100" in made.provenance["slim-fused"]
    made.save(tmp_path)
    made = Bundle.load(tmp_path)
    backbone = backbone_of(made)
    pixels = torch.from_numpy(load_pixels(photographs[0], backbone.preprocessing).copy())[None]
    with torch.inference_mode():
        (latent,) = backbone.head("slim-fused")(pixels)
        mine = encoder(backbone.head("input")(pixels)[0], "fused")
        torch.testing.assert_close(latent, mine, rtol=2e-2, atol=2e-2)  # the bundle's numbers have half precision
        packet = Codec(made).compress(
            Encoder.of(made, "slim-fused")(latent)[0].numpy(), made.feature_point("slim-fused", 0), 7
        )
        symbols, gain = Codec(made).decompress(packet), made.gain("slim-fused", 0)
        features = Decoder.of(made, "slim-fused")(torch.from_numpy(symbols)[None], torch.from_numpy(gain)[None])
    assert features.shape == latent.shape
    again = with_imitation(backbone, made, SHORT, encoder, photographs[:60], photographs[60:68])
    assert [p.name for p in again.operating_points] == [p.name for p in made.operating_points]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"of": "layer2"}, "no learned encoder .* it has slim-100"),
        ({"width": "a b"}, "plain name"),
        ({"channels": (2, 8, 8)}, "needs its stem's stride"),
        ({"channels": (4, 8, 12, 8, 16, 16, 12)}, "stem of stride 4; there are 2"),
        ({"channels": MOBILE}, "slim-100 has the form"),
    ],
)
def test_mistakes_are_named(base, photographs, tmp_path, change, says):
    with pytest.raises(DataError, match=says):
        imitate(backbone_of(base), base, replace(SHORT, **change), photographs, tmp_path, ALONE)
    with pytest.raises(DataError, match="no photographs"):
        imitate(backbone_of(base), base, SHORT, [], tmp_path, ALONE)

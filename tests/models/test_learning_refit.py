"""Darknet's form of the slimmable encoder: where it starts, and YOLOv2-tiny's own plan end to end with tiny sizes."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from headrace.models.backbones import Backbone, Pixels
from headrace.models.bundle import LearnedSpec, SplitSpec
from headrace.models.closed_form import fisher_gradients
from headrace.models.exceptions import DataError
from headrace.models.learning.album import Album
from headrace.models.learning.assemble import assemble
from headrace.models.learning.cut import _encoder, tensors_of
from headrace.models.learning.metric import Nats
from headrace.models.learning.plan import TrainPlan
from headrace.models.learning.refit import Darknet
from headrace.models.learning.resume import resume
from headrace.models.learning.slimmable import SlimmableEncoder
from headrace.models.learning.start import Narrowing, start
from headrace.models.learning.synthesis import Synthesis, SynthesisShape
from headrace.models.learning.team import Team
from headrace.models.learning.train import train
from headrace.models.measure import find_pictures, load_pixels
from headrace.models.repair.deltas import Deltas
from headrace.models.split import fit
from headrace.models.zoo.catalogue import load_backbone
from headrace.models.zoo.sources import Source
from torch import Tensor
from torch.nn import functional

ANCHOR = "pool3"
WIDE = "100 = [8, 16, 32, 64, 2]"
PLAN = Path(__file__).parents[2] / "models" / "plans" / "yolov2_tiny-slim.toml"
WIDTHS = {
    "8": (8, 16, 16, 64),
    "deep": (8, 16, 32, 64, 2),
    "4": (4, 16, 16, 64),
    "narrow": (1, 8, 16, 48),
    "middle": (1, 16, 16, 64),
    "whole": (1, 16, 32, 64),
}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """Random weights, whose normalisations have seen pictures: else nothing gets through seven layers."""
    return load_backbone(Source("yolov2_tiny", seed=1, size=64))


@pytest.fixture(scope="module")
def album(backbone, noise_pictures) -> Album:
    return Album(find_pictures(noise_pictures), backbone, ANCHOR, torch.device("cpu"))


@pytest.fixture(scope="module")
def started(backbone, album) -> tuple[SlimmableEncoder, Synthesis, Tensor, Tensor, Nats]:
    pixels, features, _ = album.batch(np.random.default_rng(0), 48)
    metric = Nats(fisher_gradients(backbone.tail(ANCHOR), [features], 0, backbone.task.probe))
    encoder = SlimmableEncoder(WIDTHS, 256)
    synthesis = Synthesis(SynthesisShape(256, (64, 8, 8), 2, ((8, 4, 1),)), features.mean((0, 2, 3)), torch.eye(64))
    narrowing = Narrowing.of(backbone, ANCHOR)
    assert isinstance(narrowing, Darknet) and narrowing.channels == WIDTHS["whole"] and narrowing.covers(encoder)
    seen = Pixels(backbone.preprocessing)(pixels)
    start(encoder, synthesis, narrowing, seen, features, metric, 4e4)
    return encoder.eval(), synthesis.eval(), seen, features, metric


def test_at_the_detectors_own_width_it_starts_nearly_as_the_detector(started):
    """Nearly: the weights are shared with narrower widths, which were fitted along with a lesser weight."""
    encoder, synthesis, seen, features, _ = started
    with torch.inference_mode():
        made = synthesis(encoder(seen, "whole"))
    error = (made - features).square().mean() / (features - features.mean((0, 2, 3), keepdim=True)).square().mean()
    assert float(error) < 0.1


def test_alone_the_detectors_own_width_is_the_detector(backbone, album, started):
    _, _, seen, features, metric = started
    encoder = SlimmableEncoder({"whole": WIDTHS["whole"]}, 256)
    synthesis = Synthesis(SynthesisShape(256, (64, 8, 8), 2, ((8, 4, 1),)), features.mean((0, 2, 3)), torch.eye(64))
    narrowing = Narrowing.of(backbone, ANCHOR)
    assert narrowing is not None
    start(encoder, synthesis, narrowing, seen, features, metric, 4e4)
    pixels, wanted, _ = album.batch(np.random.default_rng(5), 8)
    with torch.inference_mode():
        made = synthesis.eval()(encoder.eval()(Pixels(backbone.preprocessing)(pixels), "whole"))
    error = (made - wanted).square().mean() / (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().mean()
    assert float(error) < 1e-2


def test_narrower_widths_start_better_than_with_nothing(started):
    """By the metric, nearer to the features than their mean over all places is; wider ones nearer still."""
    encoder, synthesis, seen, features, metric = started
    with torch.inference_mode():
        unlearned = float(metric(features - features.mean((0, 2, 3), keepdim=True)).mean())
        off = {w: float(metric(synthesis(encoder(seen, w)) - features).mean()) / unlearned for w in WIDTHS}
    assert off["whole"] < off["middle"] < off["narrow"] < 1, off
    assert off["middle"] < off["4"] < 1 and off["8"] < 1, off
    assert off["deep"] < off["8"], off


def test_residual_layers_begin_as_nothing_but_their_shortcuts(started):
    encoder, *_ = started
    *_, first, second, _ = encoder.layers("deep")
    assert first.layer.residual and second.layer.residual
    x = torch.randn(2, 64, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(second(first(x, "deep"), "deep"), x)


def test_a_width_with_residual_layers_taken_out_is_the_slimmable_one(started):
    """Once they do something: its weights are its own, and its shortcuts are there."""
    encoder = copy.deepcopy(started[0])
    for layer in encoder.layers("deep"):
        torch.nn.init.uniform_(layer.norms["deep"].weight, 0.5, 1.0)
    parts = {f"s/encoder/{key}": value.detach().numpy() for key, value in encoder.parts().items()}
    assert "s/encoder/8x2/3/deep/scale" in parts and "s/encoder/8/3/8/scale" in parts
    split = SplitSpec("s-deep", (256, 8, 8), 256, (), learned=LearnedSpec("s", "deep", WIDTHS["deep"], ANCHOR, ()))
    plain = _encoder(parts, split)
    x = started[2][:2]
    with torch.inference_mode():
        wanted = encoder(x, "deep")
        torch.testing.assert_close(plain(x), wanted, atol=1e-3 * float(wanted.abs().max()), rtol=1e-3)


def test_residual_layers_go_on_from_a_bundle(started):
    encoder, synthesis, seen, _, _ = copy.deepcopy(started)
    for layer in encoder.layers("deep"):
        torch.nn.init.uniform_(layer.norms["deep"].weight, 0.5, 1.0)
    again, theirs = copy.deepcopy(encoder), copy.deepcopy(synthesis)
    for parameter in again.parameters():
        torch.nn.init.normal_(parameter)
    nothing = Deltas(torch.nn.Conv2d(3, 3, 1), 0, 0)
    resume(tensors_of("s", encoder, synthesis), "s", again, theirs, nothing, seen)
    with torch.inference_mode():
        wanted, found = encoder(seen[:2], "deep"), again.eval()(seen[:2], "deep")
    assert float((found - wanted).abs().max()) < 2e-2 * float(wanted.abs().max())  # half precision


def test_channels_that_say_most_come_first():
    """What is predicted from twelve channels hangs on three of them alone."""
    from headrace.models.learning.refit import _order

    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 24, generator=rng, dtype=torch.float64)  # two numbers a channel
    wanted = torch.stack([3 * x[:, 8] + x[:, 9], 2 * x[:, 20] - x[:, 1], 0.5 * x[:, 0]], 1)
    order = _order(x.T @ x / 4000, x.T @ wanted / 4000, 2)
    assert order[:3].tolist() == [4, 10, 0]


def test_the_pooling_before_the_activation_is_darknets():
    from headrace.models.learning.slimmable import plan_layers

    (first, *_) = plan_layers([(1, 4, 4, 4)], 2)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(first.finish(x), functional.max_pool2d(functional.leaky_relu(x, 0.1), 2))


@pytest.mark.parametrize("channels", list(WIDTHS.values()))
def test_every_stem_ends_at_a_sixteenth(channels):
    encoder = SlimmableEncoder({"a": channels}, 6).eval()
    with torch.inference_mode():
        assert encoder(torch.zeros(1, 3, 96, 96), "a").shape == (1, 6, 6, 6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ((WIDE, "100 = [3, 16, 32, 64, 2]"), "stride 3"),
        ((WIDE, "100 = [8, 16, 32]"), "needs its stem's stride"),
        ((WIDE, "100 = [2, 16, 16, 16, 16, 16, 16, 40]"), "another form"),
        ((WIDE, "100 = [8, 16, 16, 32]"), "fewer channels"),
    ],
)
def test_plans_with_mistakes_are_refused(tmp_path, change, says):
    file = tmp_path / "plan.toml"
    assert change[0] in PLAN.read_text()
    file.write_text(PLAN.read_text().replace(*change))
    with pytest.raises(DataError, match=says):
        TrainPlan.load(file)


def test_a_network_of_another_form_is_left_alone():
    assert Narrowing.of(load_backbone(Source("timm/test_resnet", seed=3, size=64)), "layer2") is None


def test_the_plan_for_yolo_from_pictures_to_a_bundle(noise_pictures, tmp_path, monkeypatch):
    """Few steps of every stage, and the widths are split points whose heads are the encoder that was learned."""
    monkeypatch.setattr("headrace.models.learning.train.FITTED", 24)
    monkeypatch.setattr("headrace.models.learning.train.STARTED", 8)
    monkeypatch.setattr("headrace.models.split.timed", lambda backbone, bundle, *_: bundle)
    monkeypatch.setattr("headrace.models.learning.assemble.timed", lambda backbone, bundle, *_: bundle)
    pictures = find_pictures(noise_pictures)
    backbone = load_backbone(Source("yolov2_tiny", seed=1, size=64))
    base = fit(backbone, ("pool5",), pictures[:24], pictures[24:26])
    plan = TrainPlan.load(PLAN)
    stages = tuple(s.model_copy(update={"steps": 2}) for s in plan.stages)
    few = plan.model_copy(update={"views": 16, "batch": 4, "stages": stages, "synthesis": ((16, 8, 1), (8, 4, 1))})
    learned = train(backbone, few, pictures, tmp_path, Team(0, 1, torch.device("cpu")))
    assert learned.said.startswith("from the backbone's own first stages")
    made = assemble(backbone, base, few, learned, pictures[:24], pictures[24:26])
    assert [s.name for s in made.splits] == ["pool5", "slim-25", "slim-100"]
    pixels = torch.from_numpy(np.stack([load_pixels(p, backbone.preprocessing) for p in pictures[:4]]))
    for width in plan.encoder.taken:
        with torch.inference_mode():
            (alone,) = backbone.head(f"slim-{width}")(pixels)
            whole = learned.encoder(Pixels(backbone.preprocessing)(pixels), width)
            (scores, corners) = backbone.tail(f"slim-{width}")(alone)
        assert float((alone - whole).abs().max()) < 2e-2 * float(whole.abs().max())  # half precision
        assert scores.shape == (4, 20, 80) and corners.shape == (4, 20, 4)

"""Where a learned encoder starts, and the views that a GPU makes (here on a CPU)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from headrace.models.backbones import Backbone, Pixels
from headrace.models.closed_form import fisher_gradients
from headrace.models.exceptions import DataError
from headrace.models.learning.album import Album
from headrace.models.learning.metric import Nats
from headrace.models.learning.slimmable import SlimmableEncoder
from headrace.models.learning.start import Narrowing, start
from headrace.models.learning.synthesis import Synthesis, SynthesisShape
from headrace.models.measure import find_pictures, load_pixels, views_of
from headrace.models.zoo.catalogue import load_backbone
from headrace.models.zoo.sources import Source
from torch import Tensor

ANCHOR = "blocks.2.0"
WHOLE = (2, 32, 16, 96, 24, 144, 144, 40)
WIDTHS = {
    "coarse": (4, 16, 16, 48, 16, 72, 72, 40),
    "narrow": (2, 16, 16, 48, 16, 72, 72, 40),
    "whole": WHOLE,
}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(Source("timm/tf_efficientnet_lite0", seed=1, size=64))


@pytest.fixture(scope="module")
def album(backbone, noise_pictures) -> Album:
    return Album(find_pictures(noise_pictures), backbone, ANCHOR, torch.device("cpu"))


@pytest.fixture(scope="module")
def started(backbone, album) -> tuple[SlimmableEncoder, Synthesis, Tensor, Tensor, Nats]:
    pixels, features, _ = album.batch(np.random.default_rng(0), 48)
    metric = Nats(fisher_gradients(backbone.tail(ANCHOR), [features], 0, backbone.task.probe))
    encoder = SlimmableEncoder(WIDTHS, 160)
    shape = SynthesisShape(160, (40, 8, 8), 2, ((8, 4, 1), (6, 4, 1)))
    synthesis = Synthesis(shape, features.mean((0, 2, 3)), torch.eye(40))
    narrowing = Narrowing.of(backbone, ANCHOR)
    assert narrowing is not None and narrowing.channels == WHOLE and narrowing.covers(encoder)
    seen = Pixels(backbone.preprocessing)(pixels)
    start(encoder, synthesis, narrowing, seen, features, metric, 3e4)
    return encoder.eval(), synthesis.eval(), seen, features, metric


def test_at_the_backbones_own_width_it_starts_as_the_backbone(started):
    encoder, synthesis, seen, features, _ = started
    with torch.inference_mode():
        made = synthesis(encoder(seen, "whole"))
    error = (made - features).square().mean() / (features - features.mean(0)).square().mean()
    assert float(error) < 1e-2, "batch statistics take the place of the backbone's"


def test_narrower_it_starts_better_than_with_nothing(started):
    """By the metric, nearer to the features than their mean over all views is."""
    encoder, synthesis, seen, features, metric = started
    with torch.inference_mode():
        unlearned = float(metric(features - features.mean(0)).mean())
        narrow, coarse = (float(metric(synthesis(encoder(seen, w)) - features).mean()) for w in ("narrow", "coarse"))
    assert narrow < unlearned and narrow < coarse, (narrow, coarse, unlearned)


def test_the_latents_scale_follows_from_the_price(backbone, started):
    """A quantiser's step costs as much in nats as the bits that a finer one would take are worth."""
    _, synthesis, _, _, metric = started
    errors = torch.zeros(1, 160, 4, 4)
    errors[0, 3, 2, 1] = 1.0
    with torch.inference_mode():
        moved = synthesis.guess(errors) - synthesis.guess(torch.zeros_like(errors))
        moved = torch.nn.functional.pixel_shuffle(moved, 2)
        whitened = torch.einsum("dc,bchw->bdhw", metric.channels[0], moved)
        nats = 0.5 * metric.scales[1] * float(whitened.square().sum())
    # d(nats)/d(bits) of a uniform quantiser: nats * 1/12 * 2 ln 2 a bit, against 1 / price
    assert nats / 12 * 2 * np.log(2) * 3e4 == pytest.approx(1, rel=1e-2)


def test_other_backbones_start_from_random_weights():
    assert Narrowing.of(load_backbone(Source("timm/test_resnet", seed=3, size=64)), "layer2") is None
    backbone = load_backbone(Source("timm/tf_efficientnet_lite0", seed=1, size=64))
    narrowing = Narrowing.of(backbone, ANCHOR)
    assert narrowing is not None and not narrowing.covers(SlimmableEncoder({"w": (2, 48, *WHOLE[2:])}, 8))
    assert Narrowing.of(backbone, "blocks.3") is None


def test_views_are_new_every_time_and_the_same_for_the_same_numbers(backbone, album):
    one = album.batch(np.random.default_rng(5), 6)
    again, other = album.batch(np.random.default_rng(5), 6), album.batch(np.random.default_rng(6), 6)
    assert one[0].dtype == torch.uint8 and one[0].shape == (6, 64, 64, 3)
    assert torch.equal(one[0], again[0]) and not torch.equal(one[0], other[0])
    with torch.inference_mode():
        (features,) = backbone.head(ANCHOR)(one[0])
        (scores,) = backbone.tail(ANCHOR)(features)
    scale = float(features.abs().max())
    torch.testing.assert_close(one[1], features, atol=0.05 * scale, rtol=0)  # bfloat16
    assert one[2][0].shape == scores.shape and float(one[2][0].sum(1).mean()) == pytest.approx(1, abs=1e-2)


def test_a_view_is_a_part_of_its_photograph(backbone, tmp_path):
    """Of a picture that is red on the left and blue on the right, views are both, in one order or the other."""
    from PIL import Image

    picture = np.zeros((300, 500, 3), np.uint8)
    picture[:, :250, 0], picture[:, 250:, 2] = 200, 200
    Image.fromarray(picture).save(tmp_path / "a.png")
    views = Album([tmp_path / "a.png"], backbone, ANCHOR, torch.device("cpu")).batch(np.random.default_rng(0), 32)[0]
    assert set(np.unique(views[..., 1].numpy())) == {0}, "nothing of the padding is seen"
    left, right = views[:, 32, 1].float(), views[:, 32, -2].float()
    assert (left[:, 0] > right[:, 0]).any() and (left[:, 0] < right[:, 0]).any(), "flipped half of the time"
    assert float((left + right)[:, [0, 2]].sum(1).min()) > 300


def test_a_photograph_that_cannot_be_read_is_named(backbone, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        Album([Path(tmp_path / "broken.jpg")], backbone, ANCHOR, torch.device("cpu"))


def test_views_of_a_photograph_are_itself_and_parts_of_it(backbone, noise_pictures):
    paths = find_pictures(noise_pictures)[:3]
    views = views_of(paths, 3, 0)
    assert views[:3] == paths and len(views) == 9
    how = backbone.preprocessing
    drawn = [load_pixels(view, how) for view in views]
    assert all(d.shape == (how.size, how.size, 3) and d.dtype == np.uint8 for d in drawn)
    assert len({d.tobytes() for d in drawn}) == 9, "every view is another one"
    assert all(np.array_equal(d, load_pixels(v, how)) for d, v in zip(drawn, views_of(paths, 3, 0), strict=True))
    assert views_of(paths, 1, 0) == paths


def test_every_other_view_of_a_detector_is_a_mosaic(noise_pictures, tmp_path, monkeypatch):
    """Four pictures of one colour each: a mosaic has up to four, any other view has one."""
    from PIL import Image

    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    detector = load_backbone(Source("own_models:Boxes", "detection", size=32, labels=("a", "b", "c")))
    for at, grey in enumerate((0, 80, 160, 240)):
        Image.new("RGB", (300, 200), (grey, grey, grey)).save(tmp_path / f"{at}.png")
    album = Album(find_pictures(tmp_path), detector, "body.1", torch.device("cpu"))
    pixels, features, outputs = album.batch(np.random.default_rng(1), 8)
    colours = [len(np.unique(view)) for view in pixels.numpy()]
    assert max(colours[::2]) > 1 and colours[1::2] == [1, 1, 1, 1]
    assert len(features) == 8 and len(outputs) > 1 and all(len(each) == 8 for each in outputs)

"""Scenes of photographs with what the uncut detector makes of them."""

import numpy as np
import pytest
import torch
from headrace.models.exceptions import BackboneError, DataError
from headrace.models.learning.gallery import Gallery
from headrace.models.learning.plan import TrainPlan
from headrace.models.measure import find_pictures
from headrace.models.zoo.catalogue import load_backbone
from headrace.models.zoo.sources import Source


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(Source("yolov2_tiny", seed=1, size=64))


@pytest.fixture(scope="module")
def gallery(backbone, noise_pictures) -> Gallery:
    return Gallery(find_pictures(noise_pictures), backbone, "pool3", ("pool4", "pool5"), torch.device("cpu"))


def test_scenes_come_with_the_uncut_detectors_features_answers_and_later_maps(backbone, gallery):
    pixels, features, others = gallery.batch(np.random.default_rng(3), 5)
    assert pixels.dtype == torch.uint8 and pixels.shape == (5, 64, 64, 3)
    with torch.inference_mode():
        (wanted,) = backbone.head("pool3")(pixels)
        answers = backbone.tail("pool3")(wanted)
        (pool4,), (pool5,) = backbone.head("pool4")(pixels), backbone.head("pool5")(pixels)
    for found, exact in zip((features, *others), (wanted, *answers, pool4, pool5), strict=True):
        assert found.dtype == torch.float32 and found.shape == exact.shape and not found.is_inference()
        # Half precision on the way.
        assert float((found - exact).abs().max()) < 0.05 * float(exact.abs().max()), found.shape


def test_scenes_are_always_new_and_drawn_from_the_generator_alone(gallery):
    first, again, other = (gallery.batch(np.random.default_rng(seed), 4)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    grey = (first == torch.tensor(127, dtype=torch.uint8)).all(3).flatten(1).float().mean(1)
    assert 0 < float(grey.max()) < 0.7  # bars of a letterbox


def test_what_cannot_be_shown_is_said(backbone, noise_pictures, tmp_path):
    with pytest.raises(BackboneError, match="pool3"):
        Gallery(find_pictures(noise_pictures)[:2], backbone, "pool4", ("pool3",), torch.device("cpu"))
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        Gallery([broken], backbone, "pool3", (), torch.device("cpu"))


def test_a_plan_of_scenes_is_one_for_a_detector(noise_pictures, tmp_path):
    from headrace.models.learning.team import Team
    from headrace.models.learning.train import train

    classifier = load_backbone(Source("timm/test_resnet", seed=3, size=64))
    plan = TrainPlan.model_validate(
        {
            "bundle": tmp_path,
            "scenes": True,
            "encoder": {"widths": {"a": (8, 4, 4, 8)}},
            "synthesis": ((8, 4, 1),),
            "stages": ({"towards": "features", "steps": 1},),
        }
    )
    with pytest.raises(DataError, match="scenes"):
        train(classifier, plan, find_pictures(noise_pictures) * 8, tmp_path, Team(0, 1, torch.device("cpu")))

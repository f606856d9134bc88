"""torchvision's detectors with random weights: they rejoin, their boxes are torchvision's own, one step is learned."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from headrace.models.backbones import EXACT, Backbone
from headrace.models.repair.distil import RepairPlan, repair
from headrace.models.split import fit
from headrace.models.tasks import Boxes, Detection
from headrace.models.zoo.catalogue import load_backbone
from headrace.models.zoo.sources import Source

NAMES = {
    "fasterrcnn_mobilenet_v3_large_fpn": "body.body.6",
    "retinanet_resnet50_fpn": "body.body.layer1",
    "ssdlite320_mobilenet_v3_large": "body.features.0.6",
}
CASES = [(name, 96 if "retinanet" in name else 160) for name in NAMES] + [("ssdlite320_mobilenet_v3_large", 224)]


@pytest.fixture(scope="module")
def photographs(noise_pictures) -> Path:
    """See `noise_pictures`."""
    return noise_pictures


def detector(name: str, size: int = 160) -> Backbone:
    return load_backbone(Source(f"torchvision/{name}", seed=2, size=size))


@pytest.mark.parametrize(("name", "size"), CASES)
def test_the_rejoined_detector_is_the_uncut_one(name, size):
    at, backbone = NAMES[name], detector(name, size)
    assert backbone.prove(at) <= EXACT
    pixels = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        joined, uncut = backbone.tail(at)(*backbone.head(at)(pixels)), backbone.uncut(pixels)
    for mine, theirs in zip(joined, uncut, strict=True):
        assert float((mine - theirs).abs().max()) <= EXACT * float(theirs.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_boxes_are_those_of_torchvision_s_own_model(name):
    """The detector as torchvision calls it, on a picture that its transform leaves as it is."""
    backbone = detector(name)
    task = backbone.task
    assert isinstance(task, Detection)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        own = torchvision.models.get_model(name, weights=None, weights_backbone=None).eval()
    own.transform.min_size, own.transform.max_size, own.transform.fixed_size = (160,), 160, (160, 160)
    rules = own.roi_heads if hasattr(own, "roi_heads") else own
    rules.score_thresh = 0.0
    pixels = torch.randint(0, 256, (1, 160, 160, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = own([pixels[0].permute(2, 0, 1) / 255])[0]
        (mine,) = replace(task, minimum=0.0, candidates=50_000).answers(backbone.uncut(pixels))
    assert isinstance(mine, Boxes) and len(mine.scores) > 10
    count = min(len(mine.scores), len(theirs["scores"]), 10)
    assert np.allclose(mine.scores[:count], theirs["scores"][:count].numpy(), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_fpn", "ssdlite320_mobilenet_v3_large"])
def test_a_step_is_learned(name, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr("headrace.models.split.timed", lambda backbone, bundle, *_: bundle)
    at, backbone = NAMES[name], detector(name)
    paths = sorted(photographs.iterdir())
    bundle = fit(backbone, [at], paths[:12], paths[12:14])
    plan = RepairPlan(steps=2, crops=8, batch=2, rank=4, hidden=8, photographs=100, held_out=2)
    _, learned = repair(bundle, photographs, plan, tmp_path)
    assert learned.fingerprint == bundle.fingerprint
    assert any(v.any() for v in learned.repair.values())

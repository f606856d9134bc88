"""Split points at a smaller size of the input: the same weights, fewer pixels, fewer places, fewer bytes."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from headrace.cli import app
from headrace.edge.device import Device
from headrace.edge.engine import Engine
from headrace.models.bitstream import Packet
from headrace.models.bottleneck import Decoder, Encoder
from headrace.models.bundle import Bundle
from headrace.models.codec import Codec
from headrace.models.edge_half import load_edge_half
from headrace.models.exceptions import BackboneError, DataError, OperatingPointError
from headrace.models.export import export_edge_half
from headrace.models.extend import added, extend, extended
from headrace.models.measure import find_pictures, load_pixels
from headrace.models.preprocessing import prepare
from headrace.models.repair.data import make_crops
from headrace.models.split import SplitPlan, fit, fit_splits
from headrace.models.zoo.catalogue import backbone_of, load_backbone
from headrace.models.zoo.sources import Source
from headrace.server.engine import FeatureInput, TailKey
from headrace.server.tail import load_tails
from PIL import Image
from rich.progress import Progress
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))  # own_models

BACKBONE = Source("timm/test_resnet", seed=3, size=64)
SMALL = "layer2-32px"


@pytest.fixture(scope="module")
def folder(noise_pictures) -> Path:
    """See `noise_pictures`."""
    return noise_pictures


@pytest.fixture(scope="module", autouse=True)
def untimed():
    """Timing exports every head to ONNX, which takes half a minute and says nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("split", "extend"):
            patch.setattr(f"headrace.models.{module}.timed", lambda backbone, bundle, *_: bundle)
        yield


@pytest.fixture(scope="module")
def base(folder) -> Bundle:
    paths = find_pictures(folder)
    return fit(load_backbone(BACKBONE), ("layer2",), paths[:60], paths[60:68])


@pytest.fixture(scope="module")
def bundle(base, folder) -> Bundle:
    paths = find_pictures(folder)
    return extend(backbone_of(base), base, [SMALL], paths[:60], paths[60:68])


def test_it_is_the_same_network_at_another_size(base):
    backbone = backbone_of(base)
    sized, cut = backbone.at(SMALL)
    assert (cut, sized.preprocessing.size) == ("layer2", 32)
    assert abs(sized.preprocessing.resize - base.preprocessing.resize / 2) <= 0.5
    assert backbone.at(SMALL)[0] is sized and backbone.at("layer2") == (backbone, "layer2")
    assert backbone.prove(SMALL) < 1e-5
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        (joined,) = backbone.tail(SMALL)(*backbone.head(SMALL)(pixels))
        x = (pixels.permute(0, 3, 1, 2).float() - torch.tensor(backbone.preprocessing.mean).reshape(-1, 1, 1)) / (
            torch.tensor(backbone.preprocessing.std).reshape(-1, 1, 1)
        )
        whole = torch.softmax(backbone.parts.front(x), 1)
    torch.testing.assert_close(joined, whole, atol=1e-5, rtol=1e-4)


def test_it_is_added_beside_the_others(base, bundle):
    small, own = bundle.split(SMALL), bundle.split("layer2")
    assert small.size == 32 and own.size == 0
    assert small.features[1] * 2 == own.features[1]
    assert [p for p in bundle.operating_points if p.split != SMALL] == list(base.operating_points)
    points = [p for p in bundle.operating_points if p.split == SMALL]
    assert len(points) >= 6 and all(p.bytes_median > 0 for p in points)
    assert bundle.preprocessing_at(SMALL).size == 32 and bundle.preprocessing_at("layer2") == bundle.preprocessing
    with pytest.raises(OperatingPointError):
        bundle.preprocessing_at("layer9")


def test_older_bundles_keep_their_fingerprints(base):
    fields = base.manifest()["splits"][0]
    assert "size" not in fields and "learned" not in fields


def test_saved_and_loaded(bundle, tmp_path):
    bundle.save(tmp_path)
    assert Bundle.load(tmp_path).split(SMALL) == bundle.split(SMALL)


def test_the_edge_scales_a_frame_once_and_the_server_answers(bundle, folder, tmp_path):
    """Captured picture -> pixels of the head's size -> ONNX -> packet -> the tail at that size."""
    export_edge_half(bundle, tmp_path)
    engine = Engine(load_edge_half(tmp_path), tmp_path, Device())
    picture = Image.open(find_pictures(folder)[-1]).convert("RGB")
    backbone, codec = backbone_of(bundle), Codec(bundle)
    tails = load_tails([bundle], "cpu", 1)
    for name in (SMALL, "layer2"):
        point = next(p for p in bundle.operating_points if p.split == name)
        coded = engine.encode(picture, point, 7)
        pixels = prepare(picture, bundle.preprocessing_at(name))
        with torch.inference_mode():
            latent = Encoder.of(bundle, name)(*backbone.head(name)(torch.from_numpy(pixels[None].copy())))[0].numpy()
        symbols = codec.decompress(Packet.from_bytes(coded.packet))
        mine = codec.decompress(codec.compress(latent, point, 7))
        assert np.mean(symbols != mine) < 1e-3  # a symbol at the edge of rounding may differ between engines
        gain = bundle.gain(name, point.rate_level)
        ((answer,),) = tails[TailKey(bundle.fingerprint, name)]([FeatureInput(symbols, gain)])
        with torch.inference_mode():
            features = Decoder.of(bundle, name)(torch.from_numpy(symbols[None]), torch.from_numpy(gain[None]))
            (scores,) = backbone.tail(name)(features)
        assert answer.labels[0].index == int(scores.argmax())
    # What was scaled for a smaller head is of no use to the uncut model; the picture itself is kept for it.
    point = next(p for p in bundle.operating_points if p.split == SMALL)
    coded = engine.encode(picture, point, 8)
    assert coded.pixels is None
    assert (
        engine.answer(picture, coded.pixels).labels
        == engine.answer(None, prepare(picture, bundle.preprocessing)).labels
    )


def test_repair_learns_from_the_uncut_model_at_its_own_size(bundle, folder, tmp_path):
    """Features are those of the small picture, outputs those of the whole one."""
    backbone, paths = backbone_of(bundle), find_pictures(folder)
    crops = make_crops(backbone, SMALL, paths, 16, 0, tmp_path / "small", torch.device("cpu"))
    whole = make_crops(backbone, "layer2", paths, 16, 0, tmp_path / "whole", torch.device("cpu"))
    features, (outputs,) = crops.batch(np.arange(4))
    _, (wanted,) = whole.batch(np.arange(4))
    assert features.shape[2:] == bundle.split(SMALL).features[1:]
    torch.testing.assert_close(outputs, wanted, atol=2e-3, rtol=1e-2)


def test_what_cannot_be_is_said(base, bundle, folder):
    backbone = backbone_of(base)
    for name in ("layer2-16px", "layer2-128px"):
        with pytest.raises(BackboneError, match=r"32\.\.64 pixels"):
            backbone.at(name)
    with pytest.raises(BackboneError, match="cannot be cut after"):
        backbone.head("layer9-32px")
    with pytest.raises(DataError, match="name the split points"):
        extended(SplitPlan(BACKBONE, folder), folder)
    spare = base.operating_points[-1]
    taken = {p.id for p in base.operating_points}
    full = replace(
        base,
        operating_points=(*base.operating_points, *(replace(spare, id=i) for i in range(128) if i not in taken)),
    )
    with pytest.raises(DataError, match="at most 128"):
        added(full, [bundle.split(SMALL)], {})


def test_another_backbones_bundle_is_refused(base, folder, tmp_path):
    base.save(tmp_path)
    arguments = ["split", "timm/test_resnet2", "--add-to", str(tmp_path), "--at", SMALL]
    done = CliRunner().invoke(app, [*arguments, "--calibration", str(folder), "--output", str(tmp_path / "new")])
    assert done.exit_code != 0
    assert "timm/test_resnet" in str(done.exception or done.output)


def test_what_is_the_bundles_own_cannot_be_asked_for_beside_it(base, folder, tmp_path):
    base.save(tmp_path)
    arguments = ["split", "timm/test_resnet", "--add-to", str(tmp_path), "--at", SMALL, "--calibration", str(folder)]
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path), "--size", "160", "--data-note", "mine"])
    assert done.exit_code == 2 and "--size, --data-note" in done.output
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path), "--held-out", "0"])
    assert done.exit_code == 2 and "--held-out" in done.output


def test_the_command_adds_a_split_point(base, folder, tmp_path):
    base.save(tmp_path / "old")
    # The name as it may be typed, too; in the bundle it is in full.
    arguments = ["split", "test_resnet", "--add-to", str(tmp_path / "old"), "--at", SMALL, "--photographs", "100"]
    given = [*arguments, "--held-out", "8", "--calibration", str(folder), "--output", str(tmp_path / "new")]
    done = CliRunner().invoke(app, given, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    made = Bundle.load(tmp_path / "new")
    assert [s.name for s in made.splits] == ["layer2", SMALL]
    assert SMALL in made.provenance["added"]
    replace(made, provenance={**made.provenance, "repair": f"layer2 by 3 steps; {SMALL} by 4 steps"}).save(
        tmp_path / "new"
    )
    changed = {str(tmp_path / "old"): str(tmp_path / "new"), SMALL: "layer2-48px"}
    instead = [*(changed.get(a, a) for a in given), "--instead-of", SMALL, "--distortions", "0.02,0.05,0.12"]
    done = CliRunner().invoke(app, instead, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    made = Bundle.load(tmp_path / "new")
    assert [s.name for s in made.splits] == ["layer2", "layer2-48px"]
    assert made.split("layer2-48px").rate_levels == 3
    said = f"--at layer2-48px --instead-of {SMALL} --distortions 0.02,0.05,0.12 --photographs 100 --seed 0"
    assert made.provenance["added"].endswith(said) and made.provenance["repair"] == "layer2 by 3 steps"
    refused = CliRunner().invoke(app, [*arguments[:2], *given[-4:], "--instead-of", SMALL])
    assert refused.exit_code != 0 and "--add-to" in refused.output
    for wrong, text in (
        ("0.05,0.02", "not positive and rising"),
        ("0,0.1", "not positive and rising"),
        ("a", "commas"),
    ):
        refused = CliRunner().invoke(app, [*given, "--distortions", wrong])
        assert refused.exit_code != 0 and text in str(refused.exception) + refused.output


def test_pixels_of_a_smaller_size_show_the_same_part(base, folder):
    """The middle of a frame at half the size is the middle of it, not a smaller part."""
    path = find_pictures(folder)[0]
    whole = load_pixels(path, base.preprocessing).astype(np.float32)
    small = load_pixels(path, base.preprocessing.at(32)).astype(np.float32)
    halved = whole.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(halved - small).mean() < 6


def test_a_detector_at_another_size_gives_boxes_in_pixels_of_its_own(folder, tmp_path):
    """YOLOv2-tiny of random weights: fewer cells, and the same corners for what fills the same share of them."""
    backbone = load_backbone(Source("yolov2_tiny", seed=1, size=96))
    assert backbone.prove("pool3-64px") < 1e-5
    pixels = torch.full((1, 96, 96, 3), 90, dtype=torch.uint8)
    with torch.inference_mode():
        scores, _ = backbone.uncut(pixels)
        fewer, wider = backbone.tail("pool3-64px")(*backbone.head("pool3-64px")(pixels[:, :64, :64]))
    assert (scores.shape[1], fewer.shape[1]) == (5 * 9, 5 * 4)
    centres = ((wider[..., :2] + wider[..., 2:]) / 2).reshape(5, 2, 2, 2)
    assert (centres[:, 0, 0] < 48).all() and (centres[:, 1, 1] > 48).all() and (centres < 96).all()
    paths = find_pictures(folder)
    specs, _ = fit_splits(backbone, ["pool3-64px"], paths[:12], 0, Progress(disable=True))
    assert (specs[0].size, specs[0].features) == (64, (64, 8, 8))
    crops = make_crops(backbone, "pool3-64px", paths, 16, 0, tmp_path, torch.device("cpu"))
    features, wanted = crops.batch(np.arange(2))
    with torch.inference_mode():
        torch.testing.assert_close(backbone.tail("pool3-64px")(features)[0], wanted[0], atol=2e-3, rtol=2e-2)


def test_a_detector_that_cannot_be_run_at_another_size_says_so():
    with pytest.raises(BackboneError, match="only be cut at its own size"):
        load_backbone(Source("own_models:Boxes", "detection", size=64)).at("body.1-32px")

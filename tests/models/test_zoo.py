"""Names, weights, and bundles that are made by `headrace split` of many kinds of models and loaded again."""

import pickle
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from headrace.cli import app
from headrace.models.backbones import EXACT, Pixels
from headrace.models.bottleneck import Decoder, Encoder
from headrace.models.bundle import UNCUT, Bundle, head_file
from headrace.models.class_map import decode_class_map
from headrace.models.codec import Codec
from headrace.models.edge_half import has_local, load_edge_half
from headrace.models.exceptions import BackboneError
from headrace.models.export import Only, export_edge_half, write_onnx
from headrace.models.measure import load_pixels
from headrace.models.operating_point import Kind
from headrace.models.split import fit
from headrace.models.tasks import Boxes, Labels
from headrace.models.zoo.catalogue import backbone_of, load_backbone, write_weights
from headrace.models.zoo.darknet import CLASSES, Regions, fill, yolov2_tiny
from headrace.models.zoo.sources import Source, state_digest
from headrace.server.engine import FeatureInput, TailKey
from headrace.server.tail import load_tails
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))

import own_models

KINDS = {
    "residual net": (Source("timm/test_resnet", seed=3, size=64), "layer2"),
    "tokens": (Source("test_vit", seed=3, size=64), "blocks.1"),
    "channels last": (Source("own_models:Windows", "classification", size=32), "add"),
    "boxes": (Source("own_models:Boxes", "detection", size=32), "body.1"),
    "detector": (Source("ssdlite320_mobilenet_v3_large", seed=1, size=160), "body.features.0.10"),
    "segmentation": (Source("lraspp_mobilenet_v3_large", seed=1, size=64), "net.backbone.3"),
}


@pytest.mark.parametrize(("source", "at"), KINDS.values(), ids=KINDS.keys())
def test_a_packet_of_any_model_is_answered_by_its_tail(source, at, noise_pictures, tmp_path, monkeypatch):
    """Fitted, saved, loaded; the edge's ONNX head, the codec, the server's tail: all of it from the bundle alone."""
    monkeypatch.setattr("headrace.models.split.timed", lambda _, bundle, *__: bundle)  # is seconds of exporting
    backbone = load_backbone(source)
    paths = sorted(noise_pictures.iterdir())
    fit(backbone, [backbone.cut(at).name], paths[:12], paths[12:14]).save(tmp_path)
    write_weights(backbone, tmp_path)
    bundle = Bundle.load(tmp_path)
    assert has_local(bundle) == (bundle.task == "classification")
    point = next(p for p in bundle.operating_points if p.kind is Kind.FEATURE)
    head = Only(backbone.head(at), Encoder.of(bundle, at))
    write_onnx(backbone, head, "latent", tmp_path / "head.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "head.onnx"))
    pixels = load_pixels(paths[0], bundle.preprocessing)[None]
    (latent,) = session.run(["latent"], {"pixels": pixels})
    expected = head(torch.from_numpy(pixels.copy())).numpy()
    assert np.abs(latent - expected).max() < 1e-3 * np.abs(expected).max()
    symbols = Codec(bundle).decompress(Codec(bundle).compress(latent[0], point, 1))
    gain = bundle.gain(point.split, point.rate_level)
    tails = load_tails([bundle], "cpu", 0)
    frames = [FeatureInput(symbols, gain), FeatureInput(np.zeros_like(symbols), gain)]
    ((output,), _) = tails[TailKey(bundle.fingerprint, point.split)](frames)
    restored = Decoder.of(bundle, at)(torch.from_numpy(symbols)[None], torch.from_numpy(gain.copy())[None])
    answer = backbone.task.answers(backbone.tail(at)(restored))[0]
    assert output.tail == bundle.task == backbone.task.name
    if isinstance(answer, Labels):
        assert tuple(x.index for x in output.labels) == answer.indexes
        assert np.allclose([x.score for x in output.labels], answer.scores, rtol=1e-3)
    elif isinstance(answer, Boxes):
        assert len(output.boxes) == len(answer.scores) > 0
        assert np.allclose([b.score for b in output.boxes], answer.scores, rtol=1e-3)
    else:
        classes = decode_class_map(output.class_map.png)
        assert classes.shape == (64, 64) and (classes == answer.classes).mean() > 0.99
    assert all(0 <= p.accuracy <= 1 for p in bundle.operating_points)


def test_a_factory_s_weights_travel_in_the_bundle(noise_pictures, tmp_path):
    """Through the command: the factory would draw others when it is called again."""
    command = ["split", "own_models:Residual", "--task", "classification", "--size", "32", "--at", "stem.2"]
    folders = ["--calibration", str(noise_pictures), "--output", str(tmp_path)]
    done = CliRunner().invoke(app, [*command, *folders, "--photographs", "100", "--held-out", "4"])
    assert done.exit_code == 0, (done.output, done.exception)
    bundle = Bundle.load(tmp_path)
    assert bundle.backbone.weights == "file"
    assert backbone_of(bundle).spec == bundle.backbone
    assert bundle.split("stem.2").features == (16, 16, 16)
    assert 0 < bundle.split("stem.2").edge_share < 1.5
    save_file(own_models.Residual().state_dict(), tmp_path / "backbone.safetensors")
    with pytest.raises(BackboneError, match="split anew"):
        backbone_of(bundle)


@pytest.mark.parametrize("frames", [2, 1], ids=["a free batch", "a batch of one"])
def test_a_program_of_torch_export_travels_in_the_bundle(frames, small_bundle, tmp_path):
    module = own_models.Residual().eval()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},) if frames > 1 else None
    program = torch.export.export(module, (torch.zeros(frames, 3, 32, 32),), dynamic_shapes=shapes)
    path = tmp_path / "net.pt2"
    torch.export.save(program, path)
    backbone = load_backbone(Source(str(path), "classification"))
    assert backbone.prove("stem.2") <= EXACT
    assert backbone.traced.frame_by_frame == (frames == 1)
    write_weights(backbone, tmp_path / "bundle")
    path.unlink()
    bundle = replace(small_bundle, backbone=backbone.spec, preprocessing=backbone.preprocessing)
    again = backbone_of(replace(bundle, folder=tmp_path / "bundle"))
    assert (again.spec, again.spec.name) == (backbone.spec, "net.pt2")
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = module(Pixels(again.preprocessing)(pixels)).softmax(1)
    assert torch.allclose(again.uncut(pixels)[0], expected, atol=1e-5)
    assert torch.allclose(again.tail("stem.2")(*again.head("stem.2")(pixels))[0], expected, atol=1e-5)


def test_a_detector_s_edge_half_has_no_uncut_model(noise_pictures, tmp_path):
    backbone = load_backbone(Source("own_models:Boxes", "detection", size=32))
    paths = sorted(noise_pictures.iterdir())
    bundle = fit(backbone, ["body.1"], paths[:12], paths[12:14])
    assert 0 < bundle.split("body.1").edge_share < 1.5
    bundle.save(tmp_path)
    write_weights(backbone, tmp_path)
    export_edge_half(Bundle.load(tmp_path), tmp_path / "half")
    assert load_edge_half(tmp_path / "half").fingerprint == bundle.fingerprint
    assert not has_local(bundle)
    assert not (tmp_path / "half" / UNCUT).exists()
    assert (tmp_path / "half" / head_file("body.1")).is_file()


def test_a_program_s_pickles_are_not_run(tmp_path):
    """PyTorch's own loader would run this one, which is why it is kept from it."""
    torch.export.save(
        torch.export.export(own_models.Residual().eval(), (torch.zeros(1, 3, 32, 32),)), tmp_path / "a.pt2"
    )
    mark = tmp_path / "was run"
    with zipfile.ZipFile(tmp_path / "a.pt2") as good, zipfile.ZipFile(tmp_path / "b.pt2", "w") as bad:
        for name in good.namelist():
            sample = "sample_inputs" in name
            bad.writestr(name, pickle.dumps(Trap(mark)) if sample else good.read(name))
    with pytest.raises(BackboneError, match="cannot be read"):
        load_backbone(Source(str(tmp_path / "b.pt2"), "classification"))
    assert not mark.exists()
    with pytest.raises(BackboneError, match="digest"):
        load_backbone(Source(str(tmp_path / "a.pt2"), "classification", sha256="00" * 32))


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_random_weights_are_the_same_again_and_others_with_another_seed():
    first, again, other = (load_backbone(Source("test_resnet", seed=s)) for s in (1, 1, 2))
    assert first.spec == again.spec
    assert first.spec.sha256 != other.spec.sha256
    assert first.spec.weights == "random:1"


def test_weights_from_a_file(tmp_path):
    donor = load_backbone(Source("test_resnet", seed=1))
    path = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous().clone() for k, v in donor.state.state_dict().items()}, path)
    assert load_backbone(Source("test_resnet", weights=path)).spec.sha256 == donor.spec.sha256
    with pytest.raises(BackboneError, match="does not hold the weights of this model"):
        load_backbone(Source("test_vit", weights=path))
    path.write_bytes(b"nothing")
    with pytest.raises(BackboneError, match="cannot be read as safetensors"):
        load_backbone(Source("test_resnet", weights=path))


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (Source("resnt50"), "close to it: resnet50"),
        (Source("timm/resnt50"), "close to it: resnet50"),
        (Source("own_models:nothing", "classification"), "cannot be imported"),
        (Source("own_models:no_module", "classification"), "gives int, not a torch.nn.Module"),
        (Source("own_models:Residual"), "say what the outputs .* mean with --task"),
        (Source("test_resnet", "detection", seed=1), "is for classification, not for detection"),
        (Source("maskrcnn_resnet50_fpn", seed=1), "answers with more than boxes"),
        (Source("nowhere.pt2", "classification"), "cannot be read as a file of torch.export"),
        (Source("yolov2_tiny", size=100, seed=1), "multiples of 32"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_reason(source, why):
    with pytest.raises(BackboneError, match=why):
        load_backbone(source)


def test_a_cut_of_several_maps_is_fitted_and_sent_as_one(tmp_path):
    backbone = load_backbone(Source("own_models:Pyramid", "segmentation", size=32, seed=0))
    several = next(c for c in backbone.cuts if len(c.maps) > 1)
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((32, 32)).save(tmp_path / f"{i}.png")
    paths = sorted(tmp_path.iterdir())
    bundle = fit(backbone, [several.name], paths, paths[:2])
    (spec,) = bundle.splits
    assert spec.features == backbone.packing(several.name).packed
    points = [p for p in bundle.operating_points if p.kind is Kind.FEATURE]
    assert all(p.bytes_median > 0 for p in points)
    # The real packets, decoded: what comes back is nearer to what was sent, the finer the rate level.
    (features,) = backbone.head(several.name)(
        torch.from_numpy(load_pixels(paths[0], bundle.preprocessing).copy())[None]
    )
    latent, codec = Encoder.of(bundle, several.name)(features)[0].numpy(), Codec(bundle)
    errors = []
    for point in (points[0], points[-1]):
        symbols = torch.from_numpy(codec.decompress(codec.compress(latent, point, 0)))[None]
        gain = torch.from_numpy(bundle.gain(several.name, point.rate_level))[None]
        restored = Decoder.of(bundle, several.name)(symbols, gain)
        errors.append(float((restored - features).square().mean() / features.var()))
    assert errors[0] < 0.5 * errors[1], errors


def test_the_list_shows_every_cut():
    done = CliRunner().invoke(app, ["split", "own_models:Residual", "--task", "classification", "--list"])
    assert done.exit_code == 0, done.exception
    assert "own_models:Residual: 4 cuts" in done.stdout
    assert "stem.2" in done.stdout and "16x112x112" in done.stdout


def test_a_state_s_digest_is_over_names_shapes_and_values():
    module = own_models.Residual()
    before = state_digest(module)
    assert before == state_digest(module)
    with torch.no_grad():
        module.scores.bias[0] += 1e-3
    assert state_digest(module) != before


def test_darknet_values_go_to_their_layers_in_order():
    net = yolov2_tiny()
    count = sum(p.numel() for p in net.parameters()) + sum(b.numel() for n, b in net.named_buffers() if "running" in n)
    assert count == 11_237_145
    values = torch.arange(count, dtype=torch.float32)
    fill(net, values)
    first = net[0]
    assert first[1].bias[0] == 0 and first[1].weight[0] == 16 and first[1].running_mean[0] == 32
    assert first[1].running_var[0] == 48 and first[0].weight.flatten()[0] == 64
    assert net.regions.weight.flatten()[-1] == values[-1]
    with pytest.raises(BackboneError, match="too few"):
        fill(net, values[:-1])
    with pytest.raises(BackboneError, match="the network holds"):
        fill(net, torch.cat((values, values[:1])))


def test_regions_are_boxes_where_darknet_puts_them():
    """One cell that is sure of one class: its box is at the cell's middle, of the anchor's size."""
    regions = torch.full((1, 425, 13, 13), -20.0)
    at = regions.view(1, 5, 5 + CLASSES, 13, 13)
    at[0, 2, :5, 4, 7] = torch.tensor([0.0, 0.0, 0.0, 0.0, 20.0])
    at[0, 2, 5 + 11, 4, 7] = 20.0
    scores, corners = Regions()(regions)
    assert scores.shape == (1, 845, 80) and corners.shape == (1, 845, 4)
    best = int(scores[0].amax(1).argmax())
    assert scores[0, best].argmax() == 11 and scores[0, best, 11] > 0.99
    half = torch.tensor((3.33843, 5.47434)) * 32 / 2
    middle = torch.tensor((7.5, 4.5)) * 32
    assert torch.allclose(corners[0, best], torch.cat((middle - half, middle + half)), atol=1e-3)

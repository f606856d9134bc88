"""A detector cut on fewer pixels that answers on the grid of all: YOLOv2-tiny of random weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from headrace.models.bottleneck import Decoder, Encoder
from headrace.models.bundle import Bundle
from headrace.models.exceptions import DataError
from headrace.models.measure import find_pictures, load_pixels
from headrace.models.quantiser import quantise
from headrace.models.repair.distil import RepairPlan, repair
from headrace.models.repair.resample import Resample, enlarged, own_cut
from headrace.models.repair.resample_fit import fit_resample
from headrace.models.repair.tail import repaired, tail_of
from headrace.models.split import fit
from headrace.models.zoo.catalogue import load_backbone
from headrace.models.zoo.sources import Source
from headrace.server.engine import FeatureInput, TailKey
from headrace.server.tail import load_tails

SOURCE = Source("yolov2_tiny", seed=1, size=96)
AT = "pool3-64px"
PLAN = RepairPlan((AT,), steps=3, crops=16, batch=4, rank=2, hidden=8, photographs=100, held_out=2, resample=True)


@pytest.fixture(scope="module")
def bundle(noise_pictures) -> Bundle:
    backbone, paths = load_backbone(SOURCE), find_pictures(noise_pictures)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.models.split.timed", lambda backbone, bundle, *_: bundle)
        return fit(backbone, (AT,), paths[:20], paths[20:22])


def test_the_least_squares_fit_is_nearer_than_bicubic(noise_pictures):
    """On a photograph that it was not fitted to."""
    backbone, paths = load_backbone(SOURCE), find_pictures(noise_pictures)
    found = fit_resample(backbone, AT, paths[:40], 0, torch.device("cpu"))
    assert own_cut(AT) == "pool3" and own_cut("pool3") == "pool3"
    assert found.size == backbone.shape("pool3")[1:] == (12, 12)
    features = []
    for name in (AT, "pool3"):
        pixels = np.stack([load_pixels(p, backbone.at(name)[0].preprocessing) for p in paths[40:44]])
        with torch.inference_mode():
            features.append(backbone.head(name)(torch.from_numpy(pixels))[0])
    less, more = features
    errors = [float((x - more).square().mean()) for x in (found(less), enlarged(less, found.size))]
    assert errors[0] < 0.7 * errors[1], errors
    again = Resample.of({k: v.half().float() for k, v in found.tensors().items()})
    assert again.size == found.size and torch.allclose(again(less), found(less), atol=2e-2)


def test_the_repaired_half_answers_on_the_whole_grid(bundle, noise_pictures, tmp_path):
    backbone, better = repair(bundle, noise_pictures, PLAN, tmp_path / "work")
    assert better.fingerprint == bundle.fingerprint
    pixels = np.stack([load_pixels(find_pictures(noise_pictures)[30], bundle.preprocessing_at(AT))])
    gain = torch.from_numpy(bundle.gain(AT, 0).copy())[None]
    with torch.inference_mode():
        latent = Encoder.of(bundle, AT)(*backbone.head(AT)(torch.from_numpy(pixels))).numpy()
        symbols = torch.from_numpy(quantise(latent[0], bundle.gain(AT, 0)))[None]
        answers = []
        for each in (bundle, better):
            decoder, tail = repaired(each, AT, Decoder.of(each, AT), tail_of(each, AT, backbone))
            answers.append(tail(decoder(symbols, gain)))
    assert [a[0].shape[1] for a in answers] == [5 * 2 * 2, 5 * 3 * 3]
    better.save(tmp_path / "bundle")
    tails = load_tails([Bundle.load(tmp_path / "bundle")], "cpu", 0)
    (output,) = tails[TailKey(better.fingerprint, AT)]([FeatureInput(symbols[0].numpy(), gain[0].numpy())])
    assert output


def test_without_a_denoiser_there_is_nothing_to_resample_in(bundle, noise_pictures, tmp_path):
    with pytest.raises(DataError, match="before the denoiser"):
        repair(bundle, noise_pictures, replace(PLAN, hidden=0), tmp_path)

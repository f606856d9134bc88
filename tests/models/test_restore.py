"""A light head and the server's restorer learn together; a repair goes on from there."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from headrace.models.bottleneck import Decoder, Encoder
from headrace.models.bundle import Bundle
from headrace.models.codec import Codec
from headrace.models.exceptions import BundleError, DataError
from headrace.models.extend import extend
from headrace.models.learning import command as learning_command
from headrace.models.learning.course import Lightening, Views, lessons_of
from headrace.models.learning.lighten import lighten
from headrace.models.learning.restore import RestoreCourse
from headrace.models.learning.team import ALONE
from headrace.models.measure import find_pictures
from headrace.models.recode import latents_of, recoded
from headrace.models.repair.distil import RepairPlan, _identity, repair
from headrace.models.repair.restorer import Restorer
from headrace.models.repair.tail import repaired, restores
from headrace.models.split import fit
from headrace.models.zoo.catalogue import backbone_of, load_backbone
from headrace.models.zoo.sources import Source

BACKBONE = Source("timm/mobilenetv2_035", seed=1, size=64)
SPLIT, OTHER = "blocks.1", "blocks.2"
HOW = Lightening(steps=150, batch=8, rate=3e-3, average=0.9, hidden=(4, 8, 8), restore=True)
PLAN = RepairPlan(at=(SPLIT,), steps=4, crops=32, batch=8, rank=2, photographs=100, held_out=4)


@pytest.fixture(scope="module")
def photographs(noise_pictures) -> list[Path]:
    return find_pictures(noise_pictures)


@pytest.fixture(scope="module")
def bundle(photographs) -> Bundle:
    """With something of a repair at two split points."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.models.split.timed", lambda backbone, bundle, *_: bundle)
        made = fit(load_backbone(BACKBONE), (SPLIT, OTHER), photographs[:60], photographs[60:68])
    name = "parts/front/blocks/5/0/conv_pw/weight"
    stale = {f"{split}/tail/{name}": np.zeros(1, np.float16) for split in (SPLIT, OTHER)}
    said = {"repair": "; ".join(f"{split} by 800 steps" for split in (SPLIT, OTHER))}
    return replace(made, repair=stale, provenance={**made.provenance, **said})


@pytest.fixture(scope="module")
def restored(bundle, photographs, tmp_path_factory) -> Bundle:
    return lighten(backbone_of(bundle), bundle, [SPLIT], photographs, HOW, tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def light(bundle, photographs, tmp_path_factory) -> Bundle:
    """The same head learned as long without a restorer."""
    how = replace(HOW, restore=False)
    made = lighten(backbone_of(bundle), bundle, [SPLIT], photographs, how, tmp_path_factory.mktemp("work"))
    return replace(made, repair={})


def _error_and_bytes(bundle: Bundle, made: Bundle, photographs) -> tuple[float, float]:
    """At the finest level, through packets: how far the server's features are from the whole head's, in the latent's
    metric and as a share of its variance; mean bytes. On views that were not learned from."""
    backbone, codec, encoder = backbone_of(made), Codec(made), Encoder.of(bundle, SPLIT)
    pixels = torch.cat(Views(backbone.at(SPLIT)[0], photographs, replace(HOW, seed=9)).apart())
    point = made.feature_point(SPLIT, 0)
    decoder, _ = repaired(made, SPLIT, Decoder.of(made, SPLIT), backbone.tail(SPLIT))
    with torch.inference_mode():
        wanted = encoder(load_backbone(BACKBONE).head(SPLIT)(pixels)[0])
        latents = Encoder.of(made, SPLIT)(backbone.head(SPLIT)(pixels)[0]).numpy()
        packets = [codec.compress(latent, point, 0) for latent in latents]
        symbols = torch.from_numpy(np.stack([codec.decompress(packet) for packet in packets]))
        gain = torch.from_numpy(made.gain(SPLIT, 0)).expand(len(symbols), -1)
        error = (encoder(decoder(symbols, gain)) - wanted).square().sum((1, 2, 3)).mean()
        varied = (wanted - wanted.mean(0)).square().sum((1, 2, 3)).mean()
    return float(error / varied), float(np.mean([len(packet.to_bytes()) for packet in packets]))


def test_the_server_tells_what_a_light_head_cannot_compute(bundle, light, restored, photographs):
    alone, alone_bytes = _error_and_bytes(bundle, light, photographs)
    together, together_bytes = _error_and_bytes(bundle, restored, photographs)
    assert together < 0.8 * alone
    assert together_bytes < 1.1 * alone_bytes


def test_only_what_was_learned_behind_another_head_goes(bundle, restored):
    assert restored.fingerprint != bundle.fingerprint
    assert restores(restored, SPLIT) and not restores(restored, OTHER)
    kept = [name for name in restored.repair if "/restore/" not in name]
    assert [name.split("/")[0] for name in kept] == [OTHER]
    kernels = [a for name, a in restored.repair.items() if "/inner/" in name and name.endswith("/weight")]
    assert len(kernels) == 4 and {a.dtype for a in kernels} == {np.dtype(np.int8)}
    assert restored.provenance["lighten"].endswith("with a restorer")
    assert restored.provenance["repair"] == f"{OTHER} by 800 steps"


def test_bytes_have_a_price(bundle, photographs, tmp_path):
    """The finer the level, the less a bit is worth; what is never sent is free."""
    (lesson,) = lessons_of(bundle, [SPLIT])
    course = RestoreCourse(backbone_of(bundle), bundle, lesson, photographs, HOW, tmp_path, ALONE)
    prices, sent = course._prices, course._sent
    assert torch.isfinite(prices).all() and (prices[sent == 0] == 0).all() and (prices[sent == 1] >= 0).all()
    always = (sent == 1).all(0)
    assert prices[0][always].mean() < prices[4][always].mean()
    networks = course.networks((), HOW.hidden)
    loss = sum(float(part.detach()) for part in course.step(networks, 0))
    assert loss == sum(float(part.detach()) for part in course.step(networks, 0))  # of the step alone
    course._prices = torch.zeros_like(prices)
    assert sum(float(part.detach()) for part in course.step(networks, 0)) < loss


def test_levels_take_the_bytes_that_they_took(bundle, photographs):
    """Of latents that say the same in smaller numbers: finer steps; and the tables are theirs."""
    before = latents_of(load_backbone(BACKBONE), bundle, SPLIT, photographs[:60])
    now = (0.7 * before).astype(np.float32)
    made = recoded(bundle, SPLIT, before, now)
    assert made.operating_points == bundle.operating_points and made.fingerprint != bundle.fingerprint
    for level in (0, 5, 9):
        np.testing.assert_allclose(made.gain(SPLIT, level), bundle.gain(SPLIT, level) / 0.7, rtol=1e-3)
        old, new = (_mean_bytes(b, each, level) for b, each in ((bundle, before), (made, now)))
        assert new == pytest.approx(old, rel=0.02)
    # Latents that are as they were, but for one channel that is loud now: the order and tables are others.
    loud = before * np.where(np.arange(before.shape[1]) == before.shape[1] - 1, 6.0, 1.0)[:, None, None]
    other = recoded(bundle, SPLIT, before, loud.astype(np.float32))
    assert other.gain(SPLIT, 0)[0] < bundle.gain(SPLIT, 0)[0]
    assert _mean_bytes(other, loud, 0) == pytest.approx(_mean_bytes(bundle, before, 0), rel=0.1)


def test_the_command_fits_steps_and_tables_to_what_was_learned(bundle, noise_pictures, tmp_path, monkeypatch):
    """And measures the operating points with the restorer."""
    (tmp_path / "bundle").mkdir()
    replace(bundle, repair={}).save(tmp_path / "bundle")
    monkeypatch.setattr(learning_command, "timed", lambda backbone, bundle, *_: bundle)
    learning_command.lighten_bundle(
        tmp_path / "bundle", [SPLIT], replace(HOW, steps=20), [noise_pictures], tmp_path / "out", tmp_path / "work",
        fitted=100, held_out=6, views=1,
    )  # fmt: skip
    made = Bundle.load(tmp_path / "out")
    assert restores(made, SPLIT) and not np.array_equal(made.gain(SPLIT, 0), bundle.gain(SPLIT, 0))
    assert np.array_equal(made.gain(OTHER, 0), bundle.gain(OTHER, 0))
    for level in range(made.split(SPLIT).rate_levels):
        old, new = (b.feature_point(SPLIT, level).bytes_median for b in (bundle, made))
        assert new == pytest.approx(old, rel=0.15)
    weights = sorted(name for name in made.learned if name.startswith(f"{SPLIT}/head/"))
    assert weights and made.split(SPLIT).clips is not None


def _mean_bytes(bundle: Bundle, latents, level: int) -> float:
    codec, point = Codec(bundle), bundle.feature_point(SPLIT, level)
    packets = [codec.compress(latent, point, 0) for latent in latents.astype(np.float32)]
    gain = bundle.gain(SPLIT, level)
    sent = np.isin(np.arange(latents[0].size), bundle.tensors[f"{SPLIT}/order"]).reshape(latents[0].shape)
    decoded = codec.decompress(packets[0])
    coded = decoded != 0
    assert np.array_equal(decoded[coded], np.rint(latents[0] * gain[:, None, None]).astype(int)[coded])
    assert not (coded & ~sent).any()
    return float(np.mean([len(packet.to_bytes()) for packet in packets]))


def test_a_restorer_begins_as_the_identity_and_is_read_as_it_was_written():
    made = Restorer(torch.randn(6), torch.rand(6) + 0.5, 2.0, hidden=8, blocks=3)
    features, gain = torch.randn(2, 6, 5, 7), torch.rand(2, 4) + 0.1
    with torch.inference_mode():
        torch.testing.assert_close(made(features, gain), features)
        for value in made.parameters():
            value.copy_(torch.randn_like(value) / 4)
        again = Restorer.of(made.tensors(), 2.0)
        assert len(again.inner) == 6
        torch.testing.assert_close(again(features, gain), made(features, gain))
        assert not torch.allclose(again(features, 2 * gain), made(features, gain))


def test_a_restorer_that_lacks_a_tensor_is_named(restored):
    wrong = replace(restored, repair={k: v for k, v in restored.repair.items() if not k.endswith("/leave/weight")})
    with pytest.raises(BundleError, match=rf"the repair of {SPLIT} .* does not fit its backbone: .*leave.*weight"):
        repaired(wrong, SPLIT, Decoder.of(wrong, SPLIT), backbone_of(wrong).tail(SPLIT))


def test_a_restorer_goes_on_learning(restored, photographs, tmp_path):
    """From what the bundle has, without a step taken it is the same."""
    (lesson,) = lessons_of(restored, [SPLIT])
    course = RestoreCourse(backbone_of(restored), restored, lesson, photographs, HOW, tmp_path, ALONE)
    networks = course.networks(restored.split(SPLIT).clips)
    for name, value in networks.repair().items():
        np.testing.assert_allclose(value, restored.repair[name], rtol=0, atol=1, err_msg=name)  # eight bits: one step


def test_a_repair_begins_with_the_restorer(restored, noise_pictures, tmp_path):
    _, made = repair(restored, noise_pictures, PLAN, tmp_path)
    assert made.fingerprint == restored.fingerprint and restores(made, SPLIT)
    names = {name.split("/")[1] for name in made.repair if name.startswith(f"{SPLIT}/")}
    assert names == {"restore", "tail"}
    before, after = (each.repair[f"{SPLIT}/restore/enter/bias"].astype(np.float32) for each in (restored, made))
    assert 0 < np.abs(after - before).max() < 0.05  # four steps from where it was, and not from the start


def test_a_repair_that_was_killed_is_found_again_by_what_it_began_with(restored, photographs):
    turned = replace(restored, repair=dict(reversed(restored.repair.items())))
    name = f"{SPLIT}/restore/enter/bias"
    other = replace(restored, repair={**restored.repair, name: restored.repair[name] + 1})
    found, same, another = (_identity(b, SPLIT, photographs, PLAN) for b in (restored, turned, other))
    assert found == same != another


def test_what_does_not_go_with_a_restorer_is_refused(bundle, restored, photographs, noise_pictures, tmp_path):
    with pytest.raises(DataError, match=rf"restorer of {SPLIT} is for its own grid; repair it without --resample"):
        repair(restored, noise_pictures, replace(PLAN, resample=True), tmp_path)
    single = replace(bundle.split(SPLIT), slices=bundle.split(SPLIT).slices[:1])
    (lesson,) = lessons_of(bundle, [SPLIT])
    with pytest.raises(DataError, match=f"{SPLIT} has one rate level"):
        RestoreCourse(backbone_of(bundle), bundle, replace(lesson, specs=(single,)), photographs, HOW, tmp_path, ALONE)


def test_a_head_goes_over_to_other_pixels_with_its_restorer(restored, photographs, monkeypatch):
    monkeypatch.setattr("headrace.models.extend.timed", lambda backbone, bundle, *_: bundle)
    other = f"{SPLIT}-56px"
    made = extend(backbone_of(restored), restored, [other], photographs[:60], photographs[60:64], instead_of=SPLIT)
    assert restores(made, other) and not restores(made, SPLIT)
    name = "restore/inner/0/weight"
    assert np.array_equal(made.repair[f"{other}/{name}"], restored.repair[f"{SPLIT}/{name}"])


def test_a_head_with_a_restorer_does_not_learn_without(restored, photographs, tmp_path):
    with pytest.raises(DataError, match=f"head of {SPLIT} learned with a restorer, .* add --restore"):
        lighten(backbone_of(restored), restored, [SPLIT], photographs, replace(HOW, restore=False), tmp_path)


def test_processes_share_a_repair(restored, noise_pictures, tmp_path):
    """Through the command, which writes one bundle; each has crops of its own."""
    restored.save(tmp_path / "bundle")
    options = ["--bundle", tmp_path / "bundle", "--at", SPLIT, "--calibration", noise_pictures, "--photographs", "100"]
    options += ["--held-out", "4", "--steps", "3", "--crops", "32", "--rank", "2", "--output", tmp_path / "made"]
    team = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*team, "-m", "headrace.cli", "repair", *map(str, options)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("fingerprint") == 1
    made = Bundle.load(tmp_path / "made")
    assert any(name.startswith(f"{SPLIT}/tail/") for name in made.repair) and restores(made, SPLIT)
    assert not (tmp_path / "made" / "repair-work").exists()

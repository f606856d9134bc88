"""Heads are made light: fewer clips, fewer hidden channels, weights that learn to do without."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from headrace.models.bottleneck import Encoder
from headrace.models.bundle import Bundle
from headrace.models.cutting.cuts import Head, find_cuts
from headrace.models.cutting.graph import trace
from headrace.models.cutting.own_head import OwnHead
from headrace.models.exceptions import BundleError, DataError
from headrace.models.export import export_edge_half
from headrace.models.extend import extend
from headrace.models.learning import command as learning_command
from headrace.models.learning import lighten as lightening
from headrace.models.learning import plan
from headrace.models.learning.command import train_bundle
from headrace.models.learning.course import Lightening, Views
from headrace.models.learning.lighten import lighten
from headrace.models.learning.narrow import narrow
from headrace.models.measure import find_pictures
from headrace.models.repair.data import make_crops
from headrace.models.split import fit
from headrace.models.zoo.catalogue import backbone_of, load_backbone
from headrace.models.zoo.sources import Source

BACKBONE = Source("timm/mobilenetv2_035", seed=1, size=64)
SPLIT, SMALL = "blocks.1", "blocks.1-48px"


def _loud(backbone, by: float = 2.5):
    """Its random weights larger, so that clips clip."""
    for module in backbone.parts.front.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.fill_(by)
    return backbone


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(BACKBONE)


@pytest.fixture(scope="module")
def photographs(noise_pictures) -> list[Path]:
    return find_pictures(noise_pictures)


@pytest.fixture(scope="module")
def bundle(backbone, photographs) -> Bundle:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.models.split.timed", lambda backbone, bundle, *_: bundle)
        return fit(backbone, (SPLIT, SMALL), photographs[:60], photographs[60:68])


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return 40 * torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def head(backbone) -> Head:
    return Head(backbone.traced, backbone.cut(SPLIT))


def test_a_copy_with_all_clips_is_the_head(head, pixels):
    own = OwnHead(head)
    assert own.clips == 6
    with torch.inference_mode():
        torch.testing.assert_close(own(pixels)[0], head(pixels)[0], rtol=0, atol=0)
        before = head(pixels)[0].clone()
        for weight in own.weights().values():
            weight.zero_()
        torch.testing.assert_close(head(pixels)[0], before, rtol=0, atol=0)  # the backbone's own weights are its own


def test_without_clips_only_what_was_clipped_differs(head, pixels):
    with torch.inference_mode():
        quiet = 1e-3 * pixels
        torch.testing.assert_close(OwnHead(head, ())(quiet)[0], head(quiet)[0])
        assert not torch.allclose(OwnHead(head, ())(pixels)[0], head(pixels)[0], rtol=0.01)
        kept = OwnHead(head, range(6))
        torch.testing.assert_close(kept(pixels)[0], head(pixels)[0], rtol=0, atol=0)


def test_hidden_channels_are_left_out_where_they_say_least(head, pixels):
    """With all of them nothing changes; with half of them less is lost than without half at random."""
    whole = OwnHead(head)
    assert [b.hidden for b in whole.bottlenecks()] == [16, 48, 48]
    light = OwnHead(head)
    narrow(light, whole, [16, 48, 48], pixels)
    with torch.inference_mode():
        wanted = whole(pixels)[0]
        assert (light(pixels)[0] - wanted).square().mean() < 1e-3 * wanted.var()
    narrow(light := OwnHead(head), whole, [16, 24, 24], pixels)
    shapes = [tuple(w.shape) for w in light.weights().values()]
    assert sum(w.numel() for w in light.weights().values()) < sum(w.numel() for w in whole.weights().values())
    assert (24, 1, 3, 3) in shapes
    with torch.inference_mode():
        wanted, found = whole(pixels)[0], light(pixels)[0]
        off = (found - wanted).square().mean() / wanted.var()
        assert off < 0.5
    again = OwnHead(head).take(light.weights())
    with torch.inference_mode():
        torch.testing.assert_close(again(pixels)[0], light(pixels)[0], rtol=0, atol=0)


def test_a_light_head_loses_further_channels(head, pixels):
    """Those that say least of what it has, and what it has learned of the others stays."""
    whole, light = OwnHead(head), OwnHead(head, ())
    narrow(light, whole, [8, 32, 32], pixels)
    light.take({name: 0.9 * weight for name, weight in light.weights().items()})
    before, kept = OwnHead(head, ()).take(light.weights()), light.weights()
    stay = narrow(light, whole, [8, 24, 32], pixels, before)
    assert [len(s) for s in stay] == [8, 24, 32]
    assert stay[1].max() < 32  # numbered among the channels that it has, not the backbone's
    first, _, second = (b.first for b in before.bottlenecks())
    torch.testing.assert_close(light.weights()[str(first)], kept[str(first)], rtol=0, atol=0)
    torch.testing.assert_close(light.weights()[str(second)], kept[str(second)], rtol=0, atol=0)
    middle = before.bottlenecks()[1].first
    torch.testing.assert_close(light.weights()[str(middle)], kept[str(middle)][stay[1]], rtol=0, atol=0)


def test_weights_that_no_normalisation_was_folded_into_are_found():
    """Parameters in modules, with dots in their names, and a convolution without a bias."""
    inner = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU6(), torch.nn.Conv2d(4, 4, 1, bias=False))
    front = torch.nn.Sequential(inner, torch.nn.ReLU6(), torch.nn.Conv2d(4, 2, 1), torch.nn.AvgPool2d(4))
    traced = trace(front, torch.randn(2, 3, 16, 16))
    head = Head(traced, find_cuts(traced)[-1])
    own, pixels = OwnHead(head), torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(own(pixels)[0], head(pixels)[0], rtol=0, atol=0)
    learned = own.learnable()
    assert len(learned) >= 3
    own(pixels)[0].sum().backward()
    assert all(p.grad is not None for p in learned.values())


@pytest.mark.parametrize("hidden", [(16, 48), (16, 64, 48), (16, 0, 48)])
def test_hidden_channels_that_do_not_fit_are_refused(head, pixels, hidden):
    with pytest.raises(DataError, match="do not fit a head that has 16,48,48"):
        narrow(OwnHead(head), OwnHead(head), hidden, pixels)


@pytest.fixture(scope="module")
def lightened(bundle, photographs, tmp_path_factory) -> Bundle:
    """Of fewer hidden channels."""
    how = Lightening(steps=5, batch=8, hidden=(8, 32, 32))
    return lighten(backbone_of(bundle), bundle, [SPLIT], photographs, how, tmp_path_factory.mktemp("work"))


def test_a_light_head_learns_the_latent(bundle, photographs, tmp_path, monkeypatch):
    """Where clips mattered, it learns to do without them."""
    errors: list[float] = []
    real = lightening.descend

    def descend(parameters, loss, rate, steps, checkpoint, identity, note, **rest):
        real(parameters, loss, rate, steps, checkpoint, identity, lambda _, error: errors.append(error), **rest)

    monkeypatch.setattr(lightening, "descend", descend)
    loud = _loud(load_backbone(BACKBONE), 1.4)
    made = lighten(loud, bundle, [SPLIT], photographs, Lightening(steps=120, batch=8, rate=2e-3), tmp_path)
    assert len(made.split(SPLIT).clips or ()) < 6
    assert np.mean(errors[-10:]) < 0.75 * np.mean(errors[:5]), errors


def test_only_that_head_changes(bundle, lightened, backbone):
    made = lightened
    assert made.split(SPLIT).clips is not None and made.split(SMALL).clips is None
    assert made.fingerprint != bundle.fingerprint
    assert made.operating_points == bundle.operating_points
    assert "hidden channels 8,32,32" in made.provenance["lighten"]
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    light = backbone_of(made)
    with torch.inference_mode():
        assert not torch.equal(light.head(SPLIT)(pixels)[0], backbone.head(SPLIT)(pixels)[0])
        small = pixels[:, :48, :48]
        torch.testing.assert_close(light.head(SMALL)(small)[0], backbone.head(SMALL)(small)[0], rtol=0, atol=0)
    assert light.rejoin_error(SPLIT) < 1e-5  # the backbone itself is as it was


def test_a_light_head_is_kept_and_exported(lightened, tmp_path):
    """It is read again as it was written, and the device's graph is the smaller one."""
    made = lightened
    made.save(tmp_path / "whole")
    again = Bundle.load(tmp_path / "whole")
    assert again.fingerprint == made.fingerprint and again.split(SPLIT).clips == made.split(SPLIT).clips
    export_edge_half(again, tmp_path / "edge")
    graph = onnx.load(tmp_path / "edge" / f"head-{SPLIT}.onnx").graph
    assert any(tuple(w.dims) == (32, 1, 3, 3) for w in graph.initializer)
    operations = [n.op_type for n in graph.node]
    assert operations.count("Relu") == 6 - len(made.split(SPLIT).clips)
    (tmp_path / "whole" / "learned.safetensors").unlink()
    with pytest.raises(BundleError, match=r"lacks what was learned for blocks\.1"):
        backbone_of(Bundle.load(tmp_path / "whole"))


def test_a_head_at_another_size_is_made_light(bundle, photographs, tmp_path):
    how = Lightening(steps=2, batch=4, hidden=(8, 32, 32))
    made = lighten(backbone_of(bundle), bundle, [SMALL], photographs, how, tmp_path)
    pixels = torch.zeros(1, 48, 48, 3, dtype=torch.uint8)
    with torch.inference_mode():
        (features,) = backbone_of(made).head(SMALL)(pixels)
    assert features.shape[1:] == made.split(SMALL).features


def test_clips_that_matter_stay(bundle, photographs, tmp_path):
    """Nothing is clipped by random weights of the usual size, so all may go; of a loud backbone some have to stay."""
    how = Lightening(steps=1, batch=4)
    assert lighten(backbone_of(bundle), bundle, [SPLIT], photographs, how, tmp_path / "quiet").split(SPLIT).clips == ()
    loud = _loud(load_backbone(BACKBONE))
    clips = lighten(loud, bundle, [SPLIT], photographs, how, tmp_path / "loud").split(SPLIT).clips
    assert clips and len(clips) < 6


def test_a_split_point_that_is_fitted_anew_has_the_backbones_head(lightened, photographs, monkeypatch):
    monkeypatch.setattr("headrace.models.extend.timed", lambda backbone, bundle, *_: bundle)
    again = extend(backbone_of(lightened), lightened, [SPLIT], photographs[:60], photographs[60:68])
    assert again.split(SPLIT).clips is None and not again.learned and not backbone_of(again).own_heads


def test_a_light_head_goes_over_to_other_pixels(lightened, photographs, monkeypatch):
    """Its weights are convolutions; what is fitted to the places is fitted anew."""
    monkeypatch.setattr("headrace.models.extend.timed", lambda backbone, bundle, *_: bundle)
    backbone, other = backbone_of(lightened), "blocks.1-56px"
    made = extend(backbone, lightened, [other], photographs[:60], photographs[60:68], instead_of=SPLIT)
    assert [s.name for s in made.splits] == [SMALL, other]
    assert made.split(other).clips == lightened.split(SPLIT).clips and made.split(other).features[1:] == (14, 14)
    assert set(made.learned) == {name.replace(SPLIT, other) for name in lightened.learned}
    assert not any(key.startswith(f"{SPLIT}/") for key in made.tensors) and set(backbone.own_heads) == {other}
    pixels = torch.randint(0, 256, (2, 56, 56, 3), dtype=torch.uint8)
    weights = backbone_of(lightened).own_heads[SPLIT].weights
    with torch.inference_mode():
        (features,) = backbone_of(made).head(other)(pixels)
    assert features.shape[1:] == made.split(other).features
    assert all(torch.equal(backbone.own_heads[other].weights[key], value) for key, value in weights.items())


def test_a_cut_can_be_there_twice_with_two_heads(lightened, photographs, tmp_path, monkeypatch):
    """By its own name, and with the size that it has anyway."""
    monkeypatch.setattr("headrace.models.extend.timed", lambda backbone, bundle, *_: bundle)
    backbone, other = backbone_of(lightened), "blocks.1-64px"
    made = extend(backbone, lightened, [other], photographs[:60], photographs[60:68], instead_of=SMALL)
    assert [s.name for s in made.splits] == [SPLIT, other] and made.split(other).size == 0
    assert made.split(other).clips is None and set(backbone.own_heads) == {SPLIT}
    how = Lightening(steps=1, batch=4, hidden=(8, 16, 16))
    both = lighten(backbone, made, [other], photographs, how, tmp_path)
    assert set(backbone.own_heads) == {SPLIT, other}
    for name, channels in ((SPLIT, 32), (other, 16)):
        weights = [w for key, w in both.learned.items() if key.startswith(f"{name}/head/")]
        assert max(len(w) for w in weights) == channels
        points = {p.id for p in both.operating_points if p.split == name}
        assert len(points) == both.split(name).rate_levels


def test_a_repair_behind_a_light_head_learns_the_uncut_models_answers(lightened, photographs, tmp_path):
    """And not what the tail makes of what the light head gives."""
    backbone = backbone_of(lightened)
    crops = make_crops(backbone, SPLIT, photographs[:8], 16, 0, tmp_path / "light", torch.device("cpu"))
    whole = make_crops(load_backbone(BACKBONE), SPLIT, photographs[:8], 16, 0, tmp_path / "whole", torch.device("cpu"))
    every = np.arange(16)
    torch.testing.assert_close(crops.batch(every)[1][0], whole.batch(every)[1][0], rtol=1e-2, atol=1e-4)
    assert not torch.allclose(crops.batch(every)[0], whole.batch(every)[0], rtol=0.05, atol=0.05)


def test_only_the_same_cut_stands_in_for_another_one(lightened, photographs):
    for names in (["blocks.2-56px"], ["blocks.1-56px", "blocks.2"]):
        with pytest.raises(DataError, match=r"cannot stand in for blocks\.1: name one split point .* blocks\.1-208px"):
            extend(backbone_of(lightened), lightened, names, photographs[:60], [], instead_of=SPLIT)


def test_a_light_head_learns_on_towards_the_whole_one(bundle, lightened, photographs, tmp_path):
    """From what it has learned, with its clips and channels, and not towards what it gives itself."""
    pixels = torch.cat(Views(backbone_of(bundle).at(SPLIT)[0], photographs, Lightening(1)).apart())
    how = Lightening(steps=100, batch=6, rate=3e-3, average=0.9, seed=5)
    further = lighten(backbone_of(lightened), lightened, [SPLIT], photographs, how, tmp_path)
    assert further.split(SPLIT).clips == lightened.split(SPLIT).clips
    name = f"{SPLIT}/head/0"
    assert further.learned[name].shape == lightened.learned[name].shape
    assert further.provenance["lighten"].count("steps") == 2
    encoder = Encoder.of(bundle, SPLIT)
    with torch.inference_mode():
        whole, *found = (encoder(backbone_of(b).head(SPLIT)(pixels)[0]) for b in (bundle, lightened, further))
        before, after = ((latents - whole).square().mean() for latents in found)
    assert after < 0.9 * before


def test_only_what_learned_is_measured_anew(lightened, noise_pictures, tmp_path, monkeypatch, capsys):
    """Also where a head was light already, whose clips stay."""
    lightened.save(tmp_path / "light")
    monkeypatch.setattr(learning_command, "timed", lambda backbone, bundle, *_: bundle)
    how, work = Lightening(steps=1, batch=4), tmp_path / "work"
    learning_command.lighten_bundle(
        tmp_path / "light", [SPLIT], how, [noise_pictures], tmp_path / "out", work, fitted=100, held_out=8, views=1
    )
    made = Bundle.load(tmp_path / "out")
    before = {p.id: p for p in lightened.operating_points}
    changed = {p.split for p in made.operating_points if p != before[p.id]}
    assert changed == {SPLIT}
    assert f"{SPLIT} lighter, fingerprint" in capsys.readouterr().out


def test_what_cannot_be_made_light_is_said(bundle, lightened, photographs, tmp_path):
    how = Lightening(steps=1, batch=4)
    with pytest.raises(DataError, match=r"has no split point 'blocks\.9'; it has blocks\.1, blocks\.1-48px"):
        lighten(backbone_of(bundle), bundle, ["blocks.9"], photographs, how, tmp_path)
    wider = Lightening(steps=1, batch=4, hidden=(8, 32, 48))
    with pytest.raises(DataError, match="hidden channels 8,32,48 do not fit a head that has 8,32,32"):
        lighten(backbone_of(lightened), lightened, [SPLIT], photographs, wider, tmp_path)
    light = Bundle.load(Path(plan.__file__).parents[1] / "bundles" / "efficientnet_lite0")
    with pytest.raises(DataError, match="slim-100 of bundle efficientnet_lite0 is light already; begin with"):
        lighten(backbone_of(bundle), light, ["slim-100"], photographs, how, tmp_path)
    with pytest.raises(DataError, match="no photographs"):
        lighten(backbone_of(bundle), bundle, [SPLIT], [], how, tmp_path)


def test_a_head_without_such_activations_is_said(photographs, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.models.split.timed", lambda backbone, bundle, *_: bundle)
        plain = fit(
            load_backbone(Source("timm/test_resnet", seed=3, size=64)),
            ("layer2",),
            photographs[:60],
            photographs[60:64],
        )
    with pytest.raises(DataError, match="layer2: there is no ReLU6"):
        lighten(backbone_of(plain), plain, ["layer2"], photographs, Lightening(steps=1, batch=4), tmp_path)


def test_bundles_of_before_say_nothing_of_clips(bundle):
    from headrace.models.bundle_specs import split_fields, split_spec

    fields = split_fields(bundle.split(SPLIT))
    assert "clips" not in fields
    assert split_spec(json.loads(json.dumps(fields))).clips is None
    clipped = split_fields(replace(bundle.split(SPLIT), clips=()))
    assert split_spec(json.loads(json.dumps(clipped))).clips == ()


def test_a_light_encoder_is_not_learned_further(noise_pictures, tmp_path):
    """Its weights would be taken for those of an encoder with all clips."""
    plans = Path(plan.__file__).parents[1] / "plans"
    text = (plans / "efficientnet_lite0-slim.toml").read_text()
    folder = json.dumps(str(plans.parent / "bundles" / "efficientnet_lite0"))
    file = tmp_path / "further.toml"
    file.write_text(text.replace('bundle = "../bundles/efficientnet_lite0"', f'bundle = {folder}\nbegin = "bundle"'))
    with pytest.raises(DataError, match="'slim' of bundle efficientnet_lite0 is light already"):
        train_bundle(file, [noise_pictures], tmp_path / "out", tmp_path / "work", 100, 8, 1, "cpu")

"""Learn a narrow exit behind a deep cut of a small random backbone, and run it as a device would."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from headrace.edge.head import Head
from headrace.edge.local import Exits
from headrace.models.bundle import EXITS, Bundle
from headrace.models.edge_half import load_edge_half
from headrace.models.exceptions import BackboneError, BundleError, DataError
from headrace.models.exits import command as exit_command
from headrace.models.exits import learn as exit_learn
from headrace.models.exits.classifier import classifier
from headrace.models.exits.command import ExitPlan, make_exits
from headrace.models.exits.costs import ExitCost, exit_costs
from headrace.models.exits.graph import write_exit
from headrace.models.exits.layers import in_four_bits
from headrace.models.exits.learn import NarrowPlan
from headrace.models.exits.narrow import Answering, begun, narrow_rest
from headrace.models.export import export_edge_half
from headrace.models.extend import without
from headrace.models.measure import find_pictures
from headrace.models.onnx_session import open_session
from headrace.models.split import fit
from headrace.models.zoo.catalogue import backbone_of, load_backbone
from headrace.models.zoo.sources import Source
from rich.progress import Progress

BACKBONE = Source("timm/mobilenetv2_035", seed=3, size=96)
AT, TOO_EARLY, HIDDEN = "blocks.5", "blocks.4", 80
PLAN = ExitPlan((AT,), photographs=100, held_out=10, narrow=NarrowPlan(HIDDEN, steps=3, batch=4, crops=32))


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(BACKBONE)


@pytest.fixture(scope="module")
def bundle(backbone, noise_pictures) -> Bundle:
    paths = find_pictures(noise_pictures)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.models.split.timed", lambda backbone, bundle, *_: bundle)
        return fit(backbone, (TOO_EARLY, AT), paths[:60], paths[60:68])


@pytest.fixture(scope="module")
def made(bundle, noise_pictures, tmp_path_factory) -> Bundle:
    """A bundle with a narrow exit; timing exports graphs for as long as all else takes."""
    work, others = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("others")
    for path in find_pictures(noise_pictures)[:8]:
        shutil.copy(path, others)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exit_command, "exit_costs", lambda _, specs: {s.split: ExitCost(1e-3, 0.1, 0.2) for s in specs})
        _, made, _ = make_exits(bundle, noise_pictures, replace(PLAN, more=(others,)), work)
    assert any(work.iterdir()), "what was learned from stays until the bundle is saved"
    return made


def test_with_all_hidden_channels_and_every_place_it_is_the_rest_of_the_backbone(backbone):
    features = torch.randn(4, *backbone.shape(AT), generator=torch.Generator().manual_seed(0)).abs()
    rest, kept = begun(backbone, AT, 336, features)
    assert kept.tolist() == list(range(336))
    rest.windows = 0
    (wanted,) = backbone.between(AT, "global_pool")(features)
    torch.testing.assert_close(rest(features)[0], wanted.flatten(1), rtol=2e-2, atol=2e-3 * float(wanted.max()))


@pytest.fixture(scope="module")
def edge_half(made, tmp_path_factory) -> Path:
    """Without the uncut model, whose export takes as long as all else."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.models.export.has_local", lambda _: False)
        patch.setattr("headrace.models.edge_half.has_local", lambda _: False)
        export_edge_half(made, folder)
    return folder


@pytest.fixture
def half(edge_half, monkeypatch) -> Bundle:
    monkeypatch.setattr("headrace.models.edge_half.has_local", lambda _: False)
    return load_edge_half(edge_half)


def test_a_device_computes_what_was_learned(made, half, edge_half):
    assert half.exit_specs == made.exit_specs and not half.narrow_exits and not (edge_half / EXITS).exists()
    pixels = np.random.default_rng(1).integers(0, 256, (1, 96, 96, 3), dtype=np.uint8)
    (features,) = open_session(edge_half / f"head-{AT}.onnx").run(["features"], {"pixels": pixels})
    (scores,) = open_session(edge_half / f"exit-{AT}.onnx").run(None, {"features": features})
    backbone = backbone_of(made)
    rest = narrow_rest(backbone, AT, backbone.narrow_exits[AT])
    assert rest.expand_weight.shape[0] == HIDDEN
    weight, offset = (part / made.exit(AT).temperature for part in classifier(backbone))
    steps, scales = in_four_bits(weight)
    rounded = ((steps - 8.0) * scales[..., None]).reshape(len(weight), -1)[:, : weight.shape[1]]
    assert 0.01 < np.abs(rounded - weight).mean() / np.abs(weight).mean() < 0.12
    layers = map(torch.from_numpy, (rounded.astype(np.float32), offset))
    (wanted,) = Answering(rest, *layers)(torch.from_numpy(features))
    np.testing.assert_allclose(scores, wanted, rtol=0.1, atol=1e-4)  # all else is in eight bits


def test_a_head_gives_the_exits_scores_when_it_is_asked(half, edge_half):
    head, exits = Head(half, edge_half), Exits(half, edge_half)
    pixels = np.random.default_rng(2).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    plain, asked = head.reach(AT, pixels), head.reach(AT, pixels, ask=True)
    assert plain.scores is None and asked.scores is not None
    np.testing.assert_array_equal(plain.latent, asked.latent)
    np.testing.assert_array_equal(plain.features, asked.features)
    # By the exit's own graph, which older edges run.
    (labels, confidence), (others, other) = exits(AT, asked), exits(AT, plain)
    assert [label.index for label in labels] == [label.index for label in others]
    assert confidence == pytest.approx(other, abs=1e-5)
    assert head.reach(TOO_EARLY, pixels, ask=True).scores is None
    nothing = open_session(edge_half / f"head-{AT}.onnx").run(["scores"], {"pixels": pixels[None]})[0]
    assert nothing.shape == (1, 0)


def test_what_is_learned_comes_nearer_to_the_uncut_model(backbone, bundle, noise_pictures, tmp_path):
    """The loss of the very crops that are learned from; on random weights nothing carries over to others."""
    paths, losses = find_pictures(noise_pictures)[:16], []

    class Noting(Progress):
        def update(self, task_id, **what) -> None:
            if "loss" in str(what.get("said", "")):
                losses.append(float(what["said"].split()[-1]))

    plan = NarrowPlan(HIDDEN, steps=40, batch=16, crops=16)
    exit_learn.learn(backbone, AT, paths, paths, plan, 0, tmp_path, Noting(disable=True))
    assert len(losses) == 40 and losses[-1] < losses[0]


def test_it_costs_less_than_the_rest_of_the_backbone(made):
    backbone = backbone_of(made)
    narrow = exit_costs(backbone, made.exit_specs)[AT]
    backbone.narrow_exits = {}
    whole = exit_costs(backbone, made.exit_specs)[AT]
    classes = 1000 * 1280 / 1e9
    assert narrow.gmac - classes < (whole.gmac - classes) / 2


def test_bundles_keep_it_by_its_digest_and_know_when_it_is_damaged(bundle, made, tmp_path):
    assert made.fingerprint == bundle.fingerprint
    made.save(tmp_path)
    loaded = Bundle.load(tmp_path)
    assert loaded.manifest() == made.manifest() and set(loaded.narrow_exits) == set(made.narrow_exits)
    assert f"--hidden {HIDDEN} --steps 3 --crops 32 --more FOLDER" in loaded.provenance["exits"]
    assert not without(made, [AT]).narrow_exits
    (tmp_path / EXITS).write_bytes((tmp_path / EXITS).read_bytes()[:-1] + b"\x7f")
    with pytest.raises(BundleError, match=r"exits\.safetensors has the digest"):
        Bundle.load(tmp_path)
    (tmp_path / EXITS).unlink()
    with pytest.raises(BundleError, match=r"exits\.safetensors cannot be read"):
        Bundle.load(tmp_path)
    bundle.save(tmp_path)
    assert not Bundle.load(tmp_path).narrow_exits


def test_other_exits_stay(made, noise_pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(exit_command, "exit_costs", lambda _, specs: {s.split: ExitCost(1e-3, 0.1, 0.2) for s in specs})
    plan = replace(PLAN, at=(TOO_EARLY,), narrow=NarrowPlan())
    _, both, _ = make_exits(made, noise_pictures, plan, tmp_path / "work")
    assert {s.split for s in both.exit_specs} == {AT, TOO_EARLY}
    assert both.exit(AT) == made.exit(AT) and both.narrow_exits.keys() == made.narrow_exits.keys()
    assert [part.split()[3] for part in both.provenance["exits"].split("; ")] == [AT, TOO_EARLY]


def test_where_none_can_be_it_is_said(backbone, bundle, made, noise_pictures, tmp_path):
    with pytest.raises(DataError, match="none is left to learn from; give a folder of others with --more"):
        make_exits(bundle, noise_pictures, PLAN, tmp_path / "work")
    with pytest.raises(BackboneError, match=r"not behind blocks\.4; take a later split point, or leave --hidden out"):
        begun(backbone, TOO_EARLY, HIDDEN, torch.zeros(1, *backbone.shape(TOO_EARLY)))
    with pytest.raises(DataError, match="keeps 1 to 336 hidden channels, not 337; change --hidden"):
        begun(backbone, AT, 337, torch.randn(4, *backbone.shape(AT)))
    damaged = replace(made, narrow_exits={k: v for k, v in made.narrow_exits.items() if not k.endswith("/kept")})
    damaged.save(tmp_path)
    with pytest.raises(BundleError, match=r"the narrow exit at blocks\.5 does not fit its backbone"):
        write_exit(backbone_of(Bundle.load(tmp_path)), made.exit(AT), Path(tmp_path / "exit.onnx"))

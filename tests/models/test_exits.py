"""Give a small random backbone exits, and see what bundle, edge half and evaluation make of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from headrace.models.bundle import MANIFEST, Bundle, ExitSpec
from headrace.models.bundle_exits import with_exits
from headrace.models.edge_half import load_edge_half
from headrace.models.evaluation.edge_costs import StageCost
from headrace.models.evaluation.exits import Told, exit_rows, exit_summary, measure_exits
from headrace.models.exceptions import BackboneError, BundleError, DataError, OperatingPointError
from headrace.models.exits import command as exit_command
from headrace.models.exits.classifier import classifier
from headrace.models.exits.command import ExitPlan, exit_scores, make_exits, uncut_labels
from headrace.models.exits.confidence import (
    best_two,
    calibration_error,
    confidences,
    fit_confidence,
    fit_temperature,
    scores_of,
    surest,
    tempered,
)
from headrace.models.exits.costs import ExitCost
from headrace.models.export import export_edge_half
from headrace.models.extend import without
from headrace.models.measure import find_pictures, load_pixels
from headrace.models.onnx_session import open_session
from headrace.models.operating_point import Kind
from headrace.models.split import fit
from headrace.models.zoo.catalogue import load_backbone
from headrace.models.zoo.sources import Source

BACKBONE = Source("timm/test_resnet", seed=3, size=64)
AT, DEEP, SIZE = "layer2-48px", "layer3", 48
PLAN = ExitPlan((AT,), photographs=100, held_out=10)
WORK = Path("nothing-is-learned")


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(BACKBONE)


@pytest.fixture(scope="module")
def bundle(backbone, noise_pictures) -> Bundle:
    paths = find_pictures(noise_pictures)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.models.split.timed", lambda backbone, bundle, *_: bundle)
        return fit(backbone, (AT, DEEP), paths[:60], paths[60:68])


@pytest.fixture(scope="module")
def made_and_reports(bundle, noise_pictures):
    """A bundle with an exit; timing exports graphs for as long as all else takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exit_command, "exit_costs", lambda _, specs: {s.split: ExitCost(1e-3, 0.1, 0.2) for s in specs})
        _, made, reports = make_exits(bundle, noise_pictures, PLAN, WORK)
    return made, reports


@pytest.fixture(scope="module")
def made(made_and_reports) -> Bundle:
    return made_and_reports[0]


def test_an_exit_is_an_operating_point_and_the_fingerprint_stays(bundle, made_and_reports):
    made, (report,) = made_and_reports
    assert made.fingerprint == bundle.fingerprint
    point, spec = made.exit_point(AT), made.exit(AT)
    assert (point.name, point.kind, point.accuracy) == (f"exit@{AT}", Kind.LOCAL, report.accuracy)
    assert (spec.share, spec.surest) == (0.2, report.surest)
    assert point.edge_share == report.with_head == made.split(AT).edge_share + 0.2
    assert point.id not in {p.id for p in bundle.operating_points}
    assert made.exit(DEEP) is None
    assert made.feature_point(AT, 0).kind is Kind.FEATURE
    assert made.provenance["exits"] == f"headrace exit --at {AT} --photographs 100 --held-out 10 --seed 0"
    assert 0 <= report.error <= 1 and str(report).startswith(f"exit@{AT}: ")


def test_its_accuracy_is_how_often_it_has_the_uncut_models_label(backbone, made, noise_pictures):
    paths = find_pictures(noise_pictures)[:12]
    labels = uncut_labels(backbone, paths)
    with torch.inference_mode():
        pixels = torch.from_numpy(np.stack([load_pixels(p, backbone.preprocessing) for p in paths]))
        assert np.array_equal(backbone.uncut(pixels)[0].argmax(1).numpy(), labels)
        small = torch.from_numpy(np.stack([load_pixels(p, made.preprocessing_at(AT)) for p in paths]))
        (plain,) = backbone.tail(AT)(*backbone.head(AT)(small))
    expected = tempered(plain.numpy().astype(np.float64), made.exit(AT).temperature)
    found = exit_scores(backbone, made.exit(AT), paths)
    np.testing.assert_allclose(found, expected, rtol=0.1, atol=1e-4)  # in eight bits
    assert np.abs(found.sum(1) - 1).max() < 1e-5


def test_bundle_and_edge_half_keep_it(made, tmp_path, monkeypatch, backbone):
    made.save(tmp_path / "whole")
    loaded = Bundle.load(tmp_path / "whole")
    assert loaded.exit_specs == made.exit_specs and loaded.operating_points == made.operating_points
    assert loaded.manifest() == made.manifest()
    monkeypatch.setattr("headrace.models.export.backbone_of", lambda _: backbone)
    monkeypatch.setattr("headrace.models.export.has_local", lambda _: False)
    monkeypatch.setattr("headrace.models.edge_half.has_local", lambda _: False)
    export_edge_half(loaded, tmp_path / "half")
    half = load_edge_half(tmp_path / "half")
    assert half.exit_specs == made.exit_specs
    pixels = np.random.default_rng(1).integers(0, 256, (1, SIZE, SIZE, 3), dtype=np.uint8)
    head = open_session(tmp_path / "half" / f"head-{AT}.onnx")
    latent, features = head.run(["latent", "features"], {"pixels": pixels})
    assert latent.shape[1:] == made.split(AT).latent_shape and features.shape[1:] == made.split(AT).features
    (scores,) = open_session(tmp_path / "half" / f"exit-{AT}.onnx").run(None, {"features": features})
    assert scores.shape == (1, len(loaded.labels)) and scores.sum() == pytest.approx(1, abs=1e-5)
    others = open_session(tmp_path / "half" / f"head-{DEEP}.onnx").get_outputs()
    assert [x.name for x in others] == ["latent"], "what has no exit gives no features"


def test_what_cannot_be_an_exit_is_refused(backbone, bundle, made, noise_pictures, monkeypatch):
    assert without(made, [DEEP]).exit_specs == made.exit_specs
    assert not without(made, [AT]).exit_specs and not any(p.is_exit for p in without(made, [AT]).operating_points)
    with pytest.raises(BundleError, match="do not fit its split points"):
        replace(made, exit_specs=()).check()
    with pytest.raises(BundleError, match="has temperature 0"):
        with_exits(made, (replace(made.exit_specs[0], temperature=0.0),), (made.operating_points[-1],), {})
    with pytest.raises(OperatingPointError, match="has no operating point layer2-48px@99"):
        made.feature_point(AT, 99)
    with pytest.raises(DataError, match="an exit is for classifiers"):
        make_exits(replace(bundle, task="detection"), noise_pictures, PLAN, WORK)
    with pytest.raises(DataError, match="name the split points that get an exit with --at: layer2-48px, layer3"):
        make_exits(bundle, noise_pictures, replace(PLAN, at=()), WORK)
    with pytest.raises(OperatingPointError, match="has no split point 'layer9'"):
        make_exits(bundle, noise_pictures, replace(PLAN, at=("layer9",)), WORK)
    monkeypatch.setattr("headrace.models.exits.classifier.AFFINE", -1.0)
    with pytest.raises(BackboneError, match="does not end in a linear classifier"):
        classifier(backbone)


def test_the_classifier_is_taken_out_of_the_backbone(backbone):
    weight, offset = classifier(backbone)
    x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        (scores,) = backbone.tail("global_pool")(x[:, :, None, None])
    torch.testing.assert_close(
        (x @ torch.from_numpy(weight).T + torch.from_numpy(offset)).softmax(1), scores, rtol=1e-4, atol=1e-6
    )


def test_confidence_is_honest_where_its_model_is_right():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6000, 20)) * 3
    chances = scores_of(logits, 2.0)
    labels = (chances.cumsum(1) > rng.random((6000, 1))).argmax(1)
    temperature = fit_temperature(logits[:4000], labels[:4000])
    assert temperature == pytest.approx(2.0, rel=0.05)
    np.testing.assert_allclose(tempered(scores_of(logits, 1.0), 2.0), chances, rtol=1e-6)
    best, second = best_two(scores_of(logits, temperature))
    right = logits.argmax(1) == labels
    spec = ExitSpec("a", temperature, fit_confidence(best[:4000], second[:4000], right[:4000]))
    sure = confidences(spec, best[4000:], second[4000:])
    assert calibration_error(sure, right[4000:]) < 0.03
    assert right[4000:][surest(sure)].mean() > right[4000:].mean() + 0.1
    assert calibration_error(np.full(100, 0.9), np.arange(100) % 2 == 0) == pytest.approx(0.4)


def test_rows_of_an_evaluation(backbone, made, noise_pictures, monkeypatch):
    scores = np.array([[0.2, 0.7, 0.1], [0.5, 0.3, 0.2]])
    monkeypatch.setattr("headrace.models.evaluation.exits.exit_scores", lambda *_: scores)
    told = measure_exits(backbone, made, find_pictures(noise_pictures)[:2])
    assert told[AT].labels.tolist() == [1, 0]
    assert told[AT].confidence[0] == made.exit(AT).sure(0.7, 0.2)
    monkeypatch.setattr("headrace.models.evaluation.exits.exit_costs", lambda *_: {AT: ExitCost(1e-3, 0.1, 0.2)})
    truth, uncut = np.arange(8), np.array([0, 1, 2, 3, 4, 5, 0, 0])
    exact = Told(np.array([0, 1, 9, 9, 9, 9, 0, 7]), np.array([0.95, 0.9, 0.1, 0.1, 0.1, 0.1, 0.2, 0.1]))
    head = StageCost(1e-3, 0.1, 0.1)
    (row,) = exit_rows(backbone, made, {AT: exact}, truth, uncut, {AT: head})
    assert (row.top1, row.relative, row.agreement) == (3 / 8, 0.5, 3 / 8)
    assert (row.surest_top1, row.surest_of_uncut, row.share_of_uncut, row.beyond) == (1.0, 1.0, pytest.approx(0.3), 0.2)
    kept = {k.confidence: k for k in row.kept}
    assert (kept[0.9].share, kept[0.9].agreement, kept[0.9].relative) == (0.25, 1.0, 1.0)
    assert kept[0.98].share == 0.0
    (line,) = exit_summary([row])
    assert line["kind"] == "local" and line["kept"][0]["confidence"] == 0.5


def test_a_manifest_without_exits_is_read(bundle, tmp_path):
    bundle.save(tmp_path)
    assert b"exits" not in (tmp_path / MANIFEST).read_bytes() and not Bundle.load(tmp_path).exit_specs


def test_the_committed_bundle_answers_early_and_is_as_it_was_for_the_server():
    bundle = Bundle.load(Path(__file__).parents[2] / "models" / "bundles" / "efficientnet_lite0")
    point = min((p for p in bundle.operating_points if p.is_exit), key=lambda p: p.edge_share)
    spec = bundle.exit(point.split)
    assert point.accuracy >= 0.5 and spec.surest >= 0.8 and spec.share < point.edge_share < 0.4
    assert bundle.fingerprint == with_exits(bundle, (), (), {}).fingerprint
    narrow = bundle.exit("blocks.5")
    assert bundle.exit_point("blocks.5").accuracy >= 0.6 and narrow.surest >= 0.9 and narrow.share < 0.06

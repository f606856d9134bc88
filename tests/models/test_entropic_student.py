"""Entropic Student: its parts are the published ones, packets decode exactly, files are checked, training resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from headrace.cli import app
from headrace.models.baselines import student_file, student_train
from headrace.models.baselines.entropic_student import ANCHOR, Student, StudentEncoder
from headrace.models.baselines.student_file import (
    StudentFacts,
    read_student,
    student_files,
    student_tensors,
    write_student,
)
from headrace.models.baselines.student_lesson import STAGES, StudentLesson, StudentPlan, tail_parts
from headrace.models.baselines.student_measure import StudentCodec, measure_student
from headrace.models.baselines.student_train import train_student
from headrace.models.bitstream import Packet
from headrace.models.cutting.costs import count_macs
from headrace.models.exceptions import BitstreamError, DataError
from headrace.models.learning.album import Album
from headrace.models.measure import find_pictures
from headrace.models.zoo.catalogue import load_backbone
from headrace.models.zoo.sources import Source
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("efficientnet_lite0")


def untrained(seed: int = 3, spread: float = 4.0) -> Student:
    """Random weights, and an encoder whose latents are a few steps wide."""
    torch.manual_seed(seed)
    student = Student(24)
    with torch.no_grad():
        student.encoder.last.weight *= spread / 0.15
        student.prior.matrices[0] += torch.linspace(-1, 1, 24)[:, None, None]
        student.prior.biases[0] += torch.linspace(-2, 2, 24)[:, None, None]
    student.freeze_prior()
    return student


def facts(backbone, target: int = 1234) -> StudentFacts:
    return StudentFacts(backbone.spec.name, backbone.spec.sha256, target, 1e-5, 640, "not at all")


@pytest.fixture
def written(backbone, tmp_path) -> Path:
    path = tmp_path / "student.safetensors"
    write_student(path, student_tensors(untrained(), {}), facts(backbone))
    return path


@pytest.fixture
def labelled(tmp_path) -> Path:
    folder = tmp_path / "labelled"
    for wnid, name in {"n02124075": "chelsea", "n07920052": "coffee"}.items():
        (folder / wnid).mkdir(parents=True)
        Image.fromarray(getattr(skimage.data, name)()).save(folder / wnid / f"{name}.png")
    return folder


def test_tables_cost_what_the_density_says():
    """Medians have half of the mass on either side; a packet's symbols take as many bits as training counts."""
    student = untrained()
    symbols = torch.randint(-6, 7, (2, 24, 5, 5)).float()
    latent = symbols + student.medians
    with torch.inference_mode():
        again, likelihoods = student.prior(latent, training=False)
    assert torch.equal(student.rounded(latent + 0.3), again) and torch.allclose(again, latent, atol=1e-5)
    where = np.arange(24)[:, None, None].repeat(25, 1).reshape(24, 5, 5)
    tables = student.tables()
    bits = tables.bits(symbols[0].numpy().astype(np.int32), where)
    assert bits.sum() == pytest.approx(float(-likelihoods[0].log2().sum()), rel=0.02)
    low, _, high = student.prior.quantiles[:, 0].unbind(1)
    reach = tables.offsets + tables.sizes - 3
    assert (tables.offsets <= (low - student.medians.flatten()).ceil().numpy()).all()
    assert (reach >= (high - student.medians.flatten()).floor().numpy()).all()


def test_encoder_is_the_published_one():
    """0.59 GMAC at 224 pixels, of which normalisations are a fifth; latent of 24 x 55 x 55."""
    encoder = StudentEncoder().requires_grad_(False).eval()
    assert encoder(torch.zeros(1, 3, 224, 224)).shape == (1, 24, 55, 55)
    convolutions = 112**2 * 3 * 96 * 25 + 56**2 * 96 * 48 * 25 + 55**2 * 48 * 24 * 4
    normalisations = 112**2 * 96**2 + 56**2 * 48**2
    assert count_macs(encoder, torch.zeros(1, 3, 224, 224)) == convolutions + normalisations
    assert 0.58e9 < convolutions + normalisations < 0.60e9


def test_packets_decode_to_the_symbols_that_were_coded(backbone, written):
    student = read_student(written, backbone)
    codec = StudentCodec(student, 55)
    with torch.inference_mode():
        (latent,) = student.encoder(torch.from_numpy(skimage.data.chelsea()[None, :224, :224].copy()))
    for values in (latent[0].numpy(), 40 * latent[0].numpy(), np.zeros((24, 55, 55), np.float32)):
        symbols = codec.symbols(values)
        data = codec.packet(symbols)
        assert (codec.received(data) == symbols).all()
        assert np.abs(codec.rounded(symbols) - values).max() <= 0.5 + 1e-4 * np.abs(values).max()
    symbols = codec.symbols(latent[0].numpy())
    assert np.abs(symbols).max() >= 2, "there is something to code"
    assert len(codec.packet(symbols)) - codec.bits(symbols) / 8 == pytest.approx(20, abs=6), "header and coder's state"
    two = Packet(0, 0, (b"ab", b"c")).to_bytes()
    with pytest.raises(BitstreamError, match="one slice"):
        codec.received(two)


def test_photographs_are_coded_and_answered(backbone, written, labelled):
    """Of a student whose decoder gives the mean of the features the answer is the tail's for it."""
    student = read_student(written, backbone)
    paths = sorted(labelled.rglob("*.png"))
    found = measure_student(backbone, student, paths)
    assert len(found.packet_bytes) == len(found.answers) == 2
    for whole, coded, bits in zip(found.packet_bytes, found.slice_bytes, found.entropy_bits, strict=True):
        assert 9 <= whole - coded <= 24, "the header of our own packets"
        assert coded == pytest.approx(bits / 8, rel=0.02, abs=12)


def test_the_tail_s_parts_are_the_tail_and_take_changes(backbone, tmp_path):
    with torch.inference_mode():
        features = backbone.head(ANCHOR)(torch.from_numpy(skimage.data.chelsea()[None, :224, :224].copy()))
        values = features
        for part in tail_parts(backbone):
            values = part(*values)
        assert torch.allclose(values[0], backbone.tail(ANCHOR)(*features)[0], atol=1e-6)
    last = student_file.weights(tail_parts(backbone)[-1])
    name = next(k for k, v in last.items() if v.shape == (1000,))
    change = torch.zeros(1000)
    change[7] = 100.0
    path = tmp_path / "changed.safetensors"
    write_student(path, student_tensors(untrained(), {f"3/{name.replace('.', '/')}": change}), facts(backbone))
    with torch.inference_mode():
        (scores,) = read_student(path, backbone).answer(torch.zeros(1, 24, 55, 55))
    assert int(scores.argmax()) == 7


def test_what_is_no_student_is_refused(backbone, written, tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"garbage" * 10)
    with pytest.raises(DataError, match=r"bad\.safetensors is not an Entropic Student"):
        read_student(bad, backbone)
    save_file({"a": torch.zeros(2)}, bad)
    with pytest.raises(DataError, match="not an Entropic Student of version 2; give a file that"):
        read_student(bad, backbone)
    with pytest.raises(DataError, match=r"is not an Entropic Student: .*No such file"):
        read_student(tmp_path / "none.safetensors", backbone)
    with pytest.raises(DataError, match="holds no Entropic Student"):
        student_files(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no Entropic Student"):
        student_files(tmp_path / "empty")
    write_student(bad, student_tensors(untrained(), {}), replace(facts(backbone), weights="ab" * 32))
    with pytest.raises(DataError, match="with weights abababababababab, this bundle's"):
        read_student(bad, backbone)
    tensors = student_tensors(untrained(), {})
    for name, other in {
        "tables/cdf": torch.zeros_like(tensors["tables/cdf"]),
        "encoder/last.weight": torch.zeros(3),
        "prior/quantiles": torch.zeros(1, 1, 3),
    }.items():
        write_student(bad, {**tensors, name: other}, facts(backbone))
        with pytest.raises(DataError, match="is damaged or of another version"):
            read_student(bad, backbone)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_training_goes_on_and_ends_the_same(noise_pictures, tmp_path, monkeypatch):
    """Both stages on 32 pixels; a run that is killed in the second one ends as one that was not."""
    backbone = load_backbone("efficientnet_lite0").at(f"{ANCHOR}-32px")[0]
    plan = StudentPlan(targets=(40, 80), batch=4, first=0.4, tuned=1)
    how = {"plan": plan, "views": 32}
    whole = train_student(backbone, [noise_pictures], tmp_path / "a", tmp_path / "a-work", **how)
    first = student_train.descend
    calls = []

    def killed(named, loss, rate, steps, *rest, **more):
        calls.append(steps)
        if len(calls) == 2:

            def dying(step):
                if step == 1:
                    raise KeyboardInterrupt
                return loss(step)

            return first(named, dying, rate, steps, *rest, **more)
        return first(named, loss, rate, steps, *rest, **more)

    monkeypatch.setattr(student_train, "descend", killed)
    with pytest.raises(KeyboardInterrupt):
        train_student(backbone, [noise_pictures], tmp_path / "b", tmp_path / "b-work", **how)
    monkeypatch.undo()
    resumed = train_student(backbone, [noise_pictures], tmp_path / "b", tmp_path / "b-work", **how)
    assert calls == [3, 2] and [p.name for p in whole] == ["student-40.safetensors", "student-80.safetensors"]
    for a, b in zip(whole, resumed, strict=True):
        found = read_student(a, backbone)
        mine, theirs = load_file(a), load_file(b)
        assert mine.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in mine.items())
        assert found.facts == read_student(b, backbone).facts and found.facts.views == 3 * 4 + 2 * 8
        assert "tuned: decoder, the tail up to blocks.2, and its biases" in found.facts.said
    assert not torch.equal(*(load_file(path)["encoder/last.weight"] for path in whole)), "they were divided in time"
    with pytest.raises(DataError, match="6 views are too few"):
        train_student(backbone, [noise_pictures], tmp_path / "c", tmp_path / "c", plan, 6)


@pytest.fixture
def small(noise_pictures):
    """Views of 32 pixels, and a lesson of them for given targets."""
    backbone = load_backbone("efficientnet_lite0").at(f"{ANCHOR}-32px")[0]
    album = Album(find_pictures(noise_pictures)[:40], backbone, ANCHOR, torch.device("cpu"), STAGES[1:])
    return lambda *targets: StudentLesson(backbone, StudentPlan(targets, batch=4), album, torch.device("cpu"))


def test_both_losses_fall_and_beta_moves(small):
    lesson = small(60)
    first = float(lesson.steering.log_betas)
    for stage, name in enumerate(("errors", "nats")):
        named = lesson.parameters(stage)
        optimiser = torch.optim.Adam(named.values(), lr=1e-3)
        seen = []
        for step in range(8):
            # The same step and so the same views and noise; beta moves between the last two alone.
            share = step == 7
            lesson.running[name].zero_()
            optimiser.zero_grad()
            sum(lesson.losses(stage, 0, 0.5 if share else 0.0)).backward()
            optimiser.step()
            seen.append(float(lesson.running[name]))
        assert seen[-1] < 0.95 * seen[0], (name, seen)
        lesson.begin_second()
    assert float(lesson.steering.log_betas) != first
    assert {name.split(".")[1] for name in lesson.parameters(0)} == {"encoder", "prior", "decoder"}
    assert {name.split(".")[1] for name in lesson.parameters(1)} == {"decoder", "tail"}


def test_one_student_learns_for_all_and_is_then_divided(small):
    lesson = small(60, 120, 30)
    named = lesson.parameters(0)
    begun = {name: p.detach().clone() for name, p in named.items()}
    optimiser = torch.optim.SGD(named.values(), lr=1e-6)
    for loss in (found := list(lesson.losses(0, 1, 0.1))):
        loss.backward()
    optimiser.step()
    moved = {name.split(".")[0] for name, p in named.items() if not torch.equal(p, begun[name])}
    assert len(found) == 1 and moved == {"1"}, "the finest one"
    assert len(list(lesson.losses(0, 2, 0.7))) == 3
    for i in (0, 2):
        assert all(torch.equal(p, named["1" + k[1:]]) for k, p in named.items() if k.startswith(f"{i}."))
    coarse, fine, coarsest = lesson.steering.log_betas.tolist()
    assert fine < coarse < coarsest
    assert len(list(lesson.losses(1, 0, 0.0))) == 3
    short = small(60, 120)
    list(short.losses(0, 0, 0.0))
    short.begin_second()
    assert torch.equal(*(short.student(i).encoder.last.weight for i in (0, 1))), "even after a first stage of one step"


def test_eval_rd_refuses_what_is_no_student(labelled, tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\0" * 100)
    command = ["eval", "rd", "--data", str(labelled)]
    done = CliRunner().invoke(app, [*command, "--entropic-student", str(bad)])
    assert done.exit_code != 0 and isinstance(done.exception, DataError) and "train-student" in str(done.exception)
    done = CliRunner().invoke(app, [*command, "--own", "none", "--pictures", "none"])
    assert "nothing is measured" in str(done.exception)


def test_other_backbones_have_no_baseline(noise_pictures, tmp_path):
    other = load_backbone(Source("timm/test_resnet", seed=3, size=64))
    with pytest.raises(DataError, match=r"has no stages blocks\.1, .*EfficientNet-Lite"):
        train_student(other, [noise_pictures], tmp_path, tmp_path, StudentPlan(batch=4), 100)

"""What the device computes: packets that the codec reads back, pictures, labels."""

from __future__ import annotations

import io
import threading
import time
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from headrace.edge.device import Device
from headrace.edge.engine import Engine, reference_picture
from headrace.edge.exceptions import AbandonedError, EngineError
from headrace.edge.head import Abandon
from headrace.edge.local import best_labels
from headrace.models.bitstream import Packet
from headrace.models.codec import Codec
from headrace.models.exceptions import OperatingPointError
from headrace.models.operating_point import Kind
from headrace.models.preprocessing import prepare
from headrace.models.quantiser import quantise
from PIL import Image


@pytest.fixture
def engine(bundle, edge_half) -> Engine:
    return Engine(bundle, edge_half, Device())


@pytest.fixture
def picture() -> Image.Image:
    return reference_picture(80, 60)


def point(bundle, name):
    return next(p for p in bundle.operating_points if p.name == name)


def test_a_feature_packet_holds_the_quantised_latent(engine, bundle, edge_half, picture):
    chosen = point(bundle, "stage.1@0")
    encoded = engine.encode(picture, chosen, 77)
    packet = Packet.from_bytes(encoded.packet)
    assert (packet.operating_point, packet.frame_id, len(packet.slices)) == (0, 77, 2)
    pixels = prepare(picture, bundle.preprocessing)
    session = onnxruntime.InferenceSession(edge_half / "head-stage.1.onnx", providers=["CPUExecutionProvider"])
    (latent,) = session.run(["latent"], {"pixels": pixels[None]})
    expected = quantise(latent[0], bundle.gain("stage.1", 0))
    assert (Codec(bundle).decompress(packet) == expected).all()
    assert expected.any()
    assert (encoded.pixels == pixels).all()
    assert encoded.seconds == encoded.prepare_s + encoded.compute_s + encoded.compress_s > 0


@pytest.mark.parametrize(("name", "kind"), [("webp@50", "WEBP"), ("jpeg@50", "JPEG")])
def test_an_image_packet_holds_the_prepared_picture(engine, bundle, picture, name, kind):
    chosen = point(bundle, name)
    packet = Packet.from_bytes(engine.encode(picture, chosen, 5).packet)
    assert (packet.operating_point, packet.frame_id, len(packet.slices)) == (chosen.id, 5, 1)
    decoded = Image.open(io.BytesIO(packet.slices[0]))
    assert (decoded.format, decoded.size) == (kind, (32, 32))
    error = np.asarray(decoded.convert("RGB"), float) - prepare(picture, bundle.preprocessing)
    assert np.abs(error).mean() < 12


def test_a_local_answer_is_the_uncut_model_s(engine, bundle, edge_half, picture):
    pixels = prepare(picture, bundle.preprocessing)
    session = onnxruntime.InferenceSession(edge_half / "uncut.onnx", providers=["CPUExecutionProvider"])
    (scores,) = session.run(["scores"], {"pixels": pixels[None]})
    answer = engine.answer(picture, None)
    assert [x.index for x in answer.labels] == np.argsort(-scores[0])[:5].tolist()
    assert answer.labels[0].score == pytest.approx(scores[0].max())
    assert engine.answer(None, pixels).labels == answer.labels
    assert engine.answer(None, pixels).prepare_s == 0


def test_what_is_abandoned_stops_at_once(bundle, edge_half, picture):
    engine = Engine(bundle, edge_half, Device(1e9))  # an emulated device that would take for ever
    abandon = Abandon()
    stopper = threading.Timer(0.2, abandon.set)
    stopper.start()
    began = time.monotonic()
    with pytest.raises(AbandonedError):
        engine.encode(picture, point(bundle, "stage.1@0"), 0, abandon)
    assert time.monotonic() - began < 30


def test_a_graph_that_runs_is_stopped_by_its_options(engine, bundle, picture):
    abandon = Abandon()
    abandon.set()
    with pytest.raises(AbandonedError):
        engine._head("stage.1", prepare(picture, bundle.preprocessing), abandon)
    assert engine.encode(picture, point(bundle, "stage.1@0"), 0).packet, "the next computation is not stopped"


def test_best_labels_are_in_order_and_ties_go_to_the_lower_index():
    labels = best_labels(np.array([0.1, 0.4, 0.4, 0.1], np.float32), 3)
    assert [x.index for x in labels] == [1, 2, 0]


def test_a_graph_that_cannot_be_loaded_is_named(bundle, tmp_path, picture):
    (tmp_path / "head-stage.1.onnx").write_bytes(b"no graph")
    engine = Engine(bundle, tmp_path, Device())
    with pytest.raises(EngineError, match=r"head-stage\.1\.onnx cannot be loaded"):
        engine.encode(picture, point(bundle, "stage.1@0"), 0)
    with pytest.raises(EngineError, match=r"uncut\.onnx cannot be loaded"):
        engine.answer(picture, None)


def test_an_encoder_refuses_points_of_another_kind(engine, bundle):
    pixels = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(OperatingPointError, match="only image points"):
        engine._encoder.image(pixels, point(bundle, "local"), 0)


def test_every_stage_is_timed_once_a_round(engine, bundle):
    points = [p for p in bundle.operating_points if p.kind is not Kind.LOCAL]
    engine.warm_up(points)
    seconds = engine.time_stages(points, 3)
    assert set(seconds) == {"stage.1", "webp", "jpeg"}
    assert all(s > 0 for s in seconds.values())


@pytest.mark.parametrize(("first", "second"), [("stage.1@0", "stage.1@1"), ("jpeg@50", "jpeg@20")])
def test_a_frame_is_coded_anew_at_another_level_without_its_head(engine, bundle, picture, first, second, monkeypatch):
    other = replace(point(bundle, first), rate_level=20) if second == "jpeg@20" else point(bundle, second)
    encoded = engine.encode(picture, point(bundle, first), 7)
    direct = engine.encode(picture, other, 7)
    monkeypatch.setattr(engine, "_head", None)
    monkeypatch.setattr(engine, "_prepare", None)
    again = encoded.again(other)
    assert again.packet == direct.packet != encoded.packet
    assert again.prepare_s == encoded.prepare_s and again.coder_s > 0


def test_coding_anew_can_be_abandoned(engine, bundle, picture):
    abandon = Abandon()
    encoded = engine.encode(picture, point(bundle, "stage.1@0"), 7, abandon)
    abandon.set()
    with pytest.raises(AbandonedError):
        encoded.again(point(bundle, "stage.1@1"))

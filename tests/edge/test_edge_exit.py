"""Exits on the edge: answers from a head's features, alone or in place of a packet; halves with and without them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from headrace.edge.assembly import make_ready, select_points
from headrace.edge.config import EdgeSettings
from headrace.edge.controller import ControlLoop
from headrace.edge.device import Device
from headrace.edge.engine import Encoded, Engine, LocalAnswer
from headrace.edge.exceptions import ConfigError
from headrace.edge.interfaces import Limits
from headrace.edge.ledger import Ledger, Outcome
from headrace.edge.on_device import Keeping, OnDevice
from headrace.edge.pipeline import Pipeline
from headrace.models.bundle import MANIFEST, Bundle
from headrace.models.edge_half import file_names, load_edge_half
from headrace.models.exceptions import BundleError
from headrace.models.operating_point import Kind, OperatingPoint
from headrace.protos.messages import Label
from PIL import Image

from .conftest import ScriptedServer, make_bundle, make_exiting, write_edge_half
from .rig import FEATURE, LOCAL, PICTURE, PIXELS, Choice, Scripted
from .test_edge_daemon import start  # noqa: F401

DARK, BRIGHT = (Image.new("RGB", (40, 40), (c, c, c)) for c in (10, 250))
EXIT = OperatingPoint(2, Kind.LOCAL, "stage.1", accuracy=0.6)


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    return write_edge_half(tmp_path_factory.mktemp("exits"), make_exiting())


@pytest.fixture
def engine(half) -> Engine:
    return Engine(load_edge_half(half), half, Device())


def named(bundle: Bundle, name: str) -> OperatingPoint:
    return next(p for p in bundle.operating_points if p.name == name)


def test_an_exit_answers_from_the_heads_features(engine):
    point = named(engine.bundle, "exit@stage.1")
    assert (point.kind, point.stage, point.is_exit, point.is_uncut) == (Kind.LOCAL, "exit@stage.1", True, False)
    answer = engine.answer(BRIGHT, None, point)
    share = np.exp(6 * 250 / 128)
    assert answer.labels[0] == Label(3, pytest.approx(share / (share + 9), abs=1e-4))
    assert answer.confidence == pytest.approx(answer.labels[0].score, abs=1e-4) and answer.point is point
    assert engine.answer(DARK, None, point).confidence < 0.3 and answer.confidence > 0.9
    pixels = np.asarray(BRIGHT.resize((32, 32)))
    assert engine.answer(None, pixels, point).labels == answer.labels, "pixels that were prepared before"
    assert engine.answer(BRIGHT, None).confidence is None, "the uncut model does not doubt itself"


def test_a_frame_that_the_exit_is_sure_of_gets_no_packet(engine):
    point = named(engine.bundle, "stage.1@0")
    kept = engine.encode(BRIGHT, point, 0, sure=0.9)
    assert kept.packet == b"" and kept.own.labels[0].index == 3 and kept.own.point.name == "exit@stage.1"
    assert kept.compute_s >= kept.own.compute_s > 0
    sent = engine.encode(DARK, point, 0, sure=0.9)
    assert sent.packet and sent.own.confidence < 0.3 and sent.compute_s > sent.own.compute_s
    assert engine.encode(BRIGHT, point, 0).own is None, "not asked"


def test_a_half_lists_its_exits_and_one_without_them_has_the_same_fingerprint(half, tmp_path):
    plain, exiting = make_bundle(), make_exiting()
    assert plain.fingerprint == exiting.fingerprint
    assert set(file_names(exiting)) - set(file_names(plain)) == {"exit-stage.1.onnx"}
    bundle = load_edge_half(half)
    assert bundle.exit("stage.1") == exiting.exit("stage.1") and bundle.exit_point("stage.1").id == 43
    with pytest.raises(BundleError, match=r"exit-stage.1\.onnx does not have the digest"):
        damaged = tmp_path / "damaged"
        damaged.mkdir()
        for file in half.iterdir():
            (damaged / file.name).write_bytes(file.read_bytes())
        (damaged / "exit-stage.1.onnx").write_bytes((half / "exit-stage.1.onnx").read_bytes()[:-1])
        load_edge_half(damaged)
    old = write_edge_half(tmp_path / "old", plain)
    engine = Engine(load_edge_half(old), old, Device())
    assert engine.encode(BRIGHT, named(plain, "stage.1@0"), 0, sure=0.1).own is None, "nobody to ask"


def test_settings_choose_exits(half):
    bundle = load_edge_half(half)
    assert [p.name for p in select_points(bundle, EdgeSettings(point="exit@stage.1"))] == ["exit@stage.1"]
    ready = make_ready(bundle, EdgeSettings(kinds=["feature"], exit_confidence=0.9))
    assert {p.kind for p in ready.points} == {Kind.FEATURE}
    assert "exit@stage.1" in ready.compute_s
    plain = replace(make_bundle(), folder=half)
    with pytest.raises(ConfigError, match="exits at: none"):
        make_ready(plain, EdgeSettings(exit_confidence=0.9))


class Rig:
    def __init__(self, keeping: Keeping | None = None, **limits) -> None:
        self.closed = []
        self.control = Scripted()
        points = (FEATURE, LOCAL, EXIT)
        ledger = Ledger(self.closed.append)
        self.pipeline = Pipeline(
            self.control, points, Limits(**limits), ledger, local_s=0.2, exits_s={EXIT.stage: 0.1}, keeping=keeping
        )
        self.pipeline.connect(0.0, max_in_flight=16, max_packet_bytes=2**20)


def test_during_an_outage_the_most_accurate_answer_in_time_is_given():
    rig = Rig(deadline_s=0.25)
    rig.pipeline.disconnect(0.0)
    rig.control.choice = Choice(LOCAL)
    rig.pipeline.captured(PICTURE, 0.0)
    assert rig.pipeline.take_up(0.0).frame.point is LOCAL
    rig.pipeline.compute_failed(rig.closed[0] if rig.closed else rig.pipeline._computing, "gone")
    rig.pipeline.captured(PICTURE, 1.0)
    work = rig.pipeline.take_up(1.1)
    assert work.local and work.frame.point is EXIT, "the uncut model would be late now"
    rig.pipeline.answered_locally(work.frame, LocalAnswer((Label(3, 0.8),), 0.01, 0.09, 0.7, EXIT), 1.2)
    assert (rig.closed[-1].outcome, rig.closed[-1].confidence) == (Outcome.LOCAL, 0.7)
    assert ("computed", "exit@stage.1", pytest.approx(0.1)) in rig.control.heard
    rig.pipeline.captured(PICTURE, 2.0)
    assert rig.pipeline.take_up(2.2) is None and rig.closed[-1].outcome is Outcome.DROPPED, "nothing is in time"


def test_the_control_loops_choice_among_local_points_is_followed():
    rig = Rig()
    rig.control.choice = Choice(EXIT)
    rig.pipeline.captured(PICTURE, 0.0)
    assert rig.pipeline.take_up(0.0).frame.point is EXIT
    device = OnDevice((FEATURE, LOCAL, EXIT), 0.2, {EXIT.stage: 0.1})
    assert (device.in_time(1.0), device.in_time(0.15), device.in_time(0.05)) == (LOCAL, EXIT, None)
    assert device.in_time(1.0, EXIT) is EXIT and device.in_time(1.0, FEATURE) is LOCAL
    assert device.late(LOCAL) is LOCAL and device.late(FEATURE) is EXIT and device.quickest_s == 0.1
    device.took(EXIT, 0.3)
    assert device.in_time(0.15) is None
    assert not OnDevice((FEATURE,), 0.2, {}) and OnDevice((FEATURE,), 0.2, {}).in_time(9.0) is None


def test_a_sure_frame_ends_on_the_device_but_for_keep_alives():
    rig = Rig(Keeping(0.9, keep_alive_s=10))
    rig.pipeline.captured(PICTURE, 0.0)
    work = rig.pipeline.take_up(0.0)
    assert work.sure is None, "the first one is sent: nobody has heard of the link"
    rig.pipeline.encoded(work.frame, Encoded(b"packet", PIXELS, 0.01, 0.02, 0.03), 0.1)
    assert rig.pipeline.next_to_write(0.1) is not None
    rig.pipeline.captured(PICTURE, 0.2)
    work = rig.pipeline.take_up(0.2)
    assert work.sure == 0.9
    own = LocalAnswer((Label(3, 0.99),), 0.0, 0.01, 0.95, EXIT)
    rig.pipeline.encoded(work.frame, Encoded(b"", PIXELS, 0.01, 0.03, 0.0, own=own), 0.3)
    frame = rig.closed[-1]
    assert (frame.outcome, frame.point, frame.sent_bytes) == (Outcome.LOCAL, EXIT, 0)
    assert frame.labels == own.labels and frame.confidence == 0.95 and frame.latency_s == pytest.approx(0.1)
    assert ("kept", 0.95) in rig.control.heard
    rig.pipeline.captured(PICTURE, 10.1)
    assert rig.pipeline.take_up(10.1).sure is None, "nothing was sent for ten seconds"


def test_the_control_loop_takes_the_exit_in_an_outage_when_the_uncut_model_cannot_keep_up():
    loop = ControlLoop(
        (FEATURE, LOCAL, EXIT),
        deadline_s=0.25,
        frame_interval_s=0.1,
        uncut_s=0.5,
        compute_s={"stage.1": 0.08, "local": 0.5, "exit@stage.1": 0.09},
    )
    loop.on_connected(0.0)
    loop.on_disconnected(0.1)
    chosen = [loop.choose(0.2 + 0.1 * i, 0.2 + 0.1 * i, compute_free_at=0.2 + 0.1 * i).point for i in range(5)]
    assert chosen == [EXIT] * 5


async def test_sure_frames_stay_on_a_real_edge(half, start, tmp_path):  # noqa: F811
    """Bright and dark pictures in turn: the first, bright one is a keep-alive; of the others the dark ones are sent."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        (DARK if i % 2 else BRIGHT).save(folder / f"{i}.png")
    server = ScriptedServer(half)
    await server.start()
    try:
        edge = await start(
            server=server.address,
            source=[str(folder)],
            as_fast_as_possible=True,
            point="stage.1@0",
            exit_confidence=0.9,
        )
        assert await edge.end() == 0, "".join(edge.log)
    finally:
        await server.kill()
    frames = sorted(edge.frames, key=lambda f: f["frame"])
    assert [f["outcome"] for f in frames] == ["ok", "ok", "local", "ok", "local", "ok"]
    assert len(server.frames) == 4 and edge.lines[-1]["on_time"] == 6
    kept, sent = frames[2], frames[3]
    assert (kept["point"], kept["kind"], kept["bytes"]) == ("exit@stage.1", "local", 0)
    assert kept["labels"][0]["index"] == 3 and kept["confidence"] > 0.9 and sent["confidence"] < 0.3
    assert "confidence" not in frames[0], "it had to be sent, so the exit was not asked"


def test_an_older_reader_finds_nothing_that_it_does_not_know(half):
    import msgpack

    manifest = msgpack.unpackb((half / MANIFEST).read_bytes())
    assert all(p["id"] != 43 for p in manifest["operating_points"]), "its operating points are those it always had"
    assert json.dumps([p["split"] for p in manifest["exits"]["points"]]) == '["stage.1"]'

"""The filter on the device: empty frames stay there, but for keep-alives and audits; and what is said of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from headrace.edge.assembly import select_points
from headrace.edge.config import EdgeSettings
from headrace.edge.device import Device
from headrace.edge.engine import Encoded, Engine
from headrace.edge.exceptions import ConfigError
from headrace.edge.filtering import Audits, Filtering
from headrace.edge.interfaces import Limits
from headrace.edge.ledger import Ledger, Outcome
from headrace.edge.pipeline import Pipeline
from headrace.models.operating_point import Kind, OperatingPoint
from headrace.protos.messages import Box, Label, Result, Status, TailOutput, Timing
from PIL import Image

from .conftest import ScriptedServer, make_bundle, make_filtered, write_edge_half
from .rig import FEATURE, LOCAL, PICTURE, PIXELS, Scripted
from .test_edge_daemon import start  # noqa: F401  a fixture

DARK, BRIGHT = Image.new("RGB", (64, 48), (10, 10, 10)), Image.new("RGB", (64, 48), (250, 250, 250))
PERSON = Box(3, 0.8, 1, 2, 3, 4)


@pytest.fixture(scope="module")
def filtered_half(tmp_path_factory) -> Path:
    return write_edge_half(tmp_path_factory.mktemp("filtered"), make_filtered(0.5))


def test_a_share_is_audited_and_silence_is_broken():
    """In exact numbers: the first frame, every frame after ten seconds of silence, and about a tenth of all others."""
    filtering = Filtering((3,), audit_share=0.1, keep_alive_s=10, rng=Random(0))
    assert filtering.must_send(0.0), "nothing was ever sent"
    filtering.on_written(0.0)
    quiet = Filtering((3,), audit_share=0.0, keep_alive_s=10, rng=Random(0))
    quiet.on_written(5.0)
    assert [quiet.must_send(t) for t in (5.1, 14.9, 15.0, 20.0)] == [False, False, True, True]
    filtering.on_written(100.0)
    assert 0.08 < np.mean([filtering.must_send(100.0) for _ in range(4000)]) < 0.12


def test_audits_count_what_was_missed():
    filtering = Filtering((3,), audit_share=0, keep_alive_s=1)
    for boxes in ([], [PERSON], [Box(3, 0.2, 0, 0, 1, 1)], [Box(4, 0.9, 0, 0, 1, 1)]):
        filtering.on_answer(boxes)
    assert filtering.audits == Audits(answered=4, missed=1)


def test_no_packet_is_made_of_an_empty_frame(filtered_half):
    bundle = make_filtered(0.5)
    engine = Engine(bundle, filtered_half, Device())
    point = bundle.operating_points[0]
    empty = engine.encode(DARK, point, 1, filtered=True)
    assert (empty.packet, empty.empty) == (b"", True) and empty.presence == pytest.approx(10 / 128, abs=1e-3)
    audit = engine.encode(DARK, point, 1)
    assert audit.packet and audit.empty and audit.compress_s > 0
    full = engine.encode(BRIGHT, point, 1, filtered=True)
    assert full.packet and not full.empty and full.presence == pytest.approx(250 / 128, abs=1e-3)
    plain = Engine(make_bundle(), write_edge_half(filtered_half.parent / "plain", make_bundle()), Device())
    assert plain.encode(DARK, point, 1, filtered=True).packet, "a bundle without a filter sends everything"


class Rig:
    def __init__(self, filtering: Filtering | None) -> None:
        self.closed = []
        self.control = Scripted()
        self.pipeline = Pipeline(
            self.control, (FEATURE, LOCAL), Limits(), Ledger(self.closed.append), local_s=0.1, filtering=filtering
        )
        self.pipeline.connect(0.0, max_in_flight=16, max_packet_bytes=2**20)


def test_an_empty_frame_is_filtered_and_its_compute_learned():
    rig = Rig(Filtering((3,), audit_share=0, keep_alive_s=10))
    rig.pipeline.captured(PICTURE, 0.0)
    work = rig.pipeline.take_up(0.0)
    assert not work.filtered, "the first one is sent: nobody has heard of the link"
    rig.pipeline.encoded(work.frame, Encoded(b"packet", PIXELS, 0.01, 0.02, 0.03, -4.0, True), 0.1)
    assert rig.pipeline.next_to_write(0.1) is not None
    result = Result(0, Status.OK, "", (TailOutput("detection", boxes=(PERSON,)),), Timing(), 0, 1)
    rig.pipeline.answered(result, 0.2)
    assert rig.pipeline._filtering.audits == Audits(1, 1), "sent although empty, and there was somebody"
    rig.pipeline.captured(PICTURE, 0.3)
    work = rig.pipeline.take_up(0.3)
    assert work.filtered
    rig.pipeline.encoded(work.frame, Encoded(b"", PIXELS, 0.01, 0.02, 0.0, -5.0, True), 0.4)
    assert [f.outcome for f in rig.closed] == [Outcome.OK, Outcome.FILTERED]
    assert rig.closed[1].presence == -5.0 and rig.closed[1].sent_bytes == 0
    assert ("computed", FEATURE.name, pytest.approx(0.03)) in rig.control.heard
    assert rig.pipeline.next_to_write(0.4) is None and rig.pipeline.take_up(0.4) is None
    unfiltered = Rig(None)
    unfiltered.pipeline.captured(PICTURE, 0.0)
    assert not unfiltered.pipeline.take_up(0.0).filtered


def test_pictures_are_not_sent_past_the_filter():
    bundle = make_filtered(0.5)
    assert {p.kind for p in select_points(bundle, EdgeSettings(filter=True))} == {Kind.FEATURE, Kind.LOCAL}
    assert Kind.IMAGE in {p.kind for p in select_points(bundle, EdgeSettings())}
    with pytest.raises(ConfigError, match="tiny0 has no filter; give it one with `headrace filter`"):
        select_points(make_bundle(), EdgeSettings(filter=True))


def test_features_are_not_sent_past_the_filter_where_their_split_point_has_none():
    bundle = make_filtered(0.5)
    (split,) = bundle.splits
    more = {k.replace("stage.1/", "stage.2/"): v for k, v in bundle.tensors.items() if "/filter/" not in k}
    points = (*bundle.operating_points, OperatingPoint(2, Kind.FEATURE, "stage.2"))
    both = replace(
        bundle,
        splits=(split, replace(split, name="stage.2")),
        tensors={**bundle.tensors, **more},
        operating_points=points,
    ).check()
    assert both.filters("stage.1") and not both.filters("stage.2")
    assert {p.split for p in select_points(both, EdgeSettings(filter=True))} == {"stage.1", ""}
    assert "stage.2" in {p.split for p in select_points(both, EdgeSettings())}


async def test_empty_frames_stay_on_a_real_edge(filtered_half, start, tmp_path):  # noqa: F811
    """Dark and bright pictures in turn: the first, dark one is a keep-alive; of the others the bright ones are sent."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(8):
        (BRIGHT if i % 2 else DARK).save(folder / f"{i}.png")
    outputs = (TailOutput("detection", boxes=(PERSON,)), TailOutput("classification", (Label(2, 0.75),)))
    server = ScriptedServer(filtered_half, outputs=outputs)
    await server.start()
    try:
        edge = await start(
            server=server.address,
            source=[str(folder)],
            as_fast_as_possible=True,
            point="stage.1@0",
            filter=True,
            audit_share=0.0,
        )
        assert await edge.end() == 0, "".join(edge.log)
    finally:
        await server.kill()
    assert [f["outcome"] for f in sorted(edge.frames, key=lambda f: f["frame"])] == [
        "ok",
        "ok",
        *["filtered", "ok"] * 3,
    ]
    assert len(server.frames) == 5 and edge.lines[-1]["audits"] == {"answered": 1, "missed": 1}
    filtered = next(f for f in edge.frames if f["outcome"] == "filtered")
    assert (filtered["bytes"], filtered["empty"]) == (0, True) and filtered["presence"] < 0.5
    answered = next(f for f in edge.frames if f["frame"] == 1)
    assert [b["index"] for b in answered["boxes"]] == [3] and [x["index"] for x in answered["labels"]] == [2], (
        "two tails answered one packet"
    )

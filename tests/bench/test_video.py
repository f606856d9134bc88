"""`headrace eval video` on a small video of its own, with the committed bundle."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from headrace.bench.video import Lag, evaluate_video
from headrace.models.bundle import Bundle
from headrace.models.command_line import COMMITTED
from headrace.models.exceptions import DataError
from headrace.models.operating_point import Kind
from headrace.models.synthetic import moving
from PIL import Image
from rich.console import Console


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """The committed one, with three of its points."""
    from dataclasses import replace

    whole = Bundle.load(COMMITTED)
    kept = [p for p in whole.operating_points if p.name in ("blocks.5@2", "blocks.5@8") or p.kind is Kind.LOCAL]
    return replace(whole, operating_points=tuple(kept), splits=tuple(s for s in whole.splits if s.name == "blocks.5"))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight frames at 20 a second."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((320, 240), Image.BICUBIC)
    path = tmp_path_factory.mktemp("video") / "moving.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 224, 224, "yuv420p"
        for pixels in moving(picture, picture, 224, 8, seed=1):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_rates_and_points_are_measured_and_written(bundle: Bundle, video: Path, tmp_path: Path) -> None:
    file = tmp_path / "video.json"
    console = Console(record=True, width=120)
    rows = evaluate_video(bundle, video, (20, 10), limit=7, json_file=file, console=console)
    assert [(r.point, r.fps, r.frames) for r in rows] == [
        ("blocks.5@2", 20, 7),
        ("blocks.5@8", 20, 7),
        ("blocks.5@2", 10, 4),
        ("blocks.5@8", 10, 4),
    ]
    for row in rows:
        assert row.ratio == pytest.approx(row.bytes / row.key_bytes)
        assert row.error == 1.0
    assert rows[0].ratio < 0.9
    assert rows[0].predicted >= 0.5
    found = json.loads(file.read_text())
    assert found["video"] == "moving.mp4"
    assert (found["behind"], found["hysteresis"]) == (0, 0.0)
    assert [r["point"] for r in found["rows"]] == [r.point for r in rows]
    assert "blocks.5@2" in console.export_text()


def test_answers_that_lag_cost_bytes_and_hysteresis_saves_some(bundle: Bundle, video: Path) -> None:
    quiet = Console(quiet=True)
    near, far, held = (evaluate_video(bundle, video, (), how, console=quiet)[0] for how in (Lag(), Lag(2), Lag(0, 0.3)))
    assert near.bytes < far.bytes
    assert held.bytes < near.bytes
    assert held.error > near.error == 1.0


def test_what_cannot_be_measured_is_refused(bundle: Bundle, video: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    (tmp_path / "no.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"no\.mp4"):
        evaluate_video(bundle, tmp_path / "no.mp4")
    with pytest.raises(DataError, match="31 frames"):
        evaluate_video(bundle, video, (), Lag(31))
    with pytest.raises(DataError, match="hysteresis"):
        evaluate_video(bundle, video, (), Lag(0, 0.6))
    tensors = {name: t for name, t in bundle.tensors.items() if not name.startswith("temporal/")}
    with pytest.raises(DataError, match="headrace temporal"):
        evaluate_video(replace(bundle, tensors=tensors), video)

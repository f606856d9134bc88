"""The rendered video: every frame once and in order, boxes where they are in the captured frame."""

from __future__ import annotations

import av
import numpy as np
import pytest
from headrace.edge.exceptions import ConfigError
from headrace.edge.ledger import Frame, Ledger, Outcome
from headrace.edge.render import MOST_BEHIND, Render
from headrace.models.bundle import Preprocessing
from headrace.protos.messages import Box, Label
from PIL import Image

from .test_edge_daemon import start  # noqa: F401  a fixture

HOW = Preprocessing(320, 320, 0.0, 255.0, "letterbox")
GREY = (90, 90, 90)


def frames_of(path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]


def frame(number: int, shade: int = 90, size: tuple[int, int] = (640, 360), **more) -> Frame:
    picture = Image.new("RGB", size, (shade,) * 3)
    made = Frame(number, 0.0, 1.0, size=size, shown=picture, **more)
    made.outcome = more.get("outcome", Outcome.OK)
    return made


def render(tmp_path, frames) -> list[np.ndarray]:
    path = tmp_path / "out.mp4"
    made = Render(path, 10.0, ("cat", "dog"), HOW)
    for each in frames:
        made.frame(each)
    made.close()
    return frames_of(path)


def test_frames_are_written_in_the_order_of_capture(tmp_path):
    """They close in another; one could not be read."""
    shades = {0: 40, 1: 80, 2: 120, 4: 200}
    unread = Frame(3, 0.0, 1.0)
    given = {i: frame(i, shade) for i, shade in shades.items()} | {3: unread}
    found = render(tmp_path, [given[i] for i in (2, 0, 4, 3, 1)])
    assert [f.shape for f in found] == [(360, 640, 3)] * 4
    assert [round(float(f[:300].mean()) / 40) for f in found] == [1, 2, 3, 5]


def test_a_box_is_drawn_where_it_is_in_the_captured_frame(tmp_path):
    """640x360 letterboxed into 320: half the size, 70 pixels down."""
    box = Box(1, 0.9, 50, 100, 150, 200)
    (found, held, plain) = render(
        tmp_path,
        [
            frame(0, boxes=(box, Box(0, 0.1, 200, 100, 300, 200)), latency_s=0.1),
            frame(1, outcome=Outcome.DROPPED),
            frame(2, latency_s=0.1),
        ],
    )
    changed = np.abs(found.astype(int) - 90).max(2) > 40
    rows, columns = np.nonzero(changed[: 360 - 40])
    assert (columns.min(), columns.max()) == (pytest.approx(100, abs=3), pytest.approx(300, abs=3))
    assert (rows.min(), rows.max()) == (pytest.approx(60, abs=3), pytest.approx(260, abs=3))
    assert np.abs(found[160, 150:250].astype(int) - 90).max() < 20, "the inside is left as it is"
    assert np.abs(held[150:250, 98:103].astype(int) - 90).max() > 25, "the last boxes stay, in grey"
    assert np.abs(plain[100:200].astype(int) - 90).max() < 20, "an answer without boxes clears them"


def test_small_frames_are_enlarged_and_odd_sizes_fit(tmp_path):
    (found, other) = render(
        tmp_path, [frame(0, size=(101, 75), labels=(Label(0, 0.9),), latency_s=0.1), frame(1, size=(400, 300))]
    )
    assert found.shape == other.shape == (300, 404, 3)


def test_what_cannot_be_drawn_in_time_is_left_out(tmp_path):
    """Frames whose turn has not come are not all kept in memory."""
    path = tmp_path / "out.mp4"
    made = Render(path, 10.0, (), HOW)
    for number in range(1, MOST_BEHIND + 20):
        made.frame(frame(number, size=(64, 64)))
    made.frame(frame(0, size=(64, 64)))
    made.close()
    assert made.left_out >= 19
    assert len(frames_of(path)) == MOST_BEHIND + 20 - made.left_out


@pytest.mark.parametrize(("name", "why"), [("nowhere/out.mp4", "is no folder"), ("out.unknown", "cannot be written")])
def test_a_file_that_cannot_be_written_is_refused_at_once(name, why, tmp_path):
    with pytest.raises(ConfigError, match=why):
        Render(tmp_path / name, 10.0, (), HOW)


def test_pictures_are_kept_only_where_they_are_shown():
    for keep in (True, False):
        ledger = Ledger(lambda _: None, keep_pictures=keep)
        entered = ledger.enter(0.0, 1.0, Image.new("RGB", (4, 4)))
        ledger.close(entered, Outcome.DROPPED)
        assert (entered.shown is not None) == keep and entered.picture is None


async def test_a_real_edge_renders_its_frames(server, start, tmp_path):  # noqa: F811
    edge = await start(
        server=server.address, as_fast_as_possible=True, point="stage.1@0", render=str(tmp_path / "out.mp4")
    )
    assert await edge.end() == 0, "".join(edge.log)
    assert len(frames_of(tmp_path / "out.mp4")) == 6

"""The live view on a terminal and without one, and the timeline."""

from __future__ import annotations

import io

import pytest
from headrace.bench.demo.scenario import PHASES
from headrace.bench.demo.tally import OUTCOMES, FrameRecord
from headrace.bench.demo.timeline import draw
from headrace.bench.demo.view import View
from headrace.bench.links.record import LinkRecord
from headrace.bench.links.schedule import Phase
from PIL import Image
from rich.console import Console

LINK = [Phase(1, 8), Phase(1, 0), Phase(4, 0.5)]


def records(count: int) -> list[FrameRecord]:
    """Frames of every outcome, some without an answer."""
    return [
        FrameRecord(
            i,
            i / 10,
            OUTCOMES[i % len(OUTCOMES)],
            "" if i % len(OUTCOMES) == 3 else ("webp@30", "blocks.3@4", "local")[i % 3],
            100 * i,
            (1,),
            "tabby",
            None if i % len(OUTCOMES) == 3 else 40.0 + 10 * i,
            1000.0 if i % 2 else None,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_view_shows_what_happens(terminal) -> None:
    now = [0.0]
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120)
    with View(console, LINK, frames=50, deadline_ms=250, clock=lambda: now[0]) as view:
        now[0] = 10.0
        view.begin(0.5)
        for record in records(50):
            now[0] = 10.0 + record.captured_s
            view.frame(record)
        view.note("the server was killed (SIGKILL)")
    text = file.getvalue()
    assert "SIGKILL" in text
    assert "0.5 Mbit/s" in text
    assert "tabby" in text
    assert ("ok 9" if terminal else "ok 7") in text
    if not terminal:
        assert "\x1b" not in text
        assert len(text.splitlines()) == 3  # two lines in five seconds, and the note


def test_without_a_terminal_an_outage_is_named() -> None:
    now = [0.0]
    file = io.StringIO()
    view = View(Console(file=file, width=120), LINK, frames=50, deadline_ms=250, clock=lambda: now[0])
    view.begin()
    now[0] = 1.5
    view.frame(FrameRecord(20, 2.0, "dropped"))
    assert "OUTAGE" in file.getvalue()
    assert "no answer" in file.getvalue()


@pytest.mark.parametrize("frames", [records(60), [], [FrameRecord(0, 0.0, "dropped")]], ids=["many", "none", "one"])
def test_the_timeline_is_a_picture(tmp_path, frames) -> None:
    path = tmp_path / "timeline.png"
    draw(path, frames, PHASES, deadline_ms=250, record=LinkRecord(up={0: 1000, 12: 50_000}), title="a run")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        colours = picture.convert("RGB").getcolors(2**24)
        assert picture.width > 1000
        assert colours is not None
        assert len(colours) > 20

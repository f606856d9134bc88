"""The demo's live view: what the edge says of its frames, beside what the link is set to.

On a terminal it is redrawn in place; elsewhere (a file, CI) a line is printed every two seconds.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..links.schedule import Phase, RateSchedule
from .tally import OUTCOMES, FrameRecord

STYLES = {"ok": "green", "local": "blue", "late": "yellow", "dropped": "bright_black", "error": "red"}
_BARS = "▁▂▃▄▅▆▇█"
_SHOWN_FRAMES = 48
_LINE_EVERY_S = 2.0


class View:
    """Shows a run; a context manager around it."""

    def __init__(
        self,
        console: Console,
        phases: Sequence[Phase],
        *,
        frames: int,
        deadline_ms: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Describe the run.

        Args:
            console: where to.
            phases: the link's schedule, from the first frame on.
            frames: how many will be captured.
            deadline_ms: of each.
            clock: seconds.
        """
        self._console, self._phases, self._schedule = console, phases, RateSchedule.of_phases(phases)
        self._expected, self._deadline_ms, self._clock = frames, deadline_ms, clock
        self._begun: float | None = None
        self._counts: Counter[str] = Counter()
        self._recent: deque[FrameRecord] = deque(maxlen=_SHOWN_FRAMES)
        self._note = ""
        self._next_line_s = _LINE_EVERY_S
        self._live = (
            Live(console=console, refresh_per_second=6, get_renderable=self._render) if console.is_terminal else None
        )

    def __enter__(self) -> View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, ago_s: float = 0.0) -> None:
        """The first frame was captured so many seconds ago: the link's schedule begins."""
        self._begun = self._clock() - ago_s

    def note(self, text: str) -> None:
        """Something happened that is no frame."""
        self._note = text
        if self._live is None:
            self._console.print(f"{self._elapsed():6.1f} s  {text}", highlight=False)

    def frame(self, record: FrameRecord) -> None:
        """A frame's outcome is known."""
        self._counts[record.outcome] += 1
        self._recent.append(record)
        if self._live is None and record.captured_s >= self._next_line_s:
            self._next_line_s += _LINE_EVERY_S
            self._console.print(self._line(record), highlight=False, soft_wrap=True)

    def _elapsed(self) -> float:
        return 0.0 if self._begun is None else self._clock() - self._begun

    def _link(self) -> str:
        rate = self._schedule.rate(self._elapsed())
        return f"{rate / 1e6:g} Mbit/s" if rate else "OUTAGE"

    def _line(self, last: FrameRecord) -> str:
        counts = " ".join(f"{outcome} {n}" for outcome in OUTCOMES if (n := self._counts[outcome]))
        latency = "no answer" if last.latency_ms is None else f"{last.latency_ms:.0f} ms"
        return (
            f"{last.captured_s:6.1f} s  {self._link():>11}  {last.point or '-':<12} {last.bytes / 1000:5.1f} kB "
            f"{latency:>9}  {counts}  {last.text}"
        )

    def _render(self) -> RenderableType:
        last = self._recent[-1] if self._recent else None
        elapsed, known = self._elapsed(), sum(self._counts.values())
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="bright_black", justify="right", min_width=10)
        rows.add_column()
        rate = self._schedule.rate(elapsed)
        rows.add_row("link", Text(self._link(), "bold" if rate else "bold red"))
        if last is not None:
            believed = "unknown" if last.rate_kbps is None else f"{last.rate_kbps / 1000:.2f} Mbit/s"
            rows.add_row("estimate", believed if last.connected else Text("not connected", "red"))
            rows.add_row("point", f"[bold]{last.point or '-'}[/]  {last.bytes / 1000:.1f} kB")
            rows.add_row("latency", self._latencies())
            rows.add_row("answer", Text(last.text or "-", "italic"))
        rows.add_row("outcomes", self._outcomes())
        rows.add_row("frames", ProgressBar(self._expected, min(known, self._expected), width=_SHOWN_FRAMES))
        if self._note:
            rows.add_row("", Text(self._note, "bright_black"))
        return Panel(
            Group(rows), title=f"Headrace  {elapsed:.0f} s", title_align="left", width=min(96, self._console.width)
        )

    def _latencies(self) -> Text:
        """The last frames' latencies as bars: full height is twice the deadline, red is no answer."""
        text = Text()
        for record in self._recent:
            if record.latency_ms is None:
                text.append("×", STYLES.get(record.outcome, ""))
            else:
                level = int(record.latency_ms / (2 * self._deadline_ms) * len(_BARS))
                text.append(_BARS[min(level, len(_BARS) - 1)], STYLES.get(record.outcome, ""))
        answered = [r.latency_ms for r in self._recent if r.latency_ms is not None]
        if answered:
            text.append(f" {answered[-1]:.0f} of {self._deadline_ms:.0f} ms")
        return text

    def _outcomes(self) -> Text:
        text = Text()
        for outcome in OUTCOMES:
            if n := self._counts[outcome]:
                text.append(f"{outcome} {n}  ", STYLES.get(outcome, ""))
        return text

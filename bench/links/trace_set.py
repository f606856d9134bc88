"""Sets of recorded links: which windows of which traces a measurement runs over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...models.exceptions import DataError
from .traces import Trace, read_trace

SQUARE_WAVE = "square wave"
_NO_TRACES = ("LICENCE", "LICENSE", "README")
_LEAST_BPS = 1000.0
"""A window that carries less than that is an outage, in which there is nothing to choose."""


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of one recorded link.

    Attributes:
        trace: the stretch, from its time 0 on.
        group: the trace set: the folder that the file lies in.
        cellular: recorded on a mobile network (all but FCC's measurements of broadband, by their file names).
    """

    trace: Trace
    group: str
    cellular: bool


def square_wave(high_bps: float = 8e6, low_bps: float = 0.3e6, step_s: float = 10.0) -> Window:
    """The link on which adaptation is hardest to get right: it is wrong right after every step."""
    return Window(Trace.steps([(step_s, high_bps), (step_s, low_bps)], SQUARE_WAVE), SQUARE_WAVE, False)


def read_windows(folder: Path, *, seconds: float, below_bps: float, per_trace: int) -> list[Window]:
    """Windows of all traces in a folder and its subfolders, in order of their names.

    Args:
        folder: where they lie; a trace's format is told by its content.
        seconds: length of a window; a shorter trace is looped.
        below_bps: windows with a mean rate of this and more are left out.
        per_trace: at most so many of each trace, evenly spread over it; 0: all that fit.

    Raises:
        DataError: there is no such folder, a file in it is no trace, or no window is left.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; --traces takes one with recorded links")
    windows = [
        w
        for path in sorted(folder.rglob("*"))
        if _is_trace(path)
        for w in _of(path, folder, seconds, below_bps, per_trace)
    ]
    if not windows:
        raise DataError(f"{folder} holds no trace with a window under {below_bps / 1e6:g} Mbit/s; see --below-mbps")
    return windows


def _is_trace(path: Path) -> bool:
    return path.is_file() and not path.name.startswith((".", *_NO_TRACES)) and path.suffix not in {".md", ".py"}


def _of(path: Path, folder: Path, seconds: float, below_bps: float, per_trace: int) -> Iterator[Window]:
    trace = read_trace(path)
    starts = []
    for number in range(max(1, int(trace.duration_s // seconds))):
        begin = number * seconds
        mean_bps = 8 * (trace.carried(begin + seconds) - trace.carried(begin)) / seconds
        if _LEAST_BPS <= mean_bps < below_bps:
            starts.append(begin)
    if 0 < per_trace < len(starts):
        starts = [starts[number * len(starts) // per_trace] for number in range(per_trace)]
    broadband = path.name.startswith("trace_") and "http" in path.name
    for begin in starts:
        window = trace.window(begin, seconds, f"{path.name}+{begin:g}s")
        yield Window(window, path.parent.name if path.parent != folder else folder.name, not broadband)

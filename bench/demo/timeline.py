"""The demo's picture: one run over time, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..links.record import LinkRecord
from ..links.schedule import Phase
from .tally import OUTCOMES, FrameRecord

COLOURS = {
    "ok": "#2a7f4f",
    "local": "#2b6cb0",
    "late": "#d97706",
    "dropped": "#9ca3af",
    "filtered": "#c4b5fd",
    "error": "#b91c1c",
}
_OUTAGE = "#fde8e8"
_FLOOR_KBPS = 50.0
"""Where an outage is drawn on the logarithmic axis of the rate."""


def draw(
    path: Path,
    frames: Sequence[FrameRecord],
    phases: Sequence[Phase],
    *,
    deadline_ms: float,
    record: LinkRecord,
    title: str,
) -> None:
    """Draw bandwidth, operating point, bytes, latency and outcomes of `frames` over time into `path`.

    Args:
        path: PNG file.
        frames: in any order; times in seconds since the first one.
        phases: the link's schedule, from the first frame on.
        deadline_ms: of every frame.
        record: what passed the link, from the first frame on.
        title: of the figure.
    """
    figure = Figure(figsize=(13, 11), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(5, 1, sharex=True, gridspec_kw={"height_ratios": [2.2, 2.6, 1.6, 3, 0.7]})
    rate, point, size, latency, strip = grid
    figure.suptitle(title)
    ordered = sorted(frames, key=lambda f: f.frame)
    end = max(ordered[-1].captured_s if ordered else 0.0, 1.0) + 0.5
    _draw_rate(rate, ordered, phases, record, end)
    _draw_points(point, ordered)
    size.bar([f.captured_s for f in ordered], [f.bytes / 1000 for f in ordered], width=0.08, color="#374151")
    size.set_ylabel("sent, kB")
    _draw_latency(latency, ordered, deadline_ms)
    _draw_strip(strip, ordered)
    for axes in grid:
        axes.set_xlim(-0.5, end)
        _mark_phases(axes, phases, end)
    strip.set_xlabel("seconds since the first frame")
    figure.savefig(path, dpi=110)


def _mark_phases(axes: Any, phases: Sequence[Phase], end: float) -> None:
    at = 0.0
    for phase in phases:
        if at >= end:
            break
        axes.axvline(at, color="#e5e7eb", linewidth=1, zorder=0)
        if phase.mbps == 0:
            axes.axvspan(at, min(at + phase.seconds, end), color=_OUTAGE, zorder=0)
        at += phase.seconds


def _draw_rate(
    axes: Any, frames: Sequence[FrameRecord], phases: Sequence[Phase], record: LinkRecord, end: float
) -> None:
    starts, rates, at = [], [], 0.0
    for phase in phases:
        if at >= end:
            break
        starts.append(at)
        rates.append(phase.mbps * 1000)
        label = f"{phase.mbps:g}" if phase.mbps else "outage"
        axes.annotate(label, (at, 1.01), xycoords=("data", "axes fraction"), fontsize=8, color="#6b7280")
        at += phase.seconds
    drawn = [max(r, _FLOOR_KBPS) for r in rates]
    axes.step([*starts, end], [*drawn, drawn[-1]], where="post", color="#111827", linewidth=2, label="link (set)")
    seconds: dict[int, int] = {}
    for bin_, count in record.up.items():
        second = int(bin_ * record.bin_s)
        seconds[second] = seconds.get(second, 0) + count
    passed = [(s + 0.5, n * 8 / 1000) for s, n in sorted(seconds.items()) if s < end]
    axes.plot(
        *zip(*passed, strict=True), "o", markersize=3, color="#2b6cb0", label="passed, a second"
    ) if passed else None
    believed = [(f.captured_s, f.rate_kbps) for f in frames if f.rate_kbps]
    if believed:
        axes.plot(*zip(*believed, strict=True), color="#d97706", linewidth=1, label="edge's estimate")
    axes.set_yscale("log")
    axes.set_ylim(_FLOOR_KBPS * 0.8, 40_000)
    axes.set_ylabel("kbit/s (Mbit/s on top)")
    axes.legend(loc="upper right", fontsize=8, ncols=3)


def _draw_points(axes: Any, frames: Sequence[FrameRecord]) -> None:
    """Operating points as rows: by stage, and within it from coarse to fine."""

    def order(name: str) -> tuple[str, int]:
        stage, _, level = name.partition("@")
        number = int(level) if level.isdigit() else 0
        return ("" if stage == "local" else stage, number if stage in ("webp", "jpeg") else -number)

    names = sorted({f.point for f in frames if f.point}, key=order)
    rows = {name: row for row, name in enumerate(names)}
    for outcome in OUTCOMES:
        chosen = [f for f in frames if f.point and f.outcome == outcome]
        axes.scatter(
            [f.captured_s for f in chosen], [rows[f.point] for f in chosen], s=9, color=COLOURS[outcome], marker="s"
        )
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(-0.7, max(len(names), 1) - 0.3)
    axes.set_ylabel("operating point")
    axes.grid(axis="y", color="#f3f4f6")
    axes.set_axisbelow(True)


def _draw_latency(axes: Any, frames: Sequence[FrameRecord], deadline_ms: float) -> None:
    top = 2.4 * deadline_ms
    for outcome in OUTCOMES:
        chosen = [(f.captured_s, min(f.latency_ms, top)) for f in frames if f.outcome == outcome and f.latency_ms]
        if chosen:
            axes.scatter(*zip(*chosen, strict=True), s=11, color=COLOURS[outcome])
    unanswered = [f.captured_s for f in frames if f.latency_ms is None]
    axes.plot(unanswered, [top] * len(unanswered), "x", markersize=4, color=COLOURS["dropped"], clip_on=False)
    axes.axhline(deadline_ms, color="#b91c1c", linewidth=1)
    axes.annotate(
        "deadline",
        (0.998, deadline_ms * 1.03),
        xycoords=("axes fraction", "data"),
        ha="right",
        fontsize=8,
        color="#b91c1c",
    )
    axes.set_ylim(0, top)
    axes.set_ylabel(f"latency, ms\n(x: no answer; at the top: over {top:.0f})")


def _draw_strip(axes: Any, frames: Sequence[FrameRecord]) -> None:
    for outcome in OUTCOMES:
        at = [f.captured_s for f in frames if f.outcome == outcome]
        axes.bar(at, [1] * len(at), width=0.1, color=COLOURS[outcome])
    axes.set_yticks([])
    axes.set_ylim(0, 1)
    axes.set_ylabel("outcome")
    counted = [(o, sum(f.outcome == o for f in frames)) for o in OUTCOMES]
    handles = [Patch(color=COLOURS[o], label=f"{o} {n}") for o, n in counted if n]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.75), ncols=len(OUTCOMES), fontsize=9)

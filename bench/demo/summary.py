"""What the demo says in the end: frames by outcome, share in time, agreement with the uncut model, bytes; and files."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ...models.bundle import Bundle
from ..links.schedule import Phase
from ..workload import Answers, Workload
from . import detection, scenario, timeline
from .references import Conditions, Reference, compute_times, replay_references, server_seconds
from .tally import OUTCOMES, FrameRecord, Tally, tally

HEADRACE = "Headrace, measured"
MEASURED = (
    "Measured: the first column, by real processes over the emulated link. For the other columns: every packet's size "
    "(the same frames were really coded), every answer (the tails really ran), every frame's compute time, "
    "and the server's."
)
REPLAYED = (
    "Replayed in virtual time: when the other columns' packets and answers arrive on the same schedule of the link. "
    "'Headrace, replayed' shows how far replay and reality agree."
)
AGREEMENT = (
    "Agreement with the uncut model on the same frames: its label is ours (same label), or among our five best (in our "
    "five). (1) of the frames answered in time; (2) of all captured frames, where one without an answer in time agrees "
    "with nothing."
)


def conclude(
    console: Console,
    output: Path,
    bundle: Bundle,
    streamed: scenario.Streamed,
    *,
    half: Path,
    workload: Workload,
    answers: Answers,
    detected: detection.Detected | None = None,
) -> int:
    """Replay the references, print the summary and write the files. Returns the exit code."""
    scenario.write_frames(output / "frames.jsonl", streamed)
    began = time.monotonic()
    with console.status("") as status:

        def note(text: str) -> None:
            status.update(text)
            if not console.is_terminal:
                console.print(f"Afterwards: {text} ...")

        note("coding the same frames for the references")
        workload.begin(half)
        conditions = _conditions(streamed, workload)
        references = replay_references(workload, answers, conditions, note)
    tallies = _tallies(streamed, references, workload)
    timeline.draw(
        output / "timeline.png",
        streamed.frames,
        scenario.PHASES,
        deadline_ms=scenario.DEADLINE_MS,
        record=streamed.link,
        title=f"Headrace: {bundle.backbone.name}, {scenario.FPS:g} frames/s, {scenario.DEADLINE_MS:g} ms deadline, "
        f"a device on which the uncut model takes {scenario.DEVICE_UNCUT_MS:g} ms",
    )
    complaints = streamed.complaints()
    _write_summary(output / "summary.json", bundle, streamed, conditions, tallies, complaints, detected)
    _print_phases(console, streamed.frames)
    _print_tallies(console, tallies)
    for text in (MEASURED, REPLAYED, AGREEMENT):
        console.print(text, style="bright_black", highlight=False)
    if detected is not None:
        detection.say(console, detected, output)
    captured = streamed.summary["frames"]
    for complaint in complaints:
        console.print(f"The sums do not add up: {complaint}", style="bold red")
    if not complaints:
        console.print(f"The outcomes of {captured} captured frames sum to {captured}.", highlight=False)
    console.print(
        f"Written: {output / 'timeline.png'}, summary.json, frames.jsonl, link.json (replays "
        f"took {time.monotonic() - began:.0f} s)",
        soft_wrap=True,
        highlight=False,
    )
    return 1 if complaints else 0


def _conditions(streamed: scenario.Streamed, workload: Workload) -> Conditions:
    fallback = workload.device_seconds(scenario.DEVICE_UNCUT_MS / 1000)
    return Conditions(
        phases=scenario.PHASES,
        delay_s=scenario.DELAY_S,
        deadline_s=scenario.DEADLINE_MS / 1000,
        fps=scenario.FPS,
        compute=compute_times(streamed.frames, workload.points, fallback),
        server_s=server_seconds(streamed.frames),
        disconnected_s=tuple(streamed.server_away_s),
    )


def _tallies(streamed: scenario.Streamed, references: Sequence[Reference], workload: Workload) -> list[Tally]:
    uncut = [labels[0] for labels in workload.uncut]
    return [
        tally(HEADRACE, streamed.frames, uncut, measured=True),
        *(tally(each.name, each.frames, uncut, measured=False) for each in references),
    ]


def _write_summary(
    path: Path,
    bundle: Bundle,
    streamed: scenario.Streamed,
    conditions: Conditions,
    tallies: Sequence[Tally],
    complaints: Sequence[str],
    detected: detection.Detected | None,
) -> None:
    content = {
        "fingerprint": bundle.fingerprint.hex(),
        "frames": streamed.summary["frames"],
        "sums_add_up": not complaints,
        "complaints": list(complaints),
        "fps": scenario.FPS,
        "deadline_ms": scenario.DEADLINE_MS,
        "device_uncut_ms": scenario.DEVICE_UNCUT_MS,
        "link": {
            "kind": streamed.link_kind,
            "one_way_delay_ms": scenario.DELAY_S * 1000,
            "phases": [asdict(phase) for phase in scenario.PHASES],
            "connections": streamed.link.connections,
        },
        "server_away_s": streamed.server_away_s,
        "compute_ms": {stage: round(s * 1000, 2) for stage, s in sorted(conditions.compute.median_s.items())},
        "server_ms": round(conditions.server_s * 1000, 2),
        "runs": [asdict(each) for each in tallies],
        "detection": detected.summary() if detected is not None else None,
        "notes": [MEASURED, REPLAYED, AGREEMENT],
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def _print_tallies(console: Console, tallies: Sequence[Tally]) -> None:
    """One column a run, so that it fits a terminal of 80 columns."""
    table = Table(title="The same frames over the same link", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("")
    for each in tallies:
        name, _, rest = each.name.replace(",", "").rpartition(" ")
        table.add_column(f"{name}\n{rest}", justify="right", no_wrap=True)
    shown = [o for o in OUTCOMES if any(t.outcomes[o] for t in tallies)]
    rows: list[tuple[str, Callable[[Tally], str]]] = [
        ("frames", lambda t: str(t.captured)),
        *((f"  {outcome}", lambda t, o=outcome: str(t.outcomes[o])) for outcome in shown),
        ("in time", lambda t: f"{t.on_time:.1%}"),
        ("same label (1)", lambda t: f"{t.agree_first:.1%}"),
        ("in our five (1)", lambda t: f"{t.agree_five:.1%}"),
        ("same label (2)", lambda t: f"{t.agree_first_all:.1%}"),
        ("in our five (2)", lambda t: f"{t.agree_five_all:.1%}"),
        ("bytes a frame", lambda t: f"{t.bytes_per_frame:.0f}"),
        ("median ms", lambda t: "-" if t.latency_ms is None else f"{t.latency_ms:.0f}"),
    ]
    for name, cell in rows:
        table.add_row(name, *(cell(each) for each in tallies))
    console.print(table)


def _print_phases(console: Console, frames: Sequence[FrameRecord]) -> None:
    table = Table(title="Headrace on the narrowing link", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("second", "Mbit/s", "frames", "in time", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("mostly at (so many frames)", no_wrap=True)
    for start, phase, inside in _by_phase(frames, scenario.PHASES):
        points = Counter(f.point for f in inside if f.point)
        table.add_row(
            f"{start:g}",
            f"{phase.mbps:g}" if phase.mbps else "outage",
            str(len(inside)),
            f"{sum(f.on_time for f in inside) / max(1, len(inside)):.0%}",
            f"{sum(f.bytes for f in inside) / max(1, len(inside)):.0f}",
            ", ".join(f"{name} {n}" for name, n in points.most_common(2)),
        )
    console.print(table)


def _by_phase(frames: Sequence[FrameRecord], phases: Sequence[Phase]) -> list[tuple[float, Phase, list[FrameRecord]]]:
    """Start, phase, and the frames captured in it; the last one takes what comes later."""
    found, at = [], 0.0
    for number, phase in enumerate(phases):
        end = at + phase.seconds if number + 1 < len(phases) else float("inf")
        found.append((at, phase, [f for f in frames if at <= f.captured_s < end]))
        at = end
    return found

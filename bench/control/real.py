"""The real half of `headrace bench control`: some cells with real processes over an emulated link.

    server process <--emulated link (netem, TUN relay or proxy)--> edge process --lines--> on-time accuracy, measured
    the same frames, packets really coded, measured times --> virtual clock          --> on-time accuracy, simulated

Both count an answer in time with the accuracy that the bundle's table states for its point (for an answer in reserve,
for that point), so that they can be compared. The simulation is given what the real run measured and the control loop
does not choose: sizes of these very frames; the compute times that the edge began with, those by stage, and how lucky
each frame was in them; how long a free device takes to notice a frame; the server's times; and what the processes and
the emulator add to an answer beside these, a few ms of scheduling, gRPC and relaying.
"""

from __future__ import annotations

import ast
import asyncio
import math
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ...models.bundle import Bundle
from ...models.exceptions import HeadraceError
from ...models.operating_point import Kind, OperatingPoint
from ...server.config import ServerSettings
from ...server.edge_halves import EdgeHalves
from .. import material
from ..cores import all_cores, cores_beside_the_edge
from ..links.emulators import Emulator, choose, open_link
from ..links.spec import LinkSpec
from ..links.trace_set import Window
from ..links.traces import Trace
from ..links.virtual_link import VirtualLink
from ..processes import Process, Server
from ..workload import Workload
from .cells import Conditions
from .simulate import coder_seconds, replay

PORT, EDGE_LOG = 50051, "edge.log"
DOWN_BPS = 1e8
MOST_ROUNDS = 12
"""So often at most a run is simulated, each time with more of its packets really coded."""
ON_TIME = ("ok", "local")
COMPUTE = ("prepare", "compute", "compress")
LEAST_AGAIN = 5
"""From so many frames that were coded anew is known what that takes."""
MOST_PICK_UP_S = 0.01
"""A free device takes no longer to notice a frame."""

Line = dict[str, Any]
Task = tuple[Window, float, float]
"""Window, deadline and device, both in seconds."""


@dataclass(frozen=True, slots=True)
class RealCell:
    """One cell, measured and simulated.

    Attributes:
        trace: name of the window.
        deadline_s, device_s: of the cell; the device by what the uncut model takes on it.
        measured, simulated: on-time accuracy, 0..1.
        added_s: what the processes and the emulator added to an answer, median.
        outcomes: of the measured frames.
    """

    trace: str
    deadline_s: float
    device_s: float
    measured: float
    simulated: float
    added_s: float
    outcomes: dict[str, int]

    @property
    def difference(self) -> float:
        """Measured less simulated."""
        return self.measured - self.simulated


def run_real(
    folder: Path, tasks: Sequence[Task], conditions: Conditions, console: Console, emulator: str = "auto"
) -> list[RealCell]:
    """Run cells for real, one after another.

    Args:
        folder: of the bundle.
        tasks: which cells.
        conditions: as for the simulation; runs are as long as the demo's frames last at most.
        console: says which emulator is used, and how it goes.
        emulator: "auto" for the best one that this machine has, or its name.

    Raises:
        HeadraceError: a process ended before its time, or the emulator cannot be used.
    """
    bundle, (chosen, why) = Bundle.load(folder), choose(emulator)
    console.print(f"Real processes over: {why}", highlight=False, soft_wrap=True)
    frames = min(conditions.frames, material.FRAMES)
    with tempfile.TemporaryDirectory(prefix="headrace-") as scratch:
        photographs = material.write_photographs(Path(scratch) / "photographs")
        sources = [str(material.video()), str(photographs)]
        with Workload(sources, bundle, frames, len(all_cores())) as workload:
            workload.ready()
            half = asyncio.run(EdgeHalves(ServerSettings.load().cache_dir).folder(bundle))
            workload.begin(half)
            found = []
            for number, task in enumerate(tasks):
                log = Path(scratch) / str(number)
                log.mkdir()
                lines = asyncio.run(_measured(chosen, folder, half, sources, task, conditions, frames, log))
                profile_s = profile_in((log / EDGE_LOG).read_text(errors="replace"))
                found.append(_compare(bundle.operating_points, lines, profile_s, workload, task, conditions))
                console.print(_told(found[-1]), highlight=False)
    return found


async def _measured(
    emulator: Emulator,
    bundle: Path,
    half: Path,
    sources: Sequence[str],
    task: Task,
    conditions: Conditions,
    frames: int,
    scratch: Path,
) -> list[Line]:
    """The edge's lines of one run; the link begins with the first captured frame."""
    window, deadline_s, device_s = task
    cores = cores_beside_the_edge()
    async with AsyncExitStack() as stack:
        # As in the simulation, answers come back unhindered: a recorded uplink's gaps are not the downlink's.
        spec = LinkSpec(up=window.trace, down=DOWN_BPS, delay_s=conditions.delay_s)
        link = await open_link(emulator, spec, PORT, cores=cores)
        stack.push_async_callback(link.close)
        serve = {
            "bundles": bundle,
            "host": link.server_host,
            "insecure": True,
            "port": PORT,
            "threads": max(1, len(cores)),
        }
        server = await Server.listening(serve, scratch / "server.log", cores, link.server_prefix)
        stack.push_async_callback(server.stop)
        flags = {
            "server": link.address,
            "bundle": half,
            "source": sources,
            "fps": conditions.fps,
            "max_frames": frames,
            "deadline_ms": deadline_s * 1000,
            "device_uncut_ms": device_s * 1000,
            "cut_short": False,  # the simulation sends whole frames
        }
        edge = await Process.start("edge", flags, scratch / EDGE_LOG, all_cores(), link.edge_prefix)
        stack.push_async_callback(edge.stop)
        lines: list[Line] = []
        async for line in edge.lines():
            if line.get("event") != "frame":
                continue
            if not lines:
                link.begin((line["latency_ms"] or 0.0) / 1000 + line["frame"] / conditions.fps)
            lines.append(line)
        if await edge.wait() != 0 or len(lines) != frames:
            raise HeadraceError(f"the edge gave {len(lines)} of {frames} frames:\n{edge.log_end()}")
        return sorted(lines, key=lambda line: int(line["frame"]))


def _compare(
    points: Sequence[OperatingPoint],
    lines: Sequence[Line],
    profile_s: Mapping[str, float],
    workload: Workload,
    task: Task,
    conditions: Conditions,
) -> RealCell:
    window, deadline_s, device_s = task
    accuracy = {p.name: p.accuracy for p in points}
    outcomes: dict[str, int] = {}
    for line in lines:
        outcomes[line["outcome"]] = outcomes.get(line["outcome"], 0) + 1
    answers = [line["fallback_point"] or line["point"] for line in lines if line["outcome"] in ON_TIME]
    measured = sum(accuracy[point] for point in answers) / len(lines)
    added_s = added_seconds(lines, window.trace, conditions)
    for _ in range(MOST_ROUNDS):
        simulated = replay(
            points,
            workload.sizes(),
            compute_seconds(points, lines, profile_s or workload.device_seconds(device_s)),
            window.trace,
            delay_s=conditions.delay_s,
            deadline_s=deadline_s,
            fps=conditions.fps,
            server_s=server_seconds(lines, conditions.server_s),
            overhead_bytes=conditions.overhead_bytes,
            uncut_s=device_s,
            coder_s=recoding_seconds(points, lines, device_s),
            seen_s=pick_up_seconds(lines),
            back_s=added_s,
            profile_s=profile_s,
        )
        # Sizes are estimates until a frame has been coded at a point. The loop sees only those of its own choices.
        chosen = [(record.frame, record.point) for record in simulated.records if record.point >= 0]
        unknown = [pair for pair in chosen if not workload.known(pair)]
        if not unknown:
            break
        workload.code(unknown)
    added = statistics.median(added_s)
    return RealCell(window.trace.name, deadline_s, device_s, measured, simulated.score, added, outcomes)


def profile_in(log: str) -> dict[str, float]:
    """Seconds by stage that the edge measured before it began and its loop started from, as its log tells them; nothing
    where it tells none."""
    found = re.search(r"stages_ms=(\{[^}]*\})", log)
    told = ast.literal_eval(found[1]) if found else {}
    return {str(stage): float(ms) / 1000 for stage, ms in told.items()}


def compute_seconds(
    points: Sequence[OperatingPoint], lines: Sequence[Line], profiled: Mapping[str, float]
) -> NDArray[np.float64]:
    """What each frame would have taken on the emulated device at each point, as far as the run tells.

    A frame that was slow for its stage is taken to be as slow for any other: of a stage that ran it gets the time that
    is as far up among those measured as its own is among its stage's. (The same factor for all would make 2 ms that a
    picture took longer into 30 ms of an exit's.)

    Args:
        points: of the bundle.
        lines: the edge's, of all frames.
        profiled: seconds by stage; stages that never ran take theirs, times what those that did took over theirs.

    Returns:
        Seconds, float64 [frames, points].
    """
    stage_of = {p.name: p.stage for p in points}
    took = [sum(line["timings_ms"].get(part, 0.0) for part in COMPUTE) / 1000 for line in lines]
    ran = [stage_of.get(line["point"], "") if "compute" in line["timings_ms"] else "" for line in lines]
    measured = {stage: np.sort([t for t, r in zip(took, ran, strict=True) if r == stage]) for stage in set(ran) - {""}}
    place = [
        float(np.searchsorted(measured[r], t)) / (len(measured[r]) - 1) if r and len(measured[r]) > 1 else 0.5
        for t, r in zip(took, ran, strict=True)
    ]
    over = [float(np.median(times)) / profiled[stage] for stage, times in measured.items() if stage in profiled]
    factor = statistics.median(over) if over else 1.0
    by_stage = {
        stage: np.quantile(measured[stage], place)
        if stage in measured
        else np.full(len(lines), factor * profiled.get(stage, 0.0))
        for stage in {p.stage for p in points}
    }
    return np.stack([by_stage[p.stage] for p in points], axis=1)


def recoding_seconds(points: Sequence[OperatingPoint], lines: Sequence[Line], device_s: float) -> NDArray[np.float64]:
    """What coding a frame anew takes, float64 [points]; of latents as measured, if that was done five times."""
    seconds = coder_seconds(points, device_s)
    again = [line["timings_ms"]["again"] / 1000 for line in lines if "again" in line["timings_ms"]]
    if len(again) >= LEAST_AGAIN:
        seconds[[p.kind is Kind.FEATURE for p in points]] = statistics.median(again)
    return seconds


def pick_up_seconds(lines: Sequence[Line]) -> list[float]:
    """How long after its capture each frame was taken up by a device that was free; the median of these for the others,
    which waited for the device."""
    found, free = [math.nan] * len(lines), -math.inf
    for number, line in enumerate(lines):
        spent = line["timings_ms"]
        wait_s = spent.get("wait", math.nan) / 1000
        if line["captured_s"] >= free and wait_s <= MOST_PICK_UP_S:  # else it may have waited for an answer in reserve
            found[number] = wait_s
        if "compute" in spent:
            free = line["captured_s"] + wait_s + sum(spent.get(part, 0.0) for part in (*COMPUTE, "again")) / 1000
    return _filled(found, 0.0)


def server_seconds(lines: Sequence[Line], otherwise: float) -> list[float]:
    """How long the server held each frame; the median for frames that it did not have, `otherwise` if it had none."""
    found = [line["timings_ms"].get("server", math.nan) / 1000 for line in lines]
    return _filled(found, otherwise)


def _filled(found: Sequence[float], otherwise: float) -> list[float]:
    """With the median in place of what is not a number; `otherwise` if there is nothing else."""
    known = [seconds for seconds in found if not math.isnan(seconds)]
    middle = statistics.median(known) if known else otherwise
    return [middle if math.isnan(seconds) else seconds for seconds in found]


def added_seconds(lines: Sequence[Line], trace: Trace, conditions: Conditions) -> list[float]:
    """What each frame took over the times of its stages, the server and the link, which is reckoned anew from the times
    at which they were written; at least 0, and the median for frames without an answer. The first frame's capture is
    the trace's time 0."""
    link = VirtualLink(trace, delay_s=conditions.delay_s, overhead_bytes=conditions.overhead_bytes)
    over, written_s = [math.nan] * len(lines), 0.0
    for number, line in enumerate(lines):
        spent = line["timings_ms"]
        if not line["bytes"]:
            continue
        made_s = sum(spent.get(part, 0.0) for part in ("wait", *COMPUTE, "again")) / 1000
        captured_s = line["captured_s"] - lines[0]["captured_s"]
        written_s = max(written_s, captured_s + made_s)
        arrives_s = link.write(line["bytes"], written_s)
        if "server" in spent and line["latency_ms"] is not None:
            answered_s = arrives_s + spent["server"] / 1000 + conditions.delay_s
            over[number] = max(captured_s + line["latency_ms"] / 1000 - answered_s, 0.0)
    return _filled(over, 0.0)


def _told(cell: RealCell) -> str:
    outcomes = ", ".join(f"{name} {count}" for name, count in sorted(cell.outcomes.items()))
    return (
        f"{cell.trace}, {cell.deadline_s * 1000:g} ms, device {cell.device_s * 1000:g} ms: measured "
        f"{cell.measured:.3f}, simulated {cell.simulated:.3f} ({outcomes}; {cell.added_s * 1000:.1f} ms more a frame)"
    )


def real_table(cells: Sequence[RealCell]) -> Table:
    """Measured beside simulated on-time accuracy."""
    table = Table(title="real processes over the emulated link, and their simulation")
    for title in ("link", "deadline", "device", "added", "measured", "simulated", "difference"):
        table.add_column(title, justify="left" if title == "link" else "right")
    for c in cells:
        times = f"{c.deadline_s * 1000:g} ms", f"{c.device_s * 1000:g} ms", f"{c.added_s * 1000:.1f} ms"
        table.add_row(c.trace, *times, f"{c.measured:.3f}", f"{c.simulated:.3f}", f"{c.difference:+.3f}")
    return table

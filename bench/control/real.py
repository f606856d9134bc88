"""The real half of `headrace bench control`: some cells with real processes over an emulated link.

    server process <--emulated link (netem, TUN relay or proxy)--> edge process --lines--> on-time accuracy, measured
    the same frames, packets really coded, measured times --> virtual clock          --> on-time accuracy, simulated

Both count an answer in time with the accuracy that the bundle's table states for its point, so that they can be
compared. The simulation is given what the real run measured and the control loop does not choose: sizes of these very
frames, compute times by stage and how much longer or shorter than that each frame took, the server's times, and what
the processes and the emulator add to every frame beside these: a few ms of scheduling, gRPC and relaying.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ...models.bundle import Bundle
from ...models.exceptions import HeadraceError
from ...models.operating_point import OperatingPoint
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

PORT = 50051
DOWN_BPS = 1e8
MOST_ROUNDS = 12
"""So often at most a run is simulated, each time with more of its packets really coded."""
ON_TIME = ("ok", "local")
COMPUTE = ("prepare", "compute", "compress")

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
        added_s: what the processes and the emulator added to every frame.
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
                found.append(_compare(bundle.operating_points, lines, workload, task, conditions))
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
        edge = await Process.start("edge", flags, scratch / "edge.log", all_cores(), link.edge_prefix)
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
    points: Sequence[OperatingPoint], lines: Sequence[Line], workload: Workload, task: Task, conditions: Conditions
) -> RealCell:
    window, deadline_s, device_s = task
    accuracy = {p.name: p.accuracy for p in points}
    outcomes: dict[str, int] = {}
    for line in lines:
        outcomes[line["outcome"]] = outcomes.get(line["outcome"], 0) + 1
    measured = sum(accuracy[line["point"]] for line in lines if line["outcome"] in ON_TIME) / len(lines)
    seconds, factors = compute_factors(points, lines, workload.device_seconds(device_s))
    added_s = added_seconds(lines, window.trace, conditions)
    for _ in range(MOST_ROUNDS):
        simulated = replay(
            points,
            workload.sizes(),
            np.multiply.outer(factors, [seconds[p.stage] for p in points]),
            window.trace,
            delay_s=conditions.delay_s + added_s / 2,
            deadline_s=deadline_s,
            fps=conditions.fps,
            server_s=server_seconds(lines, conditions.server_s),
            overhead_bytes=conditions.overhead_bytes,
            uncut_s=device_s,
            coder_s=coder_seconds(points, device_s),
        )
        # Sizes are estimates until a frame has been coded at a point. The loop sees only those of its own choices.
        chosen = [(record.frame, record.point) for record in simulated.records if record.point >= 0]
        unknown = [pair for pair in chosen if not workload.known(pair)]
        if not unknown:
            break
        workload.code(unknown)
    return RealCell(window.trace.name, deadline_s, device_s, measured, simulated.score, added_s, outcomes)


def compute_factors(
    points: Sequence[OperatingPoint], lines: Sequence[Line], profiled: Mapping[str, float]
) -> tuple[dict[str, float], list[float]]:
    """What the emulated device really took.

    Args:
        points: of the bundle.
        lines: the edge's, of all frames.
        profiled: seconds by stage, for stages that ran fewer than five times.

    Returns:
        Seconds by stage: the median of what was measured. And for each frame how many times its stage's seconds its own
        compute took; 1 where nothing was computed.
    """
    stage_of = {p.name: p.stage for p in points}
    spent: list[tuple[str, float]] = []
    for line in lines:
        each, stage = line["timings_ms"], stage_of.get(line["point"], "")
        took = sum(each.get(part, 0.0) for part in COMPUTE) / 1000 if "compute" in each else 0.0
        spent.append((stage if took > 0 else "", took))
    seconds = dict(profiled)
    for stage in profiled:
        measured = [took for ran, took in spent if ran == stage]
        if len(measured) >= 5:
            seconds[stage] = statistics.median(measured)
    return seconds, [took / seconds[stage] if stage in seconds else 1.0 for stage, took in spent]


def server_seconds(lines: Sequence[Line], otherwise: float) -> list[float]:
    """How long the server held each frame; the median for frames that it did not have, `otherwise` if it had none."""
    found = [line["timings_ms"].get("server", math.nan) / 1000 for line in lines]
    known = [seconds for seconds in found if not math.isnan(seconds)]
    middle = statistics.median(known) if known else otherwise
    return [middle if math.isnan(seconds) else seconds for seconds in found]


def added_seconds(lines: Sequence[Line], trace: Trace, conditions: Conditions) -> float:
    """Median of what frames took over the times of their stages, the server and the link, which is reckoned anew from
    the times at which they were written; at least 0. The first frame's capture is the trace's time 0."""
    link = VirtualLink(trace, delay_s=conditions.delay_s, overhead_bytes=conditions.overhead_bytes)
    over, written_s = [], 0.0
    for line in lines:
        spent = line["timings_ms"]
        if not line["bytes"]:
            continue
        made_s = sum(spent.get(part, 0.0) for part in ("wait", *COMPUTE, "again")) / 1000
        captured_s = line["captured_s"] - lines[0]["captured_s"]
        written_s = max(written_s, captured_s + made_s)
        arrives_s = link.write(line["bytes"], written_s)
        if "server" in spent and line["latency_ms"] is not None:
            answered_s = arrives_s + spent["server"] / 1000 + conditions.delay_s
            over.append(captured_s + line["latency_ms"] / 1000 - answered_s)
    return max(statistics.median(over), 0.0) if over else 0.0


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

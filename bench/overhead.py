"""`headrace bench overhead`: what the runtime adds to computing, with one frame in flight over loopback.

overhead = end-to-end time - (preparing, head, entropy coding) on the edge - (entropy decoding, decoder and tail) on the
server. What remains is queues, threads, event loops, gRPC, protobuf and the kernel, there and back. The
control loop's decision is part of it.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..models.bundle import Bundle
from ..models.exceptions import HeadraceError
from ..server.config import ServerSettings
from ..server.edge_halves import EdgeHalves
from . import material
from .cores import all_cores, cores_beside_the_edge
from .processes import Process, Server

COMPUTE = ("prepare", "compute", "compress", "again", "decode", "tail")
POINT = "blocks.3@4"
"""Any would do: the overhead is beside what a point computes."""
WARM_UP = 20
"""First frames that are left out."""


def run(frames: int = 300, json_file: Path | None = None) -> int:
    """Measure, print median and 99th percentile, and write `{"median_ms", "p99_ms", "frames"}` to `json_file`.

    Returns:
        Exit code 0.

    Raises:
        HeadraceError: a process ended before its time, or frames were not answered.
    """
    console = Console()
    with tempfile.TemporaryDirectory(prefix="headrace-") as scratch:
        lines = asyncio.run(_stream(frames + WARM_UP, Path(scratch), console))
    found = summarise(lines[WARM_UP:])
    console.print(
        f"Overhead of the runtime over {found['frames']} frames, one in flight on loopback: median "
        f"{found['median_ms']:.2f} ms, p99 {found['p99_ms']:.2f} ms (end to end {found['end_to_end_ms']:.2f} ms, of "
        f"which {found['compute_ms']:.2f} ms were computing).",
        highlight=False,
        soft_wrap=True,
    )
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def overhead_ms(line: Mapping[str, Any]) -> float:
    """Of one frame, from its line."""
    timings = line["timings_ms"]
    return float(line["latency_ms"] - sum(timings.get(part, 0.0) for part in COMPUTE))


def summarise(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median and 99th percentile of the overhead in ms, medians of end-to-end and computing time, number of frames.

    Raises:
        HeadraceError: there are none, or one was not answered by the server.
    """
    unanswered = [line for line in lines if line["latency_ms"] is None or not line["bytes"]]
    if not lines or unanswered:
        raise HeadraceError(f"{len(unanswered)} of {len(lines)} frames were not answered by the server; try again")
    each = sorted(overhead_ms(line) for line in lines)
    end_to_end = statistics.median(line["latency_ms"] for line in lines)
    return {
        "median_ms": round(statistics.median(each), 3),
        "p99_ms": round(each[min(len(each) - 1, math.ceil(0.99 * len(each)) - 1)], 3),
        "end_to_end_ms": round(end_to_end, 3),
        "compute_ms": round(
            statistics.median(sum(line["timings_ms"].get(part, 0.0) for part in COMPUTE) for line in lines), 3
        ),
        "frames": len(lines),
    }


async def _stream(frames: int, scratch: Path, console: Console) -> list[dict[str, Any]]:
    """The lines of that many frames, one in flight."""
    settings = ServerSettings.load()
    bundle = Bundle.load(settings.bundles[0])
    cores = cores_beside_the_edge()
    server = await Server.listening({"port": 0, "threads": max(1, len(cores))}, scratch / "server.log", cores)
    try:
        if console.is_terminal:
            console.print("The device's half is being prepared (half a minute the first time) ...")
        half = await EdgeHalves(settings.cache_dir).folder(bundle)
        flags = {
            "server": server.address,
            "bundle": half,
            "source": str(material.video()),
            "loop": True,
            "max_frames": frames,
            "as_fast_as_possible": True,
            "max_in_flight": 1,
            "point": POINT,
            "deadline_ms": 10_000,
            "cpu": max(all_cores()) if cores else None,
        }
        edge = await Process.start("edge", flags, scratch / "edge.log")
        try:
            lines = [line async for line in edge.lines() if line.get("event") == "frame"]
            code = await edge.wait()
        finally:
            await edge.stop()
        if code != 0:
            raise HeadraceError(f"the edge ended with code {code}:\n{edge.log_end()}")
        return lines
    finally:
        await server.stop()

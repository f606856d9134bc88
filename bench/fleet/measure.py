"""The model's constants, measured on this machine: a real server, real tails, real streams."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from ...edge.controller import ControlLoop
from ...models.bundle import Bundle
from ...models.codec import Codec
from ...models.operating_point import Kind
from ...server.config import SHIPPED_BUNDLE, ServerSettings
from ...server.edge_halves import EdgeHalves
from ...server.engine import TailKey
from ..server.load import SETTLE_S, Load, offer
from ..server.run import smallest
from ..server.systems import Place, devices, host, our_server
from .model import Constants

SIZES = (1, 2, 4, 8)
REPEATS = 7
STREAMS = 200
TICKS = os.sysconf("SC_CLK_TCK")


async def measure(place: Place) -> Constants:
    """Measure everything; takes about half a minute, and as much again the first time (a device's half is exported).

    Args:
        place: core of the server, and a folder for logs.
    """
    bundle = Bundle.load(SHIPPED_BUNDLE)
    batch_s, decode_s = await asyncio.to_thread(compute, bundle)
    greet_s, idle_mb, base_mb = await streams(place)
    return Constants(
        batch_s, decode_s, await serving(place), greet_s, idle_mb, base_mb, await half_mb(bundle), decision(bundle)
    )


def compute(bundle: Bundle) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Seconds of batches by split point and size, and of decoding by split point; one thread."""
    import io

    import numpy as np
    import torch
    from PIL import Image

    from ...models.bitstream import Packet
    from ...server.decoder import PacketDecoder
    from ...server.tail import load_tails

    torch.set_num_threads(1)
    tails = load_tails([bundle], "cpu", 1, "onnx")  # as a server does that is told nothing else
    decoder, codec, rng = PacketDecoder(bundle), Codec(bundle), np.random.default_rng(0)
    side = bundle.preprocessing.size
    batch_s: dict[str, dict[int, float]] = {}
    decode_s: dict[str, float] = {}
    for split in (*(spec.name for spec in bundle.splits), ""):
        tail = tails[TailKey(bundle.fingerprint, split)]
        points = [p for p in bundle.operating_points if p.split == split and p.kind in (Kind.FEATURE, Kind.IMAGE)]
        point = points[len(points) // 2]
        if split:
            symbols = np.rint(rng.laplace(0, 1, bundle.split(split).latent_shape)).astype(np.int32)
            packet = codec.compress_symbols(symbols, point, 0)
        else:
            file = io.BytesIO()
            smooth = Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8)).resize((side, side))
            smooth.save(file, point.codec, quality=30)
            packet = Packet(point.id, 0, (file.getvalue(),))
        made = decoder.decode(packet, point)
        decode_s[split] = timed(lambda p=packet, o=point: decoder.decode(p, o))  # type: ignore[misc]
        batch_s[split] = {n: timed(lambda t=tail, n=n, m=made: t([m] * n)) for n in SIZES}  # type: ignore[misc]
    return batch_s, decode_s


async def streams(place: Place) -> tuple[float, float, float]:
    """CPU seconds of a greeting, MB of an idle stream, MB of a server without any."""
    async with our_server(place) as server:
        base = rss_mb(server.pid)
        fingerprint = bytes.fromhex(server.fingerprint)
        async with devices("headrace", server.address, fingerprint, 20, smallest()):
            pass  # what is made once
        before, begin = cpu_s(server.pid), rss_mb(server.pid)
        async with devices("headrace", server.address, fingerprint, STREAMS, smallest()):
            greeted = cpu_s(server.pid) - before
            await asyncio.sleep(1.0)
            return greeted / STREAMS, max(0.0, rss_mb(server.pid) - begin) / STREAMS, base


async def serving(place: Place, fps: float = 300.0, seconds: float = 4.0) -> float:
    """CPU seconds of a frame where nothing is decoded or computed."""
    async with (
        host("null", place) as (process, said),
        devices("null", said["address"], bytes.fromhex(said["fingerprint"]), 16, smallest()) as targets,
    ):
        await offer(Load.even(16, fps, 1.0, 0.25), targets)
        before = cpu_s(process.pid)
        tally = await offer(Load.even(16, fps, seconds, 0.25), targets)
        frames = sum(tally.due) * (seconds + SETTLE_S) / seconds  # those of the settling time too
        return (cpu_s(process.pid) - before) / frames


async def half_mb(bundle: Bundle) -> float:
    """MB of what a device fetches."""
    halves = EdgeHalves(ServerSettings.load().cache_dir)
    try:
        folder = await halves.folder(bundle)
        return sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    finally:
        await halves.close()


def decision(bundle: Bundle) -> float:
    """Seconds of a device's decision."""
    loop = ControlLoop(bundle.operating_points, deadline_s=0.25, frame_interval_s=0.1, uncut_s=0.15)
    now = [0.0]

    def choose() -> None:
        now[0] += 0.1
        loop.choose(now[0], now[0], compute_free_at=now[0])

    for _ in range(50):
        choose()
    return timed(choose)


def timed(work: Callable[[], object]) -> float:
    """Median CPU seconds of this thread over some repetitions; another process on the core does not count."""
    work()
    taken = []
    for _ in range(REPEATS):
        began = time.thread_time()
        work()
        taken.append(time.thread_time() - began)
    return statistics.median(taken)


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def rss_mb(pid: int) -> float:
    """Resident memory of a process in MB (10^6 bytes)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

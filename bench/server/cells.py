"""What our server does under what it does not like: ten times too much, one greedy device, many idle ones, SIGTERM."""

from __future__ import annotations

import asyncio
import math
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...models.bundle import Bundle
from ...protos.messages import Status
from ...server.config import SHIPPED_BUNDLE
from ..processes import Server
from .clients import StreamDevice
from .load import Load, Tally, Target, offer
from .systems import Material, Place, devices, our_server, spread

ACTIVE_FPS = 20.0
"""Of the one active device among idle ones."""


@asynccontextmanager
async def connected(server: Server, count: int, material: Material) -> AsyncIterator[list[Target]]:
    """Devices at our server."""
    async with devices("headrace", server.address, bytes.fromhex(server.fingerprint), count, material) as made:
        yield made


@dataclass(frozen=True, slots=True)
class Overload:
    """What became of ten times too much, and memory before and after."""

    tally: Tally
    mb_begin: float
    mb_end: float


async def peak(offer_fps: Callable[[float], Awaitable[Tally]], first: float = 40.0, growth: float = 1.35) -> float:
    """The most goodput in frames a second, over loads that grow by `growth` until two in a row bring no more."""
    best, load, worse = 0.0, first, 0
    await offer_fps(first)  # everything is warm
    while worse < 2:
        goodput = (await offer_fps(load)).goodput
        worse = 0 if goodput > 1.02 * best else worse + 1
        best, load = max(best, goodput), load * growth
    return best


async def overload(server: Server, material: Material, load: Load, *, heed: bool) -> Overload:
    """Offer `load`, which is many times what the server carries.

    Args:
        server: ours.
        material: packets.
        load: what is due at the devices.
        heed: devices send nothing while the server asks them to wait, as `headrace edge` does; else they send all.
    """
    async with connected(server, len(load.rates), material) as targets:
        for target in targets:
            if isinstance(target, StreamDevice):
                target.heeds = heed
        await offer(Load(load.rates, 1.0, load.deadline_s, load.pattern), targets)
        begin = rss_mb(server)
        tally = await offer(load, targets)
        return Overload(tally, begin, rss_mb(server))


@dataclass(frozen=True, slots=True)
class Counts:
    """Frames that were due and that were answered in time, by device."""

    due: tuple[int, ...]
    good: tuple[int, ...]

    @classmethod
    def of(cls, tallies: Sequence[Tally], count: int) -> Counts:
        """Of the first `count` devices, over all tallies."""
        due, good = zip(*((t.due[:count], t.good[:count]) for t in tallies), strict=True)
        return cls(tuple(map(sum, zip(*due, strict=True))), tuple(map(sum, zip(*good, strict=True))))

    @property
    def shares(self) -> tuple[float, ...]:
        """In time, by device."""
        return tuple(g / max(1, d) for g, d in zip(self.good, self.due, strict=True))

    @property
    def share(self) -> float:
        """In time, of all devices' frames."""
        return sum(self.good) / max(1, sum(self.due))


@dataclass(frozen=True, slots=True)
class Greed:
    """All devices but a greedy one, without and beside it, over all turns; Jain's index without it."""

    alone: Counts
    beside: Counts
    jain: float

    @property
    def points(self) -> tuple[float, ...]:
        """What each device loses of its share in time, in points."""
        return tuple((a - b) * 100 for a, b in zip(self.alone.shares, self.beside.shares, strict=True))

    @property
    def mean(self) -> float:
        """What all of them together lose, in points."""
        return (self.alone.share - self.beside.share) * 100

    @property
    def error(self) -> float:
        """Standard error of one device's loss in points, if all lose alike and each frame by chance: the largest of
        many devices' losses is some two of them above what a device loses."""
        parts = ((c.share * (1.0 - c.share), sum(c.due) / len(c.due)) for c in (self.alone, self.beside))
        return 100 * math.sqrt(sum(variance / max(1.0, frames) for variance, frames in parts))


async def greed(
    server: Server, material: Material, fps: float, count: int, frames: int, deadline_s: float, turns: int
) -> Greed:
    """What one device that sends 100 times as much as each of the others takes from each of them, in turns: a moment in
    which the machine does something else falls on either side.

    Args:
        server: ours.
        material: packets.
        fps: that `count` devices offer together; one more that is greedy sends 100 times a device's share of it.
        count: devices beside the greedy one.
        frames: of each device that are due in all turns together, about, without the greedy one and again beside it.
        deadline_s: of every frame.
        turns: how often both are measured, at other times of frames each.
    """
    each, seconds = fps / count, frames * count / fps / turns
    alone: list[Tally] = []
    beside: list[Tally] = []
    async with connected(server, count + 1, material) as targets:
        for turn in range(turns):
            for tallies, greedy in ((alone, 0.0), (beside, 100 * each)):
                load = Load((each,) * count + (greedy,), seconds, deadline_s, seed=turn)
                tallies.append(await offer(load, targets))
    jain = spread([tally.fairness() for tally in alone])[0]
    return Greed(Counts.of(alone, count), Counts.of(beside, count), jain)


@dataclass(frozen=True, slots=True)
class Idle:
    """What idle devices cost: MB of the server for each of them, and the 99th percentile of an active one in seconds,
    without and with them, by round."""

    mb: float
    without: tuple[float, ...]
    beside: tuple[float, ...]

    @property
    def longer(self) -> float:
        """The active one's 99th percentile with them over that without, in the median of the rounds."""
        return spread([b / w for b, w in zip(self.beside, self.without, strict=True)])[0]


async def idle(server: Server, material: Material, count: int, seconds: float, deadline_s: float, rounds: int) -> Idle:
    """Measure them at a server that has done nothing yet.

    Memory is what the process grows by when they connect for the first time: later they get what others gave back.
    """
    active = Load((ACTIVE_FPS,), seconds, deadline_s, "periodic")
    mb, without, beside = 0.0, list[float](), list[float]()
    async with connected(server, 1, material) as one:
        await offer(active, one)  # whatever grows with the first frames has grown
        for number in range(rounds):
            without.append((await offer(active, one)).p(99))
            begin = rss_mb(server)
            async with connected(server, count, material):
                await asyncio.sleep(1.0)
                if number == 0:
                    mb = (rss_mb(server) - begin) / count
                beside.append((await offer(active, one)).p(99))
            await asyncio.sleep(0.5)
    return Idle(mb, tuple(without), tuple(beside))


async def lost_on_drain(place: Place, material: Material, fps: float, times: int) -> tuple[int, int]:
    """Admitted frames without a result when SIGTERM comes under load, and frames admitted, over `times` repetitions.

    The server's log says how many frames it took from each device; the device knows how many results it got.
    """
    lost = admitted = 0
    for repetition in range(times):
        began = log_size(place.scratch / "headrace.log")
        async with our_server(place) as server, connected(server, 8, material) as targets:
            load = Load((fps / 8,) * 8, 2.0, 1.0, seed=repetition)
            offering = asyncio.create_task(offer(load, targets))
            await asyncio.sleep(0.8 + 0.07 * repetition)
            server.terminate()
            streams = [t for t in targets if isinstance(t, StreamDevice)]
            await asyncio.gather(*(stream.over() for stream in streams))
            await server.wait(20)
            offering.cancel()
            await asyncio.gather(offering, return_exceptions=True)
            taken = frames_taken(server.log, began)
            for number, stream in enumerate(streams):
                refused = stream.statuses.get(Status.UNAVAILABLE, 0)
                admitted += taken.get(number, 0) - refused
                lost += max(0, taken.get(number, 0) - stream.results)
    return lost, admitted


async def lost_on_swap(place: Place, material: Material, fps: float, times: int) -> tuple[int, int]:
    """As `lost_on_drain`, when a bundle is replaced by another version in a watched folder under load.

    Streams of the old version are ended soon after, with what was admitted answered; the new one is there by then.
    """
    lost = admitted = 0
    with tempfile.TemporaryDirectory(prefix="headrace-bundles-") as name:
        folder = Path(name)
        versions = two_versions()
        versions[0].save(folder / "version-0")
        async with our_server(place, bundle_dir=folder, linger_s=0.3) as server:
            for repetition in range(times):
                old, new = versions[repetition % 2], versions[(repetition + 1) % 2]
                begin = log_size(server.log)
                async with devices("headrace", server.address, old.fingerprint, 8, material) as targets:
                    load = Load((fps / 8,) * 8, 60.0, 1.0, seed=repetition)
                    offering = asyncio.create_task(offer(load, targets))
                    await asyncio.sleep(0.8)
                    new.save(folder / ".new")
                    (folder / ".new").rename(folder / f"version-{repetition + 1}")
                    shutil.rmtree(folder / f"version-{repetition}")
                    streams = [t for t in targets if isinstance(t, StreamDevice)]
                    async with asyncio.timeout(60):
                        await asyncio.gather(*(stream.over() for stream in streams))
                    offering.cancel()
                    await asyncio.gather(offering, return_exceptions=True)
                    gone, taken_in = await _count(streams, server.log, begin)
                    lost, admitted = lost + gone, admitted + taken_in
    return lost, admitted


async def _count(streams: Sequence[StreamDevice], log: Path, begin: int) -> tuple[int, int]:
    """Frames that the server took and did not answer; and those that it took and did not refuse as no longer served."""
    async with asyncio.timeout(10):
        while len(taken := frames_taken(log, begin)) < len(streams):
            await asyncio.sleep(0.05)  # the log's last lines are on their way
    pairs = [(taken[number], stream) for number, stream in enumerate(streams)]
    lost = sum(max(0, count - stream.results) for count, stream in pairs)
    return lost, sum(count - stream.statuses.get(Status.UNAVAILABLE, 0) for count, stream in pairs)


def two_versions() -> tuple[Bundle, Bundle]:
    """The shipped bundle, and one whose decoder differs in the last bits and so has another fingerprint."""
    bundle = Bundle.load(SHIPPED_BUNDLE)
    name = f"{bundle.splits[0].name}/decoder"
    other = replace(bundle, tensors={**bundle.tensors, name: bundle.tensors[name] * np.float32(1.0000001)})
    return bundle, other


def frames_taken(log: Path, begin: int) -> dict[int, int]:
    """Frames that were read from each device's stream, by its number, as the log says from byte `begin` on."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_bytes()[begin:].decode(errors="replace"))
    found: dict[int, int] = {}
    for line in text.splitlines():
        if "stream closed" in line:
            device, frames = re.search(r"device-(\d+)", line), re.search(r"frames\"?[=:] ?(\d+)", line)
            if device and frames:
                found[int(device[1])] = int(frames[1])
    return found


def log_size(log: Path) -> int:
    """Bytes of a log so far."""
    return log.stat().st_size if log.exists() else 0


def rss_mb(server: Server) -> float:
    """Resident memory of the server's process, in MB (10^6 bytes)."""
    pages = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1])
    return pages * 4096 / 1e6

"""The systems that are measured, each started as processes on the server's core and stopped after its turn."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.bitstream import Packet
from ...models.exceptions import HeadraceError
from ..cores import keep_to
from ..processes import Server
from .clients import HttpDevice, StreamDevice
from .load import Target

PACKAGES = {"litserve": "litserve", "ray": "ray"}
NAMES = {
    "headrace": "Headrace",
    "litserve": "LitServe",
    "ray": "Ray Serve",
    "bare": "bare loop",
    "bare-torch": "bare loop in eager PyTorch",
    "null": "Headrace without a tail",
}
READY_S = 180.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how systems run: the server's cores, frames of a batch, a folder for logs."""

    cores: frozenset[int]
    batch: int
    scratch: Path


@dataclass(frozen=True, slots=True)
class Material:
    """What devices send: the same packets to every system."""

    packets: tuple[Packet, ...]

    @property
    def data(self) -> list[bytes]:
        """As bytes."""
        return [packet.to_bytes() for packet in self.packets]


def installed(kind: str) -> bool:
    """Whether a system can be started here."""
    return kind not in PACKAGES or importlib.util.find_spec(PACKAGES[kind]) is not None


@asynccontextmanager
async def devices(
    kind: str, address: str, fingerprint: bytes, count: int, material: Material | None
) -> AsyncIterator[list[Target]]:
    """Connected devices of a system; without material they send what is answered without computing."""
    made: list[Any] = []
    for number in range(count):
        if kind in ("headrace", "null"):
            packets = material.packets if material else ()
            made.append(StreamDevice(address, fingerprint, f"device-{number}", packets))
        else:
            data = material.data if material else [b""]
            litserve = kind == "litserve"
            bodies = [json.dumps({"packet": base64.b64encode(d).decode()}).encode() for d in data] if litserve else data
            kind_of = "application/json" if litserve else "application/octet-stream"
            made.append(HttpDevice(address, "/predict" if litserve else "/", kind_of, bodies, 4 if material else 16))
    try:
        for device in made:
            await device.connect()
        yield made
    finally:
        await asyncio.gather(*(device.close() for device in made), return_exceptions=True)


@asynccontextmanager
async def our_server(place: Place, **flags: Any) -> AsyncIterator[Server]:
    """`headrace serve` on the server's core, with one thread for the tail."""
    given = {"port": 0, "threads": 1, "decode_threads": 1, "max_batch": place.batch, "metrics_port": 0} | flags
    server = await Server.listening(given, place.scratch / "headrace.log", place.cores)
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def host(kind: str, place: Place) -> AsyncIterator[tuple[asyncio.subprocess.Process, dict[str, Any]]]:
    """One of `hosts`, ready, and what it said then. It and all its children end with the context."""
    port = free_port()
    with (place.scratch / f"{kind}.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "headrace.bench.server.hosts", kind, str(port), str(place.batch)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            limit=2**20,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, place.cores) if place.cores else None,
        )
    keep_to(process.pid, place.cores)
    try:
        said = {"address": f"127.0.0.1:{port}"}
        if kind == "litserve":  # it says nothing; it answers once its worker is ready
            await answers(f"127.0.0.1:{port}", process)
        else:
            said |= await line_of(process, kind, place.scratch)
        yield process, said
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), 20)
        for pid in of_session(process.pid):  # Ray's workers have process groups of their own, and stay in the session
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


async def bare_fps(process: asyncio.subprocess.Process, seconds: float, material: Material, scratch: Path) -> float:
    """Frames a second of the bare loop."""
    assert process.stdin is not None
    texts = ",".join(data.hex() for data in material.data)
    process.stdin.write(f"{seconds} {texts}\n".encode())
    await process.stdin.drain()
    return float((await line_of(process, "bare", scratch))["fps"])


async def line_of(process: asyncio.subprocess.Process, kind: str, scratch: Path) -> dict[str, Any]:
    """The next line of JSON.

    Raises:
        HeadraceError: the process ended, or said nothing for long.
    """
    assert process.stdout is not None
    try:
        async with asyncio.timeout(READY_S):
            async for line in process.stdout:
                with contextlib.suppress(json.JSONDecodeError):
                    said = json.loads(line)
                    if isinstance(said, dict):
                        return said
    except TimeoutError:
        pass
    text = (scratch / f"{kind}.log").read_text(errors="replace")[-2000:]
    raise HeadraceError(f"{NAMES.get(kind, kind)} did not get ready:\n{text}")


async def answers(address: str, process: asyncio.subprocess.Process) -> None:
    """Wait until an HTTP server answers an empty packet.

    Raises:
        HeadraceError: it ended, or does not.
    """
    body = json.dumps({"packet": ""}).encode()
    async with asyncio.timeout(READY_S), AsyncExitStack() as stack:
        while process.returncode is None:
            device = HttpDevice(address, "/predict", "application/json", [body])
            stack.push_async_callback(device.close)
            with contextlib.suppress(OSError):
                await device.connect()
                future = device.send(0, 1000)
                if future is not None and await future:
                    return
            await asyncio.sleep(0.2)
    raise HeadraceError("LitServe ended before it answered")


def of_session(session: int) -> list[int]:
    """Processes of a session that was made for one system."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                    found.append(int(folder.name))
    return found


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return int(each.getsockname()[1])


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and most."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return median, ordered[0], ordered[-1]

"""TCP through an emulated link, within its namespaces or on loopback: what arrives when."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from headrace.bench.links.emulators import Emulator, open_link, probe
from headrace.bench.links.netem import NetemLink
from headrace.bench.links.record import EmulatedLink, LinkRecord
from headrace.bench.links.spec import LinkSpec
from headrace.bench.links.tun_relay import TunRelayLink

BLOCK = bytes(64 * 1024)


def need(emulator: Emulator) -> None:
    """Skip, and say so loudly, where an emulator is not available."""
    why = next(verdict.why_not for verdict in probe() if verdict.emulator == emulator)
    if why:
        pytest.skip(f"EMULATOR {emulator} UNAVAILABLE, NOTHING TESTED: {why}")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Connection:
    """One TCP connection through a link. Times are the event loop's."""

    edge: socket.socket
    server: socket.socket
    connect_s: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    async def send_for_ever(self) -> None:
        while True:
            await asyncio.get_running_loop().sock_sendall(self.edge, BLOCK)

    async def receive(self, seconds: float) -> None:
        """Note what arrives at the server for so long."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while data := await loop.sock_recv(self.server, 1 << 20):
                    self.arrivals.append((loop.time(), len(data)))

    async def receive_bytes(self, size: int) -> None:
        loop = asyncio.get_running_loop()
        while size > 0:
            data = await loop.sock_recv(self.server, 1 << 20)
            self.arrivals.append((loop.time(), len(data)))
            size -= len(data)

    async def ping(self) -> float:
        """Seconds for one byte there and one back."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        await loop.sock_sendall(self.edge, b"?")
        await loop.sock_recv(self.server, 1)
        await loop.sock_sendall(self.server, b"!")
        await loop.sock_recv(self.edge, 1)
        return loop.time() - began

    def received(self, start: float, end: float) -> int:
        return sum(size for at, size in self.arrivals if start <= at < end)


class Ends:
    """A link and connections through it."""

    def __init__(self, link: EmulatedLink, listener: socket.socket) -> None:
        self.link, self._listener = link, listener
        self._sockets: list[socket.socket] = []

    async def connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        edge = _socket(self.link, "edge")
        edge.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        host, _, port = self.link.address.rpartition(":")
        began = loop.time()
        await loop.sock_connect(edge, (host, int(port)))
        took = loop.time() - began
        server, _ = await loop.sock_accept(self._listener)
        server.setblocking(False)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets += [edge, server]
        return Connection(edge, server, took)

    async def record(self) -> LinkRecord:
        """What has passed until now."""
        if isinstance(self.link, TunRelayLink | NetemLink):
            return await self.link.refresh()
        return self.link.record()

    def close(self) -> None:
        for each in (self._listener, *self._sockets):
            each.close()


@contextlib.asynccontextmanager
async def ends(emulator: Emulator, spec: LinkSpec, congestion: str = "reno") -> AsyncIterator[Ends]:
    """A link whose schedule has not begun, with somebody who listens behind it."""
    need(emulator)
    port = free_port()
    link = await open_link(emulator, spec, port, congestion=congestion)
    try:
        listener = _socket(link, "server")
        listener.bind((link.server_host, port))
        listener.listen()
        found = Ends(link, listener)
        try:
            yield found
        finally:
            found.close()
    finally:
        await link.close()


@contextlib.asynccontextmanager
async def sending(connection: Connection) -> AsyncIterator[None]:
    """Somebody at the edge's end who always has more to send."""
    task = asyncio.create_task(connection.send_for_ever())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _socket(link: EmulatedLink, end: str) -> socket.socket:
    if isinstance(link, TunRelayLink | NetemLink):
        return link.spaces.socket("edge" if end == "edge" else "server")
    made = socket.socket()
    made.setblocking(False)
    return made

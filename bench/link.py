"""An emulated link that needs no privileges: a TCP proxy with a rate, a one-way delay, a bounded queue and outages.

    client --> small socket buffer --> queue (bounded) --> rate --> delay --> server          up
    client <-------------------------------------------- delay <-- outage <-- server          down

Chunks of at most 1448 bytes leave one after the other in virtual time, so that late timers do not add up and
connections share the link smoothly. When the queue is full nothing more is read, and TCP pushes back to the sender;
socket buffers are small so that the kernel hides little. In an outage nothing passes and connections stay open.

What a TCP proxy hides: packet loss, the sender's congestion control (both connections are short, lossless loopback
ones, so there is no slow start after idle) and the handshake's round trip. Emulators that do show them (netem, a TUN
relay between namespaces) fit behind the same interface, `EmulatedLink`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import struct
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from .schedule import RateSchedule

CHUNK_BYTES = 1448
"""What one Ethernet frame carries of TCP."""
SOCKET_BUFFER_BYTES = 8 * 1024
"""Asked of the kernel, which doubles it for its bookkeeping."""
DEFAULT_QUEUE_BYTES = 32 * 1024
_DELAY_LINE_CHUNKS = 512
"""Most chunks of one connection and direction between being read and being delivered; bounds the memory."""
RECORD_BIN_S = 0.1


class EmulatedLink(Protocol):
    """What a program needs of a link, whatever emulates it.

    Attributes:
        kind: name of the mechanism, to be printed.
        address: "host:port" that the client side connects to.
    """

    kind: str
    address: str

    def begin(self, ago_s: float = 0.0) -> None:
        """Start the schedule, as of so many seconds ago; until then its first rate holds."""

    def set_rate(self, up_bps: float) -> None:
        """Leave the schedule: this rate from now on, 0 being an outage both ways."""

    def record(self) -> LinkRecord:
        """What has passed so far."""

    async def close(self) -> None:
        """Cut all connections."""


@dataclass(slots=True)
class LinkRecord:
    """What passed when: bytes by bins of `bin_s` seconds since the schedule's beginning."""

    bin_s: float = RECORD_BIN_S
    up: dict[int, int] = field(default_factory=dict)
    down: dict[int, int] = field(default_factory=dict)
    connections: int = 0

    def to_json(self) -> str:
        """One JSON object."""
        sides = {
            name: [[round(b * self.bin_s, 3), n] for b, n in sorted(side.items())]
            for name, side in (("up", self.up), ("down", self.down))
        }
        return json.dumps({"bin_s": self.bin_s, "connections": self.connections, **sides})

    @classmethod
    def from_json(cls, text: str) -> LinkRecord:
        """The inverse of `to_json`."""
        read = json.loads(text)
        up, down = ({round(at / read["bin_s"]): n for at, n in read[name]} for name in ("up", "down"))
        return cls(read["bin_s"], up, down, read["connections"])


class _Outlet:
    """The far end of one direction of one connection: delivers chunks when they are due, in order."""

    def __init__(self, sock: socket.socket) -> None:
        self.slots = asyncio.Semaphore(_DELAY_LINE_CHUNKS)
        self._sock = sock
        self._due: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    def put(self, due: float, chunk: bytes) -> None:
        self._due.put_nowait((due, chunk))

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, chunk = await self._due.get()
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            if not chunk:
                self._sock.shutdown(socket.SHUT_WR)
                return
            await loop.sock_sendall(self._sock, chunk)
            self.slots.release()


class _Direction:
    """One direction of the link, shared by all its connections: a bounded queue and a server of variable rate."""

    def __init__(self, rates: RateSchedule, delay_s: float, queue_bytes: int) -> None:
        self.rates, self.delay_s, self.queue_bytes = rates, delay_s, queue_bytes
        self.passed: dict[int, int] = {}
        self._origin = math.inf
        self._queue: deque[tuple[float, bytes, _Outlet]] = deque()
        self._queued = 0
        self._changed, self._room, self._turn = asyncio.Event(), asyncio.Event(), asyncio.Lock()

    def set_rates(self, rates: RateSchedule) -> None:
        self.rates = rates
        self._changed.set()

    def begin(self, now: float, rates: RateSchedule) -> None:
        self._origin = now
        self.set_rates(rates)

    async def pump(self, source: socket.socket, outlet: _Outlet) -> None:
        """Read from a socket, as far as there is room, until it ends."""
        loop = asyncio.get_running_loop()
        while True:
            await outlet.slots.acquire()
            chunk = await loop.sock_recv(source, CHUNK_BYTES)
            async with self._turn:  # first come, first served among connections
                while self._queued and self._queued + len(chunk) > self.queue_bytes:
                    self._room.clear()
                    await self._room.wait()
            self._queued += len(chunk)
            self._queue.append((loop.time(), chunk, outlet))
            self._changed.set()
            if not chunk:
                return

    async def run(self) -> None:
        """Let chunks pass at the schedule's rate, for ever."""
        loop = asyncio.get_running_loop()
        free = 0.0
        while True:
            finish = math.inf
            if self._queue:
                arrived, chunk, outlet = self._queue[0]
                finish = self.rates.finish(max(arrived, free), 8 * len(chunk))
                if finish <= loop.time():
                    self._queue.popleft()
                    self._queued -= len(chunk)
                    self._room.set()
                    free = finish
                    self._count(finish, len(chunk))
                    outlet.put(finish + self.delay_s, chunk)
                    continue
            # The past of a schedule never changes, so after a change the same chunk is simply reckoned anew.
            self._changed.clear()
            timer = None if math.isinf(finish) else loop.call_at(finish, self._changed.set)
            await self._changed.wait()
            if timer is not None:
                timer.cancel()

    def _count(self, at: float, size: int) -> None:
        if at >= self._origin and size:
            key = int((at - self._origin) / RECORD_BIN_S)
            self.passed[key] = self.passed.get(key, 0) + size


class TcpProxyLink:
    """See the module. Lives in the event loop that makes it; a loop that stalls makes the link stall."""

    kind = "TCP proxy (hides loss and congestion control)"

    def __init__(
        self,
        connect: str,
        schedule: RateSchedule,
        *,
        delay_s: float = 0.0,
        queue_bytes: int = DEFAULT_QUEUE_BYTES,
        begin_with_connection: bool = False,
    ) -> None:
        """Describe the link; `open` makes it.

        Args:
            connect: "host:port" of the server behind it; need not listen yet.
            schedule: rate up, from `begin` on. Down there is no limit but the same outages.
            delay_s: one way, on both ways.
            queue_bytes: most bytes that wait for their turn, each way.
            begin_with_connection: begin with the first connection, for lack of somebody to call `begin`.
        """
        self.address = ""
        self._connect, self._schedule = _split_address(connect), schedule
        self._begin_with_connection = begin_with_connection
        self._up = _Direction(schedule.shifted(_LATER), delay_s, queue_bytes)
        self._down = _Direction(schedule.outages_only().shifted(_LATER), delay_s, queue_bytes)
        self._origin: float | None = None
        self._connections = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None

    async def open(self, listen: str = "127.0.0.1:0") -> TcpProxyLink:
        """Listen; port 0 is any free one, `address` tells which.

        Raises:
            OSError: the address cannot be listened on.
        """
        self._listener = _new_socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(_split_address(listen))
        self._listener.listen()
        host, port = self._listener.getsockname()
        self.address = f"{host}:{port}"
        for work in (self._up.run(), self._down.run(), self._accept(self._listener)):
            self._keep(asyncio.create_task(work))
        return self

    async def __aenter__(self) -> TcpProxyLink:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def begin(self, ago_s: float = 0.0) -> None:
        """See `EmulatedLink`."""
        self._origin = asyncio.get_running_loop().time() - ago_s
        self._up.begin(self._origin, self._schedule.shifted(self._origin))
        self._down.begin(self._origin, self._schedule.outages_only().shifted(self._origin))

    def set_rate(self, up_bps: float) -> None:
        """See `EmulatedLink`."""
        now = asyncio.get_running_loop().time()
        self._up.set_rates(self._up.rates.changed(now, up_bps))
        self._down.set_rates(self._down.rates.changed(now, math.inf if up_bps > 0 else 0.0))

    def record(self) -> LinkRecord:
        """See `EmulatedLink`."""
        return LinkRecord(RECORD_BIN_S, dict(self._up.passed), dict(self._down.passed), self._connections)

    async def close(self) -> None:
        """See `EmulatedLink`."""
        if self._listener is not None:
            self._listener.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(listener)
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections += 1
            if self._begin_with_connection and self._origin is None:
                self.begin()
            self._keep(asyncio.create_task(self._join(client)))

    async def _join(self, client: socket.socket) -> None:
        """Connect the client to the server until both have ended, or until either fails."""
        server = _new_socket()
        tasks: list[asyncio.Task[None]] = []
        try:
            await asyncio.get_running_loop().sock_connect(server, self._connect)
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            up, down = _Outlet(server), _Outlet(client)
            work = (self._up.pump(client, up), up.run(), self._down.pump(server, down), down.run())
            tasks = [asyncio.create_task(w) for w in work]
            await asyncio.gather(*tasks)
        except OSError:
            # Reset, as the other side of the link was; an ordinary close would look like a polite end.
            for sock in (client, server):
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            client.close()
            server.close()


_LATER = 1e12
"""Seconds; a schedule that begins so late holds its first rate until `begin` moves it."""


def _new_socket() -> socket.socket:
    """A socket whose buffers are small; set before listening or connecting, as the window is agreed on then."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setblocking(False)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
    # Loopback's segments of 64 KB do not fit such a window, and the sender would wait for its persist timer.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, CHUNK_BYTES)
    return sock


def _split_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{address!r} is no address; write HOST:PORT")
    return host, int(port)

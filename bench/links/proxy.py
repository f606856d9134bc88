"""An emulated link that needs no privileges: a TCP proxy with rates, a delay, a bounded queue and outages.

    client --> small socket buffer --> queue (bounded) --> rate --> delay --> server          up
    client <-------------------------------------------- delay <-- outage <-- server          down

Chunks of at most 1448 bytes leave one after the other in virtual time, so that late timers do not add up and
connections share the link smoothly. When the queue is full nothing more is read, and TCP pushes back to the sender;
socket buffers are small so that the kernel hides little. In an outage nothing passes and connections stay open.

What a TCP proxy hides: packet loss, the sender's congestion control (both connections are short, lossless loopback
ones, so there is no slow start after idle) and the handshake's round trip. A described loss holds a chunk, and all
that is behind it on its connection, for one round trip, and lets it take its share of the link twice: what the loss
costs a stream, without what it does to a congestion window. Emulators that show all of it (netem, a TUN relay between
namespaces) are behind the same interface, `EmulatedLink`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
from collections import deque

from ...models.exceptions import DataError
from .rates import Rates
from .record import RECORD_BIN_S, LinkRecord, SideCounts
from .spec import LinkSpec, Side

CHUNK_BYTES = 1448
"""What one Ethernet frame carries of TCP."""
SOCKET_BUFFER_BYTES = 8 * 1024
"""Asked of the kernel, which doubles it for its bookkeeping."""
_DELAY_LINE_CHUNKS = 512
"""Most chunks of one connection and direction between being read and being delivered; bounds the memory."""


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

    def __init__(self, spec: LinkSpec, side: Side) -> None:
        self._spec, self._dice = spec, spec.dice(side)
        self._schedule = spec.rates(side)
        self.rates: Rates = self._schedule.shifted(_LATER)
        self.counts = SideCounts()
        self.passed: dict[int, int] = {}
        self._origin = math.inf
        self._queue: deque[tuple[float, bytes, _Outlet, bool]] = deque()  # arrived; lost at first
        self._queued = 0
        self._changed, self._room, self._turn = asyncio.Event(), asyncio.Event(), asyncio.Lock()

    def set_rates(self, rates: Rates) -> None:
        self.rates = rates
        self._changed.set()

    def begin(self, now: float) -> None:
        self._origin = now
        self.set_rates(self._schedule.shifted(now))

    async def pump(self, source: socket.socket, outlet: _Outlet) -> None:
        """Read from a socket, as far as there is room, until it ends."""
        loop = asyncio.get_running_loop()
        while True:
            await outlet.slots.acquire()
            chunk = await loop.sock_recv(source, CHUNK_BYTES)
            async with self._turn:  # first come, first served among connections
                while self._queued and self._queued + len(chunk) > self._spec.queue_bytes:
                    self._room.clear()
                    await self._room.wait()
            self._queued += len(chunk)
            self.counts.queue_bytes_max = max(self.counts.queue_bytes_max, self._queued)
            lost = bool(chunk) and self._spec.loss > 0 and self._dice.random() < self._spec.loss
            self._queue.append((loop.time(), chunk, outlet, lost))
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
                arrived, chunk, outlet, lost = self._queue[0]
                finish = self.rates.finish(max(arrived, free), 8 * len(chunk) * (1 + lost))
                if finish <= loop.time():
                    self._queue.popleft()
                    self._queued -= len(chunk)
                    self._room.set()
                    free = finish
                    self._count(arrived, finish, len(chunk))
                    self.counts.lost += lost
                    late = (self._spec.rtt_s if lost else 0.0) + self._dice.random() * self._spec.jitter_s
                    outlet.put(finish + self._spec.delay_s + late, chunk)
                    continue
            # The past of a schedule never changes, so after a change the same chunk is simply reckoned anew.
            self._changed.clear()
            timer = None if math.isinf(finish) else loop.call_at(finish, self._changed.set)
            await self._changed.wait()
            if timer is not None:
                timer.cancel()

    def _count(self, arrived: float, at: float, size: int) -> None:
        if not size:
            return
        self.counts.packets += 1
        self.counts.bytes += size
        self.counts.queue_s_max = max(self.counts.queue_s_max, at - arrived)
        if at >= self._origin:
            key = int((at - self._origin) / RECORD_BIN_S)
            self.passed[key] = self.passed.get(key, 0) + size


class TcpProxyLink:
    """See the module. Lives in the event loop that makes it; a loop that stalls makes the link stall."""

    kind = "TCP proxy (hides loss and congestion control)"
    edge_prefix: tuple[str, ...] = ()
    server_prefix: tuple[str, ...] = ()

    def __init__(self, connect: str, spec: LinkSpec, *, begin_with_connection: bool = False) -> None:
        """Describe the link; `open` makes it.

        Args:
            connect: "host:port" of the server behind it; need not listen yet.
            spec: the link, from `begin` on.
            begin_with_connection: begin with the first connection, for lack of somebody to call `begin`.

        Raises:
            DataError: `connect` is no address.
        """
        self.address = ""
        self._connect, self._spec = split_address(connect), spec
        self.server_host = self._connect[0]
        self._begin_with_connection = begin_with_connection
        self._up, self._down = _Direction(spec, "up"), _Direction(spec, "down")
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
        self._listener.bind(split_address(listen))
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
        self._up.begin(self._origin)
        self._down.begin(self._origin)

    def set_rate(self, up_bps: float) -> None:
        """See `EmulatedLink`."""
        now = asyncio.get_running_loop().time()
        self._up.set_rates(self._up.rates.changed(now, up_bps))
        self._down.set_rates(self._down.rates.changed(now, self._spec.down_beside(up_bps, now - (self._origin or now))))

    def record(self) -> LinkRecord:
        """See `EmulatedLink`."""
        passed = dict(self._up.passed), dict(self._down.passed)
        return LinkRecord(RECORD_BIN_S, *passed, self._connections, self._up.counts, self._down.counts)

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


def split_address(address: str) -> tuple[str, int]:
    """Read "host:port".

    Raises:
        DataError: it is none.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise DataError(f"{address!r} is no address; write HOST:PORT")
    return host, int(port)

"""The devices' ends: the real stream to our server, and HTTP to the others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import grpc

from ...models.bitstream import VERSION, Packet
from ...models.exceptions import HeadraceError
from ...protos import messages
from ...protos.messages import Frame, Hello, Result, Status, Welcome

OWN = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
"""A connection of its own for each device."""


class StreamDevice:
    """A device with a stream of its own to our server.

    Attributes:
        results: how many results came, of whatever status.
        statuses: how many by status.
        ended: why the stream is over; None while it is not.
        heeds: whether it sends nothing while the server asks it to wait, as `headrace edge` does.
    """

    heeds = False

    def __init__(self, address: str, fingerprint: bytes, name: str, packets: Sequence[Packet]) -> None:
        """Nothing is connected yet; `packets` are sent in turn."""
        self._began, self._held_until = time.perf_counter(), 0.0
        self._address, self._hello, self._packets = address, Hello(fingerprint, VERSION, name, several=True), packets
        self.name, self.results = name, 0
        self.ended: tuple[grpc.StatusCode, str] | None = None
        self.statuses: dict[Status, int] = {}
        self._waiting: dict[int, asyncio.Future[bool]] = {}
        self._outgoing: asyncio.Queue[Any] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    async def connect(self) -> None:
        """Greet.

        Raises:
            HeadraceError: the server does not welcome it.
        """
        self._channel = grpc.aio.insecure_channel(self._address, options=OWN)
        stub: Any = messages.HeadraceStub(self._channel)  # type: ignore[no-untyped-call]
        self._call: Any = stub.Stream()
        try:
            await self._call.write(messages.hello_request(self._hello))
            welcome = messages.read_response(await self._call.read())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, AttributeError):
            welcome = None
        if not isinstance(welcome, Welcome):
            raise HeadraceError(f"the server does not welcome device {self.name}: {await self._call.details()}")
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]

    def send(self, frame: int, remaining_ms: int) -> asyncio.Future[bool] | None:
        """See `load.Target`."""
        now = time.perf_counter()
        if self.ended is not None or (self.heeds and now < self._held_until):
            return None
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[frame] = future
        packet = replace(self._packets[frame % len(self._packets)], frame_id=frame).to_bytes()
        self._outgoing.put_nowait(
            messages.frame_request(Frame(packet, remaining_ms, clock_ms=1 + int((now - self._began) * 1e3)))
        )
        return future

    async def close(self) -> None:
        """Break the connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close(None)

    async def over(self) -> None:
        """Wait until the server has ended the stream."""
        await asyncio.wait(self._tasks[:1])

    async def _read(self) -> None:
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                for result in messages.results_of(response):
                    self._on_result(result)
        except grpc.aio.AioRpcError:
            pass
        self.ended = (await self._call.code(), await self._call.details())
        for future in self._waiting.values():
            if not future.done():
                future.set_result(False)

    def _on_result(self, result: Result) -> None:
        self.results += 1
        self.statuses[result.status] = self.statuses.get(result.status, 0) + 1
        if result.retry_ms:
            self._held_until = max(self._held_until, time.perf_counter() + result.retry_ms / 1e3)
        future = self._waiting.pop(result.frame_id, None)
        if future is not None and not future.done():
            future.set_result(result.status is Status.OK)

    async def _write(self) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._call.write(await self._outgoing.get())


class HttpDevice:
    """A device that posts frames over HTTP/1.1 connections that are kept; as many can be under way at a time."""

    def __init__(self, address: str, path: str, kind: str, bodies: Sequence[bytes], connections: int = 16) -> None:
        """Nothing is connected yet; `bodies` of the content type `kind` are sent in turn."""
        self._connections = connections
        host, _, port = address.rpartition(":")
        self._host, self._port = host, int(port)
        head = f"POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: {kind}\r\nContent-Length: "
        self._requests = [f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies]
        self._free: list[_Connection] = []
        self._all: list[_Connection] = []

    async def connect(self) -> None:
        """Open the connections."""
        loop = asyncio.get_running_loop()
        for _ in range(self._connections):
            _, connection = await loop.create_connection(_Connection, self._host, self._port)
            self._all.append(connection)
        self._free = list(self._all)

    def send(self, frame: int, remaining_ms: int) -> asyncio.Future[bool] | None:  # noqa: ARG002
        """See `load.Target`. None of these servers takes a deadline."""
        while self._free and self._free[-1].lost:
            self._free.pop()
        if not self._free:
            return None
        connection = self._free.pop()
        future = connection.request(self._requests[frame % len(self._requests)])
        future.add_done_callback(lambda _: self._free.append(connection))
        return future

    async def close(self) -> None:
        """Close the connections."""
        for connection in self._all:
            connection.close()


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._future: asyncio.Future[bool] | None = None
        self._transport: asyncio.Transport | None = None
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def request(self, data: bytes) -> asyncio.Future[bool]:
        self._future = asyncio.get_running_loop().create_future()
        self._buffer.clear()
        if self._transport is None or self.lost:
            self._future.set_result(False)
        else:
            self._transport.write(data)
        return self._future

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or self._future is None or self._future.done():
            return
        head = bytes(self._buffer[:end]).lower()
        at = head.find(b"content-length:")
        if at >= 0:
            whole = len(self._buffer) >= end + 4 + int(head[at + 15 :].split(b"\r\n", 1)[0])
        else:
            whole = self._buffer.endswith(b"0\r\n\r\n")
        if whole:
            self._future.set_result(head.startswith(b"http/1.1 200"))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.lost = True
        if self._future is not None and not self._future.done():
            self._future.set_result(False)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

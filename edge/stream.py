"""Stream: the connection to the server. It greets, sends what there is to send, and comes back by itself.

connect --> Hello, Welcome --> packets up, results down --> broken --> wait (exponential backoff, full jitter) --+
   ^                                                                                                            |
   +------------------------------------------------------------------------------------------------------------+
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn, Protocol

import grpc
import structlog

from ..models.bundle import short
from ..protos import messages
from ..protos.messages import Continuation, Frame, HeadraceStub, Hello, Result, StreamRequest, Welcome
from .access import PLAIN, Access
from .exceptions import ConfigError, FingerprintRefusedError, RefusedError, StreamError
from .interfaces import Outgoing
from .ledger import STOPPED

log = structlog.get_logger(__name__)

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]

CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    # A connection of one's own for each attempt: waiting between them is `Backoff`'s business alone.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.max_receive_message_length", 4 * 2**20),
)


class Backoff:
    """How long to wait before the next attempt: exponential with full jitter (Brooker, AWS Architecture Blog, 2015)."""

    def __init__(self, minimum_s: float, maximum_s: float, rng: random.Random) -> None:
        """Waits are drawn from 0 to a bound that begins at `minimum_s` and doubles up to `maximum_s`."""
        self._minimum, self._maximum, self._rng = minimum_s, maximum_s, rng
        self.failures = 0

    def next_s(self) -> float:
        """Seconds to wait after one more failure."""
        bound = min(self._maximum, self._minimum * 2.0 ** min(self.failures, 60))
        self.failures += 1
        return self._rng.uniform(0, bound)

    def reset(self) -> None:
        """The connection has proved itself."""
        self.failures = 0


class Handler(Protocol):
    """Who is told what happens on the stream; called in the event loop's thread."""

    def on_welcome(self, welcome: Welcome, round_trip_s: float) -> None:
        """The stream is up; the greeting took `round_trip_s` seconds there and back."""
        ...

    def on_result(self, result: Result) -> None:
        """A frame was answered."""
        ...

    def on_broken(self, reason: str) -> None:
        """The stream is down again; called once for each welcome."""
        ...

    def next_to_write(self) -> Outgoing | Continuation | None:
        """The stream can take something."""
        ...


class StreamClient:
    """Keeps a stream to the server."""

    def __init__(
        self,
        address: str,
        handler: Handler,
        backoff: Backoff,
        *,
        connect_timeout_s: float,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        access: Access = PLAIN,
    ) -> None:
        """Nothing is connected before `run`."""
        self._address, self._handler, self._backoff = address, handler, backoff
        self._connect_timeout_s, self._clock, self._sleep = connect_timeout_s, clock, sleep
        self._access = access
        self._ready = asyncio.Event()
        self._hang: asyncio.Future[str] | None = None
        self.attempted = asyncio.Event()
        """Set when the first attempt has succeeded or failed."""

    def wake(self) -> None:
        """There may be something to write."""
        self._ready.set()

    def give_up_connection(self, reason: str) -> None:
        """Break the present connection and make a new one: it hangs."""
        if self._hang is not None and not self._hang.done():
            self._hang.set_result(reason)

    async def run(self, hello: Hello) -> NoReturn:
        """Connect again and again until cancelled.

        Raises:
            RefusedError: the server refuses this edge for good; `FingerprintRefusedError` if for its bundle.
        """
        while True:
            try:
                await self._one_connection(hello)
            except RefusedError:
                raise
            except StreamError as error:
                wait_s = self._backoff.next_s()
                level = log.info if self._backoff.failures > 1 else log.warning
                level("no stream to the server", server=self._address, reason=str(error), next_try_s=round(wait_s, 2))
            finally:
                self.attempted.set()
            await self._sleep(wait_s)

    async def _one_connection(self, hello: Hello) -> NoReturn:
        """One connection from its making to its end.

        Raises:
            StreamError: it could not be made, or broke.
        """
        try:
            channel = self._access.channel(self._address, CHANNEL_OPTIONS)
            metadata = self._access.metadata()
        except ConfigError as error:  # a file that was there at the start; it may come back
            raise StreamError(str(error)) from error
        try:
            call: Any = HeadraceStub(channel).Stream(metadata=metadata)  # type: ignore[no-untyped-call]
            try:
                async with asyncio.timeout(self._connect_timeout_s):
                    await _tried(channel)  # so that the greeting's time is that of one round trip
                    greeted = self._clock()
                    await call.write(messages.hello_request(hello))
                    response = await call.read()
                    round_trip_s = self._clock() - greeted
            except TimeoutError:
                raise StreamError(f"no greeting within {self._connect_timeout_s:g} s") from None
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                raise await self._why(call, hello) from None
            welcome = None if response is EOF else messages.read_response(response)
            if not isinstance(welcome, Welcome):
                raise await self._why(call, hello) if response is EOF else StreamError("no Welcome came first")
            if welcome.fingerprint != hello.fingerprint:
                raise FingerprintRefusedError(
                    f"the edge holds bundle {short(hello.fingerprint)}, the server answers with "
                    f"{short(welcome.fingerprint)}; give both the same bundle"
                )
            await self._serve(call, hello, welcome, round_trip_s)
        finally:
            await channel.close(None)

    async def _serve(self, call: Any, hello: Hello, welcome: Welcome, round_trip_s: float) -> NoReturn:
        hang: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        began, self._hang = self._clock(), hang
        self._handler.on_welcome(welcome, round_trip_s)
        self.attempted.set()
        reading, writing = asyncio.create_task(self._read(call)), asyncio.create_task(self._write(call))
        reason = STOPPED
        try:
            ends: set[asyncio.Future[Any]] = {reading, writing, hang}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if hang.done():
                reason = hang.result()
                raise StreamError(reason)
            for task in (reading, writing):
                defect = task.exception() if task.done() and not task.cancelled() else None
                if defect is not None and not isinstance(defect, grpc.aio.AioRpcError | asyncio.InvalidStateError):
                    raise defect
            # The writer fails with less to say than the call itself.
            error = await self._why(call, hello)
            reason = str(error)
            raise error
        finally:
            self._handler.on_broken(reason)
            reading.cancel()
            writing.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)
            # A server that takes streams and breaks them at once is no working server.
            if self._clock() - began > 1.0:
                self._backoff.reset()
            call.cancel()

    async def _read(self, call: Any) -> None:
        while (response := await call.read()) is not EOF:
            for result in messages.results_of(response):
                self._handler.on_result(result)

    async def _write(self, call: Any) -> None:
        greeted = self._clock() - 0.001  # a clock that says 0 says nothing
        while True:
            self._ready.clear()
            while (outgoing := self._handler.next_to_write()) is not None:
                await call.write(_request(outgoing, round((self._clock() - greeted) * 1e3) % 2**32))
            await self._ready.wait()

    async def _why(self, call: Any, hello: Hello) -> StreamError:
        """What the ended call says."""
        try:
            async with asyncio.timeout(1.0):
                code, details = await call.code(), await call.details()
        except TimeoutError:
            return StreamError("the stream cannot be used any more")
        if code is grpc.StatusCode.FAILED_PRECONDITION:
            text = f"server {self._address} refuses this device: {details}"
            if "fingerprint" in (details or ""):
                return FingerprintRefusedError(
                    text if short(hello.fingerprint) in text else f"{text} (the edge holds {short(hello.fingerprint)})"
                )
            return RefusedError(text)
        if code is grpc.StatusCode.OK:
            return StreamError("the server ended the stream")
        return StreamError(f"{code.name}: {details}" if details else code.name)


async def _tried(channel: grpc.aio.Channel) -> None:
    """Wait until the channel is connected, or could not be: then the call on it says why."""
    under_way = (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING)
    while (state := channel.get_state(try_to_connect=True)) in under_way:
        await channel.wait_for_state_change(state)


def _request(outgoing: Outgoing | Continuation, clock_ms: int) -> StreamRequest:
    if isinstance(outgoing, Continuation):
        return messages.continuation_request(outgoing)
    o = outgoing
    frame = Frame(o.packet, o.remaining_ms, o.slices_to_come, o.patience_ms, o.trace, *o.size, clock_ms)
    return messages.frame_request(frame)

"""The stream against a real gRPC server that does as it is told."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from headrace.bench.links.proxy import TcpProxyLink
from headrace.bench.links.spec import LinkSpec
from headrace.edge.exceptions import FingerprintRefusedError, RefusedError
from headrace.edge.interfaces import Outgoing
from headrace.edge.stream import Backoff, StreamClient
from headrace.models.bitstream import Packet
from headrace.protos.messages import Hello, Result, Status, Welcome


class Recorder:
    """A handler that writes down what it hears; waits are on its queue."""

    def __init__(self) -> None:
        self.outbox: list[Outgoing] = []
        self.heard: asyncio.Queue[tuple] = asyncio.Queue()

    def on_welcome(self, welcome: Welcome, round_trip_s: float) -> None:
        self.round_trip_s = round_trip_s
        self.heard.put_nowait(("welcome", welcome))

    def on_result(self, result: Result) -> None:
        self.heard.put_nowait(("result", result))

    def on_broken(self, reason: str) -> None:
        self.heard.put_nowait(("broken", reason))

    def next_to_write(self) -> Outgoing | None:
        return self.outbox.pop(0) if self.outbox else None

    async def next(self, event: str):
        name, value = await asyncio.wait_for(self.heard.get(), 20)
        assert name == event, (name, value)
        return value


class Sleeper:
    """Waits for nothing, but is told for how long it should."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.waited = asyncio.Event()

    async def __call__(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.waited.set()
        await asyncio.sleep(0)


def client(address: str, handler: Recorder, **options) -> StreamClient:
    backoff = options.pop("backoff", None) or Backoff(0.001, 0.01, random.Random(1))
    return StreamClient(address, handler, backoff, connect_timeout_s=10.0, clock=time.monotonic, **options)


def hello(server) -> Hello:
    return Hello(server.fingerprint, 1, "device", "0")


def packet(frame_id: int) -> Outgoing:
    return Outgoing(Packet(0, frame_id, (b"abc",)).to_bytes(), 250)


def test_backoff_doubles_its_bound_up_to_the_maximum_and_draws_from_all_of_it():
    class Largest(random.Random):
        def uniform(self, a, b):
            assert a == 0
            return b

    backoff = Backoff(0.1, 1.0, Largest())
    assert [backoff.next_s() for _ in range(6)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    backoff.reset()
    assert backoff.next_s() == pytest.approx(0.1)
    drawn = Backoff(1.0, 1.0, random.Random(0))
    waits = [drawn.next_s() for _ in range(2000)]
    assert min(waits) < 0.01 and max(waits) > 0.99 and 0.45 < sum(waits) / 2000 < 0.55
    for _ in range(2000):
        assert 0 <= backoff.next_s() <= 1.0, "nothing overflows after many failures"


async def test_frames_up_and_results_down(server):
    handler = Recorder()
    stream = client(server.address, handler)
    task = asyncio.create_task(stream.run(hello(server)))
    welcome = await handler.next("welcome")
    assert (welcome.fingerprint, welcome.max_in_flight) == (server.fingerprint, 16)
    assert stream.attempted.is_set()
    handler.outbox += [packet(5), packet(6)]
    stream.wake()
    results = [await handler.next("result") for _ in range(2)]
    assert sorted(r.frame_id for r in results) == [5, 6]
    assert {r.status for r in results} == {Status.OK}
    assert [f.remaining_ms for f in server.frames] == [250, 250]
    assert server.hellos[0].device == "device"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await handler.next("broken") == "stopped"


async def test_several_results_of_one_response_are_each_heard_of(server):
    server.together = 3
    handler = Recorder()
    stream = client(server.address, handler)
    task = asyncio.create_task(stream.run(hello(server)))
    await handler.next("welcome")
    handler.outbox += [packet(n) for n in range(3)]
    stream.wake()
    results = [await handler.next("result") for _ in range(3)]
    assert sorted(r.frame_id for r in results) == [0, 1, 2] and {r.status for r in results} == {Status.OK}
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_the_greeting_times_one_round_trip(server):
    """Not those of connecting, which come before it."""
    async with TcpProxyLink(server.address, LinkSpec(up=8e6, delay_s=0.1, queue_bytes=32 * 1024)) as link:
        handler = Recorder()
        task = asyncio.create_task(client(link.address, handler).run(hello(server)))
        await handler.next("welcome")
        assert 0.2 <= handler.round_trip_s < 0.39
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_it_comes_back_by_itself_when_the_server_was_killed(server):
    handler = Recorder()
    stream = client(server.address, handler)
    task = asyncio.create_task(stream.run(hello(server)))
    for _ in range(3):
        await handler.next("welcome")
        handler.outbox.append(packet(1))
        stream.wake()
        await handler.next("result")
        await server.kill()
        assert await handler.next("broken")
        await server.start()
    await handler.next("welcome")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_without_a_server_it_waits_longer_and_longer():
    handler, sleeper = Recorder(), Sleeper()

    class Largest(random.Random):
        def uniform(self, a, b):
            return b

    stream = client("127.0.0.1:1", handler, backoff=Backoff(0.1, 0.4, Largest()), sleep=sleeper)
    task = asyncio.create_task(stream.run(Hello(bytes(32), 1)))
    while len(sleeper.waits) < 4:
        sleeper.waited.clear()
        await asyncio.wait_for(sleeper.waited.wait(), 20)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert sleeper.waits[:4] == pytest.approx([0.1, 0.2, 0.4, 0.4])
    assert stream.attempted.is_set()
    assert handler.heard.empty()


async def test_another_fingerprint_is_refused_for_good_and_both_are_named(server):
    other = Hello(b"\x01" * 32, 1)
    with pytest.raises(FingerprintRefusedError) as error:
        await client(server.address, Recorder()).run(other)
    assert "0101010101010101" in str(error.value)
    assert server.fingerprint.hex()[:16] in str(error.value)
    assert len(server.hellos) == 1


async def test_another_final_refusal_is_no_matter_of_fingerprints(server):
    server.refuse = "packets of version 1 are not read here; update the device"
    with pytest.raises(RefusedError, match="update the device") as error:
        await client(server.address, Recorder()).run(hello(server))
    assert not isinstance(error.value, FingerprintRefusedError)


async def test_a_connection_that_hangs_is_made_anew(server):
    handler = Recorder()
    stream = client(server.address, handler)
    server.answer = lambda frame: None
    task = asyncio.create_task(stream.run(hello(server)))
    await handler.next("welcome")
    handler.outbox.append(packet(1))
    stream.wake()
    await asyncio.wait_for(server.arrived.wait(), 20)
    stream.give_up_connection("no answer for 3 s")
    assert await handler.next("broken") == "no answer for 3 s"
    await handler.next("welcome")
    assert len(server.hellos) == 2
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_port_that_takes_connections_and_says_nothing_is_given_up():
    silent = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    address = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    sleeper = Sleeper()
    stream = StreamClient(
        address,
        Recorder(),
        Backoff(0.001, 0.01, random.Random(1)),
        connect_timeout_s=0.2,
        clock=time.monotonic,
        sleep=sleeper,
    )
    task = asyncio.create_task(stream.run(Hello(bytes(32), 1)))
    await asyncio.wait_for(sleeper.waited.wait(), 20)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    silent.close()

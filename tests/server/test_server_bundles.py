"""Bundles that come and go while frames are answered: none that was admitted is lost."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace.models.bitstream import VERSION, Packet
from headrace.models.bundle import TENSORS, Bundle
from headrace.protos import messages
from headrace.protos.messages import Hello, Result, Status
from headrace.server import bundle_dir
from headrace.server.bundles import health_name
from headrace.server.config import SHIPPED_BUNDLE
from headrace.server.exceptions import StartError

from .conftest import another_version

MakePacket = Callable[..., Packet]
STATES = health_pb2.HealthCheckResponse


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_dir, "EVERY_S", 0.02)


@pytest.fixture
def watched(tmp_path: Path) -> Path:
    """A folder that holds the shipped bundle as `a`."""
    folder = tmp_path / "bundles"
    shutil.copytree(SHIPPED_BUNDLE, folder / "a")
    return folder


def put(bundle_folder: Path, watched: Path, name: str) -> None:
    """Put a bundle there, or replace one, in one step each."""
    if (watched / name).exists():
        (watched / name).rename(watched.parent / f"old-{name}")
    shutil.copytree(bundle_folder, watched.parent / f"new-{name}", dirs_exist_ok=True)
    (watched.parent / f"new-{name}").rename(watched / name)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def hello(bundle: Bundle) -> Hello:
    return Hello(bundle.fingerprint, VERSION, "test")


async def refused(server: Any, bundle: Bundle) -> str:
    stream = await server.raw_stream(messages.hello_request(hello(bundle)))
    code, text = await stream.ended()
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    return text


async def test_versions_are_served_side_by_side(
    start: Any, make_packet: MakePacket, bundle: Bundle, tmp_path: Path
) -> None:
    second = another_version(bundle, tmp_path / "second")
    server = await start(bundles=[SHIPPED_BUNDLE, tmp_path / "second"])
    one, other = await server.stream(hello(bundle)), await server.stream(hello(second))
    server.engine.gate.clear()
    await one.send(make_packet(1))
    await server.engine.began.get()
    for stream, frame_id in ((one, 2), (other, 3), (one, 4), (other, 5)):
        await stream.send(make_packet(frame_id))
    await server.waiting(4)
    server.engine.gate.set()
    assert {(await one.result()).frame_id for _ in range(3)} == {1, 2, 4}
    assert {(await other.result()).frame_id for _ in range(2)} == {3, 5}
    frames = Counter[bytes]()
    for key, inputs in server.engine.batches:
        frames[key.fingerprint] += len(inputs)
    assert frames == {bundle.fingerprint: 3, second.fingerprint: 2}
    default = await server.stub.GetBundle(messages.GetBundleRequest(fingerprint=bytes(32))).code()
    assert default is grpc.StatusCode.FAILED_PRECONDITION


async def test_what_is_put_into_the_folder_is_served_and_what_is_taken_away_is_not(
    start: Any, make_packet: MakePacket, bundle: Bundle, watched: Path, tmp_path: Path
) -> None:
    server = await start(bundle_dir=watched, linger_s=0)
    second = another_version(bundle, tmp_path / "second")
    assert "this server serves" in await refused(server, second)
    put(tmp_path / "second", watched, "b")
    await until(lambda: second.fingerprint in server.engine.bundles)
    stream = await server.stream(hello(second))
    await stream.send(make_packet(1))
    assert (await stream.result()).status is Status.OK
    (watched / "b").rename(tmp_path / "gone")
    code, text = await stream.ended()
    assert code is grpc.StatusCode.UNAVAILABLE and "no longer served" in text and bundle.name in text
    await until(lambda: server.engine.bundles == [bundle.fingerprint])
    await refused(server, second)
    assert (await server.stream(hello(bundle))).welcome is not None


async def test_one_that_was_given_by_name_stays_when_its_copy_leaves_the_folder(
    start: Any, make_packet: MakePacket, bundle: Bundle, watched: Path, tmp_path: Path
) -> None:
    second = another_version(bundle, tmp_path / "second")
    put(tmp_path / "second", watched, "b")
    server = await start(bundles=[SHIPPED_BUNDLE], bundle_dir=watched, linger_s=0)
    await until(lambda: second.fingerprint in server.engine.bundles)
    (watched / "a").rename(tmp_path / "gone")
    (watched / "b").rename(tmp_path / "gone too")
    await until(lambda: second.fingerprint not in server.engine.bundles)
    stream = await server.stream(hello(bundle))
    await stream.send(make_packet(1))
    assert (await stream.result()).status is Status.OK


async def test_one_that_comes_back_while_it_is_unloaded_is_held(
    start: Any, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that takes its time, and one change after another, as that on Ray does."""
    second = another_version(bundle, tmp_path / "second")
    server = await start(linger_s=0)
    bundles, engine = server.server._bundles, server.engine
    await bundles.load(tmp_path / "second")
    lock, begun, held = asyncio.Lock(), asyncio.Event(), {second.fingerprint}

    async def slow_load(each: Bundle) -> Any:
        async with lock:
            begun.set()
            await asyncio.sleep(0.2)
            held.add(each.fingerprint)
            return {}

    async def slow_unload(fingerprint: bytes) -> None:
        async with lock:
            held.discard(fingerprint)

    monkeypatch.setattr(engine, "load", slow_load)
    monkeypatch.setattr(engine, "unload", slow_unload)
    served = bundles.find(second.fingerprint)
    with served.used():  # a stream of it
        await bundles.retire(second.fingerprint)
        coming = asyncio.create_task(bundles.load(tmp_path / "second"))
        await begun.wait()
    await coming
    await bundles.retired()
    assert bundles.find(second.fingerprint) is not None and second.fingerprint in held


async def test_a_bundle_is_swapped_without_losing_a_frame(
    start: Any, make_packet: MakePacket, bundle: Bundle, watched: Path, tmp_path: Path
) -> None:
    server = await start(bundle_dir=watched, linger_s=0)
    second = another_version(bundle, tmp_path / "second")
    old = await server.stream(hello(bundle))
    server.engine.gate.clear()
    await old.send(make_packet(0))
    await server.engine.began.get()  # it is a batch of its own
    for frame_id in range(1, 6):
        await old.send(make_packet(frame_id))
    await server.waiting(5)
    put(tmp_path / "second", watched, "a")
    await until(lambda: second.fingerprint in server.engine.bundles)
    new = await server.stream(hello(second))  # before the old one has ended
    await new.send(make_packet(100))
    await old.send(make_packet(6))
    refusal = await old.result()
    assert (refusal.frame_id, refusal.status) == (6, Status.UNAVAILABLE) and "no longer served" in refusal.message
    assert bundle.fingerprint in server.engine.bundles, "its frames are not answered yet"
    server.engine.gate.set()
    assert {(r := await old.result()).frame_id: r.status for _ in range(6)} == dict.fromkeys(range(6), Status.OK)
    assert (await old.ended())[0] is grpc.StatusCode.UNAVAILABLE
    assert (await new.result()).status is Status.OK
    await until(lambda: server.engine.bundles == [second.fingerprint])


async def test_streams_of_a_replaced_bundle_may_linger(
    start: Any, make_packet: MakePacket, bundle: Bundle, watched: Path, tmp_path: Path
) -> None:
    server = await start(bundle_dir=watched, linger_s=3600)
    old = await server.stream(hello(bundle))
    second = another_version(bundle, tmp_path / "second")
    put(tmp_path / "second", watched, "a")
    await until(lambda: second.fingerprint in server.engine.bundles)
    await refused(server, bundle)
    for frame_id in range(3):
        await old.send(make_packet(frame_id))
        assert (await old.result()).status is Status.OK
    assert await server.finished(old) is grpc.StatusCode.OK
    await until(lambda: server.engine.bundles == [second.fingerprint])


async def test_a_damaged_bundle_is_not_served_and_the_old_one_is(
    start: Any, bundle: Bundle, watched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = await start(bundle_dir=watched)
    second = another_version(bundle, tmp_path / "second")
    data = bytearray((tmp_path / "second" / TENSORS).read_bytes())
    data[-1] ^= 1
    whole = (tmp_path / "second" / TENSORS).read_bytes()
    (tmp_path / "second" / TENSORS).write_bytes(data)
    put(tmp_path / "second", watched, "a")
    said = ""
    async with asyncio.timeout(60):
        while "a bundle cannot be loaded" not in said:
            await asyncio.sleep(0.01)
            said += "".join(capsys.readouterr())
    assert str(watched / "a") in said
    assert server.engine.bundles == [bundle.fingerprint]
    assert (await server.stream(hello(bundle))).welcome is not None
    (watched / "a" / TENSORS).write_bytes(whole)  # mended where it lies
    await until(lambda: second.fingerprint in server.engine.bundles)


async def test_a_bundle_that_fails_unforeseen_keeps_no_other_from_coming_or_going(
    watched: Path,
) -> None:
    shutil.copytree(SHIPPED_BUNDLE, watched / "b")
    served: list[str] = []

    class Loads:
        async def load(self, folder: Path) -> Any:
            if not (folder / "good").exists():
                raise MemoryError(folder.name)
            served.append(folder.name)
            return SimpleNamespace(bundle=SimpleNamespace(fingerprint=folder.name.encode()))

        async def retire(self, fingerprint: bytes) -> None:
            served.remove(fingerprint.decode())

    (watched / "b" / "good").touch()
    folder = bundle_dir.BundleDir(watched, Loads())  # type: ignore[arg-type]
    await folder.scan()
    assert served == ["b"], "a fails first"
    shutil.rmtree(watched / "b")
    (watched / "a" / "new").touch()  # tried again, and fails again
    await folder.scan()
    assert served == []


async def test_a_bundle_measured_anew_is_exchanged_under_its_streams(
    start: Any, make_packet: MakePacket, bundle: Bundle, watched: Path
) -> None:
    server = await start(bundle_dir=watched, linger_s=0)
    stream = await server.stream(hello(bundle))
    manifest = watched / "a" / "bundle.msgpack"
    manifest.write_bytes(manifest.read_bytes())
    await until(lambda: len(server.engine.bundles) == 2)
    await stream.send(make_packet(1))
    assert (await stream.result()).status is Status.OK
    assert await server.finished(stream) is grpc.StatusCode.OK


async def test_every_bundle_has_its_own_health_which_can_be_watched(
    start: Any, bundle: Bundle, watched: Path, tmp_path: Path
) -> None:
    server = await start(bundle_dir=watched, linger_s=0)
    health = health_pb2_grpc.HealthStub(server.channel)
    names = {
        "name": health_name(bundle.name),
        "old": health_name(bundle.fingerprint.hex()),
        "new": health_name(another_version(bundle, tmp_path / "second").fingerprint.hex()),
    }

    async def states(name: str) -> AsyncIterator[int]:
        async for answer in health.Watch(health_pb2.HealthCheckRequest(service=names[name])):
            yield answer.status

    of = {name: states(name) for name in names}
    assert [await anext(of[n]) for n in names] == [STATES.SERVING, STATES.SERVING, STATES.SERVICE_UNKNOWN]
    put(tmp_path / "second", watched, "a")
    assert await anext(of["new"]) == STATES.SERVING
    assert await anext(of["old"]) == STATES.NOT_SERVING
    answer = await health.Check(health_pb2.HealthCheckRequest(service=names["name"]))
    assert answer.status == STATES.SERVING, "another version has that name"
    draining = asyncio.create_task(server.server.drain())
    assert await anext(of["new"]) == STATES.NOT_SERVING
    for each in of.values():
        await each.aclose()
    await draining


async def test_a_folder_without_a_bundle_or_none_at_all_is_an_error(start: Any, tmp_path: Path) -> None:
    with pytest.raises(StartError, match="no bundle in"):
        await start(bundle_dir=tmp_path)
    with pytest.raises(StartError, match=r"nowhere cannot be read"):
        await start(bundle_dir=tmp_path / "nowhere")


async def test_a_bundle_that_would_decode_to_too_much_is_not_loaded(start: Any) -> None:
    with pytest.raises(StartError, match=r"decodes to \d+ numbers .* --max-elements"):
        await start(max_elements=1000)


async def swap_under_load(server: Any, watched: Path, versions: list[Path], packets: list[Packet]) -> int:
    """Devices that send as fast as they are answered, while the bundle is replaced; how many frames they sent.

    A frame that was on its way when its stream ended was never read: it is not among those that the server received.
    """
    bundles = [Bundle.load(folder) for folder in versions]
    stop, sent = asyncio.Event(), 0

    async def one_stream(packet: Packet, each: Bundle) -> None:
        nonlocal sent
        call = server.stub.Stream()
        try:
            await call.write(messages.hello_request(hello(each)))
            await call.read()
            while not stop.is_set():
                await call.write(messages.frame_request(messages.Frame(packet.to_bytes())))
                sent += 1
                result = messages.read_response(await call.read())
                assert isinstance(result, Result)
                assert result.status in (Status.OK, Status.UNAVAILABLE)
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # INTERNAL is what gRPC's client says of a stream that ended while it wrote.
            codes = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INTERNAL
            assert await call.code() in codes

    async def device(packet: Packet) -> None:
        while not stop.is_set():
            for each in bundles:
                await one_stream(packet, each)

    devices = [asyncio.create_task(device(packet)) for packet in packets]
    for folder, each in zip(versions, bundles, strict=True):
        shutil.rmtree(watched.parent / "old-a", ignore_errors=True)
        put(folder, watched, "a")
        await until(lambda each=each: server.engine.bundles == [each.fingerprint])
    stop.set()
    await asyncio.gather(*devices)
    return sent


@pytest.mark.parametrize("swaps", [3, pytest.param(20, marks=pytest.mark.slow)])
async def test_swaps_under_load_lose_no_admitted_frame(
    start: Any, make_packet: MakePacket, bundle: Bundle, watched: Path, tmp_path: Path, swaps: int
) -> None:
    server = await start(bundle_dir=watched, linger_s=0)
    versions = [tmp_path / f"version {i}" for i in range(swaps)]
    for i, folder in enumerate(versions):
        another_version(bundle, folder, 1 + 0.01 * (1 + i))
    sent = await swap_under_load(server, watched, versions, [make_packet(i) for i in range(4)])
    received, answered = server.sums()
    assert 0 < received == answered <= sent
    assert server.count("cancelled") == 0, "admitted, and its stream was cut off before the answer"

"""The load generator and its figures; a short run of the real thing, without the other systems."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
from pathlib import Path

import pytest
from headrace.bench.commands import bench_server
from headrace.bench.cores import all_cores
from headrace.bench.server import cells
from headrace.bench.server.clients import HttpDevice
from headrace.bench.server.load import SETTLE_S, Load, Tally, offer, schedule
from headrace.bench.server.plan import KEYS, PARTS, Found, Plan
from headrace.bench.server.run import run, smallest
from headrace.bench.server.search import capacity
from headrace.bench.server.systems import Place, devices, host, spread
from headrace.models.exceptions import HeadraceError


def test_devices_send_at_their_rates() -> None:
    load = Load((10.0, 40.0, 0.0), 100.0, 0.25, "poisson", seed=3)
    due = schedule(load)
    assert due == sorted(due)
    counts = [sum(device == n for _, device in due) for n in range(3)]
    assert counts[0] == pytest.approx(1005, abs=130) and counts[1] == pytest.approx(4020, abs=260) and counts[2] == 0
    gaps = [b - a for (a, _), (b, _) in itertools.pairwise(due)]
    mean = sum(gaps) / len(gaps)
    assert sum((g - mean) ** 2 for g in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.15), "exponential gaps"
    periodic = [at for at, device in schedule(Load((10.0,), 2.0, 0.25, "periodic"))]
    assert all(b - a == pytest.approx(0.1) for a, b in itertools.pairwise(periodic))
    assert schedule(load) == due, "seeded"


class Scripted:
    """A target that answers by a rule."""

    def __init__(self, rule: str) -> None:
        self.rule = rule

    def send(self, frame: int, remaining_ms: int) -> asyncio.Future[bool] | None:
        assert 0 < remaining_ms <= 100
        if self.rule == "full":
            return None
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if self.rule != "silent":
            future.set_result(self.rule == "good")
        return future


async def test_every_frame_that_is_due_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.bench.server.load.CLEAR_S", 0.1)
    tally = await offer(
        Load((50.0,) * 4, 0.4, 0.1, "periodic"), [Scripted(r) for r in ("good", "refused", "full", "silent")]
    )
    assert tally.due == pytest.approx([20] * 4, abs=1)
    assert tally.good[1:] == [0, 0, 0] and 0 < tally.good[0] <= tally.due[0]
    assert len(tally.latencies) == tally.due[0]
    assert (tally.refused, tally.unsent) == (tally.due[1], tally.due[2])
    assert tally.unanswered == pytest.approx(20 * (0.4 + SETTLE_S) / 0.4, abs=2), "settling counts here alone"


def test_figures_of_a_tally() -> None:
    tally = Tally([10, 10], [10, 0], 2.0, latencies=[0.01 * n for n in range(1, 101)])
    assert (tally.goodput, tally.share, tally.fairness()) == (5.0, 0.5, 0.5)
    assert tally.p(50) == pytest.approx(0.505)
    assert spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0) and spread([1.0, 3.0])[0] == 2.0


@pytest.mark.parametrize("first", [3.0, 70.0, 100.0, 5000.0])
async def test_the_search_finds_what_is_carried(first: float) -> None:
    async def carry(load: float) -> Tally:
        good = load <= 123.0
        return Tally([1000], [1000 if good else 980], 1000 / load)

    found = await capacity(carry, first, steps=6)
    assert 118.0 < found.fps <= 123.0
    nothing = await capacity(lambda load: carry(1e6), 100.0, widest=4)
    assert nothing.fps == 0 and len(nothing.tried) == 8, "each twice"


def test_ratios_are_of_the_same_round() -> None:
    found = Found({"headrace": [10.0, 30.0, 20.0], "litserve": [5.0, 10.0, 10.0]})
    found.ratio("over_litserve", "headrace", "litserve")
    found.ratio("over_ray_serve", "headrace", "ray")
    assert found.figures["over_litserve"] == 2.0 and found.rounds["over_litserve"] == [2.0, 3.0, 2.0]
    assert found.figures["over_ray_serve"] is None
    assert tuple(found.figures) == KEYS


async def test_the_peak_is_the_most_over_growing_loads() -> None:
    loads: list[float] = []

    async def carry(load: float) -> Tally:
        loads.append(load)
        return Tally([1000], [round(min(load, 123.0 - 0.1 * load) * 10)], 10.0)

    assert 105.0 < await cells.peak(carry) <= 123.0
    assert loads[-1] > 150.0, "two in a row brought no more"


def test_what_is_kept_is_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    found = Found.kept(file)
    found.add("headrace", 10.0)
    found.complete, found.figures["lost_on_swap"] = 1, 0
    found.save()
    found.add("headrace", 20.0)  # of a round that was not complete
    found.save()
    again = Found.kept(file)
    assert (again.rounds, again.complete, again.figures["lost_on_swap"]) == ({"headrace": [10.0]}, 1, 0)
    file.write_text("[]")
    with pytest.raises(HeadraceError, match="--keep"):
        Found.kept(file)


async def test_http_devices_speak_to_a_plain_server() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            if body == b"chunked":
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n")
                await writer.drain()
                writer.write(b"0\r\n\r\n")
            else:
                status = b"200 OK" if body == b"good" else b"503 Service Unavailable"
                writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\nok")

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    device = HttpDevice(
        f"127.0.0.1:{server.sockets[0].getsockname()[1]}", "/", "text/plain", [b"good", b"bad", b"chunked"]
    )
    await device.connect()
    futures = [device.send(n, 100) for n in range(20)]
    assert futures[16:] == [None] * 4, "a device has so many frames under way"
    answers = await asyncio.gather(*(f for f in futures if f is not None))
    assert answers == [n % 3 != 1 for n in range(16)]
    assert await (device.send(0, 100) or asyncio.sleep(0, False))
    await device.close()
    server.close()


async def test_the_null_server_answers_the_real_stream(tmp_path: Path) -> None:
    place = Place(frozenset({min(all_cores())}), 8, tmp_path)
    async with (
        host("null", place) as (_, said),
        devices("null", said["address"], bytes.fromhex(said["fingerprint"]), 4, smallest()) as targets,
    ):
        tally = await offer(Load.even(4, 40.0, 1.0, 10.0, "periodic"), targets)
    assert sum(tally.due) == sum(tally.good) > 30
    assert (tally.refused, tally.unsent, tally.unanswered) == (0, 0, 0)


def test_the_log_says_how_many_frames_were_taken(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "x [info] stream opened device=device-1 peer=a\n"
        "x [\x1b[32minfo\x1b[0m] stream closed   \x1b[36mdevice\x1b[0m=\x1b[35mdevice-1\x1b[0m "
        "frames=\x1b[35m12\x1b[0m peer=b\n"
        '{"event": "stream closed", "device": "device-0", "frames": 7}\n'
    )
    assert cells.frames_taken(log, 0) == {1: 12, 0: 7}
    assert cells.frames_taken(log, log.stat().st_size) == {}
    one, other = cells.two_versions()
    assert one.fingerprint != other.fingerprint
    assert other.check() is other


def test_flags_that_cannot_be_used_are_named() -> None:
    good = (4, 1.0, 1, 250.0, 8, "poisson", "ray", 1.0, 1, 1)
    assert Plan.of(*good).rivals == ("ray",)
    assert Plan.of(*good, "blocks.5@4", "drain,swap").parts == ("drain", "swap")
    for more, message in ((("nothing@1",), "--point"), (("blocks.5@4", "all"), "--parts")):
        with pytest.raises(HeadraceError, match=message):
            Plan.of(*good, *more)
    for at, value, message in ((5, "burst", "--pattern"), (6, "triton", "'triton'"), (0, 0, "--devices")):
        with pytest.raises(HeadraceError, match=message):
            Plan.of(*(value if n == at else v for n, v in enumerate(good)))  # type: ignore[arg-type]


def test_the_command_measures_everything_unless_told_otherwise() -> None:
    assert tuple(inspect.signature(bench_server).parameters["parts"].default.split(",")) == PARTS


@pytest.mark.slow
@pytest.mark.timeout(900)  # a dozen servers start, one after the other
def test_a_short_run_of_all_of_it(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    plan = Plan(devices=4, seconds=1.0, rounds=1, rivals=(), overload_s=2.0, idle=20, repetitions=1)
    assert run(plan, file) == 0
    found = json.loads(file.read_text())
    assert tuple(found) == KEYS
    missing = {"over_litserve", "over_ray_serve", "null_over_litserve", "null_over_ray_serve"}
    assert {key for key, value in found.items() if value is None} == missing
    assert found["over_bare_loop"] > 0 and found["overload_goodput_share"] >= 0
    assert found["lost_on_swap"] == found["lost_on_drain"] == 0

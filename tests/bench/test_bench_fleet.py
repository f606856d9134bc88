"""The capacity model in exact numbers, the virtual server, and a small fleet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from headrace.bench.fleet.cell import Cell, Fleet, Outcome, Templates
from headrace.bench.fleet.model import TARGET, Constants, Use, devices_per_core, mean_frame_s, need
from headrace.bench.fleet.run import PARTS, Plan, parts, read_constants, run, simulate
from headrace.bench.fleet.server import VirtualServer
from headrace.bench.links.trace_set import Window
from headrace.bench.links.traces import Trace
from headrace.models.bundle import Bundle
from headrace.models.exceptions import HeadraceError
from headrace.server.admission import Limits
from headrace.server.config import SHIPPED_BUNDLE

BUNDLE = Bundle.load(SHIPPED_BUNDLE)
SPLITS = (*(spec.name for spec in BUNDLE.splits), "")
CONSTANTS = Constants(
    {split: {1: 0.010, 8: 0.045} for split in SPLITS},
    dict.fromkeys(SPLITS, 0.001),
    serve_s=0.0005,
    greet_s=0.002,
    idle_mb=0.05,
    base_mb=1000.0,
    half_mb=30.0,
    decision_s=5e-5,
)


def fleet(seconds: float = 4.0, mbps: float = 3.0, **more: object) -> Fleet:
    window = Window(Trace.steps([(10.0, mbps * 1e6), (10.0, mbps * 0.5e6)], "steps"), "steps", True)
    return Fleet(tuple(BUNDLE.operating_points), BUNDLE.fingerprint, (window,), seconds=seconds, **more)


def test_batches_between_and_beyond_what_was_measured() -> None:
    of = CONSTANTS.batch_of
    assert of("", 1) == 0.010 and of("", 8) == 0.045
    assert of("", 4) == pytest.approx(0.025) and of("", 16) == pytest.approx(0.090)


def test_the_model_in_numbers() -> None:
    use = Use(fps=2.0, sent=0.5, mix={"": 1.0}, batch=1, cores=4, streams=1000, network_mbps=100.0, bits=10_000)
    assert mean_frame_s(CONSTANTS, use) == pytest.approx((0.011, 0.0005))
    assert devices_per_core(CONSTANTS, use) == pytest.approx(TARGET / 0.0115)
    ten = need(10_000, CONSTANTS, use)
    assert ten.frames_per_s == 10_000
    assert ten.tail_cores == pytest.approx(110 / TARGET) and ten.serving_cores == pytest.approx(5 / TARGET)
    assert (ten.machines, ten.first) == (42, "cores")
    assert ten.back_s == pytest.approx(10_000 * 0.002 / 168)
    assert ten.spread_s == pytest.approx(10_000 * 30 * 8 / (42 * 100))
    assert need(10_000, CONSTANTS, replace(use, cores=1000)).first == "connections"
    assert need(10_000, CONSTANTS, replace(use, cores=1000, streams=10**6, memory_mb=1001)).first == "memory"
    assert need(10_000, CONSTANTS, replace(use, cores=1000, streams=10**6, network_mbps=1)).first == "network"


def test_the_virtual_server_batches_what_waits_and_keeps_its_sums() -> None:
    given_up: list[int] = []
    server: VirtualServer[int] = VirtualServer(CONSTANTS, b"f" * 32, lambda frame, _: given_up.append(frame))
    for frame in range(6):
        assert server.arrive(frame, "", f"d{frame}", 1000, 100.0, 0.0)
    answered: list[tuple[float, list[int]]] = []
    now: float | None = 0.0
    while now is not None:
        done = server.turn(now)
        if done:
            answered.append((now, [each.frame for each in done]))
        now = server.next_at(now)
    assert sorted(frame for _, frames in answered for frame in frames) == list(range(6))
    assert (server.frames, server.batches) == (6, len(answered))
    waited = answered[-1][0] - server.busy_s
    assert 0 <= waited <= 0.0051, "the core is idle at most while a batch waits for company"
    assert given_up == [] and server.admission.open == server.admission.waiting == 0


def test_a_full_or_late_server_refuses() -> None:
    server: VirtualServer[int] = VirtualServer(CONSTANTS, b"f" * 32, lambda *_: None, limits=Limits(2, 2, 10**6))
    server.arrive(0, "", "a", 1000, 100.0, 0.0)
    server.turn(0.0)
    assert server.arrive(1, "", "a", 1000, 100.0, 0.0) and server.arrive(2, "", "a", 1000, 100.0, 0.0)
    assert not server.arrive(3, "", "a", 1000, 100.0, 0.0)
    assert not server.arrive(4, "", "b", 1000, 0.001, 0.0), "too late even if it were alone"
    assert sum(server.refused.values()) == 2


@pytest.mark.parametrize("each", [3, 150])
def test_frames_add_up_on_idle_and_overloaded_servers(each: int) -> None:
    given = fleet()
    out = Cell(given, Templates(given), CONSTANTS, range(each)).run()
    assert out.ok + out.local + out.late + out.dropped == out.frames == 4 * each
    assert out.sent == sum(out.split.values())
    assert out.refused == sum(out.reasons.values()) and out.computed == out.sent - out.refused
    assert len(out.shares) == each and sum(out.shares) * 4 == pytest.approx(out.ok + out.local)
    if each == 3:
        assert out.on_time > 0.9 and out.refused == 0 and out.load < 0.1
    else:
        assert out.load > 0.9 and out.on_time < 0.9 and out.computed > out.batches


def test_a_fleet_is_simulated_in_parts_of_whole_servers() -> None:
    for devices, each in ((100_000, 51), (1000, 7), (5, 40), (41, 40)):
        found = parts(devices, each)
        assert [n for part in found for n in part] == list(range(devices))
        assert all(len(part) % each == 0 for part in found[:-1]) and len(found) <= PARTS


def test_cells_are_the_same_for_the_same_devices_and_add_up() -> None:
    given = fleet(seconds=2.0)
    templates = Templates(given)
    both = simulate(given, templates, CONSTANTS, 5, range(10))
    assert simulate(given, templates, CONSTANTS, 5, range(10), jobs=2) == both
    total = Outcome()
    for numbers in (range(5), range(5, 10)):
        total.add(Cell(given, Templates(given), CONSTANTS, numbers).run())
    assert both == total
    assert (both.servers, both.devices, both.frames) == (2, 10, 20)


def test_a_run_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.bench.fleet.run.SAMPLE_SERVERS", 1)
    traces = tmp_path / "traces"
    traces.mkdir()
    (traces / "link").write_text("".join(f"{second} {1 + second % 3}\n" for second in range(120)))
    file = tmp_path / "fleet.json"
    assert run(Plan(traces, devices=60, seconds=1.0), file, CONSTANTS) == 0
    found = json.loads(file.read_text())
    assert found["fleet"]["devices"] == 60 and found["fleet"]["frames"] == 60
    assert [n["devices"] for n in found["needs"]] == [10_000, 100_000, 1_000_000]
    assert found["knee"][0]["load"] < found["knee"][-1]["load"]
    assert read_constants(file) == CONSTANTS
    file.write_text("{}")
    with pytest.raises(HeadraceError, match="--json"):
        read_constants(file)


def test_flags_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    assert Plan.of(tmp_path, 10, 1.0, 1.0, 250.0, "300,500", 0).devices_s == (0.3, 0.5)
    for wrong in (("x", 1.0), ("300", 0.0)):
        with pytest.raises(HeadraceError):
            Plan.of(tmp_path, 10, wrong[1], 1.0, 250.0, wrong[0], 0)

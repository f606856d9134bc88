"""Overload in virtual time: the real admission, order and batches, before a tail that takes exactly so long."""

from __future__ import annotations

import heapq
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pytest
from headrace.server.admission import Admission, Limits, Place
from headrace.server.batcher import Batcher, batch_limit_s
from headrace.server.costs import Costs
from headrace.server.engine import TailKey
from headrace.server.exceptions import FrameError

KEY = TailKey(b"f", "blocks.3")
BATCH_S = {1: 0.008, 2: 0.012, 4: 0.020, 8: 0.036}
PEAK = 8 / BATCH_S[8]
"""Frames a second, in full batches."""
SECONDS = 20.0


@dataclass
class Frame:
    device: str
    came: float
    deadline: float
    place: Place | None = None


@dataclass
class Outcome:
    """What became of every frame, by device."""

    sent: Counter[str] = field(default_factory=Counter)
    statuses: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    latencies: list[float] = field(default_factory=list)
    deepest: int = 0

    def on_time(self, *devices: str) -> float:
        """Share of the devices' frames that were answered in time."""
        return sum(self.statuses[d]["ok"] for d in devices) / sum(self.sent[d] for d in devices)


def simulate(rates: dict[str, float], seconds: float = SECONDS, deadline_s: float = 0.250, seed: int = 1) -> Outcome:
    """Open-loop Poisson arrivals of each device, in frames a second, at one server."""
    rng = random.Random(seed)
    arrivals: list[tuple[float, str]] = []
    for device, rate in rates.items():
        now = rng.expovariate(rate)
        while now < seconds:
            arrivals.append((now, device))
            now += rng.expovariate(rate)
    arrivals.sort()
    costs = Costs()
    costs.know(KEY, BATCH_S, 0.0)
    admission = Admission(Limits(256, 64, 1 << 30))
    batcher: Batcher[Frame] = Batcher(8, 0.005, costs, admission.shares)
    outcome = Outcome()
    running: list[Frame] = []
    done_at = took = 0.0
    last_done: float | None = None

    def answer(frame: Frame, status: str, now: float) -> None:
        outcome.statuses[frame.device][status] += 1
        if frame.place is not None:
            frame.place.leave()
        if status in ("ok", "late"):
            outcome.latencies.append(now - frame.came)

    def begin(now: float) -> float | None:
        """Begin a batch if the tail is free; when to look again."""
        nonlocal running, done_at, took
        if running:
            return None
        ready_at = batcher.ready_at(now)
        if ready_at is None or ready_at > now:
            return ready_at
        batch, expired = batcher.take(now)
        for frame in expired:
            answer(frame, "deadline_exceeded", now)
        if batch is not None:
            running = list(batch.items)
            for frame in running:
                assert frame.place is not None
                frame.place.begin()
            took = costs_of(len(running)) * rng.uniform(0.95, 1.1)
            done_at = now + took
            heapq.heappush(events, (done_at, 1, ""))
        return None

    events: list[tuple[float, int, str]] = [(at, 0, device) for at, device in arrivals]
    heapq.heapify(events)
    while events:
        now, kind, device = heapq.heappop(events)
        if kind == 0:
            frame = Frame(device, now, now + deadline_s)
            outcome.sent[device] += 1
            try:
                frame.place = admission.admit(
                    now,
                    frame.deadline,
                    device=device,
                    cost=costs.frame_s(KEY, now),
                    alone=costs.alone_s(KEY, now),
                    busy=max(0.0, done_at - now),
                    batch=costs.full_batch_s(KEY, 8, batch_limit_s(deadline_s), now),
                )
            except FrameError as error:
                answer(frame, error.status.name.lower(), now)
            else:
                place = frame.place
                place.pushed_out = lambda _, frame=frame: pytest.fail("nothing is this full here")
                batcher.put(frame, KEY, frame.deadline, now, start=place.start, cost=place.cost, whole=deadline_s)
        elif kind == 1:
            costs.batch_done(KEY, len(running), took, now)
            if last_done is not None:
                costs.paced(KEY, (now - last_done) / len(running), now)
            last_done = now if admission.waiting else None
            for frame in running:
                answer(frame, "ok" if now <= frame.deadline else "late", now)
            running = []
        outcome.deepest = max(outcome.deepest, admission.waiting)
        if (again := begin(now)) is not None:
            heapq.heappush(events, (again, 2, ""))
    assert admission.open == admission.waiting == 0
    assert {d: sum(c.values()) for d, c in outcome.statuses.items()} == dict(outcome.sent), "every frame, once"
    return outcome


def costs_of(size: int) -> float:
    known = Costs()
    known.know(KEY, BATCH_S, 0.0)
    return known.batch_s(KEY, size, 0.0)


def goodput(outcome: Outcome, seconds: float = SECONDS) -> float:
    return sum(c["ok"] for c in outcome.statuses.values()) / seconds


@pytest.mark.parametrize("times", [1.5, 3, 10])
def test_goodput_stays_near_its_peak_under_overload(times: float) -> None:
    devices = {f"device {i}": times * PEAK / 20 for i in range(20)}
    outcome = simulate(devices)
    assert goodput(outcome) >= 0.95 * PEAK / 1.025, "the tail takes 1.025 times as long as planned, in the mean"
    late = sum(c["late"] for c in outcome.statuses.values())
    assert late <= 0.01 * len(outcome.latencies)
    assert sorted(outcome.latencies)[int(0.99 * len(outcome.latencies))] <= 0.250
    assert outcome.deepest <= 64, "the queue is as long as the deadlines allow, not longer"


def test_nothing_is_refused_below_capacity() -> None:
    outcome = simulate({f"device {i}": 0.7 * PEAK / 20 for i in range(20)})
    assert outcome.on_time(*outcome.sent) >= 0.999


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_device_with_a_hundred_times_its_share_takes_nothing_from_the_others(load: float) -> None:
    fair = PEAK / 10
    modest = {f"device {i}": load * fair for i in range(9)}
    alone = simulate(modest | {"greedy": load * fair})
    beside = simulate(modest | {"greedy": 100 * fair})
    assert alone.on_time(*modest) - beside.on_time(*modest) <= 0.02
    for device in modest:
        assert beside.on_time(device) >= alone.on_time(device) - 0.03
    assert goodput(beside) >= 0.9 * PEAK / 1.025, "what the others leave is used"


def test_many_streams_under_one_name_are_one_device() -> None:
    modest = {f"device {i}": 0.6 * PEAK / 10 for i in range(9)}
    beside = simulate(modest | {"greedy": 20 * PEAK})
    assert beside.on_time(*modest) >= 0.97


def test_short_deadlines_are_kept_too() -> None:
    outcome = simulate({f"device {i}": 10 * PEAK / 20 for i in range(20)}, deadline_s=0.050)
    answered = sum(c["ok"] + c["late"] for c in outcome.statuses.values())
    assert sum(c["late"] for c in outcome.statuses.values()) <= 0.01 * answered
    assert goodput(outcome) >= 0.75 * PEAK, "50 ms leave room for no more than a batch of four behind another"

"""The decision that needs no weighing is the one that weighing gives."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from headrace.edge.controller import Choice, ControlLoop, ControlSettings
from headrace.edge.objective import Objective
from headrace.models.bundle import Bundle
from headrace.models.operating_point import Kind

BUNDLE = Path(__file__).parents[2] / "models" / "bundles" / "efficientnet_lite0"
RTT, HOLD, INTERVAL = 0.03, 0.01, 0.1
PRICED = ControlSettings(objective=Objective.BYTES, accuracy_floor=0.5)


class Weighing(ControlLoop):
    """One that always weighs."""

    def _nothing_to_weigh(self, now: float, captured_at: float, start: float) -> Choice | None:
        return None


class Counting(ControlLoop):
    """One that counts how often it did not have to."""

    short = 0

    def _nothing_to_weigh(self, now: float, captured_at: float, start: float) -> Choice | None:
        choice = super()._nothing_to_weigh(now, captured_at, start)
        self.short += choice is not None
        return choice


def run(loop: ControlLoop, rate: float, seed: int, frames: int = 120) -> list[Choice]:
    """Frames over a link whose rate and delay vary, with packets and compute times that do too, and some gaps."""
    random_of = random.Random(seed)
    choices, link_free, now = [], 0.0, 0.0
    loop.on_round_trip(RTT, now)
    for frame in range(frames):
        now += INTERVAL * random_of.choice((1, 1, 1, 1, 1, 2, 30))
        choice = loop.choose(now + 0.002, now, compute_free_at=now)
        choices.append(choice)
        seconds = max(choice.point.edge_share, 0.05) * 0.05 * random_of.uniform(0.9, 1.2)
        size = round(choice.point.bytes_median * random_of.lognormvariate(0, 0.2))
        loop.on_computed(choice.point, seconds, now + seconds)
        if not size:
            continue
        loop.on_coded(choice.point, size)
        ready = now + 0.002 + seconds
        loop.on_written(frame, size, ready)
        link_free = max(link_free, ready) + 8 * (size + 40) / (rate * random_of.lognormvariate(0, 0.3))
        answered = link_free + RTT + HOLD + random_of.expovariate(1000)
        loop.on_result(frame, answered, server_s=HOLD, queue_depth=0)
    return choices


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("rate", [3e4, 3e5, 2e6, 1e7, 1e8])
def test_the_short_way_leads_to_the_same_choice(rate, local):
    points = [p for p in Bundle.load(BUNDLE).operating_points if local or p.kind is not Kind.LOCAL]
    used = 0
    for seed in range(4):
        counting = Counting(points, deadline_s=0.2, frame_interval_s=INTERVAL, uncut_s=0.15)
        short = run(counting, rate, seed)
        weighed = run(Weighing(points, deadline_s=0.2, frame_interval_s=INTERVAL, uncut_s=0.15), rate, seed)
        assert [c.point.id for c in weighed] == [c.point.id for c in short]
        assert [c.p_on_time for c in short] == pytest.approx([c.p_on_time for c in weighed])
        used += counting.short
    # With a local answer, the most accurate one that is too dear for every frame, there is something to weigh.
    assert used > 200 if rate >= 1e7 and not local else used == 0 if rate <= 3e4 or local else used >= 0


def test_a_price_is_always_weighed():
    loop = Counting(
        [p for p in Bundle.load(BUNDLE).operating_points if p.kind is not Kind.LOCAL],
        deadline_s=0.2,
        frame_interval_s=INTERVAL,
        uncut_s=0.15,
        settings=PRICED,
    )
    run(loop, 1e8, 0)
    assert loop.short == 0

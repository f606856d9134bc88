"""The choice, in exact numbers and without waiting: each rule has a test that fails without it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from headrace.edge.controller import Choice, ControlLoop, ControlSettings
from headrace.models.exceptions import OperatingPointError
from headrace.models.operating_point import Kind, OperatingPoint

BEST = OperatingPoint(
    0, Kind.FEATURE, "cut", rate_level=0, bytes_median=4000, bytes_p95=4000, accuracy=0.98, edge_share=0.4
)
FINE = OperatingPoint(
    1, Kind.FEATURE, "cut", rate_level=1, bytes_median=2000, bytes_p95=2000, accuracy=0.94, edge_share=0.4
)
COARSE = OperatingPoint(
    2, Kind.FEATURE, "cut", rate_level=2, bytes_median=800, bytes_p95=800, accuracy=0.80, edge_share=0.4
)
LOCAL = OperatingPoint(3, Kind.LOCAL, accuracy=0.9, edge_share=1.0)
POINTS = (BEST, FINE, COARSE, LOCAL)
RTT, HOLD = 0.03, 0.01
EXACT = ControlSettings(overhead_bytes=0, rtt_s=RTT, server_s=HOLD)


def make(points: tuple[OperatingPoint, ...] = POINTS, **changes: object) -> ControlLoop:
    arguments: dict[str, object] = {"deadline_s": 0.25, "frame_interval_s": 0.1, "uncut_s": 0.15, "settings": EXACT}
    return ControlLoop(points, **(arguments | changes))  # type: ignore[arg-type]


def deliver(loop: ControlLoop, frame: int, ready: float, size: int, rate: float) -> float:
    """One frame over an idle link of `rate` bits a second; returns when its result came."""
    loop.on_written(frame, size, ready)
    done = ready + 8 * size / rate + RTT + HOLD
    loop.on_result(frame, done, server_s=HOLD, queue_depth=0)
    return done


def trained(
    rate: float, frames: int = 30, loop: ControlLoop | None = None, size: int = 2000
) -> tuple[ControlLoop, float]:
    """A loop that has seen `frames` frames on a link that was idle before each of them; and the next frame's time."""
    loop = loop or make()
    loop.on_round_trip(RTT, 0.0)
    now = 0.0
    for frame in range(frames):
        now = max(now + 0.1, deliver(loop, frame, now + 0.06, size, rate))
    return loop, now


def choose(loop: ControlLoop, now: float, waited: float = 0.0, free_in: float = 0.0) -> Choice:
    return loop.choose(now, now - waited, compute_free_at=now + free_in)


def test_better_links_get_finer_points() -> None:
    chosen = [choose(*trained(rate)).point.bytes_median for rate in (8e6, 250e3, 90e3)]
    assert chosen[0] == 4000
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[2] in (0, 800)


def test_expected_latency_adds_up() -> None:
    loop, now = trained(400e3, loop=make(points=(FINE,)))
    choice = choose(loop, now, waited=0.02, free_in=0.01)
    # waited, core not free, compute 0.06, 16,000 bits at 400 kbit/s, round trip, server
    assert choice.expected_latency_s == pytest.approx(0.02 + 0.01 + 0.06 + 0.04 + RTT + HOLD, abs=0.006)
    assert choice.rate_bps == pytest.approx(400e3, rel=0.03)
    assert choice.p_on_time == 1.0
    assert not choice.probe


def test_queue_is_in_the_latency() -> None:
    """4000 bytes are in flight: at 400 kbit/s they keep the link for 80 ms, and the finest point would be late."""
    free, now = trained(400e3)
    busy, _ = trained(400e3)
    busy.on_written(100, 8000, now)
    before, after = choose(free, now), choose(busy, now)
    assert before.point.kind is Kind.FEATURE
    assert after.point.bytes_median < before.point.bytes_median
    only = (replace(BEST, edge_share=0.0),)
    idle_loop, _ = trained(400e3, loop=make(points=only))
    queued_loop, _ = trained(400e3, loop=make(points=only))
    queued_loop.on_written(100, 4000, now)
    extra = choose(queued_loop, now).expected_latency_s - choose(idle_loop, now).expected_latency_s
    assert extra == pytest.approx(0.08, abs=0.01)


def test_censored_bound_acts_before_the_acknowledgement() -> None:
    """2000 bytes at 8 Mbit/s take 2 ms. Out for 140 ms less the round trip, they say: at most 160 kbit/s."""
    loop, now = trained(8e6)
    assert choose(loop, now).point == BEST
    loop.on_written(100, 2000, now)
    later = now + 0.14
    assert not loop.in_outage(later)
    assert loop.rate_bps(later) == pytest.approx(16_000 / (0.14 - RTT - HOLD), rel=0.05)
    assert choose(loop, later, waited=0.04).point in (COARSE, LOCAL)


def test_small_frames_on_an_idle_link_do_not_hide_its_speed() -> None:
    """Each sample is limited by the application. A loop that took 8 x 800 / 40 ms for the rate would never go up."""
    loop, now = trained(8e6, size=800)
    assert loop.rate_bps(now) > 1.5e6
    assert choose(loop, now).point == BEST


def test_scatter_of_sizes_counts() -> None:
    """Both are in time at their median, with 20 ms to spare; a packet three times as large is not."""
    sure = replace(FINE, bytes_p95=2000)
    spread = replace(FINE, bytes_p95=6000)
    chances = [choose(*trained(400e3, loop=make(points=(point,))), waited=0.06).p_on_time for point in (sure, spread)]
    assert chances[0] == 1.0
    assert 0.5 < chances[1] < 1.0


def test_actual_sizes_correct_the_table() -> None:
    loop, now = trained(400e3, loop=make(points=(FINE,)))
    before = choose(loop, now).expected_latency_s
    for _ in range(30):
        loop.on_coded(FINE, 4000)
    assert choose(loop, now).expected_latency_s == pytest.approx(before + 0.04, abs=0.006)


def test_measured_compute_counts_and_profile_is_the_start_value() -> None:
    loop, now = trained(8e6, loop=make(points=(FINE,)))
    slow, _ = trained(8e6, loop=make(points=(FINE,), compute_s={"cut": 0.12}))
    assert choose(slow, now).expected_latency_s == pytest.approx(choose(loop, now).expected_latency_s + 0.06, abs=1e-3)
    for frame in range(5):
        loop.on_computed(FINE, 0.12, now + frame)
    assert choose(loop, now).expected_latency_s == pytest.approx(choose(slow, now).expected_latency_s, abs=0.01)


def test_server_hold_time_counts() -> None:
    loop, now = trained(8e6, loop=make(points=(FINE,)))
    before = choose(loop, now).expected_latency_s
    for frame in range(100, 130):
        loop.on_written(frame, 2000, now)
        loop.on_result(frame, now + 0.002 + RTT + 0.11, server_s=0.11, queue_depth=9)
        now += 0.2
    assert choose(loop, now).expected_latency_s == pytest.approx(before + 0.1, abs=0.01)
    assert loop.server_queue_depth == 9


def test_compute_spill_is_priced() -> None:
    """The local answer is the most accurate and in time, but takes one and a half intervals."""
    exact_local = replace(LOCAL, accuracy=1.0)
    points = (replace(BEST, edge_share=0.66), exact_local)  # the head leaves the core nothing to catch up with
    tight, now = trained(8e6, loop=make(points=points, deadline_s=0.18))
    assert choose(tight, now).point == points[0]
    # The same device at a third of the frame rate: nothing is spilt, and local wins.
    calm, now = trained(8e6, loop=make(points=points, deadline_s=0.18, frame_interval_s=0.3))
    assert choose(calm, now).point == exact_local
    # A light head catches up within a few frames: one local answer is worth it, unless the core is behind already.
    points = (replace(FINE, edge_share=0.2), exact_local)
    light, now = trained(8e6, loop=make(points=points))
    assert choose(light, now).point == exact_local
    assert choose(light, now, waited=0.06).point == points[0]


def test_core_that_is_behind_makes_a_local_answer_late() -> None:
    loop = make(points=(LOCAL,))
    assert choose(loop, 0.0).p_on_time == 1.0
    assert choose(loop, 0.0, free_in=0.05).p_on_time == 1.0
    assert choose(loop, 0.0, free_in=0.12).p_on_time == 0.0


def test_fast_device_answers_locally_and_never_probes() -> None:
    exact_local = replace(LOCAL, accuracy=1.0)
    loop = make(points=(BEST, FINE, COARSE, exact_local), uncut_s=0.01)
    choices = [choose(loop, n / 10) for n in range(100)]
    assert {choice.point for choice in choices} == {exact_local}
    assert not any(choice.probe for choice in choices)


def test_stale_frame_is_not_worth_writing() -> None:
    loop, now = trained(400e3)
    assert loop.worth_writing(now, now - 0.06, 2000)
    # 0.16 old, 0.04 to send, 0.04 there and back: just in time, and not any more with another frame before it.
    assert loop.worth_writing(now, now - 0.15, 2000)
    assert not loop.worth_writing(now, now - 0.20, 2000)
    loop.on_written(100, 4000, now)
    assert not loop.worth_writing(now, now - 0.15, 2000)


def test_cap_on_what_is_in_flight() -> None:
    loop, now = trained(8e6, loop=make(settings=replace(EXACT, max_in_flight=2)))
    loop.on_written(100, 800, now)
    assert choose(loop, now).point.kind is Kind.FEATURE
    loop.on_written(101, 800, now)
    assert loop.link.in_flight == 2
    assert choose(loop, now).point == LOCAL
    default, now = trained(8e6)
    for frame in range(100, 104):  # ceil(0.25 / 0.1) + 1
        assert choose(default, now).point.kind is Kind.FEATURE
        default.on_written(frame, 10, now)
    assert choose(default, now).point == LOCAL


def test_outage_is_noticed_within_a_deadline_and_answered_locally() -> None:
    loop, now = trained(8e6)
    loop.on_written(100, 4000, now)
    assert not loop.in_outage(now + 0.25)
    assert loop.in_outage(now + 0.25 + RTT + 0.001)
    for n in range(3, 40):
        choice = choose(loop, now + n / 10)
        assert choice.point == LOCAL, n
        assert not choice.probe, "the frame in flight is the probe"


def test_back_to_the_best_point_within_three_frames_of_recovery() -> None:
    loop, now = trained(8e6)
    loop.on_written(100, 4000, now)
    now += 4.0
    loop.on_result(100, now, server_s=HOLD, queue_depth=0)
    chosen = []
    for frame in range(3):
        choice = choose(loop, now)
        chosen.append(choice.point)
        if choice.point.kind is Kind.FEATURE:
            deliver(loop, 200 + frame, now + 0.06, int(choice.point.bytes_median), 8e6)
        now += 0.1
    assert choose(loop, now).point == BEST, chosen
    assert chosen[0].kind is Kind.FEATURE


def test_slow_link_is_probed_at_doubling_intervals() -> None:
    """At 20 kbit/s no packet is in time: local, and a small probe now and then."""
    loop, now = trained(20e3, frames=40)
    probes = []
    frame, answer_at = 100, math.inf
    for n in range(300):
        at = now + n / 10
        if at >= answer_at:
            loop.on_result(frame, at, server_s=HOLD, queue_depth=0)
            answer_at = math.inf
        choice = choose(loop, at)
        if choice.point.kind is Kind.FEATURE:
            assert choice.probe
            assert choice.point == COARSE
            assert loop.worth_writing(at + 0.2, at, 800), "a probe is written even if it will be late"
            probes.append(at)
            frame += 1
            loop.on_written(frame, 800, at + 0.06)
            answer_at = at + 0.06 + 0.32 + RTT + HOLD
    assert 5 <= len(probes) <= 9
    gaps = [b - a for a, b in pairwise(probes)]
    assert gaps[-1] == pytest.approx(5.0, abs=0.5)


def test_probe_that_comes_back_fast_ends_the_local_answers() -> None:
    loop, now = trained(20e3, frames=40)
    choice = next(choice for n in range(100) if (choice := choose(loop, now := now + 0.1)).probe)
    deliver(loop, 100, now + 0.06, int(choice.point.bytes_median), 8e6)
    for frame in range(101, 103):
        now += 0.1
        deliver(loop, frame, now + 0.06, int(choose(loop, now).point.bytes_median) or 800, 8e6)
    assert choose(loop, now + 0.1).point == BEST


def test_answer_that_never_comes_does_not_end_probing() -> None:
    loop, now = trained(8e6)
    loop.on_written(100, 800, now)
    choices = [(n / 10, choose(loop, now + n / 10)) for n in range(200)]
    probes = [at for at, choice in choices if choice.probe]
    assert probes
    assert probes[0] > 5.0
    assert len(probes) <= 4
    loop.on_written(101, 800, now + 20)
    loop.on_result(101, now + 20.05, server_s=HOLD, queue_depth=0)
    assert loop.link.in_flight == 0


def test_disconnected_only_local_and_in_flight_forgotten() -> None:
    loop, now = trained(8e6)
    loop.on_written(100, 800, now)
    loop.on_disconnected(now)
    assert loop.link.in_flight == 0
    choices = [choose(loop, now + n / 10) for n in range(50)]
    assert {choice.point for choice in choices} == {LOCAL}
    assert not any(choice.probe for choice in choices)
    assert not loop.worth_writing(now, now, 100)
    loop.on_result(100, now, server_s=HOLD, queue_depth=0)  # of the old connection
    loop.on_connected(now + 5)
    assert choose(loop, now + 5).point.kind is Kind.FEATURE


def test_disconnected_without_a_local_point_says_that_nothing_can_be_done() -> None:
    loop, now = trained(8e6, loop=make(points=(BEST, FINE)))
    loop.on_disconnected(now)
    choice = choose(loop, now)
    assert choice.p_on_time == 0.0
    assert choice.expected_latency_s == math.inf


def test_unknown_link_begins_cautiously_and_learns_within_three_frames() -> None:
    loop = make()
    first = choose(loop, 0.0)
    assert first.rate_bps == math.inf
    assert first.point.bytes_median < BEST.bytes_median
    for frame in range(3):
        point = choose(loop, frame / 10).point
        deliver(loop, frame, frame / 10 + 0.06, int(point.bytes_median) or 800, 8e6)
    assert choose(loop, 0.3).point == BEST


@pytest.mark.parametrize("wrong", [{"points": ()}, {"deadline_s": 0.0}, {"frame_interval_s": -1.0}, {"uncut_s": 0.0}])
def test_impossible_arguments_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(OperatingPointError):
        make(**wrong)  # type: ignore[arg-type]


def test_an_expert_that_another_point_beats_is_followed_by_that_one() -> None:
    """Two points of the same accuracy: only the smaller one is ever weighed, and either may lead."""
    twin = replace(FINE, id=4, rate_level=3, bytes_median=2500, bytes_p95=2500)
    loop, now = trained(8e6, loop=make(points=(BEST, twin, FINE, COARSE, LOCAL)))
    assert choose(loop, now).point == BEST
    loop._steady.leader = 1
    choice = choose(loop, now + 0.1)
    assert choice.point == FINE and not choice.skip
    assert choose(loop, now + 0.3, waited=0.15).skip, "a fixed point takes the newest frame"

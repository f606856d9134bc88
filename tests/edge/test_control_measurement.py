"""Measurements in exact numbers: delivery samples, the round trip, compute times, packet sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from headrace.edge.measurement import (
    ComputeTimes,
    DeliverySample,
    HoldTime,
    InFlight,
    PacketSizes,
    RoundTrip,
    WindowedMinimum,
)
from headrace.models.operating_point import Kind, OperatingPoint


def test_sample_of_an_idle_link_gives_up_the_round_trip() -> None:
    flight = InFlight(overhead_bytes=0)
    flight.written(1, 1000, now=10.0)
    answered = flight.acknowledged(1, ack=10.12, round_trip_s=0.04)
    assert answered is not None
    sent, sample = answered
    assert sent.ready == 10.0
    assert sample.limited
    assert sample.transmit_s == pytest.approx(0.08)
    assert sample.rate_bps(0.001) == pytest.approx(100_000)


def test_sample_of_a_queued_frame_is_free_of_the_round_trip() -> None:
    # 100 kbit/s, round trip 0.04 s. Both are written at 10.0; the second leaves at 10.16 and is acknowledged at 10.2.
    flight = InFlight(overhead_bytes=0)
    flight.written(1, 1000, now=10.0)
    flight.written(2, 1000, now=10.0)
    flight.acknowledged(1, ack=10.12, round_trip_s=0.01)
    answered = flight.acknowledged(2, ack=10.20, round_trip_s=0.01)
    assert answered is not None
    assert not answered[1].limited
    # The round trip that was passed in is wrong, and it does not matter.
    assert answered[1].rate_bps(0.001) == pytest.approx(100_000)


def test_pause_between_frames_is_not_counted_as_transmission() -> None:
    # The second frame becomes ready after the link has sent the first, but before the first one's answer is back.
    flight = InFlight(overhead_bytes=0)
    flight.written(1, 1000, now=0.0)  # sent at 0.08, acknowledged at 0.18
    flight.acknowledged(1, ack=0.18, round_trip_s=0.1)
    flight.written(2, 1000, now=0.15)  # sent at 0.23, acknowledged at 0.33
    answered = flight.acknowledged(2, ack=0.33, round_trip_s=0.1)
    assert answered is not None
    assert answered[1].limited
    assert answered[1].transmit_s == pytest.approx(0.08)


def test_overhead_is_counted() -> None:
    flight = InFlight(overhead_bytes=50)
    flight.written(1, 100, now=0.0)
    assert flight.oldest is not None
    assert flight.oldest.bits == 8 * 150


def test_overtaken_frames_leave_with_the_one_that_was_answered() -> None:
    flight = InFlight(overhead_bytes=0)
    for frame in (1, 2, 3):
        flight.written(frame, 1000, now=0.0)
    answered = flight.acknowledged(2, ack=0.16, round_trip_s=0.0)
    assert answered is not None
    assert answered[1].bits == 16_000
    assert answered[1].rate_bps(0.001) == pytest.approx(100_000)
    assert [frame.frame_id for frame in flight.frames] == [3]
    assert flight.acknowledged(1, ack=0.2, round_trip_s=0.0) is None
    assert flight.acknowledged(99, ack=0.2, round_trip_s=0.0) is None
    assert len(flight) == 1


def test_link_began_the_oldest_frame_when_the_one_before_it_had_left() -> None:
    flight = InFlight(overhead_bytes=0)
    assert flight.begun(0.04) == -math.inf
    flight.written(1, 1000, now=0.0)
    flight.written(2, 1000, now=0.01)
    assert flight.begun(0.04) == 0.0
    flight.acknowledged(1, ack=0.12, round_trip_s=0.04)
    assert flight.begun(0.04) == pytest.approx(0.08)
    flight.clear()
    assert len(flight) == 0
    assert flight.begun(0.04) == -math.inf


def test_resolution_bounds_the_rate() -> None:
    assert DeliverySample(8000, 0.0, limited=True).rate_bps(0.004) == 2_000_000


def test_windowed_minimum_forgets_but_keeps_the_newest() -> None:
    minimum = WindowedMinimum(window_s=10.0)
    assert minimum.value == math.inf
    minimum.add(0.03, now=0.0)
    minimum.add(0.05, now=5.0)
    assert minimum.value == 0.03
    minimum.add(0.06, now=11.0)
    assert minimum.value == 0.05
    minimum.add(0.09, now=100.0)
    assert minimum.value == 0.09


def test_round_trip_takes_the_minimum_once_enough_frames_were_seen() -> None:
    round_trip = RoundTrip(0.03, window_s=60)
    for frame in range(RoundTrip.FRAMES_NEEDED):
        # At first what is over the start value may as well be transmission.
        assert round_trip.seconds == 0.03
        round_trip.add(float(frame), frame + 0.08 + frame / 1000, 8000, float(frame))
    assert round_trip.seconds == pytest.approx(0.08)


def test_round_trip_that_was_timed_on_its_own_is_believed_at_once() -> None:
    round_trip = RoundTrip(0.03, window_s=60)
    round_trip.add_timed(0.05, now=0.0)
    assert round_trip.seconds == pytest.approx(0.05)
    round_trip.add(1.0, 1.2, 8000, now=1.2)
    assert round_trip.seconds == pytest.approx(0.05)


def answers(rates: list[float], sizes: list[int], round_trip_s: float, interval: float = 0.1) -> RoundTrip:
    """Frames every `interval` seconds over a FIFO link."""
    round_trip = RoundTrip(0.03, window_s=60)
    free = 0.0
    for frame, (rate, size) in enumerate(zip(rates, sizes, strict=True)):
        ready = frame * interval
        free = max(ready, free) + 8 * size / rate
        round_trip.add(ready, free + round_trip_s, 8.0 * size, free + round_trip_s)
    return round_trip


def test_round_trip_of_a_slow_link_does_not_hold_the_transmission() -> None:
    """100 kbit/s and 50 ms: no frame comes back before 114 ms, yet one round trip explains them all."""
    sizes = [800 + 150 * (frame * 7 % 5) for frame in range(40)]
    round_trip = answers([100_000.0] * 40, sizes, 0.05)
    assert round_trip.seconds == pytest.approx(0.05, abs=0.004)


def test_round_trip_of_frames_of_one_size_is_the_minimum() -> None:
    assert answers([100_000.0] * 40, [800] * 40, 0.05).seconds == pytest.approx(0.05 + 0.064)


def test_round_trip_of_a_link_that_no_single_rate_explains_is_the_minimum() -> None:
    rng = np.random.default_rng(0)
    rates = np.exp(rng.normal(13, 1.0, 40)).tolist()
    sizes = [800 + 150 * (frame * 7 % 5) for frame in range(40)]
    round_trip = answers(rates, sizes, 0.05)
    smallest = min(0.05 + 8 * size / rate for rate, size in zip(rates, sizes, strict=True))
    assert round_trip.seconds == pytest.approx(smallest, rel=0.05)


def test_compute_time_starts_from_the_share_and_one_hiccup_is_ignored() -> None:
    times = ComputeTimes({"head": 0.08, "local": 0.15})
    assert times.seconds("head") == pytest.approx(0.08)
    for _ in range(5):
        times.add("head", 0.08)
    times.add("head", 0.8)
    assert times.seconds("head") == pytest.approx(0.08, rel=0.06)


def test_throttling_is_noticed_within_three_frames_for_all_stages() -> None:
    times = ComputeTimes({"head": 0.08, "local": 0.15})
    for _ in range(10):
        times.add("head", 0.08)
    for _ in range(3):
        times.add("head", 0.16)
    assert times.seconds("head") == pytest.approx(0.16, rel=0.1)
    assert times.seconds("local") == pytest.approx(0.30, rel=0.1)


def test_a_wrong_start_value_of_one_stage_is_its_own() -> None:
    times = ComputeTimes({"head": 0.08, "webp": 0.02})
    for _ in range(10):
        times.add("head", 0.08)
    times.add("webp", 0.06)
    assert times.seconds("webp") == pytest.approx(0.06, rel=0.05)
    assert times.seconds("head") == pytest.approx(0.08, rel=0.05)


def test_unknown_stages_and_broken_measurements_change_nothing() -> None:
    times = ComputeTimes({"head": 0.08})
    times.add("other", 1.0)
    times.add("head", math.nan)
    assert times.seconds("head") == pytest.approx(0.08)
    assert times.version == 0


def test_packet_sizes_follow_what_comes_out() -> None:
    points = [
        OperatingPoint(0, Kind.FEATURE, "blocks.3", bytes_median=1000, bytes_p95=1400),
        OperatingPoint(1, Kind.FEATURE, "blocks.3", bytes_median=2000, bytes_p95=2800),
        OperatingPoint(2, Kind.FEATURE, "blocks.5", bytes_median=500, bytes_p95=700),
        OperatingPoint(3, Kind.LOCAL),
    ]
    sizes = PacketSizes(points, np.array([0, 0, 1, 2]), 3)
    assert sizes.quantile(0.0) == pytest.approx([1000, 2000, 500, 0])
    assert sizes.quantile(1.6449) == pytest.approx([1400, 2800, 700, 0], rel=1e-3)
    for _ in range(40):
        sizes.add(0, 1500)
    assert sizes.quantile(0.0)[:3] == pytest.approx([1500, 3000, 750], rel=0.03)
    # Always the same size: what is left of the spread is small.
    assert sizes.quantile(1.6449)[0] < 1.1 * 1500
    sizes.add(3, 100)
    assert sizes.quantile(0.0)[3] == 0


def test_hold_time_follows_the_server() -> None:
    hold = HoldTime(0.02)
    assert hold.high_s == 0.02
    hold.add(0.01)
    assert hold.scenarios[0] == pytest.approx(0.01)
    assert hold.scenarios[-1] == hold.high_s == 0.02
    for _ in range(HoldTime.WINDOW):
        hold.add(0.01)
    assert hold.scenarios == pytest.approx(np.full(16, 0.01))
    for _ in range(3):
        hold.add(0.2)
    assert hold.scenarios == pytest.approx(np.full(16, 0.2))
    assert hold.high_s == 0.2


def test_hiccup_of_the_server_is_as_likely_as_it_was_and_no_more() -> None:
    """The very first frame is held for longer than the deadline: that is no reason to send nothing any more."""
    hold = HoldTime(0.02)
    hold.add(0.17)
    assert (hold.scenarios < 0.03).mean() > 0.6
    for _ in range(11):
        hold.add(0.02)
    assert hold.high_s == 0.02
    assert 0.85 <= (hold.scenarios < 0.03).mean() < 1

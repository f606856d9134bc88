"""The order of what waits, and batch forming, in exact numbers: the clock is an argument, nothing waits."""

import math
import random

import pytest
from headrace.server.admission import FILL
from headrace.server.batcher import PATIENCE_S, Batcher, Line, deadline_at
from headrace.server.costs import Costs
from headrace.server.engine import TailKey
from headrace.server.shares import BURST, Shares

DEEP, SHALLOW = TailKey(b"f", "blocks.5"), TailKey(b"f", "blocks.2")


def costs(**seconds: float) -> Costs:
    """Batches of DEEP and SHALLOW of sizes n1, n2, ... take that long."""
    known = Costs()
    for key in (DEEP, SHALLOW):
        known.know(key, {int(name[1:]): s for name, s in seconds.items()}, 0.0)
    return known


def test_a_deadline_is_what_remained_when_the_frame_came() -> None:
    assert deadline_at(10.0, 250) == 10.25
    assert deadline_at(10.0, 0) == math.inf


def test_nothing_waits_for_company_by_default() -> None:
    batcher: Batcher[str] = Batcher(8)
    assert batcher.ready_at(5.0) is None
    assert batcher.take(5.0) == (None, ())
    batcher.put("a", DEEP, 6.0, 5.0)
    assert batcher.ready_at(5.0) == 5.0


def test_the_earliest_deadline_decides_and_its_tail_fills_the_batch() -> None:
    batcher: Batcher[str] = Batcher(3)
    for name, key, deadline in (
        ("late shallow", SHALLOW, 9.0),
        ("deep 1", DEEP, 1.5),
        ("shallow", SHALLOW, 2.0),
        ("deep 4", DEEP, 4.0),
        ("deep 3", DEEP, 3.0),
        ("deep 5", DEEP, 5.0),
    ):
        batcher.put(name, key, deadline, 1.0)
    batch, expired = batcher.take(1.0)
    assert batch is not None and batch.key == DEEP and expired == ()
    assert batch.items == ("deep 1", "deep 3", "deep 4")
    batch, _ = batcher.take(1.0)
    assert batch is not None and (batch.key, batch.items) == (SHALLOW, ("shallow", "late shallow"))
    batch, _ = batcher.take(1.0)
    assert batch is not None and batch.items == ("deep 5",)
    assert len(batcher) == 0


def test_equal_deadlines_go_in_order_of_arrival() -> None:
    batcher: Batcher[int] = Batcher(4)
    for name in range(4):
        batcher.put(name, DEEP, 2.0, 1.0)
    batch, _ = batcher.take(1.0)
    assert batch is not None and batch.items == (0, 1, 2, 3)


def test_a_passed_deadline_is_given_back_and_takes_no_place_in_the_batch() -> None:
    batcher: Batcher[str] = Batcher(2)
    for name, deadline in (("gone", 1.0), ("now", 2.0), ("ok", 2.001), ("ok too", 3.0)):
        batcher.put(name, DEEP, deadline, 0.5)
    batch, expired = batcher.take(2.0)
    assert expired == ("gone", "now")
    assert batch is not None and batch.items == ("ok", "ok too")


def test_a_frame_that_cannot_be_in_time_is_not_computed() -> None:
    batcher: Batcher[str] = Batcher(8, costs=costs(n1=0.010))
    batcher.put("9 ms left", DEEP, 1.009, 1.0)
    batcher.put("11 ms left", DEEP, 1.011, 1.0)
    batch, expired = batcher.take(1.0)
    assert expired == ("9 ms left",)
    assert batch is not None and batch.items == ("11 ms left",)


def test_a_batch_is_only_as_large_as_its_most_urgent_frame_has_time_for() -> None:
    batcher: Batcher[int] = Batcher(8, costs=costs(n1=0.010, n2=0.015, n4=0.025, n8=0.045))
    for name, deadline in enumerate((1.022, 1.5, 1.5, 1.5, 1.5)):
        batcher.put(name, DEEP, deadline, 1.0)
    batch, _ = batcher.take(1.0)
    assert batch is not None and batch.items == (0, 1, 2), "three take 20 ms, four 25"
    batch, _ = batcher.take(1.020)
    assert batch is not None and batch.items == (3, 4)


def test_only_expired_frames_make_no_batch() -> None:
    batcher: Batcher[str] = Batcher(2)
    batcher.put("gone", DEEP, 1.0, 0.5)
    assert batcher.take(1.5) == (None, ("gone",))
    assert batcher.ready_at(1.5) is None


def test_a_frame_without_deadline_neither_jumps_the_queue_nor_starves() -> None:
    batcher: Batcher[str] = Batcher(1)
    batcher.put("none", DEEP, math.inf, 0.0)
    batcher.put("soon", DEEP, 0.25, 0.0)
    batcher.put("after its patience", DEEP, PATIENCE_S + 0.2, 0.1)
    order = []
    while len(batcher):
        batch, expired = batcher.take(0.2)
        assert batch is not None and not expired
        order += batch.items
    assert order == ["soon", "none", "after its patience"]


def test_a_frame_without_deadline_never_expires() -> None:
    batcher: Batcher[str] = Batcher(1)
    batcher.put("none", DEEP, math.inf, 0.0)
    batch, expired = batcher.take(1e9)
    assert batch is not None and expired == ()


# Waiting for company


def arrivals(batcher: Batcher[int], gap: float, count: int, deadline: float = 99.0) -> float:
    """Frames every `gap` seconds, each taken at once but the last; when that came."""
    now = 0.0
    for name in range(count):
        now = name * gap
        batcher.put(name, DEEP, deadline, now)
        if name < count - 1:
            batcher.take(now)
    return now


def test_a_frame_waits_where_the_next_one_comes_sooner_than_a_batch_of_its_own_would_cost() -> None:
    batcher: Batcher[int] = Batcher(4, 0.020, costs(n1=0.010, n2=0.012, n4=0.016))
    now = arrivals(batcher, 0.004, 10)
    assert batcher.ready_at(now) == pytest.approx(now + 0.008), "two alone take 20 ms, together 12"
    batcher.put(10, DEEP, 99.0, now + 0.004)
    assert batcher.ready_at(now + 0.004) == pytest.approx(now + 0.004 + 0.008)


def test_nobody_waits_at_low_load_or_where_batches_save_nothing_or_without_a_limit() -> None:
    rare: Batcher[int] = Batcher(4, 0.020, costs(n1=0.010, n2=0.012))
    now = arrivals(rare, 0.050, 10)
    assert rare.ready_at(now) == now
    dear: Batcher[int] = Batcher(4, 0.020, costs(n1=0.010, n2=0.020))
    now = arrivals(dear, 0.004, 10)
    assert dear.ready_at(now) == now
    hasty: Batcher[int] = Batcher(4, 0.0, costs(n1=0.010, n2=0.012))
    now = arrivals(hasty, 0.004, 10)
    assert hasty.ready_at(now) == now


def test_waiting_ends_with_the_limit_of_the_settings_a_full_batch_or_the_next_frames_absence() -> None:
    known = costs(n1=0.010, n2=0.012, n4=0.016)
    batcher: Batcher[int] = Batcher(4, 0.003, known)
    now = arrivals(batcher, 0.004, 10)
    assert batcher.ready_at(now) == pytest.approx(now + 0.003)
    batcher = Batcher(1, 0.020, known)
    now = arrivals(batcher, 0.004, 10)
    assert batcher.ready_at(now) == now
    batcher = Batcher(4, 0.020, known)
    now = arrivals(batcher, 0.004, 10)
    assert batcher.ready_at(now + 0.009) == now + 0.009, "it should have come by now"


def test_company_is_never_worth_a_deadline() -> None:
    batcher: Batcher[int] = Batcher(4, 0.020, costs(n1=0.010, n2=0.012))
    now = arrivals(batcher, 0.004, 10, deadline=0.036 + 0.030)
    assert batcher.ready_at(now) == pytest.approx(now + 0.030 - 2 * 0.012)
    batch, expired = batcher.take(now + 0.006)
    assert batch is not None and expired == ()


# Fair shares


def test_a_device_beyond_its_share_goes_behind_those_within_theirs() -> None:
    shares = Shares()
    line: Line[str] = Line(shares)
    for i in range(6):
        line.put(f"greedy {i}", DEEP, 1.0 + i, 0.0, start=shares.enter("greedy", 0.01), cost=0.01)
    line.put("modest", DEEP, 9.0, 0.0, start=shares.enter("modest", 0.01), cost=0.01)
    order = []
    while (entry := line.first()) is not None:
        line.pop(entry.key)
        order.append(entry.item)
        shares.served(entry.cost)
    assert order.index("modest") == 1 + BURST + 2, "behind greedy's burst, and its half of what was served meanwhile"
    assert [o for o in order if o != "modest"] == [f"greedy {i}" for i in range(6)]


def test_two_devices_get_alike_however_much_one_sends() -> None:
    shares = Shares()
    line: Line[str] = Line(shares)
    served = {"greedy": 0, "modest": 0}
    for step in range(200):
        for device, count in (("greedy", 5), ("modest", 1)):
            for _ in range(count if step < 100 else 0):
                line.put(device, DEEP, step + 1.0, step, start=shares.enter(device, 0.1), cost=0.1)
        for _ in range(2):
            entry = line.first()
            assert entry is not None
            line.pop(entry.key)
            served[entry.item] += step < 100
            shares.served(entry.cost)
            shares.leave(entry.item)
    assert served["modest"] >= 98


def test_a_device_that_is_alone_has_everything() -> None:
    shares = Shares()
    line: Line[int] = Line(shares)
    for i in range(50):
        line.put(i, DEEP, 1.0, 0.0, start=shares.enter("one", 0.01), cost=0.01)
    assert [line.pop(DEEP).item for _ in range(50)] == list(range(50))


def test_shares_remember_nobody_who_has_left() -> None:
    shares = Shares()
    shares.enter("stays", 0.01)
    for i in range(10_000):
        shares.enter(f"device {i}", 0.01)
        shares.served(0.01)
        shares.leave(f"device {i}")
    assert len(shares._finish) < 200 and shares.active == 1
    shares.leave("stays")
    assert (shares._finish, shares.virtual) == ({}, 0.0)


def test_every_frame_comes_out_once_whatever_the_order() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        shares = Shares()
        batcher: Batcher[int] = Batcher(
            rng.randint(1, 5), rng.choice((0.0, 0.1)), costs(n1=0.05, n4=0.1) if rng.random() < 0.5 else None, shares
        )
        out: list[int] = []
        now = 0.0
        for name in range(100):
            start = shares.enter(rng.choice("abc"), 0.02)
            deadline = rng.choice((math.inf, now + rng.random()))
            batcher.put(name, rng.choice((DEEP, SHALLOW)), deadline, now, start=start, cost=0.02)
            now += rng.random() / 10
            if rng.random() < 0.3:
                batch, expired = batcher.take(now)
                out += [*expired, *(batch.items if batch else ())]
                shares.served(0.02)
        while len(batcher):
            batch, expired = batcher.take(now)
            out += [*expired, *(batch.items if batch else ())]
        assert sorted(out) == list(range(100))


# Costs


def test_costs_lie_on_a_line_between_the_sizes_that_were_measured() -> None:
    known = costs(n2=0.020, n4=0.030)
    assert known.batch_s(DEEP, 3, 0.0) == pytest.approx(0.025)
    assert known.batch_s(DEEP, 8, 0.0) == pytest.approx(0.060), "in proportion beyond the largest"
    assert known.batch_s(DEEP, 1, 0.0) == pytest.approx(0.020), "as the smallest below it"
    assert known.batch_s(TailKey(b"g"), 1, 0.0) == 0.0
    assert known.frame_s(DEEP, 0.0) == pytest.approx(0.030 / 4)


def test_costs_follow_the_machine_but_hardly_an_outlier() -> None:
    known = costs(n1=0.010)
    known.batch_done(DEEP, 1, 60.0, 0.0)
    assert known.batch_s(DEEP, 1, 0.0) < 0.03
    for _ in range(60):
        known.batch_done(DEEP, 1, 0.020, 0.0)
    assert known.batch_s(DEEP, 1, 0.0) == pytest.approx(0.020, rel=0.05)


def test_what_a_frame_alone_takes_follows_each_measurement_at_once() -> None:
    known = costs(n1=0.010)
    assert known.alone_s(DEEP, 0.0) == pytest.approx(0.010)
    known.decoded(DEEP, 0.002, 0.0)
    assert known.alone_s(DEEP, 0.0) == pytest.approx(0.012)
    known.batch_done(DEEP, 1, 0.030, 0.0)
    assert known.alone_s(DEEP, 0.0) > 0.013
    assert known.alone_s(DEEP, 0.0) == pytest.approx(known.decode_s(DEEP, 0.0) + known.batch_s(DEEP, 1, 0.0))
    known.know(DEEP, {1: 0.5}, 0.0)
    assert known.alone_s(DEEP, 0.0) == pytest.approx(0.502)
    assert known.alone_s(DEEP, 11.0) < 0.002, "and is trusted less with time"


def test_what_was_long_not_measured_is_tried_again() -> None:
    known = costs(n1=10.0)
    assert known.batch_s(DEEP, 1, 1.0) == 10.0
    assert known.batch_s(DEEP, 1, 11.0) < 0.010


def test_the_pace_of_a_busy_server_is_what_a_frame_costs() -> None:
    known = costs(n1=0.010, n8=0.040)
    known.paced(DEEP, 0.009, 1.0)
    assert known.frame_s(DEEP, 1.5) == pytest.approx(0.009)
    assert known.frame_s(DEEP, 9.0) == pytest.approx(0.005), "idle since"
    known.forget(DEEP.fingerprint)
    assert known.frame_s(DEEP, 1.5) == known.batch_s(DEEP, 1, 1.5) == 0.0


def test_a_size_not_seen_lately_is_as_much_slower_as_the_one_seen_last() -> None:
    known = costs(n1=0.010, n4=0.030, n8=0.050)
    for at in range(60):
        known.batch_done(DEEP, 4, 0.060, 10.0 + at)
    assert known.batch_s(DEEP, 4, 69.0) == pytest.approx(0.060, rel=0.02)
    assert known.batch_s(DEEP, 8, 69.0) == pytest.approx(0.100, rel=0.02), "twice as slow as at the warm-up"
    assert known.batch_s(DEEP, 1, 69.0) == pytest.approx(0.020, rel=0.02)
    assert known.fitting(DEEP, 8, 0.085, 69.0) == (6, pytest.approx(0.080, rel=0.02))
    assert known.fitting(DEEP, 8, 0.001, 69.0)[0] == 1


def test_a_full_batch_takes_as_long_as_its_frames_cost_under_load() -> None:
    known = costs(n1=0.010, n4=0.020, n8=0.040)
    assert known.full_batch_s(DEEP, 8, 1.0, 0.0) == pytest.approx(0.040)
    known.paced(DEEP, 0.007, 1.0)
    assert known.full_batch_s(DEEP, 8, 1.0, 1.0) == pytest.approx(0.056), "decoding and serving, too"
    assert known.full_batch_s(DEEP, 8, 0.025, 1.0) == pytest.approx(3 * 0.007), "three fit into 25 ms"
    known.paced(DEEP, 0.001, 1.0)
    for _ in range(50):
        known.paced(DEEP, 0.001, 1.0)
    assert known.full_batch_s(DEEP, 8, 1.0, 1.0) == pytest.approx(0.040), "never less than the tail alone"


def test_batches_leave_time_for_a_frame_that_just_missed_one() -> None:
    batcher: Batcher[int] = Batcher(8, 0.0, costs(n1=0.020, n8=0.160))
    for name in range(8):
        batcher.put(name, DEEP, 1.250, 1.0, whole=0.250)
    batch, expired = batcher.take(1.0)
    assert batch is not None and batch.items == (0, 1, 2, 3, 4) and expired == (), "two of 100 ms, less the headroom"
    patient: Batcher[int] = Batcher(8, 0.0, costs(n1=0.020, n8=0.160))
    for name in range(8):
        patient.put(name, DEEP, 1.600, 1.0, whole=0.600)
    assert len(patient.take(1.0)[0].items) == 8  # type: ignore[union-attr]


def test_a_frame_that_would_shrink_its_batch_makes_room_where_enough_others_wait() -> None:
    def fill(names: int) -> Batcher[int]:
        batcher: Batcher[int] = Batcher(4, 0.0, costs(n1=0.020, n4=0.080))
        batcher.put(-1, DEEP, 1.070, 0.820, whole=0.250)  # time for three
        for name in range(names):
            batcher.put(name, DEEP, 1.250, 1.0, whole=0.250)
        return batcher

    batch, expired = fill(4).take(1.0)
    assert batch is not None and batch.items == (0, 1, 2, 3) and expired == (-1,)
    batch, expired = fill(3).take(1.0)
    assert batch is not None and batch.items == (-1, 0, 1) and expired == ()


def test_frames_beyond_their_devices_share_fill_a_batch_only_so_far() -> None:
    """Batches of 10 ms a frame, 250 ms of deadline: frames that are due make them as large as may be (8), the others
    only up to a quarter of the deadline, so that who comes meanwhile is soon in the next one."""

    def sizes(due: int, beyond: int) -> list[int]:
        batcher: Batcher[int] = Batcher(8, 0.0, costs(n1=0.010, n8=0.080))
        for name in range(due):
            batcher.put(name, DEEP, 1.250, 1.0, whole=0.250)
        for name in range(due, due + beyond):
            batcher.put(name, DEEP, 1.250, 1.0, whole=0.250, start=1.0, cost=0.010)
        found = []
        while len(batcher):
            batch, expired = batcher.take(1.0)
            assert batch is not None and not expired and sorted(batch.items) == list(batch.items)
            found.append(len(batch.items))
        return found

    assert pytest.approx(0.0625) == FILL * 0.250
    assert sizes(16, 0) == [8, 8]
    assert sizes(0, 14) == [6, 6, 2]
    assert sizes(2, 10) == [6, 6]
    assert sizes(7, 2) == [7, 2], "nothing is added to what is longer already"


def test_one_frame_beyond_its_share_goes_however_long_it_takes() -> None:
    batcher: Batcher[int] = Batcher(8, 0.0, costs(n1=0.150, n8=0.800))
    for name in range(2):
        batcher.put(name, DEEP, 1.250, 1.0, whole=0.250, start=1.0, cost=0.010)
    batch, expired = batcher.take(1.0)
    assert batch is not None and batch.items == (0,) and not expired

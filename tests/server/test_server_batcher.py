"""Admission and batch forming in exact numbers: the clock is an argument, nothing waits."""

import math
import random

import pytest
from headrace.server.batcher import PATIENCE_S, Admission, Batcher, deadline_at
from headrace.server.engine import TailKey
from headrace.server.exceptions import DrainingError, FullError

DEEP, SHALLOW = TailKey(b"f", "blocks.5"), TailKey(b"f", "blocks.2")


def test_a_deadline_is_what_remained_when_the_frame_came() -> None:
    assert deadline_at(10.0, 250) == 10.25
    assert deadline_at(10.0, 0) == math.inf


def test_admission_counts_who_waits_and_who_is_open() -> None:
    admission = Admission(2)
    first, second = admission.admit(), admission.admit()
    assert (admission.waiting, admission.open) == (2, 2)
    with pytest.raises(FullError, match="2 frames wait"):
        admission.admit()
    first.begin()
    first.begin()
    assert (admission.waiting, admission.open) == (1, 2)
    third = admission.admit()
    first.leave()
    second.leave()  # given up while it waited
    assert (admission.waiting, admission.open) == (1, 1)
    third.leave()
    assert (admission.waiting, admission.open) == (0, 0)


def test_a_draining_server_admits_nobody() -> None:
    admission = Admission(2)
    admission.draining = True
    with pytest.raises(DrainingError):
        admission.admit()
    assert admission.open == 0


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


def test_a_batch_may_wait_for_company_until_it_is_full() -> None:
    batcher: Batcher[int] = Batcher(2, max_wait_s=0.010)
    batcher.put(1, DEEP, 9.0, 1.000)
    assert batcher.ready_at(1.004) == 1.010
    assert batcher.ready_at(1.020) == 1.020
    batcher.put(2, DEEP, 9.0, 1.005)
    assert batcher.ready_at(1.005) == 1.005


def test_company_of_another_tail_does_not_fill_a_batch() -> None:
    batcher: Batcher[int] = Batcher(2, max_wait_s=0.010)
    batcher.put(1, DEEP, 8.0, 1.000)
    batcher.put(2, SHALLOW, 9.0, 1.001)
    assert batcher.ready_at(1.002) == 1.010


def test_company_is_never_worth_a_deadline() -> None:
    batcher: Batcher[int] = Batcher(2, max_wait_s=0.010)
    batcher.put(1, DEEP, 1.003, 1.000)
    assert batcher.ready_at(1.001) == 1.001
    batch, expired = batcher.take(1.001)
    assert batch is not None and expired == ()


def test_every_frame_comes_out_once_whatever_the_order() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        batcher: Batcher[int] = Batcher(rng.randint(1, 5))
        out: list[int] = []
        now = 0.0
        for name in range(100):
            batcher.put(name, rng.choice((DEEP, SHALLOW)), rng.choice((math.inf, now + rng.random())), now)
            now += rng.random() / 10
            if rng.random() < 0.3:
                batch, expired = batcher.take(now)
                out += [*expired, *(batch.items if batch else ())]
        while len(batcher):
            batch, expired = batcher.take(now)
            out += [*expired, *(batch.items if batch else ())]
        assert sorted(out) == list(range(100))

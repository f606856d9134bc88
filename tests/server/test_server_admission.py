"""Admission in exact numbers: who comes in, who does not, and what those are told."""

import random

import pytest
from headrace.server.admission import DUE_HEADROOM, FILL, HEADROOM, Admission, Limits, Place
from headrace.server.exceptions import DrainingError, ExpiredError, FrameError, FullError, Reason

MANY = 1 << 30


def admission(frames: int = MANY, device_frames: int = MANY, size: int = MANY) -> Admission:
    return Admission(Limits(frames, device_frames, size))


def refused(admission: Admission, now: float = 0.0, deadline: float = 1e9, **how: object) -> FrameError:
    with pytest.raises(FrameError) as caught:
        admission.admit(now, deadline, **how)  # type: ignore[arg-type]
    return caught.value


def test_it_counts_who_waits_and_who_is_open() -> None:
    it = admission(2)
    first, second = it.admit(0.0, size=10, cost=0.5), it.admit(0.0, size=20, cost=0.5)
    assert (it.waiting, it.open, it.waiting_bytes, it.work) == (2, 2, 30, 1.0)
    assert refused(it).reason is Reason.QUEUE_FULL
    first.begin()
    first.begin()
    assert (it.waiting, it.open, it.waiting_bytes, it.work) == (1, 2, 20, 0.5)
    third = it.admit(0.0)
    first.leave()
    second.leave()  # given up while it waited
    assert (it.waiting, it.open) == (1, 1)
    third.leave()
    assert (it.waiting, it.open, it.waiting_bytes, it.work) == (0, 0, 0, 0.0)


def test_a_draining_server_admits_nobody() -> None:
    it = admission()
    it.draining = True
    with pytest.raises(DrainingError):
        it.admit(0.0)
    assert it.open == 0


def test_a_frame_that_could_not_be_in_time_even_alone_is_told_at_once() -> None:
    it = admission()
    with pytest.raises(ExpiredError, match=r"9\.0 ms remain .* take 10\.0 ms"):
        it.admit(1.0, 1.009, alone=0.010)
    with pytest.raises(ExpiredError):
        it.admit(1.0, 1.0)
    it.admit(1.0, 1.010 + 1e-9, alone=0.010).leave()


def test_a_queue_is_bounded_in_bytes() -> None:
    it = admission(size=1000)
    it.admit(0.0, size=900)
    assert refused(it, size=101).reason is Reason.QUEUE_FULL
    it.admit(0.0, size=100)


def test_a_device_has_a_limit_of_its_own() -> None:
    it = admission(device_frames=2)
    for _ in range(2):
        it.admit(0.0, device="a")
    assert refused(it, device="a").reason is Reason.DEVICE_FULL
    it.admit(0.0, device="b")


def test_a_queue_is_bounded_in_time_and_says_when_to_come_again() -> None:
    it = admission()
    places: list[Place] = []
    while True:  # 100 ms of deadline, 10 ms a frame
        try:
            places.append(it.admit(0.0, 0.1001, cost=0.010, alone=0.010))
        except FullError as error:
            assert error.reason is Reason.OVERLOAD
            assert error.retry_s == pytest.approx(0.010, rel=0.02)
            break
    assert len(places) == round(0.100 * (1 - HEADROOM) / 0.010), "the last is done with the headroom left"
    # The server being busy with something for a while makes it worse, a later deadline better.
    assert refused(it, 0.0, 0.120, cost=0.010, alone=0.010, busy=0.050).retry_s == pytest.approx(
        0.070 + 0.050 + 0.010 - 0.084
    )
    it.admit(0.0, 0.200, cost=0.010, alone=0.010)
    places[0].begin()
    places[1].begin()
    it.admit(0.0, 0.100, cost=0.010, alone=0.010)


def test_a_queue_is_planned_in_whole_batches() -> None:
    """Frames of 10 ms in batches of 60 ms, 250 ms of deadline: who just misses a batch waits for two."""
    it = admission()
    how = {"cost": 0.010, "alone": 0.015, "batch": 0.060}
    while True:
        try:
            it.admit(0.0, 0.250, busy=0.060, **how)
        except FullError as error:
            assert error.reason is Reason.OVERLOAD and "240 ms from now" in str(error)
            break
    assert it.waiting == 12, "two batches behind the one that runs end at 180 ms, three at 240"
    it.admit(0.0, 0.290, busy=0.060, **how)


def test_a_device_that_is_mostly_turned_away_needs_more_time_left() -> None:
    it = admission()
    how = {"cost": 0.010, "alone": 0.015, "batch": 0.060, "busy": 0.060}
    for number in range(10):
        it.admit(0.0, 0.250, device=f"device {number}", **how)
    for _ in range(20):
        refused(it, 0.0, 0.100, device="pushy", **how)
    assert "180 ms from now" in str(refused(it, 0.0, 0.250, device="pushy", **how)), "70 ms would have been left"
    it.admit(0.0, 0.250, device="other", **how).leave()
    it.admit(1.1, 1.350, device="pushy", **how).leave()
    refused(it, 1.1, 1.200, device="pushy", **how)
    it.admit(1.1, 1.350, device="pushy", **how)


def test_many_devices_that_are_turned_away_come_again_as_fast_as_they_are_served() -> None:
    it = admission()
    for _ in range(7):
        it.admit(0.0, 0.1001, device="first", cost=0.010, alone=0.010)
    for number in range(1, 41):
        error = refused(it, 0.0, 0.1001, device=f"device {number}", cost=0.010, alone=0.010, busy=0.08)
        assert error.reason is Reason.OVERLOAD
    assert error.retry_s == pytest.approx(0.400), "40 devices, 10 ms a frame"
    again = refused(it, 2.0, 2.1001, device="device 1", cost=0.010, alone=0.010, busy=0.08)
    assert again.retry_s < 0.1, "the others have gone"


def test_an_idle_server_takes_what_has_little_time() -> None:
    it = admission()
    it.admit(0.0, 0.011, cost=0.010, alone=0.010)


def test_a_greedy_device_finds_its_own_queue_full_and_nobody_elses() -> None:
    it = admission()
    full = None
    while full is None:
        try:
            it.admit(0.0, 0.250, device="greedy", cost=0.010, alone=0.010)
        except FullError as error:
            full = error
    assert full.reason is Reason.OVERLOAD
    for device in "abcdef":
        it.admit(0.0, 0.250, device=device, cost=0.010, alone=0.010)
    assert refused(it, 0.0, 0.250, device="greedy", cost=0.010, alone=0.010).retry_s >= full.retry_s


def test_a_full_queue_makes_room_at_the_cost_of_who_has_most_in_it() -> None:
    it = admission(4)
    told: list[FullError] = []
    greedy = [it.admit(0.0, device="greedy", size=1) for _ in range(4)]
    for place in greedy:
        place.pushed_out = told.append
    modest = it.admit(0.0, device="modest", size=1)
    assert [error.reason for error in told] == [Reason.PUSHED_OUT] and told[0].retry_s > 0
    greedy[-1].leave()
    assert (it.waiting, it.open) == (4, 4)
    it.admit(0.0, device="modest", size=1)
    assert refused(it, device="modest", size=1).reason is Reason.QUEUE_FULL, "two each: nobody has more"
    assert refused(it, device="greedy", size=1).reason is Reason.QUEUE_FULL
    assert len(told) == 2
    modest.leave()


def test_a_frame_that_was_not_served_is_not_charged() -> None:
    it = admission()
    other = it.admit(0.0, device="other", cost=1.0)
    for _ in range(3):
        it.admit(0.0, device="a", cost=0.1).leave()
    assert it.shares.next_start("a") == it.shares.virtual
    place = it.admit(0.0, device="a", cost=0.1)
    place.begin()
    place.leave()
    assert it.shares.next_start("a") > it.shares.virtual
    other.leave()


def test_a_frame_that_the_line_takes_for_due_is_expected_to_go_as_early() -> None:
    it = admission()
    for _ in range(20):
        it.admit(0.0, device="greedy", cost=0.010)
    how = {"device": "modest", "cost": 0.010, "alone": 0.010}
    for count in range(3):  # as many as `Line` lets go before the greedy one's: see BURST
        it.admit(0.0, 0.0101 * (5 + count) / (1 - HEADROOM), **how)  # the greedy one's three, one more of its, and own
    assert refused(it, 0.0, 0.0099 * 8 / (1 - HEADROOM), **how).reason is Reason.OVERLOAD


def test_what_is_due_waits_for_every_frame_that_is_and_for_one_of_a_device_that_is_over_its_share() -> None:
    it = admission()
    how = {"cost": 0.010, "alone": 0.015, "batch": 0.080}
    greedy = [it.admit(0.0, device="greedy", **how) for _ in range(20)]
    assert [place.due for place in greedy] == [True] * 3 + [False] * 17, "see BURST"
    for _ in range(2):
        it.admit(0.0, device="modest", **how)
    # Before it go three and one of the greedy one's and two more; with it in its batch of at most 80 ms it takes 75.
    it.admit(0.0, 0.0751 / (1 - DUE_HEADROOM), device="other", **how).leave()
    assert "75 ms from now" in str(refused(it, 0.0, 0.0749 / (1 - DUE_HEADROOM), device="other", **how))
    for place in greedy[3:]:
        place.leave()
    it.admit(0.0, 0.0651 / (1 - DUE_HEADROOM), device="another", **how).leave()


def test_a_frame_that_is_due_is_planned_with_a_batch_that_others_fill_only_so_far() -> None:
    """Frames of 10 ms in batches of 80 ms behind one that takes 60 more: eight are due, so it is in the second batch.

    A frame that is due expects that one to be filled to a quarter of its 250 ms, 62.5 ms, and 10 of them to be left;
    another one's batch will be full, and 25 ms have to be left.
    """
    it = admission()
    how = {"cost": 0.010, "alone": 0.015, "batch": 0.080, "busy": 0.060}
    for _ in range(30):
        it.admit(0.0, device="greedy", **how)
    for number in range(4):
        it.admit(0.0, device=f"device {number}", **how)
    it.admit(0.0, (0.060 + 0.080) / (1 - DUE_HEADROOM - FILL) + 0.001, device="due", **how).leave()
    assert FILL * 0.250 < 0.080, "so it comes in where a full batch would be too late"
    it.admit(0.0, 0.250, device="due", **how).leave()
    for _ in range(12):
        refused(it, 0.0, 0.100, device="turned away", **how)
    assert "220 ms from now" in str(refused(it, 0.0, 0.250, device="turned away", **how))


def test_counts_of_what_is_due_end_at_nothing() -> None:
    rng = random.Random(1)
    it = admission()
    places: list[Place] = []
    for _ in range(500):
        if places and rng.random() < 0.5:
            place = places.pop(rng.randrange(len(places)))
            if rng.random() < 0.7:
                place.begin()
            place.leave()
        else:
            places.append(it.admit(0.0, device=rng.choice("abc"), cost=rng.uniform(0.005, 0.02)))
        due = sum(place.cost for place in places if place.due)
        beyond = {place.device for place in places if not place.due}
        assert it.before("d", 0.0)[1] == pytest.approx(due)
        assert it.before("d", 0.001)[1] == pytest.approx(min(it.work, due + 0.001 * len(beyond)))
    for place in places:
        place.leave()
    assert it.before("d", 0.01) == (True, 0.0) and it.work == 0.0

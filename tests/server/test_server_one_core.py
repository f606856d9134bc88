"""One core for all threads: nothing is decoded beside a batch, answers go before the next one, threads take turns."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from headrace.models.bitstream import Packet
from headrace.protos.messages import Status
from headrace.server.one_core import one_core

from .conftest import HeldEngine


async def test_what_waits_is_decoded_between_batches_and_after_the_answers(
    start: Any, make_packet: Callable[..., Packet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.server.dispatch.one_core", lambda: True)
    monkeypatch.setattr(HeldEngine, "on_our_cores", True)
    server = await start()
    stream = await server.stream()
    server.engine.gate.clear()
    await stream.send(make_packet(1))
    await server.engine.began.get()
    for frame_id in (2, 3, 4):
        await stream.send(make_packet(frame_id))
    await server.waiting(3)
    for _ in range(100):  # the event loop has every opportunity
        await asyncio.sleep(0)
    await server.decoded(1)
    server.engine.gate.set()
    await server.engine.began.get()
    assert server.count("ok") == 1, "the first one's answer is out before the next batch begins"
    results = [await stream.result() for _ in range(4)]
    assert [(r.frame_id, r.status) for r in results] == [(n, Status.OK) for n in (1, 2, 3, 4)]
    assert [len(inputs) for _, inputs in server.engine.batches] == [1, 3]


async def test_a_batch_waits_for_the_packets_that_are_being_decoded(
    start: Any, make_packet: Callable[..., Packet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.server.dispatch.one_core", lambda: True)
    monkeypatch.setattr("headrace.server.dispatch.CHUNK", 1)  # each is decoded by itself
    monkeypatch.setattr(HeldEngine, "on_our_cores", True)
    server = await start(max_batch=3)
    stream = await server.stream()
    server.engine.gate.clear()
    await stream.send(make_packet(1))
    await server.engine.began.get()
    for frame_id in (2, 3, 4, 5, 6):
        await stream.send(make_packet(frame_id))
    await server.waiting(5)
    server.engine.gate.set()
    assert {(await stream.result()).frame_id for _ in range(6)} == {1, 2, 3, 4, 5, 6}
    assert [len(inputs) for _, inputs in server.engine.batches] == [1, 3, 2], "no longer than until it is full"


PROGRAM = """
import os, threading
from headrace.server.one_core import one_core, take_turns
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
assert one_core()
take_turns()
seen = []
thread = threading.Thread(target=lambda: seen.append(os.sched_getscheduler(0)))
thread.start()
thread.join()
print(os.sched_getscheduler(0), *seen)
"""


def test_threads_that_share_a_core_do_not_interrupt_each_other() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == [str(os.SCHED_BATCH)] * 2, done.stderr


def test_a_process_with_several_cores_is_left_as_it_is() -> None:
    assert one_core() == (len(os.sched_getaffinity(0)) == 1)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER

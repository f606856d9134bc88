"""The kernel's shaper. What needs netem is skipped by name elsewhere; the rest (tbf, schedules) is in most kernels."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from headrace.bench.exceptions import LinkError
from headrace.bench.links import namespaces
from headrace.bench.links.netem import NetemLink, netem_arguments, tbf_arguments
from headrace.bench.links.schedule import RateSchedule
from headrace.bench.links.spec import LinkSpec

from .traffic import Connection, sending

pytestmark = pytest.mark.timeout(60)


def need_namespaces() -> None:
    if why := namespaces.reason_against():
        pytest.skip(f"NAMESPACES UNAVAILABLE, NOTHING TESTED: {why}")


@contextlib.asynccontextmanager
async def shaped(spec: LinkSpec) -> AsyncIterator[tuple[NetemLink, Connection]]:
    need_namespaces()
    link = await NetemLink.open(spec, 5000)
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        try:
            listener, edge = (stack.enter_context(link.spaces.socket(end)) for end in ("server", "edge"))
            listener.bind((link.server_host, 5000))
            listener.listen()
            await loop.sock_connect(edge, (link.server_host, 5000))
            server = stack.enter_context((await loop.sock_accept(listener))[0])
            server.setblocking(False)
            yield link, Connection(edge, server, 0.0)
        finally:
            await link.close()


async def test_a_schedule_with_an_outage_is_followed():
    spec = LinkSpec(up=RateSchedule([(0, 6e6), (0.8, 0), (1.4, 3e6)]), queue_bytes=100_000)
    async with shaped(spec) as (link, connection):
        async with sending(connection):
            origin = asyncio.get_running_loop().time()
            link.begin()
            await connection.receive(2.4)
        wire = 1514 / 1448
        assert wire * connection.received(origin + 0.2, origin + 0.8) == pytest.approx(6e6 / 8 * 0.6, rel=0.15)
        assert connection.received(origin + 0.95, origin + 1.4) <= 3000
        assert wire * connection.received(origin + 1.6, origin + 2.3) == pytest.approx(3e6 / 8 * 0.7, rel=0.15)
        record = await link.refresh()
        assert record.up_counts.bytes == pytest.approx(sum(record.up.values()), rel=0.1)
        assert record.up_counts.lost == 0
    assert not list(Path("/run/netns").glob(f"headrace-{os.getpid()}-*"))


async def test_a_small_queue_drops_and_counts():
    async with shaped(LinkSpec(up=4e6, queue_bytes=8000)) as (link, connection):
        async with sending(connection):
            await connection.receive(1.0)
        assert (await link.refresh()).up_counts.overflowed > 0


def test_tc_understands_what_it_is_told():
    """Also where the kernel has no netem: then it is the kernel that refuses, not `tc`."""
    need_namespaces()
    spec = LinkSpec(up=8e6, delay_s=0.02, jitter_s=0.01, loss=0.02, seed=4)
    arguments = netem_arguments(spec, "up")
    assert arguments[:7] == ["netem", "limit", "100000", "delay", "25000us", "5000us", "loss"]
    assert arguments[7:9] == ["random", "2.0000%"]
    add = ["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", "handle", "1:"]
    done = subprocess.run([*add, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "kind is unknown" in done.stderr, done.stderr
    wrong = subprocess.run([*add, "netem", "delay", "much"], capture_output=True, text=True, check=False)
    assert "kind is unknown" not in wrong.stderr
    assert "Illegal" in wrong.stderr
    for bps in (200, 1e5, 8e6, 1e10):
        done = subprocess.run([*add, *tbf_arguments(bps, 65536)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


async def test_a_kernel_without_netem_leaves_nothing_behind(monkeypatch):
    need_namespaces()
    monkeypatch.setattr("headrace.bench.links.netem.netem_arguments", lambda *_: ["no-such-discipline"])
    with pytest.raises(LinkError, match="no-such-discipline"):
        await NetemLink.open(LinkSpec(up=8e6, delay_s=0.01), 5000)
    assert not list(Path("/run/netns").glob(f"headrace-{os.getpid()}-*"))

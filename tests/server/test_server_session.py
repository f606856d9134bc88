"""A stream whose results nobody reads ends, also one that was to end: half closed, or its bundle or the server goes."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from headrace.protos import messages
from headrace.protos.messages import Frame, Result, Status
from headrace.server.gathering import Budget
from headrace.server.references import References
from headrace.server.session import END_OF_STREAM, Session, StreamLimits

UNREAD_S = 0.2


class Deaf:
    """What gRPC gives a servicer whose peer reads nothing: no write returns."""

    def __init__(self, half_closed: bool) -> None:
        self._requests: list[Any] = [messages.frame_request(Frame(b"x"))]
        self._half_closed = half_closed

    async def read(self) -> Any:
        await asyncio.sleep(0)
        if self._requests:
            return self._requests.pop(0)
        if self._half_closed:
            return END_OF_STREAM
        return await asyncio.Event().wait()

    async def write(self, response: Any) -> None:
        await asyncio.Event().wait()


class Refusing:
    """A pipeline that refuses every frame."""

    keeps_references = False
    admission = SimpleNamespace(waiting=0, draining=False, retry_s=lambda: 0.0)
    clock = staticmethod(time.monotonic)

    @property
    def moment(self) -> Any:
        return SimpleNamespace(soon=lambda flush: asyncio.get_running_loop().call_soon(flush))

    def enter(self, *args: Any, **more: Any) -> Result:
        return Result(1, Status.INVALID, "no packet")


@pytest.mark.parametrize(("half_closed", "stops"), [(False, False), (True, False), (False, True)])
async def test_a_stream_that_is_not_read_ends_whatever_else_ends_it(half_closed: bool, stops: bool) -> None:
    served: Any = SimpleNamespace(stop=asyncio.Event(), decoder=None, bundle=SimpleNamespace(name="b"))
    limits = StreamLimits(2**20, 16, 8, 2**20, unread_s=UNREAD_S)
    pipeline: Any = Refusing()
    context: Any = Deaf(half_closed)
    session = Session(pipeline, served, context, limits, "d", Budget(1), References(0), several=True)
    running = asyncio.create_task(session.run())
    if stops:
        await asyncio.sleep(UNREAD_S / 4)
        served.stop.set()
    reason = await asyncio.wait_for(running, 20)
    assert reason is not None and reason[0] is grpc.StatusCode.RESOURCE_EXHAUSTED and "no result was read" in reason[1]

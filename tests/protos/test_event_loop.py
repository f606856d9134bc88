"""The event loop of edge and server: uvloop's where it is installed, asyncio's own elsewhere."""

import asyncio
import sys

import pytest
from headrace.protos import event_loop


async def module_of_the_loop(*, fail: bool = False) -> str:
    await asyncio.sleep(0)
    if fail:
        raise ValueError("from within")
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]


def test_uvloop_where_there_is_one():
    pytest.importorskip("uvloop", reason="no wheel of uvloop for this platform")
    assert event_loop.run(module_of_the_loop()) == "uvloop"


def test_asyncio_elsewhere(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvloop", None)  # importing it fails
    assert event_loop.run(module_of_the_loop()) == "asyncio"


def test_errors_come_through():
    with pytest.raises(ValueError, match="from within"):
        event_loop.run(module_of_the_loop(fail=True))

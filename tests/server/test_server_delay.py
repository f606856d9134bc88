"""What a frame waited on its way, by its device's own clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from headrace.models.bitstream import Packet
from headrace.protos import messages
from headrace.protos.messages import Frame, Status
from headrace.server.delay import WINDOW_S, Delay


def test_the_fastest_frame_stands_for_no_delay() -> None:
    delay = Delay()
    assert delay.of(1000, 50.0) == 0
    assert delay.of(1100, 50.140) == 40
    assert delay.of(1200, 50.190) == 0, "faster than the first: the measure from now on"
    assert delay.of(1300, 50.400) == 110
    assert delay.of(0, 60.0) == 0, "not said"


def test_clocks_may_drift_stand_still_and_begin_again() -> None:
    delay = Delay()
    assert delay.of(2**32 - 50, 10.0) == 0
    assert delay.of(50, 10.1) == 0, "it began again"
    assert delay.of(150, 10.2 + 5.0) == 5000, "as if it had waited; the device slept"
    later = 10.3 + 5.0 + 2 * WINDOW_S + 1
    for n in range(0, round(2 * WINDOW_S * 10) + 20):
        delay.of(250 + 100 * n, 15.3 + 0.1 * n)
    assert delay.of(250 + round((later - 15.3) * 1e3), later) == 0


@pytest.mark.parametrize("days", [24.86, 49.71, 74.6])
def test_a_stream_may_last_for_weeks(days: float) -> None:
    """A device's clock counts milliseconds modulo 2**32; half of that has passed after 24.86 days."""
    delay, began = Delay(), days * 86_400 - 120
    assert delay.of(1000, 0.0) == 0
    for hour in range(0, int(began), 3600):
        delay.of((1000 + 1000 * hour) % 2**32 or 1, float(hour))
    late = [delay.of((1000 + round(1000 * at)) % 2**32 or 1, at) for at in (began + 0.1 * n for n in range(2400))]
    assert max(late) <= 1


@pytest.mark.parametrize("says", [True, False])
async def test_a_frame_that_waited_too_long_on_its_way_is_not_computed(
    start: Any, make_packet: Callable[..., Packet], says: bool
) -> None:
    server = await start()
    stream = await server.stream()

    async def send(frame_id: int, clock_ms: int) -> Status:
        frame = Frame(make_packet(frame_id).to_bytes(), 200, clock_ms=clock_ms if says else 0)
        await stream.call.write(messages.frame_request(frame))
        return (await asyncio.wait_for(stream.result(), 10)).status

    assert await send(1, 1000) is Status.OK
    server.clock.now += 0.5
    assert await send(2, 1300) is (Status.DEADLINE_EXCEEDED if says else Status.OK), "200 ms longer on its way"
    assert await send(3, 1450) is Status.OK, "50 ms longer"

"""The driver with a real engine and thread: what the pipeline wants is done, in its order."""

from __future__ import annotations

import asyncio
import time

from headrace.edge import reserve
from headrace.edge.capture import Captured
from headrace.edge.device import Device
from headrace.edge.driver import Driver
from headrace.edge.engine import Engine, reference_picture
from headrace.edge.interfaces import Limits
from headrace.edge.ledger import Frame, Ledger, Outcome
from headrace.edge.pipeline import Pipeline
from headrace.edge.worker import Worker
from headrace.models.bitstream import Packet

from .rig import Choice, Scripted


class Wire:
    """A stream that writes at once and answers nothing."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.written = driver, []

    def wake(self) -> None:
        while (outgoing := self.driver.next_to_write()) is not None:
            self.written.append(Packet.from_bytes(outgoing.packet))


async def test_a_packet_goes_first_and_then_the_device_answers_in_reserve(bundle, edge_half, monkeypatch):
    monkeypatch.setattr(reserve, "EARLY_S", 2.0)  # a busy machine may be late by that much
    points = {point.name: point for point in bundle.operating_points}
    sent, local = points["stage.1@0"], points["local"]
    coarser = points["stage.1@1"]
    closed: list[Frame] = []
    ledger = Ledger(closed.append)
    control = Scripted(Choice(sent, reserve=local))
    control.again = coarser
    pipeline = Pipeline(control, bundle.operating_points, Limits(deadline_s=3.0), ledger, local_s=0.001)
    pipeline.connect(0.0, max_in_flight=16, max_packet_bytes=2**20)
    worker, engine = Worker(asyncio.get_running_loop()), Engine(bundle, edge_half, Device())
    engine.warm_up(bundle.operating_points)
    driver = Driver(pipeline, ledger, engine, worker, clock=time.monotonic)
    driver.stream = wire = Wire(driver)
    try:
        driver.on_frame(Captured(reference_picture(80, 60), time.monotonic()))
        async with asyncio.timeout(30):
            while not closed:
                await asyncio.sleep(0.01)
    finally:
        worker.stop()
    (frame,) = closed
    assert [packet.operating_point for packet in wire.written] == [coarser.id], "coded anew, and written once"
    order = [name for name, *_ in control.heard if name in ("coded anew?", "written", "fallback")]
    assert order == ["coded anew?", "written", "fallback"]
    assert (frame.outcome, frame.fell_back, frame.point) == (Outcome.LOCAL, True, coarser)
    assert frame.labels == engine.answer(reference_picture(80, 60), None, local).labels

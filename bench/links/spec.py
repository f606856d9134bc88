"""One description of a link, which every emulator takes: virtual clock, netem, TUN relay and TCP proxy."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, fields
from typing import Any, Literal

from ...models.exceptions import DataError
from .rates import Rates, as_rates
from .schedule import RateSchedule
from .traces import Trace

Capacity = float | RateSchedule | Trace
"""A constant rate in bit/s (infinity: no limit), steps whose last one holds on, or a trace that begins ever anew."""
Side = Literal["up", "down"]
SIDES: tuple[Side, Side] = ("up", "down")
MTU_BYTES = 1500
DEFAULT_QUEUE_BYTES = 64 * 1024
MOST_QUEUE_BYTES = 2**30
_MOST_S = 60.0


@dataclass(frozen=True)
class LinkSpec:
    """A link between an edge and a server.

    Attributes:
        up: capacity from the edge to the server.
        down: capacity back; None: no limit, but the outages of `up`.
        delay_s: propagation one way, on both ways, in seconds.
        jitter_s: further delay of each packet, drawn evenly from 0 to this; nothing overtakes by it.
        loss: probability that a packet is lost, on either way, 0 to under 1; drawn before the queue, for each packet
            by itself.
        queue_bytes: most bytes that wait at the bottleneck, each way; what comes on top is dropped (a TCP proxy, which
            has no packets to drop, pushes back instead).
        seed: of losses and jitter.

    Raises:
        DataError: a value is out of range.
    """

    up: Capacity = math.inf
    down: Capacity | None = None
    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    queue_bytes: int = DEFAULT_QUEUE_BYTES
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for side in (self.up, self.down):
            if isinstance(side, float | int) and not side >= 0:
                raise DataError(f"a link's rate of {side} bit/s is none; it must be at least 0")
        for name, seconds in (("delay", self.delay_s), ("jitter", self.jitter_s)):
            if not 0 <= seconds <= _MOST_S:
                raise DataError(f"a link's {name} of {seconds * 1000:g} ms is none; it must be 0 to 60000 ms")
        if not 0 <= self.loss < 1:
            raise DataError(f"a link's loss of {self.loss:g} is none; it is a probability, from 0 to under 1")
        if not MTU_BYTES <= self.queue_bytes <= MOST_QUEUE_BYTES:
            raise DataError(
                f"a link's queue of {self.queue_bytes} bytes is none; it must hold {MTU_BYTES} (one packet) to 2^30"
            )

    def rates(self, side: Side) -> Rates:
        """The capacity of one side, beginning at 0."""
        if side == "up" or self.down is None:
            up = as_rates(self.up)
            return up if side == "up" else up.outages_only()
        return as_rates(self.down)

    def down_beside(self, up_bps: float, at: float) -> float:
        """The rate down when somebody sets the one up, `at` seconds after the beginning: 0 in an outage."""
        if up_bps <= 0:
            return 0.0
        return math.inf if self.down is None else as_rates(self.down).rate(at)

    def dice(self, side: Side) -> random.Random:
        """The source of losses and jitter of one side."""
        return random.Random(f"{self.seed} {side}")

    @property
    def rtt_s(self) -> float:
        """Round-trip time without any queue, with the mean jitter."""
        return 2 * self.delay_s + self.jitter_s

    def describe(self) -> str:
        """One line for people."""
        down = "without limit" if self.down is None else _describe(self.down)
        delay = f"{self.delay_s * 1000:g} ms" + (f" + 0..{self.jitter_s * 1000:g} ms" if self.jitter_s else "")
        loss = f", loss {self.loss:.2%}" if self.loss else ""
        return f"up {_describe(self.up)}, down {down}, {delay} one way{loss}, queue {self.queue_bytes} bytes"

    def to_json(self) -> str:
        """One JSON object, for a link that lives in another process."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return json.dumps(values | {side: _capacity_to_json(values[side]) for side in SIDES})

    @classmethod
    def from_json(cls, text: str) -> LinkSpec:
        """The inverse of `to_json`."""
        values = json.loads(text)
        up, down = (_capacity_from_json(values.pop(side)) for side in SIDES)
        return cls(up=math.inf if up is None else up, down=down, **values)


def _describe(capacity: Capacity) -> str:
    if isinstance(capacity, Trace):
        return f"trace {capacity.name} ({capacity.mean_bps / 1e6:.3g} Mbit/s, {capacity.duration_s:.0f} s)"
    if isinstance(capacity, RateSchedule):
        return f"{len(capacity.steps)} steps from {capacity.steps[0][1] / 1e6:g} Mbit/s"
    return "without limit" if math.isinf(capacity) else f"{capacity / 1e6:g} Mbit/s"


def _capacity_to_json(capacity: Capacity | None) -> Any:
    if isinstance(capacity, Trace):
        durations, rates = capacity.pieces
        return {"durations": durations.tolist(), "rates": rates.tolist(), "name": capacity.name}
    return {"steps": capacity.steps} if isinstance(capacity, RateSchedule) else capacity


def _capacity_from_json(value: Any) -> Capacity | None:
    if isinstance(value, dict):
        if "steps" in value:
            return RateSchedule((start, rate) for start, rate in value["steps"])
        return Trace(value["durations"], value["rates"], value["name"])
    return None if value is None else float(value)

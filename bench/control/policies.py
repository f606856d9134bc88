"""Who decides in a simulated run: the real control loop, or one fixed operating point."""

# A fixed point takes part in the same events as the loop and ignores most of what they say.
# ruff: noqa: ARG002

from __future__ import annotations

import math
from typing import Protocol

from ...edge.controller import Choice, ControlLoop
from ...models.operating_point import Kind, OperatingPoint


class Policy(Protocol):
    """What a simulated run asks and tells."""

    most_waiting: int
    """So many captured frames wait for the core, and the oldest is taken first; 1: only the newest does."""

    def choose(self, now: float, captured_at: float) -> Choice:
        """The point for a frame; the core is free now."""
        ...

    def computed(self, point: OperatingPoint, seconds: float, size: int, now: float) -> None:
        """The core took `seconds` for a frame; its packet has `size` bytes."""
        ...

    def look_again(
        self,
        now: float,
        captured_at: float,
        point: OperatingPoint,
        size: int,
        coder_s: float,
        reserve: OperatingPoint | None,
    ) -> OperatingPoint:
        """The point that a coded frame shall be coded at anew; `point` itself if its packet is well as it is."""
        ...

    def worth_writing(self, now: float, captured_at: float, size: int) -> bool:
        """Whether a packet that is ready shall be written."""
        ...

    def written(self, frame: int, size: int, now: float) -> None:
        """It was."""
        ...

    def result(self, frame: int, now: float, server_s: float, queue_depth: int) -> None:
        """Its answer came, of which the server held it for `server_s`."""
        ...

    def reserved(self, reserve: OperatingPoint, seconds: float) -> None:
        """An answer in reserve was computed at a local point."""
        ...

    def fallback(self, reserve: OperatingPoint, frame: int) -> None:
        """It was given."""
        ...

    def connected(self, up: bool, now: float) -> None:
        """The stream came up or went down."""
        ...


class Unheeding:
    """What a policy leaves out that learns nothing from compute, codes no frame anew, keeps nothing in reserve and
    lets no frame wait behind a newer one."""

    most_waiting = 1

    def computed(self, point: OperatingPoint, seconds: float, size: int, now: float) -> None: ...

    def look_again(
        self,
        now: float,
        captured_at: float,
        point: OperatingPoint,
        size: int,
        coder_s: float,
        reserve: OperatingPoint | None,
    ) -> OperatingPoint:
        return point

    def reserved(self, reserve: OperatingPoint, seconds: float) -> None: ...

    def fallback(self, reserve: OperatingPoint, frame: int) -> None: ...


class FixedPoint(Unheeding):
    """One point for every frame; knows only the deadline and how many frames are unanswered."""

    def __init__(self, point: OperatingPoint, deadline_s: float, max_in_flight: int) -> None:
        self._choice = Choice(point, 1.0, 0.0, math.inf)
        self._deadline_s = deadline_s
        self._max_in_flight = max_in_flight
        self._in_flight: set[int] = set()
        self._connected = True

    def choose(self, now: float, captured_at: float) -> Choice:
        return self._choice

    def worth_writing(self, now: float, captured_at: float, size: int) -> bool:
        fits = len(self._in_flight) < self._max_in_flight
        return self._connected and fits and now <= captured_at + self._deadline_s

    def written(self, frame: int, size: int, now: float) -> None:
        self._in_flight.add(frame)

    def result(self, frame: int, now: float, server_s: float, queue_depth: int) -> None:
        self._in_flight.discard(frame)

    def connected(self, up: bool, now: float) -> None:
        self._connected = up
        self._in_flight.clear()


class LoopPolicy:
    """The edge's own control loop."""

    def __init__(self, loop: ControlLoop) -> None:
        self.loop, self.most_waiting = loop, loop.most_waiting

    def choose(self, now: float, captured_at: float) -> Choice:
        return self.loop.choose(now, captured_at, compute_free_at=now)

    def computed(self, point: OperatingPoint, seconds: float, size: int, now: float) -> None:
        self.loop.on_computed(point, seconds, now)
        if point.kind is not Kind.LOCAL:
            self.loop.on_coded(point, size)

    def look_again(
        self,
        now: float,
        captured_at: float,
        point: OperatingPoint,
        size: int,
        coder_s: float,
        reserve: OperatingPoint | None,
    ) -> OperatingPoint:
        return self.loop.look_again(now, captured_at, point, size, coder_s, reserve)

    def worth_writing(self, now: float, captured_at: float, size: int) -> bool:
        return self.loop.worth_writing(now, captured_at, size)

    def written(self, frame: int, size: int, now: float) -> None:
        self.loop.on_written(frame, size, now)

    def result(self, frame: int, now: float, server_s: float, queue_depth: int) -> None:
        self.loop.on_result(frame, now, server_s=server_s, queue_depth=queue_depth)

    def reserved(self, reserve: OperatingPoint, seconds: float) -> None:
        self.loop.on_reserve(reserve, seconds)

    def fallback(self, reserve: OperatingPoint, frame: int) -> None:
        self.loop.on_fallback(reserve, frame)

    def connected(self, up: bool, now: float) -> None:
        (self.loop.on_connected if up else self.loop.on_disconnected)(now)

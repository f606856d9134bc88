"""One server and its devices in virtual time: real control loops over recorded links, a real queue.

A balancer gives each device to one server when it connects, and there it stays; so servers are independent of each
other, and a fleet is as many of these cells as it has servers. A device has one core: it computes one frame at a time,
and the newest frame waits.
"""

from __future__ import annotations

import copy
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...edge.controller import ControlLoop, ControlSettings
from ...models.operating_point import Kind, OperatingPoint
from ..control.cells import draw_workload
from ..links.trace_set import Window
from ..links.virtual_link import VirtualLink
from .model import Constants
from .server import VirtualServer

_CAPTURE, _CORE, _ARRIVE, _ANSWER, _SERVER = range(5)
SIZES = 64
"""Different sequences of packet sizes and compute times; devices share them out."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """What all devices have in common.

    Attributes:
        points: the bundle's.
        fingerprint: of it.
        windows: recorded links; a device gets one, and a place in it.
        fps: frames captured a second.
        seconds: simulated.
        deadline_s: capture to answer.
        devices_s: kinds of devices, by what the uncut model takes on them; taken in turn.
        delay_s: one way.
        overhead_bytes: of framing.
        seed: of everything that is drawn.
    """

    points: tuple[OperatingPoint, ...]
    fingerprint: bytes
    windows: tuple[Window, ...]
    fps: float = 1.0
    seconds: float = 6.0
    deadline_s: float = 0.25
    devices_s: tuple[float, ...] = (0.3, 0.5)
    delay_s: float = 0.015
    overhead_bytes: int = 40
    seed: int = 0

    @property
    def frames(self) -> int:
        """Of each device."""
        return max(1, round(self.seconds * self.fps))


@dataclass(slots=True)
class Outcome:
    """What became of the frames of one or more cells. Frames add up: `ok + local + late + dropped == frames`.

    Attributes:
        devices, servers, frames: simulated.
        sent: frames that were written to the link.
        refused: of these, not admitted or given up.
        held: frames that were not sent because the server had asked to wait; `dropped` counts them too.
        split: frames that arrived at servers, by split point ("" is a picture).
        accuracy: sum over frames answered in time of their point's accuracy.
        bytes: sent.
        busy_s: of the servers' cores.
        seconds: simulated, summed over servers.
        batches, computed: batches and the frames in them.
        reasons: refused frames by reason.
        shares: on-time share of each device.
    """

    devices: int = 0
    servers: int = 0
    frames: int = 0
    ok: int = 0
    local: int = 0
    late: int = 0
    dropped: int = 0
    sent: int = 0
    refused: int = 0
    held: int = 0
    accuracy: float = 0.0
    bytes: int = 0
    busy_s: float = 0.0
    seconds: float = 0.0
    batches: int = 0
    computed: int = 0
    split: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        """Put another one's numbers to these."""
        for name in (
            "devices",
            "servers",
            "frames",
            "ok",
            "local",
            "late",
            "dropped",
            "sent",
            "refused",
            "held",
            "bytes",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("accuracy", "busy_s", "seconds", "batches", "computed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in ((self.split, other.split), (self.reasons, other.reasons)):
            for key, count in theirs.items():
                mine[key] = mine.get(key, 0) + count
        self.shares += other.shares

    @property
    def on_time(self) -> float:
        """Share of the captured frames that were answered within the deadline."""
        return (self.ok + self.local) / max(1, self.frames)

    @property
    def load(self) -> float:
        """Share of the time that a server's core worked."""
        return self.busy_s / max(1e-9, self.seconds)


class Templates:
    """Control loops to copy: making one solves its table, which takes 40 ms; a copy takes less than 1."""

    def __init__(self, fleet: Fleet) -> None:
        """Make one of each kind of device."""
        self._made = [
            ControlLoop(
                fleet.points,
                deadline_s=fleet.deadline_s,
                frame_interval_s=1 / fleet.fps,
                uncut_s=device_s,
                settings=ControlSettings(most_waiting=1),  # the newest frame alone, as here
            )
            for device_s in fleet.devices_s
        ]
        self.work = [
            [draw_workload(fleet.points, d, fleet.frames, fleet.fps, fleet.seed + 1000 * k + n) for n in range(SIZES)]
            for k, d in enumerate(fleet.devices_s)
        ]

    def loop(self, kind: int) -> ControlLoop:
        """A new one of that kind."""
        made = self._made[kind]
        # Operating points are never changed, and would be most of the work.
        return copy.deepcopy(made, {id(each): each for each in (made.points, *made.points)})


@dataclass(frozen=True, slots=True)
class Sent:
    """A frame on its way."""

    device: int
    frame: int
    point: int
    size: int
    deadline: float


class _Device:
    """State of one device; `Cell` moves it."""

    __slots__ = ("busy", "compute", "good", "held_until", "kind", "link", "loop", "phase", "sizes", "waiting")

    def __init__(self, fleet: Fleet, templates: Templates, number: int) -> None:
        rng = np.random.default_rng((fleet.seed, number))
        self.kind = number % len(fleet.devices_s)
        self.loop = templates.loop(self.kind)
        self.sizes, self.compute = templates.work[self.kind][int(rng.integers(SIZES))]
        window = fleet.windows[int(rng.integers(len(fleet.windows)))]
        start = float(rng.uniform(0, window.trace.duration_s))
        self.link = VirtualLink(window.trace, delay_s=fleet.delay_s, start_s=start, overhead_bytes=fleet.overhead_bytes)
        self.phase = float(rng.uniform(0, 1 / fleet.fps))
        self.waiting: int | None = None
        self.busy: tuple[int, int, float] | None = None
        self.held_until = 0.0
        self.good = 0


class Cell:
    """One server and its devices."""

    def __init__(self, fleet: Fleet, templates: Templates, constants: Constants, numbers: Sequence[int]) -> None:
        """Devices are told by their numbers in the fleet, which draw their links and sizes."""
        self._fleet = fleet
        self._devices = [_Device(fleet, templates, number) for number in numbers]
        self._server: VirtualServer[Sent] = VirtualServer(constants, fleet.fingerprint, self._refused)
        self._events: list[tuple[float, int, int, object]] = []
        self._count = 0
        self._index = {point.id: n for n, point in enumerate(fleet.points)}
        self._server_at = math.inf
        self._open: dict[tuple[int, int], float] = {}
        self.outcome = Outcome(devices=len(numbers), servers=1, frames=len(numbers) * fleet.frames)

    def run(self) -> Outcome:
        """Until every frame has its outcome."""
        fleet, out = self._fleet, self.outcome
        for number, device in enumerate(self._devices):
            for frame in range(fleet.frames):
                self._at(device.phase + frame / fleet.fps, _CAPTURE, (number, frame))
        end = fleet.frames / fleet.fps
        while self._events:
            now, _, kind, what = heapq.heappop(self._events)
            if kind == _SERVER:
                self._server_at = math.inf
                self._turn(now)
            else:
                self._steps[kind](self, now, what)
        out.busy_s, out.seconds = self._server.busy_s, end
        out.batches, out.computed, out.reasons = self._server.batches, self._server.frames, dict(self._server.refused)
        out.shares = [device.good / fleet.frames for device in self._devices]
        return out

    def _at(self, when: float, kind: int, what: object) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, kind, what))

    def _captured_at(self, device: _Device, frame: int) -> float:
        return device.phase + frame / self._fleet.fps

    def _capture(self, now: float, what: tuple[int, int]) -> None:
        number, frame = what
        device = self._devices[number]
        if device.waiting is not None:
            self.outcome.dropped += 1
        device.waiting = frame
        self._take(number, now)

    def _take(self, number: int, now: float) -> None:
        device = self._devices[number]
        if device.busy is not None or device.waiting is None:
            return
        frame, device.waiting = device.waiting, None
        choice = device.loop.choose(now, self._captured_at(device, frame), compute_free_at=now)
        if choice.p_on_time <= 0 and not choice.probe:
            self.outcome.dropped += 1
            return
        point = self._index[choice.point.id]
        if choice.point.kind is not Kind.LOCAL and now + float(device.compute[frame, point]) < device.held_until:
            self.outcome.held += 1  # the server is full, and has said until when
            self.outcome.dropped += 1
            return
        device.busy = (frame, point, now)
        self._at(now + float(device.compute[frame, point]), _CORE, number)

    def _computed(self, now: float, number: int) -> None:
        device, fleet, out = self._devices[number], self._fleet, self.outcome
        assert device.busy is not None
        (frame, index, began), device.busy = device.busy, None
        point, captured = fleet.points[index], self._captured_at(device, frame)
        device.loop.on_computed(point, now - began, now)
        size = int(device.sizes[frame, index])
        if point.kind is Kind.LOCAL:
            if now - captured <= fleet.deadline_s:
                out.local += 1
                out.accuracy += point.accuracy
                device.good += 1
            else:
                out.late += 1
        else:
            device.loop.on_coded(point, size)
            if device.loop.worth_writing(now, captured, size):
                device.loop.on_written(frame, size, now)
                out.sent += 1
                out.bytes += size
                sent = Sent(number, frame, index, size, captured + fleet.deadline_s)
                # The deadline travels as what remains of it when it is written.
                self._at(device.link.write(size, now), _ARRIVE, (sent, captured + fleet.deadline_s - now))
            else:
                out.dropped += 1
        self._take(number, now)

    def _arrive(self, now: float, what: tuple[Sent, float]) -> None:
        sent, remaining = what
        point = self._fleet.points[sent.point]
        self.outcome.split[point.split] = self.outcome.split.get(point.split, 0) + 1
        self._open[sent.device, sent.frame] = now
        if not self._server.arrive(sent, point.split, f"d{sent.device}", sent.size, now + remaining, now):
            self._refused(sent, now)
        self._turn(now)

    def _turn(self, now: float) -> None:
        for each in self._server.turn(now):
            self._answer(each.frame, now, True)
        following = self._server.next_at(now)
        if following is not None and following < self._server_at:
            self._server_at = max(now, following)
            self._at(self._server_at, _SERVER, None)

    def _refused(self, sent: Sent, now: float) -> None:
        self.outcome.refused += 1
        device = self._devices[sent.device]
        device.held_until = max(device.held_until, now + self._fleet.delay_s + self._server.retry_s)
        self._answer(sent, now, False)

    def _answer(self, sent: Sent, now: float, good: bool) -> None:
        held = now - self._open.pop((sent.device, sent.frame))
        self._at(now + self._fleet.delay_s, _ANSWER, (sent, good, held, self._server.admission.waiting))

    def _answered(self, now: float, what: tuple[Sent, bool, float, int]) -> None:
        sent, good, held, depth = what
        device, out = self._devices[sent.device], self.outcome
        device.loop.on_result(sent.frame, now, server_s=held, queue_depth=depth, answered=good)
        if not good:
            out.dropped += 1
        elif now <= sent.deadline:
            out.ok += 1
            out.accuracy += self._fleet.points[sent.point].accuracy
            device.good += 1
        else:
            out.late += 1

    _steps: Mapping[int, Any] = {_CAPTURE: _capture, _CORE: _computed, _ARRIVE: _arrive, _ANSWER: _answered}

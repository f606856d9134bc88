"""The edge in virtual time: frames, one core, a link and a server, without waiting for any of them.

    camera --> [ waiting frames ] --> core --> [ link FIFO ] --> [ server FIFO ] --> answer
                 oldest first    (1 frame at a time)                         (+ one-way delay back)

How many wait is the policy's: the loop lets as many wait as fit into a deadline, up to four, and drops what is not
worth its time; others keep the newest alone.

`replay` runs the real `ControlLoop`, a restricted set of points, or one fixed point; `best_fixed` tries every fixed
point. Deterministic: the same arguments give the same records.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...edge.controller import ControlLoop, ControlSettings
from ...models.exceptions import DataError
from ...models.operating_point import Kind, OperatingPoint
from ..links.traces import Trace
from ..links.virtual_link import VirtualLink
from .policies import FixedPoint, LoopPolicy, Policy
from .records import OUTCOMES, FrameRecord, Replay

CODER_SHARE = 0.1
"""Coding a latent (again) as a share of the uncut model's time, measured: 0.06 to 0.18. Coding a picture is all of its
compute."""
_CAPTURE, _CORE, _RESERVE, _ANSWER = range(4)  # at one instant: a new frame first, so that the newest is taken


def replay(
    points: Sequence[OperatingPoint],
    sizes: ArrayLike,
    compute_s: ArrayLike,
    trace: Trace,
    *,
    delay_s: float,
    deadline_s: float,
    fps: float,
    fixed: int | None = None,
    allowed: Sequence[int] | None = None,
    policy: Policy | None = None,
    server_s: ArrayLike = 0.0,
    overhead_bytes: int = 0,
    agree: ArrayLike | None = None,
    start_s: float = 0.0,
    uncut_s: float | None = None,
    max_in_flight: int | None = None,
    settings: ControlSettings | None = None,
    link: VirtualLink | None = None,
    disconnected_s: Sequence[tuple[float, float]] = (),
    coder_s: ArrayLike = 0.0,
    seen_s: ArrayLike = 0.0,
    back_s: ArrayLike = 0.0,
    profile_s: Mapping[str, float] = {},
) -> Replay:
    """Run frames over a link in virtual time.

    Args:
        points: the operating points.
        sizes: packet bytes, [frames, points]; its first axis says how many frames there are.
        compute_s: edge seconds, [points] or [frames, points].
        trace: the uplink; looped if the run is longer.
        delay_s: one-way propagation, up and down each.
        deadline_s: capture to answer.
        fps: frames captured a second.
        fixed: index of the only point that is ever used, without any control; None: the control loop chooses.
        allowed: indexes that the loop may choose from; None: all.
        policy: who decides, in place of the loop or a fixed point.
        server_s: service time of the server, which takes one frame at a time; of all frames, or [frames].
        overhead_bytes: what the stream adds to every packet on the wire.
        agree: how right each answer is, 0..1, [frames, points]; None: each point's `accuracy`.
        start_s: the trace's time at which the first frame is captured.
        uncut_s: the loop's start value for the uncut model's time; None: the `local` point's time in `compute_s`, or
            the largest.
        profile_s: the loop's start values for compute times, by stage, where a device was profiled.
        max_in_flight: most unanswered frames for a fixed point (a further frame is dropped before it is written);
            None: as many as fit into a deadline, and one more, as for the loop.
        settings: the loop's settings; None: its defaults.
        link: the uplink (with losses, or other traffic); None: a plain one over `trace`.
        disconnected_s: (from, until) stretches of virtual time in which the stream is down and the loop knows.
        coder_s: what coding a frame anew takes, of all points or [points]; 0: no frame is (see `edge.second_look`).
        seen_s: how long after its capture a frame can be taken up, of all frames or [frames].
        back_s: how much longer than `delay_s` its answer takes, of all frames or [frames].

    Raises:
        DataError: shapes don't fit, or an index is out of range.
    """
    table = _Workload.checked(points, sizes, compute_s, agree)
    interval = 1.0 / fps
    chosen = list(range(len(points))) if allowed is None else list(allowed)
    for index in [*chosen, *([] if fixed is None else [fixed])]:
        if not 0 <= index < len(points):
            raise DataError(f"operating point index {index} is out of range; there are {len(points)}")
    cap = max_in_flight if max_in_flight is not None else math.ceil(deadline_s * fps) + 1
    if policy is not None:
        pass
    elif fixed is not None:
        policy = FixedPoint(points[fixed], deadline_s, cap)
    else:
        policy = LoopPolicy(
            ControlLoop(
                [points[index] for index in chosen],
                deadline_s=deadline_s,
                frame_interval_s=interval,
                uncut_s=uncut_s if uncut_s is not None else table.uncut_s(points),
                settings=settings or ControlSettings(),
                compute_s=profile_s,
            )
        )
    link = link or VirtualLink(trace, delay_s=delay_s, start_s=start_s, overhead_bytes=overhead_bytes)
    run = _Run(
        points,
        table,
        link,
        policy,
        delay_s,
        deadline_s,
        interval,
        server_s,
        sorted(disconnected_s),
        coder_s,
        seen_s,
        back_s,
    )
    return run.result()


def coder_seconds(points: Sequence[OperatingPoint], device_s: float) -> NDArray[np.float64]:
    """What coding a computed frame anew takes, float64 [points]."""
    share = np.array([point.edge_share for point in points])
    feature = np.array([point.kind is Kind.FEATURE for point in points])
    is_local = np.array([point.kind is Kind.LOCAL for point in points])
    return np.where(is_local, 0.0, np.where(feature, np.minimum(share, CODER_SHARE), share)) * device_s


def best_fixed(
    points: Sequence[OperatingPoint],
    sizes: ArrayLike,
    compute_s: ArrayLike,
    trace: Trace,
    *,
    delay_s: float,
    deadline_s: float,
    fps: float,
    allowed: Sequence[int] | None = None,
    server_s: float = 0.0,
    overhead_bytes: int = 0,
    agree: ArrayLike | None = None,
    start_s: float = 0.0,
    max_in_flight: int | None = None,
    disconnected_s: Sequence[tuple[float, float]] = (),
) -> tuple[int, Replay]:
    """The fixed point with the best on-time accuracy in hindsight, and its run. Arguments as in `replay`."""
    candidates = range(len(points)) if allowed is None else allowed
    runs = {
        index: replay(
            points,
            sizes,
            compute_s,
            trace,
            delay_s=delay_s,
            deadline_s=deadline_s,
            fps=fps,
            fixed=index,
            server_s=server_s,
            overhead_bytes=overhead_bytes,
            agree=agree,
            start_s=start_s,
            max_in_flight=max_in_flight,
            disconnected_s=disconnected_s,
        )
        for index in candidates
    }
    if not runs:
        raise DataError("there is no operating point to try")
    best = max(runs, key=lambda index: runs[index].score)
    return best, runs[best]


@dataclass(frozen=True, slots=True)
class _Workload:
    sizes: NDArray[np.float64]
    compute_s: NDArray[np.float64]
    agree: NDArray[np.float64]

    @classmethod
    def checked(
        cls, points: Sequence[OperatingPoint], sizes: ArrayLike, compute_s: ArrayLike, agree: ArrayLike | None
    ) -> _Workload:
        bytes_of = np.asarray(sizes, dtype=np.float64)
        if not points or bytes_of.ndim != 2 or bytes_of.shape[1] != len(points):
            raise DataError(f"sizes must be [frames, {len(points)} points], not {list(bytes_of.shape)}")
        accuracy = np.array([point.accuracy for point in points]) if agree is None else agree
        try:
            seconds = np.broadcast_to(np.asarray(compute_s, dtype=np.float64), bytes_of.shape)
            right = np.broadcast_to(np.asarray(accuracy, dtype=np.float64), bytes_of.shape)
        except ValueError as error:
            raise DataError(f"compute_s and agree must fit sizes {list(bytes_of.shape)}: {error}") from error
        return cls(bytes_of, seconds, right)

    def uncut_s(self, points: Sequence[OperatingPoint]) -> float:
        local = [index for index, point in enumerate(points) if point.is_uncut]
        return float(self.compute_s[:, local].mean() if local else self.compute_s.mean(axis=0).max())


class _Run:
    """One run: an event loop over captures, the core becoming free, and answers."""

    def __init__(
        self,
        points: Sequence[OperatingPoint],
        table: _Workload,
        link: VirtualLink,
        policy: Policy,
        delay_s: float,
        deadline_s: float,
        interval_s: float,
        server_s: ArrayLike,
        disconnected_s: Sequence[tuple[float, float]],
        coder_s: ArrayLike,
        seen_s: ArrayLike,
        back_s: ArrayLike,
    ) -> None:
        self._seen_s, self._back_s = (np.broadcast_to(np.asarray(s), len(table.sizes)) for s in (seen_s, back_s))
        self._points = points
        self._bet = -1  # the local point in reserve for the frame that the core is busy with
        self._reserve: dict[int, int] = {}  # frame -> that point, from when its answer is known
        self._coder_s = np.broadcast_to(np.asarray(coder_s, dtype=np.float64), len(points))
        self._first: tuple[int, float, int] | None = None  # of a frame that is coded anew: point, seconds, bytes
        self._index = {point.id: index for index, point in enumerate(points)}
        self._table = table
        self._link = link
        self._policy = policy
        self._delay_s = delay_s
        self._deadline_s = deadline_s
        self._interval_s = interval_s
        self._server_s = np.broadcast_to(np.asarray(server_s, dtype=np.float64), len(table.sizes))
        self._changes = [(at, up) for stretch in disconnected_s for at, up in zip(stretch, (False, True), strict=True)]
        self._session = 0  # a frame of an earlier connection gets no answer
        self._records: list[FrameRecord | None] = [None] * len(table.sizes)
        self._events: list[tuple[float, int, int, float]] = []
        self._busy: tuple[int, int, float, bool] | None = None  # frame, point, began, probe
        self._waiting: deque[int] = deque()
        self._server_free = 0.0
        self._written: dict[int, tuple[int, int, bool]] = {}  # frame -> session, point, probe
        self._run()

    def result(self) -> Replay:
        records = [record for record in self._records if record is not None]
        if len(records) != len(self._records):
            raise RuntimeError("a frame was left without an outcome")
        counts = Counter(record.outcome for record in records)
        return Replay(records, {outcome: counts[outcome] for outcome in OUTCOMES})

    def _captured_at(self, frame: int) -> float:
        return frame * self._interval_s

    def _run(self) -> None:
        for frame in range(len(self._records)):
            seen = self._captured_at(frame) + float(self._seen_s[frame])
            heapq.heappush(self._events, (seen, _CAPTURE, frame, 0.0))
        while self._events:
            now, kind, frame, held = heapq.heappop(self._events)
            self._apply_changes(now)
            if kind == _CAPTURE:
                if len(self._waiting) == self._policy.most_waiting:
                    self._drop(self._waiting.popleft(), "busy")
                self._waiting.append(frame)
                self._take(now)
            elif kind == _CORE:
                self._computed(now)
                self._take(now)
            elif kind == _RESERVE:
                self._in_reserve(frame, now)
                self._take(now)
            else:
                self._answered(frame, now, held)

    def _apply_changes(self, now: float) -> None:
        while self._changes and self._changes[0][0] <= now:
            at, up = self._changes.pop(0)
            self._session += 1
            for frame in [frame for frame, (session, *_) in self._written.items() if session < self._session]:
                self._settle(frame, "late", "no answer")
            self._policy.connected(up, at)

    def _take(self, now: float) -> None:
        while self._busy is None and self._waiting:
            self._choose(self._waiting.popleft(), now)

    def _choose(self, frame: int, now: float) -> None:
        # A core that is free at this very instant takes the frame that is captured at this instant, not an older one.
        choice = self._policy.choose(now, self._captured_at(frame))
        if choice.p_on_time <= 0 and not choice.probe:
            self._drop(frame, "stale")
            return
        point = self._index[choice.point.id]
        self._busy = (frame, point, now, choice.probe)
        self._bet = self._index[choice.reserve.id] if choice.reserve is not None else -1
        heapq.heappush(self._events, (now + float(self._table.compute_s[frame, point]), _CORE, frame, 0.0))

    def _computed(self, now: float) -> None:
        if self._busy is None:
            raise RuntimeError("the core became free without a frame")
        (frame, point, began, probe), self._busy = self._busy, None
        captured = self._captured_at(frame)
        size = int(self._table.sizes[frame, point])
        if self._again(frame, point, began, probe, size, now):
            return
        (first, seconds, coded), self._first = self._first or (point, now - began, size), None
        self._policy.computed(self._points[first], seconds, coded, now)
        if self._points[point].kind is Kind.LOCAL:
            in_time = now - captured <= self._deadline_s + 1e-9
            score = float(self._table.agree[frame, point]) if in_time else 0.0
            outcome = "local" if in_time else "late"
            self._records[frame] = FrameRecord(frame, captured, outcome, "", point, now - captured, 0, score, probe)
            return
        worth = self._policy.worth_writing(now, captured, size)
        if worth:
            self._written[frame] = (self._session, point, probe)
            self._policy.written(frame, size, now)
            arrived = self._link.write(size, now)
            begin = max(arrived, self._server_free)
            self._server_free = begin + float(self._server_s[frame])
            answer = self._server_free + self._delay_s + float(self._back_s[frame])
            heapq.heappush(self._events, (answer, _ANSWER, frame, self._server_free - arrived))
        if self._bet >= 0:
            self._busy = frame, point, now, probe
            heapq.heappush(self._events, (now + float(self._table.compute_s[frame, self._bet]), _RESERVE, frame, 0.0))
        elif not worth:
            self._drop(frame, "stale", point)

    def _in_reserve(self, frame: int, now: float) -> None:
        """The answer in reserve is there: of a frame that was not sent, it is the answer."""
        if self._busy is None:
            raise RuntimeError("a local answer is done without a frame")
        (_, point, began, probe), self._busy = self._busy, None
        self._policy.reserved(self._points[self._bet], now - began)
        in_time = now - self._captured_at(frame) <= self._deadline_s + 1e-9
        if in_time:
            self._reserve[frame] = self._bet
        if self._records[frame] is not None or frame in self._written:
            return
        if in_time:
            self._records[frame] = self._fallen_back(frame, point, now, 0, probe)
        else:
            self._drop(frame, "stale", point)

    def _fallen_back(self, frame: int, point: int, now: float, size: int, probe: bool) -> FrameRecord:
        captured, reserve = self._captured_at(frame), self._reserve[frame]
        score = float(self._table.agree[frame, reserve])
        self._policy.fallback(self._points[reserve], frame)
        latency = min(now - captured, self._deadline_s)
        return FrameRecord(frame, captured, "local", "fallback", point, latency, size, score, probe)

    def _again(self, frame: int, point: int, began: float, probe: bool, size: int, now: float) -> bool:
        """Whether the frame is coded anew, which is done once."""
        coder_s = float(self._coder_s[point])
        if self._first is not None or coder_s <= 0 or self._points[point].kind is Kind.LOCAL:
            return False
        reserve = self._points[self._bet] if self._bet >= 0 else None
        chosen = self._policy.look_again(now, self._captured_at(frame), self._points[point], size, coder_s, reserve)
        if chosen.id == self._points[point].id:
            return False
        self._first = point, now - began, size
        self._busy = frame, self._index[chosen.id], began, probe
        heapq.heappush(self._events, (now + coder_s, _CORE, frame, 0.0))
        return True

    def _answered(self, frame: int, now: float, held: float) -> None:
        if frame not in self._written or self._written[frame][0] != self._session:
            return
        service = float(self._server_s[frame])
        self._policy.result(frame, now, held, max(math.ceil(held / service) - 1, 0) if service > 0 else 0)
        in_time = now - self._captured_at(frame) <= self._deadline_s + 1e-9
        self._settle(frame, "ok" if in_time else "late", "", now)

    def _settle(self, frame: int, outcome: str, reason: str, now: float = math.inf) -> None:
        _, point, probe = self._written.pop(frame)
        captured = self._captured_at(frame)
        score = float(self._table.agree[frame, point]) if outcome == "ok" else 0.0
        size = int(self._table.sizes[frame, point])
        if outcome != "ok" and frame in self._reserve:
            self._records[frame] = self._fallen_back(frame, point, now, size, probe)
            return
        self._records[frame] = FrameRecord(frame, captured, outcome, reason, point, now - captured, size, score, probe)

    def _drop(self, frame: int, reason: str, point: int = -1) -> None:
        self._records[frame] = FrameRecord(frame, self._captured_at(frame), "dropped", reason, point)

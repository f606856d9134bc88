"""References for the demo: other ways to use the same link, replayed in virtual time on the same frames.

Measured: every packet's size (the frames are really coded), every answer (the tails are really run), compute times (in
the demo's edge, with every frame's deviation from the median), the server's time. Replayed: when what is sent arrives,
on the schedule of the demo's link. Headrace itself is replayed as well, so that the distance between replay and
reality can be read off.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...models.operating_point import Kind, OperatingPoint
from ..control.records import Replay
from ..control.simulate import coder_seconds, replay
from ..links.schedule import Phase
from ..links.traces import Trace
from ..workload import Answers, Workload, agreement
from .tally import ON_TIME, FrameRecord

_ENOUGH_FRAMES = 10
"""So many frames of a stage must have been computed in the demo for its compute time to be taken from there."""
_LIKELY = 12
"""Fixed points whose answers to the sample of frames are computed."""
_SHORTLIST = 2
"""Fixed points that are looked at closely: those that do best on a sample of frames."""
_REST_S = 3600.0
"""The schedule's last rate holds on, for a replay that takes a little longer."""


@dataclass(frozen=True, slots=True)
class ComputeTimes:
    """What the demo's edge took for computing.

    Attributes:
        median_s: seconds by `OperatingPoint.stage`.
        deviation: by frame, how much longer than its stage's median it took (1: just as long); frames that computed
            nothing have that of the frame before.
    """

    median_s: dict[str, float]
    deviation: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Conditions:
    """What all replays share, as it was in the demo.

    Attributes:
        phases: the link's schedule, from the first frame on.
        delay_s: one way.
        deadline_s, fps: of the frames.
        compute: what the device took.
        server_s: seconds that the server holds a frame.
        disconnected_s: stretches in which the server was away.
    """

    phases: tuple[Phase, ...]
    delay_s: float
    deadline_s: float
    fps: float
    compute: ComputeTimes
    server_s: float
    disconnected_s: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Reference:
    """One replayed run."""

    name: str
    frames: list[FrameRecord]


def compute_times(
    frames: Sequence[FrameRecord], points: Sequence[OperatingPoint], otherwise: dict[str, float]
) -> ComputeTimes:
    """Compute times as they were measured; of a stage that was hardly used, the median is taken from `otherwise`.

    A stage that sends features takes longer in a stream than there: predicted frames, finer rate levels, cold caches.
    So one that was hardly used takes so much longer as those do that were used.
    """
    stages = {point.name: point.stage for point in points}
    seen: dict[str, list[float]] = {}
    taken: dict[int, tuple[str, float]] = {}
    for frame in frames:
        stage = stages.get(frame.point)
        if stage is not None and frame.timings_ms.get("compute"):
            seconds = sum(frame.timings_ms.get(part, 0.0) for part in ("prepare", "compute", "compress")) / 1000
            seen.setdefault(stage, []).append(seconds)
            taken[frame.frame] = (stage, seconds)
    medians = {stage: statistics.median(each) for stage, each in seen.items() if len(each) >= _ENOUGH_FRAMES}
    sent = {point.stage for point in points if point.kind is Kind.FEATURE}
    longer = [seconds / otherwise[stage] for stage, seconds in medians.items() if stage in sent and stage in otherwise]
    factor = statistics.median(longer) if longer else 1.0
    expected = {stage: seconds * (factor if stage in sent else 1.0) for stage, seconds in otherwise.items()}
    deviation, last = [], 1.0
    for index in range(len(frames)):
        stage, seconds = taken.get(index, ("", 0.0))
        last = seconds / medians[stage] if stage in medians else last
        deviation.append(last)
    return ComputeTimes({**expected, **medians}, tuple(deviation))


def server_seconds(frames: Sequence[FrameRecord]) -> float:
    """Median seconds that the server held a frame; 20 ms if it answered none."""
    held = [f.timings_ms["server"] / 1000 for f in frames if f.outcome == "ok" and f.timings_ms.get("server")]
    return statistics.median(held) if held else 0.02


def replay_references(
    workload: Workload, answers: Answers, conditions: Conditions, note: Callable[[str], None]
) -> list[Reference]:
    """Headrace, WebP only (its quality adapts under the same control loop), local only, and the best fixed point.

    Args:
        workload: the demo's frames.
        answers: of a server with the same bundle.
        conditions: of the demo.
        note: told what is being done.
    """
    runs = _Replays(workload, answers, conditions)
    every = range(len(workload.points))
    webp = [i for i in every if workload.points[i].codec == "webp"]
    local = next(i for i in every if workload.points[i].is_uncut)
    found = []
    for name, allowed, fixed in (
        ("Headrace, replayed", None, None),
        ("WebP only", webp, None),
        ("local only", None, local),
    ):
        note(f"replaying: {name}")
        found.append(runs.reference(name, runs.settled(allowed=allowed, fixed=fixed)))
    note("replaying: every fixed operating point")
    return [*found, runs.best_fixed()]


class _Replays:
    def __init__(self, workload: Workload, answers: Answers, conditions: Conditions) -> None:
        self._workload, self._answers, self._conditions = workload, answers, conditions
        medians = conditions.compute.median_s
        self._compute_s = np.outer(conditions.compute.deviation, [medians[point.stage] for point in workload.points])
        # As the edge does, the loop begins with compute times that were measured on the device.
        self._points = [replace(p, edge_share=medians[p.stage] / medians["local"]) for p in workload.points]
        phases = [(p.seconds, p.mbps * 1e6) for p in conditions.phases]
        self._trace = Trace.steps([*phases, (_REST_S, phases[-1][1])])

    def settled(self, *, allowed: Sequence[int] | None = None, fixed: int | None = None) -> Replay:
        """A replay in which every size that mattered is real: what was estimated is coded and the replay repeated."""
        while True:
            run = self._replay(allowed, fixed)
            used = [(r.frame, r.point) for r in run.records if r.point >= 0]
            missing = [pair for pair in used if not self._workload.known(pair)]
            if not missing:
                return run
            # The next replay will often want a neighbouring rate level, which costs little once the head has run.
            near = self._workload.neighbours if fixed is None else lambda index: [index]
            self._workload.code((frame, other) for frame, index in missing for other in near(index))

    def best_fixed(self) -> Reference:
        """The fixed point, of those that send, with the most right answers in time, in hindsight.

        All are replayed with estimated sizes; those that do best by the bundle's accuracies are judged by their answers
        to the sample of frames; the best few of these with their real sizes and by every other answer.
        """
        points = self._workload.points
        estimates = {index: self._replay(None, index) for index, p in enumerate(points) if p.kind is not Kind.LOCAL}
        likely = sorted(estimates, key=lambda index: estimates[index].score, reverse=True)[:_LIKELY]
        timely = {index: estimates[index].on_time for index in likely}
        samples = {index: [(frame, index) for frame in self._workload.sample] for index in timely}
        right = self._right(timely, samples)
        shortlist = sorted(timely, key=right.__getitem__, reverse=True)[:_SHORTLIST]
        runs = {index: self.settled(fixed=index) for index in shortlist}
        timely = {index: run.on_time for index, run in runs.items()}
        right = self._right(timely, {index: _answered(run)[::2] for index, run in runs.items()})
        best = max(shortlist, key=right.__getitem__)
        return self.reference(f"best fixed, {points[best].name}", runs[best])

    def _right(self, timely: dict[int, float], samples: dict[int, list[tuple[int, int]]]) -> dict[int, float]:
        """Estimated share of frames with the right answer in time, by point."""
        self._answers.ask(self._workload, [pair for each in samples.values() for pair in each])
        return {
            index: share * agreement(samples[index], self._answers, self._workload) if samples[index] else 0.0
            for index, share in timely.items()
        }

    def _replay(self, allowed: Sequence[int] | None, fixed: int | None) -> Replay:
        c = self._conditions
        return replay(
            self._points,
            self._workload.sizes(),
            self._compute_s,
            self._trace,
            delay_s=c.delay_s,
            deadline_s=c.deadline_s,
            fps=c.fps,
            fixed=fixed,
            allowed=allowed,
            server_s=c.server_s,
            uncut_s=c.compute.median_s["local"],
            coder_s=coder_seconds(self._points, c.compute.median_s["local"]),
            disconnected_s=c.disconnected_s,
        )

    def reference(self, name: str, run: Replay) -> Reference:
        """The run with its real answers."""
        answered = _answered(run)
        self._answers.ask(self._workload, answered)
        told = {pair[0]: self._answers.labels(pair) for pair in answered}
        points = self._workload.points
        frames = [
            FrameRecord(
                frame=r.frame,
                captured_s=r.captured_s,
                outcome=r.outcome,
                point=points[r.point].name if r.point >= 0 else "",
                bytes=r.bytes,
                labels=told.get(r.frame, ()),
                latency_ms=r.latency_s * 1000 if math.isfinite(r.latency_s) else None,
                reason=r.reason,
            )
            for r in run.records
        ]
        return Reference(name, frames)


def _answered(run: Replay) -> list[tuple[int, int]]:
    """Frames that were answered in time, and their points."""
    return [(r.frame, r.point) for r in run.records if r.outcome in ON_TIME]

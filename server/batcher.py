"""Who goes next: the order of what waits, and the forming of batches, without I/O and without a clock of their own.

    put ───► Line:     earliest deadline first among the frames that are their device's due, then the others
    take ◄── Batcher:  the next batch, and the frames that can no longer be in time

Frames of one tail share a batch, whatever their device, rate level, width or prefix: the decoder takes each frame's
own gain, and what was not sent is 0, the mean. A batch is as large as what waits, up to the largest that its
most urgent frame has time for; so batches grow with the load and are of one frame without any. A frame that cannot be
in time is not computed: under overload a queue in order of arrival would make every frame late, this one keeps
answering those that can still be in time (as Clockwork does, Gujarati et al., OSDI 2020).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypedDict, TypeVar, Unpack

from .admission import BATCH_HEADROOM, FILL
from .costs import LIKELY, Costs
from .engine import TailKey
from .shares import BURST, Shares

T = TypeVar("T")

PATIENCE_S = 1.0
"""A frame without a deadline is ordered as if it had this one, so that it neither jumps the queue nor starves."""

GAPS = 0.1
"""Weight of a new gap between two arrivals in the running mean."""


SPARE = 0.04
"""Share of its deadline that a frame shall have left when its batch is done, while others wait: the result has to be
written, which under load waits for the interpreter, and to travel. A frame that has less would most likely be late, and
another one could have had its place."""


def batch_limit_s(whole: float) -> float:
    """Seconds that a batch may take with frames that had `whole` seconds until their deadline when they came: one that
    just misses a batch waits for its end, and is in the next one."""
    return (1.0 - BATCH_HEADROOM) * whole / 2


def fill_limit_s(whole: float) -> float:
    """Seconds from one batch to the next for a batch that is filled with frames of devices that are over their share.

    Shorter than `batch_limit_s`: who is within its share and comes when such a batch has just begun is in the next one,
    however many others then are, and that one may be as long as two fit into a deadline.
    """
    return FILL * whole


def deadline_at(received: float, remaining_ms: int) -> float:
    """When a frame's deadline passes, in seconds of the server's clock; infinity when it has none (0)."""
    return received + remaining_ms / 1e3 if remaining_ms else math.inf


class Tags(TypedDict, total=False):
    """What orders a frame besides its deadline: its start tag (else 0), the seconds that it takes under load (0), and
    those that it had until its deadline when it came (infinity)."""

    start: float
    cost: float
    whole: float


class Entry(NamedTuple, Generic[T]):
    """A frame that waits."""

    urgency: float
    arrival: int
    deadline: float
    since: float
    start: float
    cost: float
    whole: float
    key: TailKey
    item: T


class _Lane(Generic[T]):
    """The frames of one tail: a heap of those that are due, by urgency, and one of the others, by start tag."""

    __slots__ = ("due", "early")

    def __init__(self) -> None:
        self.due: list[tuple[float, int, Entry[T]]] = []
        self.early: list[tuple[float, int, Entry[T]]] = []

    def __len__(self) -> int:
        return len(self.due) + len(self.early)

    def first(self, virtual: float) -> tuple[bool, float, int, Entry[T]]:
        """The next frame and what orders lanes by it; the lane is not empty."""
        while self.early and self.early[0][0] <= virtual:
            entry = heapq.heappop(self.early)[2]
            heapq.heappush(self.due, (entry.urgency, entry.arrival, entry))
        early = not self.due
        order, arrival, entry = (self.early if early else self.due)[0]
        return early, order, arrival, entry

    def pop(self) -> None:
        """Take out what `first` gave."""
        heapq.heappop(self.due or self.early)


class Line(Generic[T]):
    """Frames in the order in which they are due: see `shares` for which are eligible.

    Urgency is the deadline; frames that are not eligible come after all that are, by their start tags.
    """

    def __init__(self, shares: Shares) -> None:
        """Nobody waits."""
        self._shares = shares
        self._lanes: dict[TailKey, _Lane[T]] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        """Frames that wait here."""
        return sum(map(len, self._lanes.values()))

    def waiting(self, key: TailKey) -> int:
        """Frames of one tail."""
        lane = self._lanes.get(key)
        return len(lane) if lane else 0

    def due(self, key: TailKey) -> int:
        """Frames of one tail that are their device's due, as far as is known since `first` was asked."""
        lane = self._lanes.get(key)
        return len(lane.due) if lane else 0

    def put(self, item: T, key: TailKey, deadline: float, now: float, **tags: Unpack[Tags]) -> None:
        """Let a frame wait.

        Args:
            item: what comes out again.
            key: names the tail.
            deadline: see `deadline_at`.
            now: seconds.
            tags: see `Tags`.
        """
        self._arrivals += 1  # breaks ties in order of arrival, and keeps heapq from comparing items
        urgency = deadline if math.isfinite(deadline) else now + PATIENCE_S
        start, cost, whole = tags.get("start", 0.0), tags.get("cost", 0.0), tags.get("whole", math.inf)
        self.put_back(Entry(urgency, self._arrivals, deadline, now, start, cost, whole, key, item))

    def put_back(self, entry: Entry[T]) -> None:
        """Let a frame that was taken out wait again, in its old place."""
        lane = self._lanes.get(entry.key)
        if lane is None:
            lane = self._lanes[entry.key] = _Lane()
        # Eligible a little before the virtual time reaches the tag.
        heapq.heappush(lane.early, (entry.start - BURST * entry.cost, entry.arrival, entry))

    def first(self, allowed: Callable[[TailKey], bool] | None = None) -> Entry[T] | None:
        """The frame that is next, of the tails that are allowed; None when none waits."""
        virtual = self._shares.virtual
        heads = [lane.first(virtual) for key, lane in self._lanes.items() if allowed is None or allowed(key)]
        return min(heads)[3] if heads else None

    def pop(self, key: TailKey) -> Entry[T]:
        """Take out the next frame of one tail, of which at least one waits."""
        lane = self._lanes[key]
        entry = lane.first(self._shares.virtual)[3]
        lane.pop()
        if not lane:
            del self._lanes[key]
        return entry


@dataclass(frozen=True, slots=True)
class Batch(Generic[T]):
    """Frames that go through one tail together, most urgent first."""

    key: TailKey
    items: tuple[T, ...]


class Batcher(Generic[T]):
    """Decoded frames that wait for a tail."""

    def __init__(
        self, max_batch: int, max_wait_s: float = 0.0, costs: Costs | None = None, shares: Shares | None = None
    ) -> None:
        """Make an empty one.

        Args:
            max_batch: most frames in a batch, >= 1.
            max_wait_s: the longest that a frame waits for company, where company is worth it.
            costs: what batches were measured to take.
            shares: the devices' virtual times.
        """
        self.max_batch, self.max_wait_s = max_batch, max_wait_s
        self._costs = costs or Costs()
        self._line: Line[T] = Line(shares or Shares())
        self._gaps: dict[TailKey, tuple[float, float]] = {}

    def __len__(self) -> int:
        """Frames that wait here."""
        return len(self._line)

    def waiting(self, key: TailKey) -> int:
        """Frames of one tail that wait here."""
        return self._line.waiting(key)

    def next_key(self) -> TailKey | None:
        """The tail whose frame is next; None when nothing waits."""
        entry = self._line.first()
        return entry.key if entry is not None else None

    def put(self, item: T, key: TailKey, deadline: float, now: float, **tags: Unpack[Tags]) -> None:
        """Let a decoded frame wait; see `Line.put`."""
        self._line.put(item, key, deadline, now, **tags)
        last, gap = self._gaps.get(key, (-math.inf, math.inf))
        since = now - last
        gap = gap + GAPS * (min(since, 10 * gap) - gap) if math.isfinite(gap) else since
        self._gaps[key] = (now, gap)

    def ready_at(self, now: float) -> float | None:
        """When the next batch may begin: None when nothing waits, `now` when it may begin at once.

        A batch that is not full waits for one more frame as long as that saves more of the tail's time than the
        waiting costs: with frames of this tail every `gap` seconds, n of them waiting, if
        gap < t(n) + t(1) - t(n + 1). So nothing waits at low load, nor where batches save nothing.
        """
        entry = self._line.first()
        if entry is None:
            return None
        n = self._line.waiting(entry.key)
        if self.max_wait_s <= 0 or n >= self.max_batch:
            return now
        batch_s = self._costs.batch_s
        saved = batch_s(entry.key, n, now) + batch_s(entry.key, 1, now) - batch_s(entry.key, n + 1, now)
        last, gap = self._gaps[entry.key]
        if gap >= saved or now - last > saved:
            return now
        begin = min(entry.since + self.max_wait_s, last + saved)
        # Company is not worth a deadline.
        latest = entry.deadline - 2 * batch_s(entry.key, n + 1, now)
        return max(now, min(begin, latest))

    def take(self, now: float) -> tuple[Batch[T] | None, tuple[T, ...]]:
        """Form the next batch.

        The frame that is next decides which tail is; frames of the same tail fill the batch in their order, as long as
        every frame in it stays in time by what batches of that size take.

        Returns:
            The batch (None when nothing is left), and the frames that cannot be in time any more.
        """
        expired: list[T] = []
        while (first := self._line.first()) is not None:
            if taken := self._fill(first.key, now, expired):
                return Batch(first.key, tuple(taken)), tuple(expired)
        return None, tuple(expired)

    def _fill(self, key: TailKey, now: float, expired: list[T]) -> list[T]:
        """Frames of one tail for a batch; those that are too late even alone go to `expired`."""
        taken: list[T] = []
        earliest = limit = math.inf
        alone = self._costs.batch_s(key, 1, now)
        cycles = self._costs.plan(key, self.max_batch, now).full
        while len(taken) < self.max_batch and self._line.waiting(key):
            beyond = taken and not self._line.due(key)
            entry = self._line.pop(key)
            left = entry.deadline - now
            if math.isfinite(left) and (taken or self._line.waiting(key)):
                left -= SPARE * entry.whole if math.isfinite(entry.whole) else 0.0
            if left <= 0 or left < alone:
                expired.append(entry.item)
                continue
            if beyond and cycles[len(taken)] > fill_limit_s(entry.whole):
                self._line.put_back(entry)
                break
            limit = min(limit, batch_limit_s(entry.whole))
            if not taken and math.isfinite(limit):
                full, _ = self._costs.fitting(key, self.max_batch, limit, now)
                if self._line.due(key) >= full and left < self._costs.batch_s(key, full, now, LIKELY):
                    # It would make the batch smaller, and enough others are due ("early drop" of Shen et al., "Nexus: A
                    # GPU Cluster Engine for Accelerating DNN-Based Video Analysis", SOSP 2019). Without this a queue
                    # that has once become old stays so, in small batches. It never makes room for a greedy device.
                    expired.append(entry.item)
                    continue
            costs, size = self._costs, len(taken) + 1
            if taken and (min(earliest, left) < costs.batch_s(key, size, now) or limit < cycles[size - 1]):
                self._line.put_back(entry)
                break
            taken.append(entry.item)
            earliest = min(earliest, left)
        return taken

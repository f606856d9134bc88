"""Who may come in, and who goes next: admission and batch forming, without I/O and without a clock of their own.

    admit ──► Admission: at most `queue_limit` frames wait
    put ────► Batcher:   earliest deadline first; frames of one tail share a batch, whatever their rate level or prefix
    take ◄── Batcher:    the next batch, and the frames whose deadline passed while they waited

A frame that cannot be in time is not computed: under overload a queue in order of arrival would make every frame late,
this one keeps answering those that can still be in time.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from .engine import TailKey
from .exceptions import DrainingError, FullError

T = TypeVar("T")

PATIENCE_S = 1.0
"""A frame without a deadline is ordered as if it had this one, so that it neither jumps the queue nor starves."""


def deadline_at(received: float, remaining_ms: int) -> float:
    """When a frame's deadline passes, in seconds of the server's clock; infinity when it has none (0)."""
    return received + remaining_ms / 1e3 if remaining_ms else math.inf


class Admission:
    """Counts the frames that were admitted.

    Attributes:
        limit: most frames that wait.
        waiting: admitted, and neither in a batch nor given up.
        open: admitted and not answered.
        draining: no more frames are admitted.
    """

    def __init__(self, limit: int) -> None:
        """`limit` >= 1."""
        self.limit = limit
        self.waiting = 0
        self.open = 0
        self.draining = False

    def admit(self) -> Place:
        """Let one frame in.

        Raises:
            DrainingError: the server is about to stop.
            FullError: `limit` frames wait already.
        """
        if self.draining:
            raise DrainingError("the server is draining; connect to another one, or again in a moment")
        if self.waiting >= self.limit:
            raise FullError(f"{self.waiting} frames wait on the server, which is its limit; send less, or later")
        return Place(self)


class Place:
    """An admitted frame's place: `begin` when its batch begins, `leave` when it is answered or given up."""

    def __init__(self, admission: Admission) -> None:
        """Take a place; made by `Admission.admit`."""
        self._admission = admission
        self._waits = True
        admission.waiting += 1
        admission.open += 1

    def begin(self) -> None:
        """The frame waits no longer. May be said twice."""
        if self._waits:
            self._waits = False
            self._admission.waiting -= 1

    def leave(self) -> None:
        """The frame is answered or given up."""
        self.begin()
        self._admission.open -= 1


@dataclass(frozen=True, slots=True)
class Batch(Generic[T]):
    """Frames that go through one tail together, earliest deadline first."""

    key: TailKey
    items: tuple[T, ...]


class _Entry(NamedTuple, Generic[T]):
    """A frame in the heap; the first two fields order it."""

    urgency: float
    arrival: int
    deadline: float
    since: float
    key: TailKey
    item: T


class Batcher(Generic[T]):
    """Decoded frames that wait for a tail."""

    def __init__(self, max_batch: int, max_wait_s: float = 0.0) -> None:
        """Make an empty one.

        Args:
            max_batch: most frames in a batch, >= 1.
            max_wait_s: how long a batch that is not full waits for more, counted from its oldest frame.
        """
        self.max_batch, self.max_wait_s = max_batch, max_wait_s
        self._heap: list[_Entry[T]] = []
        self._count = 0

    def __len__(self) -> int:
        """Frames that wait here."""
        return len(self._heap)

    def put(self, item: T, key: TailKey, deadline: float, now: float) -> None:
        """Let a decoded frame wait.

        Args:
            item: what `take` gives back.
            key: names the tail; frames of one key share a batch.
            deadline: see `deadline_at`.
            now: seconds.
        """
        self._count += 1  # breaks ties in order of arrival, and keeps heapq from comparing items
        urgency = deadline if math.isfinite(deadline) else now + PATIENCE_S
        heapq.heappush(self._heap, _Entry(urgency, self._count, deadline, now, key, item))

    def ready_at(self, now: float) -> float | None:
        """When the next batch may begin: None when nothing waits, `now` when it may begin at once."""
        if not self._heap:
            return None
        if self.max_wait_s <= 0:
            return now
        first = self._heap[0]
        same = [entry for entry in self._heap if entry.key == first.key]
        if len(same) >= self.max_batch:
            return now
        begin = min(entry.since for entry in same) + self.max_wait_s
        # Company is not worth a deadline.
        return now if first.deadline <= begin else max(now, begin)

    def take(self, now: float) -> tuple[Batch[T] | None, tuple[T, ...]]:
        """Form the next batch.

        The frame with the earliest deadline decides which tail is next; the batch is filled with frames of the same
        tail in order of their deadlines.

        Returns:
            The batch (None when nothing is left), and the frames whose deadline is not after `now`.
        """
        expired: list[T] = []
        taken: list[T] = []
        others = []
        chosen: TailKey | None = None
        while self._heap and len(taken) < self.max_batch:
            entry = heapq.heappop(self._heap)
            if entry.deadline <= now:
                expired.append(entry.item)
            elif not taken or entry.key == chosen:
                chosen = entry.key
                taken.append(entry.item)
            else:
                others.append(entry)
        for entry in others:
            heapq.heappush(self._heap, entry)
        return (Batch(chosen, tuple(taken)) if chosen else None), tuple(expired)

"""A server in virtual time: the real admission, shares, batcher and measured costs; only the seconds are simulated.

    arrive ─► Admission.admit ─► Batcher.put ─► [ core: a batch at a time ] ─► done

Around them is what `server/pipeline.py` and `dispatch.py` do around them with an event loop and threads. The server has
one core, on which decoding and serving take their time too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ...server.admission import Admission, Limits, Place
from ...server.batcher import Batcher, batch_limit_s
from ...server.costs import LIKELY, Costs
from ...server.engine import TailKey
from ...server.exceptions import FrameError, FullError
from .model import Constants

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Waiting(Generic[T]):
    """A frame on the server."""

    frame: T
    place: Place
    key: TailKey
    arrived: float
    pushed_out: bool = False


class VirtualServer(Generic[T]):
    """One server with one core.

    Attributes:
        busy_s: seconds that the core worked.
        batches, frames: that it computed.
        refused: frames by the name of the error.
    """

    def __init__(
        self,
        constants: Constants,
        fingerprint: bytes,
        refuse: Callable[[T, float], None],
        *,
        max_batch: int = 8,
        max_wait_s: float = 0.005,
        limits: Limits = Limits(256, 64, 64 * 2**20),  # noqa: B008  frozen
    ) -> None:
        """An idle one.

        Args:
            constants: what batches take.
            fingerprint: of the bundle.
            refuse: told of a frame that is given up after it was admitted, and when.
            max_batch, max_wait_s, limits: as the server's settings.
        """
        self._constants, self._fingerprint, self._refuse = constants, fingerprint, refuse
        self.admission = Admission(limits)
        self._costs, self._max_batch = Costs(), max_batch
        self._batcher: Batcher[Waiting[T]] = Batcher(max_batch, max_wait_s, self._costs, self.admission.shares)
        for split, known in constants.batch_s.items():
            self._costs.know(self.key(split), known, 0.0)
        self._running: list[Waiting[T]] = []
        self._done_at = self._planned_at = 0.0
        self._last_done: float | None = None
        self.busy_s = 0.0
        self.batches = self.frames = 0
        self.refused: dict[str, int] = {}
        self.retry_s = 0.0
        """What the frame that was refused last was told to wait."""

    def key(self, split: str) -> TailKey:
        """Of a split point's tail."""
        return TailKey(self._fingerprint, split)

    def arrive(self, frame: T, split: str, device: str, size: int, deadline: float, now: float) -> bool:
        """A frame came; whether it is admitted."""
        key, costs = self.key(split), self._costs
        try:
            place = self.admission.admit(
                now,
                deadline,
                device=device,
                size=size,
                cost=costs.frame_s(key, now),
                alone=costs.alone_s(key, now),
                busy=max(0.0, self._planned_at - now) if self._running else 0.0,
                batch=costs.full_batch_s(key, self._max_batch, batch_limit_s(deadline - now), now),
            )
        except FrameError as error:
            self._count(error)
            return False
        waiting = Waiting(frame, place, key, now)
        place.pushed_out = lambda error: self._push_out(waiting, error)
        whole = deadline - now
        self._batcher.put(waiting, key, deadline, now, start=place.start, cost=place.cost, whole=whole)
        return True

    def next_at(self, now: float) -> float | None:
        """When something happens by itself: a batch is done, or may begin. None: nothing will."""
        return self._done_at if self._running else self._batcher.ready_at(now)

    def turn(self, now: float) -> list[Waiting[T]]:
        """Do what is due; the frames that are answered now."""
        done: list[Waiting[T]] = []
        if self._running and self._done_at <= now:
            done, self._running = self._running, []
            key, size = done[0].key, len(done)
            # As a clock on the wall sees it: on one core decoding and serving go on within a batch's time.
            self._costs.batch_done(key, size, self._seconds(key, size), now)
            self._costs.decoded(key, self._constants.decode_s[key.split], now)
            if self._last_done is not None:
                self._costs.paced(key, (now - self._last_done) / size, now)
            for each in done:
                each.place.leave()
            self._last_done = now if self.admission.waiting else None
        while not self._running:
            ready = self._batcher.ready_at(now)
            if ready is None or ready > now:
                break
            batch, expired = self._batcher.take(now)
            for each in expired:
                each.place.leave()
                if not each.pushed_out:
                    self.refused["expired"] = self.refused.get("expired", 0) + 1
                    self.retry_s = 0.0
                    self._refuse(each.frame, now)
            items = [each for each in batch.items if not each.pushed_out] if batch else []
            if items:
                self._begin(items, now)
        return done

    def _begin(self, items: list[Waiting[T]], now: float) -> None:
        key, size = items[0].key, len(items)
        for each in items:
            each.place.begin()
        seconds = self._seconds(key, size)
        self._running, self._done_at = items, now + seconds
        self._planned_at = now + self._costs.batch_s(key, size, now, LIKELY)
        self.busy_s += seconds
        self.batches += 1
        self.frames += size

    def _seconds(self, key: TailKey, size: int) -> float:
        c = self._constants
        return c.batch_of(key.split, size) + size * (c.decode_s[key.split] + c.serve_s)

    def _push_out(self, waiting: Waiting[T], error: FullError) -> None:
        waiting.pushed_out = True
        self._count(error)
        waiting.place.leave()
        self._refuse(waiting.frame, waiting.arrived)

    def _count(self, error: FrameError) -> None:
        self.retry_s = error.retry_s
        name = str(error.reason) if error.reason is not None else type(error).__name__
        self.refused[name] = self.refused.get(name, 0) + 1

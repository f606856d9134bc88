"""Who may come in: bounded queues, a fair share of them for every device, and nobody whose turn would come too late.

    admit ──► draining?            UNAVAILABLE
          ──► too late already?    DEADLINE_EXCEEDED
          ──► queue or share full? RESOURCE_EXHAUSTED, with the time after which it makes sense to try again
          ──► a Place

The queue is bounded in frames, in bytes, in frames a device, and in **time**: a frame is let in when, by what frames
cost lately, it would be answered with some of its deadline to spare. Its own device's fair share decides how long that
takes, not the length of the queue: a device that fills the queue finds it full, the others don't. When the queue is
full in frames or bytes, the device with most frames in it gives up its newest one for a device that has fewer
("longest queue drop", McKenney, "Stochastic Fairness Queueing", INFOCOM 1990).

Without I/O and without a clock of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .exceptions import DrainingError, ExpiredError, FrameError, FullError, Reason
from .shares import BURST, Shares

HEADROOM = 0.3
"""Share of a frame's deadline that has to remain, as planned, when it is answered: plans are not kept exactly, and the
result has to travel."""

BATCH_HEADROOM = 0.1
"""The same for a plan in whole batches, which is kept more exactly."""

DUE_HEADROOM = 0.04
"""The same for a frame that is its device's due: nobody is there who could use its place better, so it is refused only
where it would be given up when its batch is formed (`batcher.SPARE`)."""

FILL = 0.25
"""Of a deadline that may pass from one batch to the next where the batch holds frames beyond their device's share."""

TURNED_HEADROOM = 0.3
"""So much more of it for a device of which every frame was turned away lately. The nearer to its deadline a frame is
answered, the likelier it is late after all or given up for another, and all that it took is lost. Whoever sends more
than can be answered has a fresher one at once."""

MOSTLY = 0.25
"""Where so large a share of a device's frames is turned away, it sends more than its share or all do: none of them is
planned as its due any more, and of less the plan is in between."""

TURNED_WEIGHT = 1 / 8
"""Of a device's frame in the share of its frames that are turned away."""

TURNED_S = 1.0
"""So long a device that was turned away counts among those that compete for what is served."""

MOST_RETRY_S = 5.0
"""Longest delay that a refused device is asked for."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What may wait: frames in all and of one device, and bytes of packets in all."""

    frames: int
    device_frames: int
    bytes: int


class Admission:
    """Counts what was admitted, and says no.

    Attributes:
        limits: see `Limits`.
        shares: the devices' virtual times, which `batcher.Line` orders by.
        waiting: frames admitted, and neither in a batch nor given up.
        waiting_bytes: their packets' bytes.
        work: seconds that the waiting frames will take.
        open: frames admitted and not answered.
        draining: no more frames are admitted.
    """

    def __init__(self, limits: Limits) -> None:
        """Nobody is here."""
        self.limits = limits
        self.shares = Shares()
        self.waiting = 0
        self.waiting_bytes = 0
        self.work = 0.0
        self.open = 0
        self.draining = False
        self._waiting: dict[str, dict[Place, None]] = {}
        self._due_work = 0.0
        self._beyond: dict[str, int] = {}
        self._turned: dict[str, tuple[float, float]] = {}
        self._forget_at = 0.0

    def admit(
        self,
        now: float,
        deadline: float = math.inf,
        *,
        device: str = "",
        size: int = 0,
        cost: float = 0.0,
        alone: float = 0.0,
        busy: float = 0.0,
        batch: float = 0.0,
    ) -> Place:
        """Let one frame in.

        Args:
            now: seconds.
            deadline: see `batcher.deadline_at`.
            device: whose share it takes of.
            size: the packet's bytes.
            cost: seconds by which it puts off the frames behind it, under load.
            alone: seconds that it takes from here to its result when it need not wait.
            busy: seconds until what runs now is done.
            batch: seconds of a full batch; 0 where frames go one by one.

        Raises:
            DrainingError: the server is about to stop.
            ExpiredError: its deadline passes before it could be answered even if it were alone.
            FullError: there is no room for it, or its turn would come too late.
        """
        error = self.refusal(now, deadline, device=device, cost=cost, alone=alone, busy=busy, batch=batch)
        if error is not None:
            raise error
        return self.take(device, size, cost)

    def refusal(
        self, now: float, deadline: float, *, device: str, cost: float, alone: float, busy: float, batch: float = 0.0
    ) -> FrameError | None:
        """Why a frame would not be let in, as far as can be told without its bytes; arguments as for `admit`.

        Returned, not raised: under overload this is what most frames come to.
        """
        left = deadline - now
        if self.draining:
            return DrainingError("the server is draining; connect to another one, or again in a moment")
        if left < alone or left <= 0:
            return ExpiredError(
                f"{max(0.0, left) * 1e3:.1f} ms remain of the deadline; decoder and tail take {alone * 1e3:.1f} ms here"
            )
        if not self.waiting:
            return None
        own = self._waiting.get(device)
        due, before = self.before(device, cost)
        wait = before + busy
        if own is not None and len(own) >= self.limits.device_frames:
            return FullError(
                f"{len(own)} frames of this device wait on the server, which is its limit; send less, or later",
                retry_s=_delay(wait / 2, cost),
                reason=Reason.DEVICE_FULL,
            )
        done, headroom = wait + alone, HEADROOM
        if batch > 0:
            # Frames are answered by the batch. One that goes into the next batch waits at most for that one's end; for
            # one that does not, whole batches go first, and its own will be full by then. Unless it is its device's
            # due, and that device is not turned away: see below, `FILL` and `MOSTLY`.
            turned = self._turned_share(device, now)
            full = int(before / batch + 1e-9) * batch  # work is a sum of costs
            own_batch = batch if full else min(batch, before + alone)
            strict = 1.0
            if due:
                # Frames of devices that are over their share fill its batch no further than `FILL`, and nobody could
                # use its place better.
                strict = min(1.0, turned / MOSTLY)
                filled = min(FILL * left, self.work - full + alone)
                own_batch += (1.0 - strict) * (min(batch, max(before - full + alone, filled)) - own_batch)
            done = busy + full + own_batch
            headroom = DUE_HEADROOM + strict * (BATCH_HEADROOM - DUE_HEADROOM) + TURNED_HEADROOM * turned
        late = done - (1.0 - headroom) * left
        if late > 0:
            return FullError(
                f"it would be answered {done * 1e3:.0f} ms from now, too near to its deadline in "
                f"{left * 1e3:.0f} ms; send less, or later",
                retry_s=_delay(max(late, self._turned_away(device, now) * cost), cost),
                reason=Reason.OVERLOAD,
            )
        return None

    def take(self, device: str, size: int, cost: float) -> Place:
        """A place for a frame that there is no `refusal` of.

        Raises:
            FullError: the queue is full, and no other device has more in it.
        """
        own = len(self._waiting.get(device, ()))
        while self.waiting >= self.limits.frames or self.waiting_bytes + size > self.limits.bytes:
            if not self._push_out(own):
                raise FullError(
                    f"{self.waiting} frames of {self.waiting_bytes} bytes wait on the server, which is its limit; "
                    "send less, or later",
                    retry_s=_delay(self.before(device, cost)[1] / 2, cost),
                    reason=Reason.QUEUE_FULL,
                )
        if (turned := self._turned.get(device)) is not None:
            self._turned[device] = (turned[0], (1 - TURNED_WEIGHT) * turned[1])
        return Place(self, device, size, cost)

    def retry_s(self) -> float:
        """Seconds until about half of what waits now is served."""
        return _delay(self.work / 2, 0.0)

    def _turned_away(self, device: str, now: float) -> int:
        """How many devices were turned away lately, this one included.

        If each comes again after so many frames' time, as much comes in all as is served; were they told when the queue
        has room again, all of them would be there then.
        """
        share = self._turned_share(device, now)
        self._turned[device] = (now, share + TURNED_WEIGHT * (1.0 - share))
        if now >= self._forget_at:
            self._turned = {d: turned for d, turned in self._turned.items() if now - turned[0] < TURNED_S}
            self._forget_at = now + TURNED_S / 4
        return len(self._turned)

    def _turned_share(self, device: str, now: float) -> float:
        """The share of a device's frames that are turned away, as a running mean; 0 after a while without any."""
        at, share = self._turned.get(device, (-math.inf, 0.0))
        return share if now - at < TURNED_S else 0.0

    def before(self, device: str, cost: float) -> tuple[bool, float]:
        """Whether a frame of the device that came now would be its due, and the seconds that others take before it.

        Either everything that waits goes first or, where its device has taken less than others, the virtual time only
        has to pass its tag; it passes one second of service in as many seconds as there are devices with frames here.
        """
        ahead = self.shares.next_start(device) - self.shares.virtual
        if ahead <= BURST * cost:
            # Due at once, as `Line` has it: before it go others that are, and about one of each device that has more.
            return True, min(self.work, self._due_work + len(self._beyond) * cost)
        return False, min(self.work, (ahead + cost) * self.shares.active_with(device) - cost)

    def _push_out(self, own: int) -> bool:
        """Take the newest frame of the device with most frames out of the queue, if it has more than `own` and one."""
        longest = max(self._waiting.values(), key=len, default=None)
        if longest is None or len(longest) <= own + 1:
            return False
        place = next(reversed(longest))
        place.push_out()
        return True

    def _enter(self, place: Place) -> None:
        self.waiting += 1
        self.waiting_bytes += place.size
        self.work += place.cost
        self.open += 1
        self._waiting.setdefault(place.device, {})[place] = None
        if place.due:
            self._due_work += place.cost
        else:
            self._beyond[place.device] = self._beyond.get(place.device, 0) + 1

    def _begin(self, place: Place) -> None:
        self.waiting -= 1
        self.waiting_bytes -= place.size
        self.work = self.work - place.cost if self.waiting else 0.0
        if place.due:
            self._due_work = self._due_work - place.cost if self.waiting else 0.0
        elif (left := self._beyond[place.device] - 1) > 0:
            self._beyond[place.device] = left
        else:
            del self._beyond[place.device]
        of_device = self._waiting[place.device]
        del of_device[place]
        if not of_device:
            del self._waiting[place.device]


class Place:
    """An admitted frame's place: `begin` when its batch begins, `leave` when it is answered or given up.

    Attributes:
        device: whose it is.
        size: bytes of the packet.
        cost: seconds that it takes under load.
        start: its start tag, see `shares`.
        due: whether it was its device's due when it came.
        pushed_out: called when it has to leave the queue for another device's frame.
    """

    __slots__ = ("_admission", "_served", "_waits", "cost", "device", "due", "pushed_out", "size", "start")

    def __init__(self, admission: Admission, device: str, size: int, cost: float) -> None:
        """Take a place; made by `Admission.admit`."""
        self.device, self.size, self.cost = device, size, cost
        self.pushed_out: Callable[[FullError], None] | None = None
        self.start = admission.shares.enter(device, cost)
        self.due = self.start - admission.shares.virtual <= BURST * cost
        self._admission = admission
        self._waits, self._served = True, False
        admission._enter(self)

    def begin(self) -> None:
        """The frame waits no longer: its batch begins. May be said twice."""
        if self._waits:
            self._waits = False
            self._served = True
            self._admission._begin(self)
            self._admission.shares.served(self.cost)

    def push_out(self) -> None:
        """The frame has to make room."""
        self._stop_waiting()
        if self.pushed_out is not None:
            self.pushed_out(
                FullError(
                    "the queue is full and this device has most frames in it; send less, or later",
                    retry_s=self._admission.retry_s(),
                    reason=Reason.PUSHED_OUT,
                )
            )

    def leave(self) -> None:
        """The frame is answered or given up."""
        self._stop_waiting()
        if not self._served:
            self._admission.shares.give_back(self.device, self.cost)
        self._admission.shares.leave(self.device)
        self._admission.open -= 1

    def _stop_waiting(self) -> None:
        if self._waits:
            self._waits = False
            self._admission._begin(self)


def _delay(seconds: float, least: float) -> float:
    return min(MOST_RETRY_S, max(seconds, least, 1e-3))

"""What is wanted of the choices, as prices: of a byte and of a second of compute, in on-time accuracy. No I/O.

    value(point) = accuracy if in time + what is left to the next frames - price x bytes - price x seconds

A constraint on an average becomes a price that follows how much of it is left (a Lagrange multiplier; the account that
sums what came in less what was spent is the integral which dual ascent takes):

- *a byte budget*: an account that fills at the budget's rate and that every packet draws from. Full, bytes are free;
  the emptier, the dearer; empty, nothing is sent. Over any time, no more is sent than the budget of that time and one
  account.
- *an accuracy floor*: an account that fills by the accuracy of every answer in time and that every captured frame
  draws the floor from. The fuller, the more what is saved (bytes, or compute) counts; empty, accuracy alone counts.
"""

from __future__ import annotations

import math
from enum import StrEnum

from ..models.exceptions import OperatingPointError

DAY_S = 86_400.0
STEEPNESS = 6.0
FLOOR_FRAMES = 20.0
"""The accuracy account holds so many right answers."""


class Objective(StrEnum):
    """What is sought."""

    ACCURACY = "accuracy"
    """The most right answers in time."""
    BYTES = "bytes"
    """The fewest bytes sent, at an on-time accuracy that is no lower than the floor."""
    COMPUTE = "compute"
    """The least compute on the device, which stands for its energy, at no lower an on-time accuracy than the floor."""


class Account:
    """Something that comes in, is spent, and can be kept up to a limit."""

    def __init__(self, capacity: float, start: float) -> None:
        self.capacity = capacity
        self.level = min(start, capacity)

    def add(self, amount: float) -> None:
        """Take in (or, if negative, spend); what does not fit is lost, and it does not go below an empty account."""
        self.level = min(max(self.level + amount, 0.0), self.capacity)

    @property
    def share(self) -> float:
        """How full it is, 0..1."""
        return self.level / self.capacity


class Prices:
    """Prices of a byte and of a second of compute, in accuracies.

    Args:
        objective: see `Objective`.
        accuracy_floor: on-time accuracy to be kept, 0..1; 0 with `Objective.ACCURACY`.
        bytes_per_day: most that is to be sent; 0: any amount.
        budget_window_s: the account of bytes holds the budget of so long, or `least_bytes` if that is more.
        least_bytes: what the smallest packet takes, framing included.
        bytes_scale: a usual packet in bytes.
        seconds_scale: a usual time of compute in seconds.

    Raises:
        OperatingPointError: the floor is no share, or missing or superfluous; or the budget is negative.
    """

    def __init__(
        self,
        objective: Objective = Objective.ACCURACY,
        *,
        accuracy_floor: float = 0.0,
        bytes_per_day: float = 0.0,
        budget_window_s: float = 600.0,
        least_bytes: float = 0.0,
        bytes_scale: float = 1000.0,
        seconds_scale: float = 0.1,
    ) -> None:
        if not 0 <= accuracy_floor < 1 or bytes_per_day < 0:
            raise OperatingPointError(
                f"an accuracy floor is at least 0 and less than 1 (got {accuracy_floor}), "
                f"bytes a day are at least 0 (got {bytes_per_day})"
            )
        if (objective is Objective.ACCURACY) != (accuracy_floor == 0):
            raise OperatingPointError(
                f"objective {objective} takes {'no' if accuracy_floor else 'an'} accuracy floor; "
                "it belongs to the objectives bytes and compute"
            )
        self.objective = objective
        self.floor = accuracy_floor
        self._byte_rate = bytes_per_day / DAY_S
        # A budget whose window holds less than a packet still pays for one now and then.
        self._bytes = Account(max(self._byte_rate * budget_window_s, least_bytes), math.inf) if bytes_per_day else None
        self._answers = Account(FLOOR_FRAMES, FLOOR_FRAMES / 2)
        self._bytes_scale, self._seconds_scale = bytes_scale, seconds_scale
        self._now: float | None = None

    @property
    def free(self) -> bool:
        """Whether nothing has a price, ever."""
        return self.objective is Objective.ACCURACY and self._bytes is None

    def captured(self, now: float, frames: int) -> None:
        """So many frames were captured since the last call."""
        if self._bytes is not None and self._now is not None:
            self._bytes.add(self._byte_rate * max(now - self._now, 0.0))
        self._now = now
        self._answers.add(-self.floor * frames)

    def answered(self, accuracy: float) -> None:
        """An answer of this accuracy came in time."""
        self._answers.add(accuracy)

    def sent(self, size_bytes: float) -> None:
        """A packet was written."""
        if self._bytes is not None:
            self._bytes.add(-size_bytes)

    @property
    def affordable_bytes(self) -> float:
        """The largest packet that may be sent now."""
        return math.inf if self._bytes is None else self._bytes.level

    @property
    def per_byte(self) -> float:
        """Accuracies that a byte costs."""
        price = 0.0
        if self._bytes is not None:
            price += _rising(1.0 - self._bytes.share)
        if self.objective is Objective.BYTES:
            price += _rising(self._answers.share)
        return price / self._bytes_scale

    @property
    def per_second(self) -> float:
        """Accuracies that a second of compute costs."""
        return _rising(self._answers.share) / self._seconds_scale if self.objective is Objective.COMPUTE else 0.0


def _rising(share: float) -> float:
    """From 0 at 0, convex: a price has to bite before the account is at its end, and hardly at its beginning."""
    return 0.05 * math.expm1(STEEPNESS * share)

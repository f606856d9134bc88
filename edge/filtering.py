"""Filtering: which frames stay on the device because the filter sees nothing of interest in them. No I/O, no clock.

A frame is `filtered` when its score is below the bundle's threshold, unless it has to be sent anyway: as a keep-alive,
when nothing has been sent for a while (the link's rate is known from what is sent), or as an audit, one of a share of
all frames, whose answers say what the filter would have missed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from random import Random

from ..protos.messages import Box

COUNTS = 0.3
"""Score from which a box says that something is there; the threshold was found with the same."""


@dataclass(frozen=True, slots=True)
class Audits:
    """Frames that were sent although the filter saw nothing in them, for whatever reason, and answered; and in how many
    of them the server did find something of interest."""

    answered: int = 0
    missed: int = 0


class Filtering:
    """Decides which frames have to be sent, and counts what the filter would have missed."""

    def __init__(
        self, classes: Collection[int], *, audit_share: float, keep_alive_s: float, rng: Random | None = None
    ) -> None:
        """What is watched.

        Args:
            classes: indexes of the classes of interest.
            audit_share: of all frames that are sent whatever their score, 0..1.
            keep_alive_s: after so many seconds without a packet the next frame is sent whatever its score.
            rng: draws the audits.
        """
        self._classes, self._audit_share, self._keep_alive_s = frozenset(classes), audit_share, keep_alive_s
        self._rng = rng or Random()
        self._sent_at = float("-inf")
        self.audits = Audits()

    def watch(self, classes: Collection[int]) -> None:
        """Another bundle's classes of interest."""
        self._classes = frozenset(classes)

    def must_send(self, now: float) -> bool:
        """Whether the frame that is taken up now is sent whatever its score."""
        return now - self._sent_at >= self._keep_alive_s or self._rng.random() < self._audit_share

    def on_written(self, now: float) -> None:
        """A packet was handed to the stream."""
        self._sent_at = now

    def on_answer(self, boxes: Collection[Box]) -> None:
        """The server answered a frame in which the filter had seen nothing."""
        found = any(box.index in self._classes and box.score >= COUNTS for box in boxes)
        self.audits = Audits(self.audits.answered + 1, self.audits.missed + found)

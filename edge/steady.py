"""The safeguard against one's own cleverness: what every point, always used, would have come to. No I/O, no clock.

On a link that jumps between two rates, a point that is in time at both can beat any adaptation, which is wrong right
after each jump. Whether a link is like that shows only in hindsight. So each point is an expert: the frames so far are
replayed for it, at the rates that were measured, on a core and a link of its own,

    core      [ max(capture, core free) ]--compute-->
    link                                 [ max(ready, link free) ]--bits / rate-->  + there and back  <= deadline?

and where the best of them has done better than the loop really did, by a margin and for long enough, it is followed
until it does worse than the loop did (following the leader, with a margin for what is only estimated).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .measurement import Floats

NOBODY = -1
MOST_MISSED = 4
"""More frames than that at once are a pause, not a core that is behind."""


class SteadyExperts:
    """Replays the frames for each point, and says which one to follow.

    Args:
        accuracy: of the points, float64 [points].
        is_local: which send nothing, bool [points].
        deadline_s, frame_interval_s: as in the control loop.
        memory: frames over which scores are averaged, exponentially.
        margin: on-time accuracy by which an expert must be better at least.
        doubt: by how much the loop's last score is raised per frame while it is not used, so that it is tried again.
    """

    LATELY, FAILS = 0.1, 0.6
    """Where the last ten frames or so came to less than this share of what the replay says, it is followed no longer: a
    device that stood still for a second makes the loop look worse than a replay that knows of no such thing."""
    HOPES = 50
    """So many of the loop's last expectations are averaged, exponentially."""
    NOISE = 0.7
    """By so many standard deviations of the mean it must be better, beside the margin."""

    def __init__(
        self,
        accuracy: Floats,
        is_local: NDArray[np.bool_],
        *,
        deadline_s: float,
        frame_interval_s: float,
        memory: int = 150,
        margin: float = 0.005,
        doubt: float = 2e-5,
    ) -> None:
        self._accuracy, self._is_local = accuracy, is_local
        self._deadline, self._interval = deadline_s, frame_interval_s
        self._memory, self._margin, self._doubt = memory, margin, doubt
        self._core = np.full(len(accuracy), -np.inf)
        self._link = np.full(len(accuracy), -np.inf)
        self._frames = 0
        self.scores = np.zeros(len(accuracy))
        """On-time accuracy that each point would have come to, float64 [points]."""
        self.loop = 0.0
        """What the loop came to, while it was used."""
        self._credit = 0.0
        self._followed = self._lately = 0.0
        self._hope, self._hopes, self._trust = 0.0, 0, 1.0
        self.leader = NOBODY
        """The point to follow, or `NOBODY`."""
        self._captured_at = -math.inf
        self._waiting: list[float] = []  # when the frames were captured that have not been replayed

    def hoped(self, accuracy: float) -> None:
        """The loop would expect this on-time accuracy of its own choice for a frame, whether or not it was followed."""
        self._hopes += 1
        self._hope += (accuracy - self._hope) / min(self._hopes, self.HOPES)

    def captured(self, captured_at: float) -> int:
        """A frame was captured. Returns how many were since the last call, with it; the core missed the others."""
        frames = 1
        if math.isfinite(self._captured_at):
            # One that is asked for again is none; frames that come faster than was said count each.
            since = captured_at - self._captured_at
            frames = max(round(since / self._interval), 1) if since > 0 else 0
            self._waiting += [self._captured_at + n * self._interval for n in range(min(frames, MOST_MISSED))]
            del self._waiting[:-MOST_MISSED]
        self._captured_at = captured_at
        return frames

    @property
    def waiting(self) -> bool:
        """Whether there are frames before the last one that have not been replayed."""
        return bool(self._waiting)

    def replay(self, seconds: Floats, bits: Floats, rate_bps: float, there_and_back_s: float) -> None:
        """Let the experts have these frames; arguments as for `frame`."""
        for captured_at in self._waiting:
            self.frame(captured_at, seconds, bits, rate_bps, there_and_back_s)
        self._waiting.clear()

    def answered(self, accuracy: float) -> None:
        """Really, an answer of this accuracy came in time."""
        self._credit += accuracy

    def frame(
        self, captured_at: float, seconds: Floats, bits: Floats, rate_bps: float, there_and_back_s: float
    ) -> None:
        """One captured frame, with what is known of it by the next capture.

        Args:
            captured_at: when.
            seconds, bits: compute and packet of each point, float64 [points].
            rate_bps: of the link then.
            there_and_back_s: round trip and server.
        """
        start = np.maximum(self._core, captured_at)
        computed = start < captured_at + self._interval  # else the core takes a newer frame
        ready = np.where(computed, start + seconds, self._core)
        due = captured_at + self._deadline
        written = computed & ~self._is_local & (self._link < due) & (ready < due)
        link = np.where(written, np.maximum(ready, self._link) + bits / max(rate_bps, 1.0), self._link)
        answer = np.where(self._is_local, ready, link + there_and_back_s)
        in_time = (written | (computed & self._is_local)) & (answer <= due)
        self._core, self._link = ready, link
        self._frames += 1
        gain = 1.0 / min(self._frames, self._memory)
        self.scores += gain * (self._accuracy * in_time - self.scores)
        if self.leader == NOBODY:
            self.loop += gain * (self._credit - self.loop)
        else:
            self._followed += gain * (self._credit - self._followed)
            self._lately += self.LATELY * (self._credit - self._lately)
            self.loop += self._doubt
        self._credit = 0.0
        self._lead()

    def _lead(self) -> None:
        if self._frames < self._memory:
            return
        if self.leader == NOBODY:
            best = int(self.scores.argmax())
            score = float(self.scores[best])
            noise = math.sqrt(max(score * (1.0 - score), 0.0) / self._memory)
            if score > self.loop + self._margin + self.NOISE * noise:
                self.leader, self._followed, self._lately = best, score, score
                self._trust = min(self.loop / max(self._hope, 1e-6), 1.0)
        elif self._followed < self.loop:
            self.leader = NOBODY
        elif self._trust * self._hope > self._followed + self._margin:
            # The link has become better: what the loop would do now is worth more, even if it falls as short of what it
            # expects as it did before.
            self.leader, self.loop = NOBODY, self._trust * self._hope
        elif self._lately < self.FAILS * self.scores[self.leader]:
            # The replay does not see what really happens. The loop gets the benefit of the doubt for a while.
            self.leader, self.loop = NOBODY, float(self.scores.max())

"""What the control loop knows of the link: its rate, the way there and back, what is under way. No I/O, no clock.

written, continued --> in flight --acknowledged--> round trip, hold time, rate
                           |                              |
                           +--> censored bound ----> scenarios of the rate --> when the link is free, what fits
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from .choice import ControlSettings
from .estimator import RateEstimator, censored_bound
from .measurement import Floats, HoldTime, InFlight, RoundTrip, Sent
from .menu import HOLD_STEPS, shuffled

SLOW, FAST = 0.1, 0.75
"""Shares of the rate's distribution by which slices that leave one by one are timed."""
SURELY_FAST = 0.1
"""A link needs no look at its distribution if this share of its rate would still do."""
USEFUL = 3.0
"""From so many times the useless rate on, a link is worth asking often."""
WAIT_FROM, WAIT_BITS, MOST_WAIT_BITS = 0.25, 12_000.0, 12_000.0
"""From this scatter of the log-rate on, a packet waits for its turn: so many bits by unit of scatter, and the most."""
WAIT_GAIN = 0.05


@dataclass(frozen=True, slots=True)
class Heard:
    """What an answer says beside its rate.

    Attributes:
        after_outage: the frame sat out an outage.
        useful: the link is well above the rate at which nothing could be sent.
    """

    after_outage: bool
    useful: bool


class LinkView:
    """See the module's docstring.

    Args:
        settings: start values and overhead.
        deadline_s: capture to answer.
        smallest_bytes: median of the smallest packet that is sent at all.
    """

    def __init__(self, settings: ControlSettings, *, deadline_s: float, smallest_bytes: float) -> None:
        self.connected = True
        self._deadline_s, self._smallest_bytes = deadline_s, smallest_bytes
        self._parts_from_s = settings.parts_from_s
        # A rate at which the smallest packet takes a whole deadline.
        self._useless_bps = 8.0 * smallest_bytes / deadline_s
        self._round_trip = RoundTrip(settings.rtt_s, settings.rtt_window_s)
        self._hold = HoldTime(settings.server_s, settings.scenarios)
        self._hold_order = shuffled(settings.scenarios, HOLD_STEPS, settings.scenarios // 4)
        self._flight = InFlight(settings.overhead_bytes)
        self._estimator = RateEstimator(
            prior_bps=settings.prior_bps, useless_bps=self._useless_bps, scenarios=settings.scenarios
        )
        self._last_bps = math.inf
        self._held_bits = 0.0
        self.wait_bits = 0.0
        """What waiting for the link's turn adds to a packet."""
        self._read_there_and_back()

    # What happens --------------------------------------------------------------------------------------------------

    def written(self, frame_id: int, size_bytes: int, now: float) -> None:
        """A packet was handed to the stream."""
        self._flight.written(frame_id, size_bytes, now)

    def continued(self, frame_id: int, size_bytes: int) -> None:
        """One more slice of it was."""
        self._flight.continued(frame_id, size_bytes)

    def on_held(self, size_bytes: int) -> None:
        """So much of a frame that leaves in parts has still to leave."""
        self._held_bits = 8.0 * size_bytes

    def acknowledged(self, frame_id: int, now: float, server_s: float) -> Heard | None:
        """A result came, of which the server held the frame for `server_s`; None if it was not in flight."""
        ack = now - max(server_s, 0.0)
        answered = self._flight.acknowledged(frame_id, ack, self._round_trip.seconds)
        if answered is None:
            return None
        sent, sample = answered
        sample = replace(sample, bits=sample.bits + self.wait_bits)
        self._last_bps = sample.rate_bps(self._estimator.resolution_s)
        self._hold.add(server_s)
        self._round_trip.add(sent.ready, ack, sent.bits, now)
        known = self._estimator.known
        could_send = not known or self._estimator.median_bps > self._useless_bps
        is_back = could_send and now - sent.ready > self._outage_after_s
        if is_back and known and sample.bits < self._useless_bps * sample.transmit_s:
            # At such a rate nothing could be sent, and a moment ago it could: the frame sat out an outage, which says
            # nothing of the rate after it. If the next one is like that too, it is the link's rate.
            self._estimator.forget()
        else:
            self._estimator.add(sample, now)
        wait = min(max(self._estimator.spread - WAIT_FROM, 0.0) * WAIT_BITS, MOST_WAIT_BITS)
        self.wait_bits += WAIT_GAIN * (wait - self.wait_bits)
        self._read_there_and_back()
        return Heard(is_back, self._estimator.median_bps > USEFUL * self._useless_bps)

    def on_round_trip(self, seconds: float, now: float) -> None:
        """A round trip of something tiny was timed."""
        self._round_trip.add_timed(seconds, now)
        self._read_there_and_back()

    def connect(self) -> None:
        """The stream is up (again)."""
        self.connected = True
        self._flight.clear()
        self._estimator.forget()

    def disconnect(self) -> None:
        """The stream is down; what was in flight is lost."""
        self.connected = False
        self._held_bits = 0.0
        self._flight.clear()

    # What is known -------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Frames that were written and are not answered."""
        return len(self._flight)

    @property
    def oldest(self) -> Sent | None:
        """The frame that has been out for longest."""
        return self._flight.oldest

    @property
    def there_and_back_s(self) -> float:
        """Round trip and server, without transmission."""
        return self._round_trip.seconds + self._hold.high_s

    @property
    def most_there_and_back_s(self) -> float:
        """The same in the slowest scenario."""
        return self._round_trip.seconds + self._hold.most_s

    def in_outage(self, now: float) -> bool:
        """Whether the stream is down, or nothing came back of a frame that was written more than a deadline ago."""
        oldest = self._flight.oldest
        return not self.connected or (oldest is not None and now - oldest.ready > self._outage_after_s)

    def rate_bps(self, now: float) -> float:
        """Median estimate of the rate, the censored bound applied; infinite while unknown."""
        if not self._estimator.known:
            return math.inf
        return min(self._estimator.median_bps, self._bound(now))

    def measured_bps(self, now: float) -> float:
        """The rate as last measured, the censored bound applied; infinite before the first."""
        return min(self._last_bps, self._bound(now))

    def scenarios(self, now: float) -> Floats:
        """Equally likely rates in bits a second, ascending, float64 [scenarios]."""
        return self._estimator.scenarios(now, self._bound(now))

    @property
    def surprises(self) -> Floats:
        """How far from what is expected the rate may be; see `RateEstimator.surprises`."""
        return self._estimator.surprises

    def free(self, per_bit: Floats) -> Floats:
        """When the link will have sent what is in flight, by scenario; `per_bit` in seconds."""
        free = np.full(len(per_bit), self._flight.begun(self._round_trip.seconds))
        for frame in self._flight.frames:
            np.maximum(free, frame.ready, out=free)
            free += (frame.bits + self.wait_bits) * per_bit
        return free

    def free_for(self, now: float, captured_at: float, per_bit: Floats) -> Floats:
        """`free`, float64 [scenarios], for a frame captured then, which waits for one that leaves in parts, too."""
        free = self.free(per_bit)
        if (held := self.held(now, captured_at)) > 0:
            free = np.maximum(free, now) + held * per_bit
        return free

    def may_answer(self, now: float, size_bytes: int, due: float) -> bool:
        """Whether a packet of so many bytes with overhead, written now, is answered by `due` if the link is fast."""
        # Mostly it is even if the link is slow, which is told without the scenarios.
        if self.sent_if_slow(now, now, 8.0 * size_bytes) + self.there_and_back_s <= due:
            return True
        return self.answer_if_fast(now, size_bytes) <= due

    def answer_if_fast(self, now: float, size_bytes: int) -> float:
        """When a packet written now is answered at about the best rate that may be hoped for."""
        per_bit = 1.0 / self.scenarios(now)[-2:-1]
        bits = 8.0 * size_bytes + self.wait_bits
        finish = max(now, float(self.free(per_bit)[0])) + bits * float(per_bit[0])
        return finish + self.there_and_back_s

    def sent_if_slow(self, now: float, ready: float, bits: float) -> float:
        """When the link has sent so much that is ready at `ready`, in the slowest scenario or before; infinite while
        nothing is known of the link, or a frame that leaves in parts is under way."""
        rate = self._estimator.slowest_bps(now, self._bound(now))
        if rate <= 0.0 or self._held_bits:
            return math.inf
        free = self._flight.begun(self._round_trip.seconds)
        for frame in self._flight.frames:
            free = max(free, frame.ready) + (frame.bits + self.wait_bits) / rate
        return max(ready, free) + (bits + self.wait_bits) / rate

    def held(self, now: float, captured_at: float) -> float:
        """Bits of the frame before, which leaves in parts, that this one has to wait for; none where nothing would be
        in time behind them, since they will be given up then."""
        if self._held_bits and not self.fits(now, captured_at, round(self._held_bits / 8 + self._smallest_bytes)):
            self._held_bits = 0.0
        return self._held_bits

    # A frame that leaves in parts, so that its rest can be given up ------------------------------------------------

    def in_parts(self, now: float, size_bytes: int) -> bool:
        """Whether a packet's slices should leave one by one: a slow scenario needs long for all of them."""
        bits = 8.0 * size_bytes
        if bits < self._parts_from_s * self.rate_bps(now) * SURELY_FAST:
            return False
        return bits * self._per_bit(now, SLOW) > self._parts_from_s

    def fits(self, now: float, captured_at: float, size_bytes: int) -> bool:
        """Whether so many further bytes can be answered in time, if the link is as fast as it most likely is."""
        per_bit = self._per_bit(now, 0.5)
        finish = max(now, self._free_at(per_bit)) + (8.0 * size_bytes + self.wait_bits) * per_bit
        return self.connected and finish + self.there_and_back_s <= captured_at + self._deadline_s

    def next_part_at(self, now: float) -> float:
        """When the next slice may leave: when a fast link would have sent what is on its way. So the link is never
        idle for long, and the estimate can rise."""
        return max(now, self._free_at(self._per_bit(now, FAST)))

    def patience_s(self, now: float, captured_at: float, size_bytes: int) -> float:
        """How long the server may wait for the rest of a frame whose first `size_bytes` are written now."""
        arrives = now + (8.0 * size_bytes + self.wait_bits) * self._per_bit(now, FAST)
        return captured_at + self._deadline_s - arrives - self.there_and_back_s

    # ---------------------------------------------------------------------------------------------------------------

    def _read_there_and_back(self) -> None:
        held: Floats = self._hold.scenarios[self._hold_order]
        self.there_and_back_scenarios: Floats = held + self._round_trip.seconds
        """`there_and_back_s` by scenario, in an order that has nothing to do with the rates', float64 [scenarios]."""

    @property
    def _outage_after_s(self) -> float:
        return self._deadline_s + self._round_trip.seconds

    def _bound(self, now: float) -> float:
        oldest = self._flight.oldest
        if oldest is None:
            return math.inf
        round_trip = self._round_trip.seconds
        return censored_bound(
            oldest.bits + self.wait_bits, now - round_trip - self._hold.high_s - self._flight.begun(round_trip)
        )

    def _per_bit(self, now: float, share: float) -> float:
        """Seconds a bit at the rate that the link exceeds with probability 1 - share."""
        rates = self.scenarios(now)
        return 1.0 / float(rates[min(int(share * len(rates)), len(rates) - 1)])

    def _free_at(self, per_bit: float) -> float:
        return float(self.free(np.array([per_bit]))[0])

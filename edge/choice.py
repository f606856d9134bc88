"""What the control loop is asked for and what it answers: its settings and its choices."""

from __future__ import annotations

from dataclasses import dataclass

from ..models.operating_point import OperatingPoint
from .objective import Objective


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """What can be tuned. The defaults are meant to be left alone.

    Attributes:
        rtt_s: round trip before the first measurement.
        server_s: server hold time before the first measurement.
        prior_bps: median of the link's rate before anything is known.
        overhead_bytes: what the stream adds to each packet (framing), counted in rates and in predictions.
        rtt_window_s: window of the minimum round trip.
        size_z: the lookahead counts packet sizes at this many standard deviations above their median.
        discount: what the next frame's on-time accuracy counts beside this one's, 0..1 (and so on for those after it).
        max_in_flight: most frames without a result; 0: as many as fit into a deadline, and one more.
        probe_interval_s, probe_interval_max_s: while frames are answered locally because the link looks too slow, a
            small probe goes out after the first, then at doubling intervals up to the second. A frame that is in
            flight serves as the probe, until it has been out for longer than the second.
        scenarios: how many rates, sizes and compute times a choice is weighed over.
        parts_from_s: a packet that a slow scenario needs longer for leaves slice by slice.
        objective: what is sought; see `Objective`.
        accuracy_floor: on-time accuracy that is kept while bytes or compute are saved, 0..1.
        bytes_per_day: most that is sent; 0: any amount.
        budget_window_s: so much of that budget can be saved up.
        fallback: frames that are sent may have an answer of the device in reserve.
        most_waiting: so many captured frames at most wait for the device, if they fit into a deadline, and the oldest
            is decided on first; 1: only the newest does.
    """

    rtt_s: float = 0.03
    server_s: float = 0.02
    prior_bps: float = 1e6
    overhead_bytes: int = 40
    rtt_window_s: float = 60.0
    size_z: float = 0.8
    discount: float = 0.9
    max_in_flight: int = 0
    probe_interval_s: float = 1.0
    probe_interval_max_s: float = 5.0
    scenarios: int = 16
    parts_from_s: float = 0.04
    objective: Objective = Objective.ACCURACY
    accuracy_floor: float = 0.0
    bytes_per_day: float = 0.0
    budget_window_s: float = 600.0
    fallback: bool = True
    most_waiting: int = 4


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do with a frame.

    Attributes:
        point: the operating point.
        p_on_time: probability that an answer is in time, the one in reserve included, 0..1. At 0 (and not a probe)
            computing is in vain: drop it.
        expected_latency_s: capture to answer in the middle scenario; infinite where none is expected.
        rate_bps: median estimate of the link's rate; infinite while unknown.
        probe: sent to learn whether the link is back, not for its answer: write it even if it would be late.
        reserve: the local point whose answer the device keeps in reserve, in case the server's is late.
        skip: the frame is worth less than what the device would then have no time for: drop it, and take up the next.
    """

    point: OperatingPoint
    p_on_time: float
    expected_latency_s: float
    rate_bps: float
    probe: bool = False
    reserve: OperatingPoint | None = None
    skip: bool = False

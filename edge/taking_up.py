"""What is done with a frame that the device takes up: sent as the control loop wants, answered here, or dropped. Pure.

the loop's choice --- can be sent ---------------------------> its point
                  \\-- else: a local point that is in time --> that
                   \\- else -------------------------------> dropped, with the reason
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..models.operating_point import Kind, OperatingPoint
from .interfaces import Chosen, Limits
from .ledger import BUDGET, BUSY, FULL, OUTAGE, STALE
from .on_device import OnDevice


class Decision(NamedTuple):
    """What to do with a frame.

    Attributes:
        point: what to compute; None for nothing.
        reason: why it is dropped; "" with no point: it waits.
    """

    point: OperatingPoint | None
    reason: str = ""


def decide(
    choice: Chosen,
    own: OnDevice,
    limits: Limits,
    left_s: float,
    *,
    connected: bool,
    room: bool,
    outage: bool,
    held: bool = False,
    spent: bool = False,
) -> Decision:
    """See the module's docstring.

    Args:
        choice: the control loop's.
        own: what the device can answer by itself.
        limits: what a frame may take.
        left_s: seconds up to the frame's deadline.
        connected: there is a stream.
        room: one more frame may be unanswered.
        outage: nothing comes back at the moment.
        held: the server is full, and has asked to wait for longer than it takes to make a packet.
        spent: the budget of bytes holds no packet.
    """
    remote = choice.point.kind is not Kind.LOCAL and connected and not held
    if remote and room and (choice.p_on_time > 0 or choice.probe or limits.lossless):
        return Decision(choice.point)
    if remote and limits.lossless:
        return Decision(None)
    # What waited too long for a local answer makes room for a fresh frame, if that would be answered in time. And where
    # no local answer ever is, the device stays free for the moment at which the link carries something again.
    local_helps = own.quickest_s <= limits.deadline_s
    link_may_help = connected and (held or choice.p_on_time <= 0)
    point = own.in_time(math.inf if limits.lossless else left_s, choice.point)
    if point is None and own and not (local_helps or link_may_help):
        point = own.late(choice.point)
    if point is not None:
        return Decision(point)
    if not connected or outage:
        return Decision(None, OUTAGE)
    if held:
        return Decision(None, FULL)
    too_late = BUDGET if spent else STALE
    return Decision(None, BUSY if remote and not room else too_late)

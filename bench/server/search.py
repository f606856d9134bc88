"""The most that a system carries: the largest offered load at which the 99th percentile is within the deadline."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from .load import Tally

ENOUGH = 0.99
"""Share of the frames that has to be answered within the deadline, which then bounds the 99th percentile.
Frames that are refused, not sent or never answered count as late."""

NEARLY = 0.9
"""From here on a load that was not carried is offered once more, and the second time counts."""

Offer = Callable[[float], Awaitable[Tally]]


@dataclass(frozen=True, slots=True)
class Capacity:
    """What was found.

    Attributes:
        fps: goodput of the best load that was carried.
        p99_s: 99th percentile of the latency at that load.
        tried: offered loads and shares in time.
    """

    fps: float
    p99_s: float
    tried: tuple[tuple[float, float], ...]


async def capacity(offer: Offer, first: float, *, steps: int = 4, growth: float = 2.0, widest: int = 12) -> Capacity:
    """Find it: by `growth` up or down from `first` until the answer lies between two loads, then halving `steps` times.

    Args:
        offer: offers a load in frames a second and counts.
        first: where to begin, frames a second.
        steps: bisections.
        growth: > 1.
        widest: most steps of the first part.
    """
    tried: list[tuple[float, float]] = []
    best: Tally | None = None
    low, high, load = 0.0, 0.0, first

    async def carried(load: float) -> bool:
        nonlocal best
        tally = await offer(load)
        tried.append((load, tally.share))
        if NEARLY <= tally.share < ENOUGH:  # a machine that stood still for a moment would decide it otherwise
            tally = await offer(load)
            tried.append((load, tally.share))
        good = tally.share >= ENOUGH
        if good and (best is None or tally.goodput > best.goodput):
            best = tally
        return good

    for _ in range(widest):
        if await carried(load):
            low = load
        else:
            high = load
        if low and high:
            break
        load = load * growth if low else load / growth
    for _ in range(steps if low and high else 0):
        middle = (low + high) / 2
        if await carried(middle):
            low = middle
        else:
            high = middle
    return Capacity(best.goodput if best else 0.0, best.p(99) if best else float("nan"), tuple(tried))

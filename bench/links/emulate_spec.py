"""`headrace emulate`: a link's description from a user's flags."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ...models.exceptions import DataError
from .schedule import RateSchedule, parse_phases
from .spec import DEFAULT_QUEUE_BYTES, Capacity, LinkSpec
from .traces import Format, read_trace


@dataclass(frozen=True, slots=True)
class LinkFlags:
    """What a user may say of a link.

    Attributes:
        trace: recorded link, replayed both ways.
        up_trace, down_trace: recorded link of one way.
        up_mbps, down_mbps: constant rate of one way, Mbit/s; None: not given.
        phases: steps up, "8:10,0:4,2:10" for 8 Mbit/s for 10 s, an outage of 4 s, then 2; "": none.
        trace_format: of all traces; "": mahimahi for one number a line, seconds-mbit for two.
        delay_ms, jitter_ms, loss, queue_bytes, seed: see `LinkSpec`.
    """

    trace: Path | None = None
    up_trace: Path | None = None
    down_trace: Path | None = None
    up_mbps: float | None = None
    down_mbps: float | None = None
    phases: str = ""
    trace_format: str = ""
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    queue_bytes: int = DEFAULT_QUEUE_BYTES
    seed: int = 0

    def spec(self) -> LinkSpec:
        """The link that they describe.

        Raises:
            DataError: two flags describe the same way, a file cannot be read, or a value is out of range.
        """
        up = self._one_of(
            "up",
            {"--trace": self.trace, "--up-trace": self.up_trace, "--up-mbps": self.up_mbps, "--phases": self.phases},
        )
        down = self._one_of(
            "down", {"--trace": self.trace, "--down-trace": self.down_trace, "--down-mbps": self.down_mbps}
        )
        return LinkSpec(
            up=math.inf if up is None else up,
            down=down,
            delay_s=self.delay_ms / 1000,
            jitter_s=self.jitter_ms / 1000,
            loss=self.loss,
            queue_bytes=self.queue_bytes,
            seed=self.seed,
        )

    def _one_of(self, way: str, flags: dict[str, Path | float | str | None]) -> Capacity | None:
        given = {name: value for name, value in flags.items() if value is not None and value != ""}
        if len(given) > 1:
            raise DataError(f"{' and '.join(given)} both describe the way {way}; give one of them")
        for value in given.values():
            if isinstance(value, Path):
                return read_trace(value, self._format())
            if isinstance(value, str):
                return _steps(value)
            return value * 1e6 if value is not None else None
        return None

    def _format(self) -> Format | None:
        known: tuple[Format, ...] = get_args(Format)
        if not self.trace_format:
            return None
        for form in known:
            if form == self.trace_format:
                return form
        raise DataError(f"there is no trace format {self.trace_format!r}; choose {', '.join(known)}")


def _steps(text: str) -> RateSchedule:
    try:
        return RateSchedule.of_phases(parse_phases(text))
    except ValueError as error:
        raise DataError(f"--phases: {error}") from error

"""An engine whose tails compute nothing, to measure what serving itself costs."""

from __future__ import annotations

from collections.abc import Sequence

from ...protos.messages import Label, TailOutput
from ...server.engine import Engine, EngineResult, TailInput, TailKey

OUTPUT = (TailOutput("classification", (Label(0, 0.0),)),)


class NullEngine(Engine):
    """Answers at once, in the event loop."""

    async def start(self) -> None:
        """There is nothing to load."""

    async def run(self, key: TailKey, inputs: Sequence[TailInput]) -> EngineResult:  # noqa: ARG002
        """A constant for each input."""
        return EngineResult([OUTPUT] * len(inputs), 0.0)

    async def close(self) -> None:
        """There is nothing to let go."""

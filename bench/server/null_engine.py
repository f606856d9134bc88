"""An engine whose tails compute nothing, to measure what serving itself costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...models.bundle import Bundle
from ...protos.messages import Label, TailOutput
from ...server.engine import BatchSeconds, Engine, EngineResult, TailInput, TailKey

OUTPUT = (TailOutput("classification", (Label(0, 0.0),)),)


class NullEngine(Engine):
    """Answers at once, in the event loop, without decoding."""

    decodes = True

    async def start(self) -> None:
        """There is nothing to load."""

    async def load(self, bundle: Bundle) -> Mapping[TailKey, BatchSeconds]:
        """There are no tails; batches take no time."""
        return {TailKey(bundle.fingerprint, spec.name): {1: 1e-6} for spec in bundle.splits}

    async def unload(self, fingerprint: bytes) -> None:
        """Nothing was loaded."""

    async def run(self, key: TailKey, inputs: Sequence[TailInput]) -> EngineResult:  # noqa: ARG002
        """A constant for each input."""
        return EngineResult([OUTPUT] * len(inputs), 0.0)

    async def close(self) -> None:
        """There is nothing to let go."""

"""The bundles that are served, several and several versions of one side by side, and their coming and going.

load ────► verified by digest ──► tails loaded and warm ──► streams are taken     others answer meanwhile
retire ──► no new streams ──► linger ──► streams end once their frames are answered ──► unloaded
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined]

from ..models.bundle import Bundle, short
from ..protos import messages
from .decoder import PacketDecoder
from .engine import Engine
from .exceptions import StartError
from .pipeline import Pipeline

log = structlog.get_logger(__name__)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Served:
    """One bundle that is served.

    Attributes:
        bundle, decoder: what packets are decoded by.
        stop: set when streams shall end once their frames are answered.
    """

    def __init__(self, bundle: Bundle, decoder: PacketDecoder) -> None:
        """Nobody uses it yet."""
        self.bundle, self.decoder = bundle, decoder
        self.stop = asyncio.Event()
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    @contextmanager
    def used(self) -> Iterator[None]:
        """While a stream or call uses it, it is not unloaded."""
        self._users += 1
        self._unused.clear()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._unused.set()

    async def unused(self) -> None:
        """Wait until nobody uses it."""
        await self._unused.wait()


class Bundles:
    """What is served, by fingerprint."""

    def __init__(
        self,
        engine: Engine,
        pipeline: Pipeline,
        health: health_aio.HealthServicer,
        *,
        linger_s: float,
        max_elements: int,
    ) -> None:
        """Nothing is served.

        Args:
            engine: holds the tails.
            pipeline: learns what they cost.
            health: is told which bundles are served, by name and by fingerprint.
            linger_s: how long the streams of a retired bundle may go on.
            max_elements: most numbers that one packet may decode to.
        """
        self._engine, self._pipeline, self._health = engine, pipeline, health
        self._linger_s, self._max_elements = linger_s, max_elements
        self._served: dict[bytes, Served] = {}
        self._retiring: dict[Served, asyncio.Task[None]] = {}
        self._changing = asyncio.Lock()
        """Held from what the engine holds to what is served: a bundle that comes back is not unloaded meanwhile."""

    def __iter__(self) -> Iterator[Served]:
        """Those that take streams, the oldest first."""
        return iter(self._served.values())

    def find(self, fingerprint: bytes) -> Served | None:
        """The bundle of that fingerprint, if it takes streams."""
        return self._served.get(fingerprint)

    @property
    def default(self) -> Served | None:
        """The one that GetBundle gives to a device that asks for none: the oldest."""
        return next(iter(self._served.values()), None)

    async def load(self, folder: Path) -> Served:
        """Serve the bundle in a folder; one of the same fingerprint is replaced where it stands.

        Raises:
            HeadraceError: it cannot be read, is damaged, or its backbone is missing. What was served is served on.
        """
        bundle = await asyncio.to_thread(Bundle.load, folder)
        self._check_size(bundle)
        decoder = PacketDecoder(bundle)
        await asyncio.to_thread(decoder.warm_up)
        async with self._changing:
            self._pipeline.know(await self._engine.load(bundle))
            served = self._served.get(bundle.fingerprint)
            if served is None:
                # A retired one that lingers keeps its streams; its tails are the same.
                served = self._served[bundle.fingerprint] = Served(bundle, decoder)
            else:  # measured anew, or with another repair
                served.bundle, served.decoder = bundle, decoder
        await self._tell_health(bundle)
        log.info("bundle loaded", bundle=bundle.name, fingerprint=short(bundle.fingerprint), folder=str(folder))
        return served

    async def retire(self, fingerprint: bytes) -> None:
        """Take no new streams for a bundle, and unload it when the present ones have ended."""
        served = self._served.pop(fingerprint, None)
        if served is None:
            return
        await self._tell_health(served.bundle)
        log.info("bundle retired", bundle=served.bundle.name, fingerprint=short(fingerprint), linger_s=self._linger_s)
        self._retiring[served] = asyncio.create_task(self._unload(served))

    def stop(self) -> None:
        """End all streams once their frames are answered."""
        for served in (*self._served.values(), *self._retiring):
            served.stop.set()

    async def retired(self) -> None:
        """Wait until every retired bundle is unloaded."""
        while self._retiring:
            await asyncio.wait(set(self._retiring.values()))

    async def close(self) -> None:
        """Wait for nothing any more."""
        for task in list(self._retiring.values()):
            task.cancel()
        await asyncio.gather(*self._retiring.values(), return_exceptions=True)

    async def _unload(self, served: Served) -> None:
        try:
            try:
                async with asyncio.timeout(self._linger_s):
                    await served.unused()
            except TimeoutError:
                served.stop.set()
                await served.unused()
            fingerprint = served.bundle.fingerprint
            async with self._changing:
                others = (s for s in (*self, *self._retiring) if s is not served)
                if all(s.bundle.fingerprint != fingerprint for s in others):  # it may have come back meanwhile
                    await self._engine.unload(fingerprint)
                    self._pipeline.forget(fingerprint)
            log.info("bundle unloaded", bundle=served.bundle.name, fingerprint=short(fingerprint))
        finally:
            del self._retiring[served]

    async def _tell_health(self, bundle: Bundle) -> None:
        names = {s.bundle.name for s in self}
        served = self.find(bundle.fingerprint) is not None
        await self._health.set(health_name(bundle.name), _SERVING if bundle.name in names else _NOT_SERVING)
        await self._health.set(health_name(bundle.fingerprint.hex()), _SERVING if served else _NOT_SERVING)

    def _check_size(self, bundle: Bundle) -> None:
        """Raise StartError when a packet of the bundle would decode to more than is allowed."""
        sizes = {s.name: s.latent_channels * s.features[1] * s.features[2] for s in bundle.splits}
        sizes["a picture"] = 3 * bundle.preprocessing.size**2
        for name, size in sizes.items():
            if size > self._max_elements:
                raise StartError(
                    f"a packet of {bundle.name} decodes to {size} numbers ({name}), the limit is "
                    f"{self._max_elements}; raise --max-elements if that is meant"
                )


def health_name(part: str) -> str:
    """The name of a bundle (by its name or its fingerprint in hex) at `grpc.health.v1`."""
    return f"{messages.SERVICE}/{part}"

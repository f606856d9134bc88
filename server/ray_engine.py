"""The engine on Ray Serve: replicas of the tails in processes of their own, on this machine or on a cluster.

    front end: streams, admission, batches ──► Ray Serve ──► replica: decode, tail     as many as load needs

A batch whose replica dies is given to another one: answering twice does no harm, so no admitted frame is lost.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import structlog

from ..models.bundle import Bundle
from ..models.extras import how_to_install
from ..protos import messages
from ..protos.messages import Status
from .engine import BatchSeconds, Engine, EngineResult, Outputs, PacketInput, Runtime, TailInput, TailKey
from .exceptions import FrameError, InferenceError, InvalidError, StartError

log = structlog.get_logger(__name__)

APPLICATION = "headrace-" + socket.gethostname()
"""Each front end has replicas of its own: it may serve other bundles than the next one."""
ATTEMPTS = 5
"""How often a batch is given to a replica before its frames are given up."""
PER_REPLICA = 2
"""Batches that a replica takes at a time: one in its tail, one being decoded."""
PAUSE_S = 0.2
"""Before a batch is given to the next replica, times the attempt."""


@dataclass(frozen=True, slots=True)
class RaySettings:
    """Of the Ray engine; see `ServerSettings` for what each one means."""

    address: str
    min_replicas: int
    max_replicas: int
    cpus: float
    device: str
    runtime: Runtime
    threads: int
    max_batch: int
    decode_threads: int
    max_packet_bytes: int


class RayEngine(Engine):
    """Gives batches of packets to replicas."""

    decodes = True

    def __init__(self, settings: RaySettings) -> None:
        """Nothing is started yet."""
        self.slots = PER_REPLICA * settings.max_replicas
        self._settings = settings
        self._bundles: dict[str, tuple[str, int]] = {}
        self._revision = 0
        # Ray need not be installed: it is looked for when it is asked for.
        self._ray: Any = None
        self._serve: Any = None
        self._handle: Any = None
        self._changing = asyncio.Lock()

    async def start(self) -> None:
        """Join the cluster at the address, or start Ray on this machine.

        Raises:
            StartError: Ray is not installed, or there is no cluster at the address.
        """
        # Beside the main thread: Ray would take over its signals, and SIGTERM shall drain.
        await asyncio.to_thread(self._start)

    async def load(self, bundle: Bundle) -> Mapping[TailKey, BatchSeconds]:
        """Have every replica load the bundle, one replica after the other; later replicas load it as they start."""
        if bundle.folder is None:
            raise StartError(f"bundle {bundle.name} was not loaded from a folder; save it and serve it from there")
        async with self._changing:
            self._revision += 1
            entry = (str(bundle.folder.resolve()), self._revision)
            before = dict(self._bundles)
            self._bundles[bundle.fingerprint.hex()] = entry
            try:
                await asyncio.to_thread(self._deploy)
            except Exception as error:
                self._bundles = before
                raise StartError(f"Ray's replicas cannot load bundle {bundle.name}: {error}") from error
        return {}

    async def unload(self, fingerprint: bytes) -> None:
        """Have every replica drop it."""
        async with self._changing:
            self._bundles.pop(fingerprint.hex(), None)
            if self._bundles:
                await asyncio.to_thread(self._deploy)

    async def run(self, key: TailKey, inputs: Sequence[TailInput]) -> EngineResult:
        """Give the packets to a replica; to another one when that dies."""
        failures = importlib.import_module("ray.exceptions")
        packets = [cast(PacketInput, each).packet for each in inputs]
        began = time.perf_counter()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                done = await self._handle.run.remote(key.fingerprint, key.split, packets)
                break
            except failures.RayTaskError:  # the replica lives, and says what is wrong
                raise
            except failures.RayError as error:
                log.warning("a replica is gone; its batch goes to another", attempt=attempt, error=repr(error)[:200])
                if attempt == ATTEMPTS:
                    raise
                await asyncio.sleep(PAUSE_S * attempt)
        return EngineResult([_read(data) for data in done], time.perf_counter() - began)

    async def close(self) -> None:
        """Take the application away, and end Ray where it was started here."""
        await asyncio.to_thread(self._close)

    def _start(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Where Ray is started here: it would give replicas the priority of work in the background.
        os.environ.setdefault("RAY_worker_niceness", "0")
        try:
            self._ray, self._serve = importlib.import_module("ray"), importlib.import_module("ray.serve")
        except ImportError as error:
            raise StartError(f"--engine ray needs Ray; {how_to_install('ray')}") from error
        s = self._settings
        mine: dict[str, Any] = {"namespace": APPLICATION, "log_to_driver": False, "logging_level": "error"}
        local = {} if s.address else {"num_cpus": max(1, int(s.max_replicas * s.cpus + 1)), "include_dashboard": False}
        try:
            self._ray.init(s.address or "local", **mine, **local)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise StartError(f"there is no Ray cluster at {s.address}: {error}; see --ray-address") from error
        self._serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})

    def _deploy(self) -> None:
        from .ray_replica import TailReplica

        s = self._settings
        scaling: dict[str, Any] = {"num_replicas": s.max_replicas}
        if s.min_replicas < s.max_replicas:
            scaling = {
                "autoscaling_config": {
                    "min_replicas": s.min_replicas,
                    "max_replicas": s.max_replicas,
                    "target_ongoing_requests": 1.5,
                    "upscale_delay_s": 5,
                    "downscale_delay_s": 120,
                }
            }
        deployment = self._serve.deployment(TailReplica).options(
            name="tail",
            max_ongoing_requests=PER_REPLICA,
            ray_actor_options={"num_cpus": s.cpus, "num_gpus": 1 if s.device == "cuda" else 0},
            user_config={"bundles": {name: list(entry) for name, entry in self._bundles.items()}},
            health_check_period_s=2,
            graceful_shutdown_timeout_s=20,
            **scaling,
        )
        application = deployment.bind(s.device, s.runtime, s.threads, s.max_batch, s.decode_threads, s.max_packet_bytes)
        self._serve.run(application, name=APPLICATION, route_prefix=None)
        self._handle = self._serve.get_deployment_handle("tail", APPLICATION)

    def _close(self) -> None:
        if self._ray is not None and self._ray.is_initialized():
            self._serve.delete(APPLICATION, _blocking=True)
            self._ray.shutdown()


def _read(data: bytes) -> Outputs | FrameError:
    result = messages.result_of(data)
    if result.status is Status.OK:
        return result.outputs
    return (InvalidError if result.status is Status.INVALID else InferenceError)(result.message)

"""Engine: where tails run. The pipeline knows this interface; `LocalEngine` runs them in one thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from ..protos.messages import TailOutput


@dataclass(frozen=True, slots=True)
class TailKey:
    """Names a tail: the bundle's fingerprint and the split point, "" for the uncut model."""

    fingerprint: bytes
    split: str = ""


@dataclass(frozen=True, slots=True)
class FeatureInput:
    """One frame for a decoder: symbols int32 [K, H, W] and the rate level's gain float32 [K]."""

    symbols: npt.NDArray[np.int32]
    gain: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ImageInput:
    """One frame for the uncut model: pixels uint8 [S, S, 3]."""

    pixels: npt.NDArray[np.uint8]


TailInput: TypeAlias = FeatureInput | ImageInput


class Tail(Protocol):
    """What answers a batch; all inputs are of the kind that the tail takes."""

    def __call__(self, inputs: Sequence[TailInput], /) -> list[tuple[TailOutput, ...]]:
        """One tuple of outputs an input, in order."""
        ...

    def warm_up(self) -> None:
        """Run one batch, so that the first frame finds everything allocated."""
        ...


@dataclass(frozen=True, slots=True)
class EngineResult:
    """What a batch gave: outputs in the order of the inputs, and the seconds that the tail took."""

    outputs: list[tuple[TailOutput, ...]]
    seconds: float


class Decoded(Protocol):
    """A frame that can go to its tail."""

    @property
    def key(self) -> TailKey:
        """Of the tail that takes it."""
        ...

    @property
    def input(self) -> TailInput:
        """What that tail takes."""
        ...


D = TypeVar("D", bound=Decoded)
R = TypeVar("R")


class Engine(ABC):
    """Runs batches. One batch at a time is asked for; the next one forms meanwhile."""

    decodes_alone = False
    """Whether `run_alone` saves something over decoding elsewhere and `run`."""

    @abstractmethod
    async def start(self) -> None:
        """Load and warm up every tail.

        Raises:
            HeadraceError: weights or the device are missing.
        """

    @abstractmethod
    async def run(self, key: TailKey, inputs: Sequence[TailInput]) -> EngineResult:
        """Answer a batch of at least one frame, all for the tail of that key."""

    async def run_alone(self, decode: Callable[[], D]) -> tuple[D, EngineResult]:
        """Decode and answer a frame that has the server to itself; only where `decodes_alone`."""
        raise NotImplementedError

    @abstractmethod
    async def close(self) -> None:
        """Let go of what `start` took; a running batch is finished first."""


class LocalEngine(Engine):
    """All tails in one thread: PyTorch's own threads already use every core, a second caller would only compete."""

    decodes_alone = True

    def __init__(self, load: Callable[[], Mapping[TailKey, Tail]]) -> None:
        """`load` makes the tails; it is called in the engine's thread, where PyTorch's settings then hold."""
        self._load = load
        self._tails: Mapping[TailKey, Tail] = {}
        self._thread = _Thread("tail")

    async def start(self) -> None:
        """Load and warm up every tail in the engine's thread."""
        await self._thread.call(self._start)

    async def run(self, key: TailKey, inputs: Sequence[TailInput]) -> EngineResult:
        """Answer a batch in the engine's thread."""
        return await self._thread.call(lambda: self._run(key, inputs))

    async def run_alone(self, decode: Callable[[], D]) -> tuple[D, EngineResult]:
        """Decode and answer in the engine's thread: two hand-overs between threads fewer than decoding elsewhere."""
        return await self._thread.call(lambda: self._run_alone(decode))

    async def close(self) -> None:
        """End the thread."""
        await self._thread.close()

    def _start(self) -> None:
        self._tails = self._load()
        for tail in self._tails.values():
            tail.warm_up()

    def _run(self, key: TailKey, inputs: Sequence[TailInput]) -> EngineResult:
        began = time.perf_counter()
        outputs = self._tails[key](inputs)
        return EngineResult(outputs, time.perf_counter() - began)

    def _run_alone(self, decode: Callable[[], D]) -> tuple[D, EngineResult]:
        decoded = decode()
        return decoded, self._run(decoded.key, [decoded.input])


class _Thread:
    """A thread that runs one job after another for the event loop.

    Of an executor it has only what is needed here: a frame waits for both hand-overs, and with a `concurrent.futures`
    future between the threads they take half as long again.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    async def call(self, job: Callable[[], R]) -> R:
        """The job's result, or what it raised."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()

        def settle(result: R) -> None:
            if not future.done():  # else the caller went away
                future.set_result(result)

        def fail(error: BaseException) -> None:
            if not future.done():
                future.set_exception(error)

        def run() -> None:
            if future.done():
                return  # the caller went away before its turn
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                try:
                    result = job()
                except BaseException as error:
                    loop.call_soon_threadsafe(fail, error)
                else:
                    loop.call_soon_threadsafe(settle, result)

        self._jobs.put(run)
        return await future

    async def close(self) -> None:
        """End the thread when the jobs that wait are done."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def _serve(self) -> None:
        while (run := self._jobs.get()) is not None:
            run()

"""Engine: where tails run. The pipeline knows this interface; `LocalEngine` runs them in one thread of this process."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from ..models.bundle import Bundle
from ..protos.messages import TailOutput
from .exceptions import FrameError
from .workers import Workers

WARM_UPS = 2
"""How often each size is run: the first time of a size allocates."""


class TailKey(NamedTuple):
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


@dataclass(frozen=True, slots=True)
class PacketInput:
    """One frame for an engine that decodes by itself: the packet's bytes, as they came."""

    packet: bytes


TailInput: TypeAlias = FeatureInput | ImageInput | PacketInput
Outputs: TypeAlias = tuple[TailOutput, ...]
BatchSeconds: TypeAlias = Mapping[int, float]
"""Seconds that a batch took, by its size."""
Runtime: TypeAlias = Literal["onnx", "torch"]
"""What computes tails: ONNX Runtime, on the CPU and as far as it can, or PyTorch."""


class Tail(Protocol):
    """What answers a batch; all inputs are of the kind that the tail takes."""

    def __call__(self, inputs: Sequence[TailInput], /) -> list[Outputs]:
        """One tuple of outputs an input, in order."""
        ...

    def example(self) -> TailInput:
        """An input of zeros, to warm up with."""
        ...


@dataclass(frozen=True, slots=True)
class EngineResult:
    """What a batch gave: outputs in the order of the inputs, or why one could not be answered where the engine decodes
    by itself, and the seconds that it took."""

    outputs: Sequence[Outputs | FrameError]
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


class Engine(ABC):
    """Runs batches, `slots` of them at a time; the next one forms meanwhile."""

    slots = 1
    """Batches that it takes at a time."""
    decodes = False
    """Whether it takes packets as they came (`PacketInput`) and decodes them where the tails are."""
    decodes_alone = False
    """Whether `run_alone` saves something over decoding elsewhere and `run`."""
    on_our_cores = False
    """Whether a batch takes the cores of this process while it runs."""

    @abstractmethod
    async def start(self) -> None:
        """Take what is needed before the first bundle.

        Raises:
            HeadraceError: the device, or what the engine stands on, is missing.
        """

    @abstractmethod
    async def load(self, bundle: Bundle) -> Mapping[TailKey, BatchSeconds]:
        """Load and warm up a bundle's tails, while others answer.

        Returns:
            What batches took, of the sizes that were tried; may be empty.

        Raises:
            HeadraceError: weights are missing or are not the bundle's.
        """

    @abstractmethod
    async def unload(self, fingerprint: bytes) -> None:
        """Let go of a bundle's tails, of which no frame is under way."""

    @abstractmethod
    async def run(self, key: TailKey, inputs: Sequence[TailInput]) -> EngineResult:
        """Answer a batch of at least one frame, all for the tail of that key."""

    def run_alone(self, decode: Callable[[], D]) -> asyncio.Future[tuple[D, EngineResult]]:
        """Begin at once to decode and answer a frame that has the server to itself; only where `decodes_alone`."""
        raise NotImplementedError

    @abstractmethod
    async def close(self) -> None:
        """Let go of what `start` took; a running batch is finished first."""


class LocalEngine(Engine):
    """All tails in one thread: PyTorch's own threads already use every core, a second caller would only compete."""

    decodes_alone = True

    def __init__(
        self,
        load: Callable[[Bundle], Mapping[TailKey, Tail]],
        set_up: Callable[[], None] = lambda: None,
        max_batch: int = 1,
        on_our_cores: bool = True,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            load: makes the tails of a bundle; called in a thread beside the engine's, which answers meanwhile.
            set_up: called once in the engine's thread, where PyTorch's settings have to be made.
            max_batch: the largest batch to warm up.
            on_our_cores: see `Engine`; not where the tails are on a GPU.
        """
        self.on_our_cores = on_our_cores
        self._load, self._set_up, self._max_batch = load, set_up, max_batch
        self._tails: dict[TailKey, Tail] = {}
        self._thread, self._loading = Workers("tail"), Workers("load")

    async def start(self) -> None:
        """Make the settings of the engine's thread."""
        await self._thread.call(self._set_up)

    async def load(self, bundle: Bundle) -> Mapping[TailKey, BatchSeconds]:
        """Make a bundle's tails beside the engine's thread, and warm them up in it, between others' batches."""
        tails = await self._loading.call(lambda: self._load(bundle))
        measured: dict[TailKey, dict[int, float]] = {}
        for key, tail in tails.items():
            measured[key] = {}
            for size in warm_up_sizes(self._max_batch):
                for _ in range(WARM_UPS):
                    seconds = await self._thread.call(partial(_timed, tail, size))
                    measured[key][size] = min(seconds, measured[key].get(size, seconds))
        self._tails.update(tails)
        return measured

    async def unload(self, fingerprint: bytes) -> None:
        """Drop the tails."""
        for key in [k for k in self._tails if k.fingerprint == fingerprint]:
            del self._tails[key]

    async def run(self, key: TailKey, inputs: Sequence[TailInput]) -> EngineResult:
        """Answer a batch in the engine's thread."""
        return await self._thread.call(lambda: self._run(key, inputs))

    def run_alone(self, decode: Callable[[], D]) -> asyncio.Future[tuple[D, EngineResult]]:
        """Decode and answer in the engine's thread: two hand-overs between threads fewer than decoding elsewhere."""
        return self._thread.begin(lambda: self._run_alone(decode))

    async def close(self) -> None:
        """End the threads."""
        await self._loading.close()
        await self._thread.close()

    def _run(self, key: TailKey, inputs: Sequence[TailInput]) -> EngineResult:
        began = time.perf_counter()
        outputs = self._tails[key](inputs)
        return EngineResult(outputs, time.perf_counter() - began)

    def _run_alone(self, decode: Callable[[], D]) -> tuple[D, EngineResult]:
        decoded = decode()
        return decoded, self._run(decoded.key, [decoded.input])


def warm_up_sizes(max_batch: int) -> list[int]:
    """1, 2, 4, ... and the largest batch."""
    sizes = [2**i for i in range(max_batch.bit_length()) if 2**i < max_batch]
    return [*sizes, max_batch]


def _timed(tail: Tail, size: int) -> float:
    """Seconds that a batch of zeros takes."""
    inputs = [tail.example()] * size
    began = time.perf_counter()
    tail(inputs)
    return time.perf_counter() - began

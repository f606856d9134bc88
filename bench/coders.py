"""Processes that code frames at operating points with the edge's own parts. Each owns a share of the frames.

A frame stays with its process, so that its pixels and latents are computed once.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..edge.encoder import Encoder
from ..edge.engine import one_a_stage
from ..edge.frames import open_sources
from ..edge.head import Head
from ..edge.local import Exits, Local
from ..models.bitstream import Packet
from ..models.bundle import Bundle, Preprocessing
from ..models.exceptions import DataError
from ..models.image_codec import decode_image
from ..models.operating_point import Kind, OperatingPoint
from ..models.preprocessing import prepare

T = TypeVar("T")
Labels = tuple[int, ...]
"""Class indices, best first, at most five."""
Pair = tuple[int, int]


class StageTimes(NamedTuple):
    """Seconds that an `OperatingPoint.stage` takes: to prepare the picture, and for all else, coding included."""

    prepare_s: float
    compute_s: float


class Coders:
    """The processes, used from one thread. `close` them."""

    def __init__(self, sources: Sequence[str], bundle: Path, frames: int, processes: int) -> None:
        """Start them; each reads and prepares its frames meanwhile.

        Args:
            sources: as the edge takes them.
            bundle: folder of the bundle.
            frames: how many.
            processes: that share them.
        """
        # Not forked: the parent may have threads of PyTorch and gRPC.
        context = multiprocessing.get_context("spawn")
        self._frames = frames
        self._pools = [
            ProcessPoolExecutor(
                1,
                mp_context=context,
                initializer=_begin,
                initargs=(list(sources), bundle, range(n, frames, processes)),
            )
            for n in range(processes)
        ]

    def ready(self) -> None:
        """Wait until the frames are read."""
        self._everywhere(_ready)

    def use(self, edge_half: Path) -> None:
        """Compute with the graphs in this folder; comes before all that follows."""
        for pool in self._pools:
            pool.submit(_use, edge_half).result()

    def uncut(self) -> list[Labels]:
        """The uncut model's labels of every frame.

        Raises:
            DataError: there are fewer frames than were asked for.
        """
        found = dict(self._everywhere(_uncut))
        if len(found) != self._frames:
            raise DataError(f"the sources hold {len(found)} frames, fewer than {self._frames}")
        return [found[frame] for frame in range(self._frames)]

    def times(self, frames: Iterable[int]) -> dict[str, StageTimes]:
        """Median processor seconds by stage over these frames, from captured pictures on."""
        found: dict[str, list[StageTimes]] = {}
        for stage, seconds in self._shared(_times, frames, lambda frame: frame):
            found.setdefault(stage, []).append(seconds)
        return {stage: StageTimes(*map(statistics.median, zip(*each, strict=True))) for stage, each in found.items()}

    def code(self, pairs: Iterable[Pair]) -> list[tuple[Pair, bytes]]:
        """Packets of frames at points."""
        return self._shared(_code, pairs, lambda pair: pair[0])

    def answer_images(self, packets: Iterable[tuple[Pair, bytes]]) -> list[tuple[Pair, Labels]]:
        """The uncut model's labels of image packets."""
        return self._shared(_answer, packets, lambda packet: packet[0][0])

    def answer_exits(self, pairs: Iterable[Pair]) -> list[tuple[Pair, Labels]]:
        """The exits' labels of frames at their points."""
        return self._shared(_early, pairs, lambda pair: pair[0])

    def close(self) -> None:
        """End the processes."""
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    def _shared(
        self, work: Callable[[list[Any]], list[T]], items: Iterable[Any], frame: Callable[[Any], int]
    ) -> list[T]:
        shares: list[list[Any]] = [[] for _ in self._pools]
        for item in items:
            shares[frame(item) % len(shares)].append(item)
        jobs = [pool.submit(work, share) for pool, share in zip(self._pools, shares, strict=True) if share]
        return [found for job in jobs for found in job.result()]

    def _everywhere(self, work: Callable[[], list[T]]) -> list[T]:
        jobs = [pool.submit(work) for pool in self._pools]
        return [found for job in jobs for found in job.result()]


class _Share:
    """The frames of one process."""

    def __init__(self, sources: list[str], bundle: Path, frames: range) -> None:
        self.bundle = Bundle.load(bundle)
        self.encoder = Encoder(self.bundle)
        self.pictures: dict[int, Image.Image] = {}
        self.pixels: dict[int, npt.NDArray[np.uint8]] = {}
        self._latents: dict[Any, npt.NDArray[np.float32]] = {}
        every = (picture for source in open_sources(sources) for picture in source.frames())
        for index, picture in islice(enumerate(every), frames.start, frames.stop, frames.step):
            if not isinstance(picture, Image.Image):
                raise picture
            self.pictures[index] = picture
            self.pixels[index] = prepare(picture, self.bundle.preprocessing)

    def use(self, edge_half: Path) -> None:
        self.head, self.local = Head(self.bundle, edge_half), Local(edge_half)
        self.exits = Exits(self.bundle, edge_half)
        # Graphs, tables and codecs are loaded on first use, which must not count as computing.
        for point in one_a_stage(self.bundle.operating_points).values():
            self.compute(point, _black(self.preprocessing(point).size))

    def preprocessing(self, point: OperatingPoint) -> Preprocessing:
        return self.bundle.preprocessing_at(point.split) if point.split else self.bundle.preprocessing

    def compute(self, point: OperatingPoint, pixels: npt.NDArray[np.uint8]) -> None:
        """What a device does at a point with prepared pixels; nothing is kept."""
        if point.is_exit:
            self.answer_early(point.split, pixels)
        elif point.kind is Kind.FEATURE:
            self.encoder.feature(self.head(point.split, pixels), point, 0)
        elif point.kind is Kind.IMAGE:
            self.encoder.image(pixels, point, 0)
        else:
            self.local(pixels)

    def packet(self, frame: int, index: int) -> bytes:
        point = self.bundle.operating_points[index]
        if point.kind is Kind.FEATURE:
            return self.encoder.feature(self.latent(frame, point.split), point, frame)
        if point.kind is Kind.IMAGE:
            return self.encoder.image(self.pixels[frame], point, frame)
        return b""

    def early(self, frame: int, split: str) -> Labels:
        """An exit's labels, from the captured picture on."""
        return self.answer_early(split, prepare(self.pictures[frame], self.bundle.preprocessing_at(split)))

    def answer_early(self, split: str, pixels: npt.NDArray[np.uint8]) -> Labels:
        """An exit's labels of prepared pixels."""
        labels, _ = self.exits(split, self.head.reach(split, pixels, ask=True))
        return tuple(label.index for label in labels)

    def latent(self, frame: int, split: str) -> npt.NDArray[np.float32]:
        found = self._latents.get((frame, split))
        if found is None:
            how = self.bundle.preprocessing_at(split)
            own = how == self.bundle.preprocessing
            pixels = self.pixels[frame] if own else prepare(self.pictures[frame], how)
            found = self._latents[frame, split] = self.head(split, pixels)
        return found


def _black(size: int) -> npt.NDArray[np.uint8]:
    return np.zeros((size, size, 3), np.uint8)


_share: _Share | None = None


def _begin(sources: list[str], bundle: Path, frames: range) -> None:
    global _share  # noqa: PLW0603 - what a process of the pool is for
    _share = _Share(sources, bundle, frames)


def _mine() -> _Share:
    if _share is None:
        raise RuntimeError("this process was not begun")
    return _share


def _ready() -> list[int]:
    return [len(_mine().pixels)]


def _use(edge_half: Path) -> None:
    _mine().use(edge_half)


def _uncut() -> list[tuple[int, Labels]]:
    share = _mine()
    return [(frame, tuple(x.index for x in share.local(pixels))) for frame, pixels in share.pixels.items()]


def _code(pairs: list[Pair]) -> list[tuple[Pair, bytes]]:
    return [(pair, _mine().packet(*pair)) for pair in pairs]


def _answer(packets: list[tuple[Pair, bytes]]) -> list[tuple[Pair, Labels]]:
    share, found = _mine(), []
    for pair, packet in packets:
        pixels = decode_image(Packet.from_bytes(packet).slices[0], share.bundle.preprocessing.size)
        found.append((pair, tuple(label.index for label in share.local(pixels))))
    return found


def _early(pairs: list[Pair]) -> list[tuple[Pair, Labels]]:
    share = _mine()
    points = share.bundle.operating_points
    return [(pair, share.early(pair[0], points[pair[1]].split)) for pair in pairs]


def _times(frames: list[int]) -> list[tuple[str, StageTimes]]:
    """Every stage of these frames."""
    share, found = _mine(), []
    for frame in frames:
        for stage, point in one_a_stage(share.bundle.operating_points).items():
            how = share.preprocessing(point)
            began = time.thread_time()
            pixels = prepare(share.pictures[frame], how)
            prepared = time.thread_time()
            # From the head on and not by `packet`, which remembers latents.
            share.compute(point, pixels)
            found.append((stage, StageTimes(prepared - began, time.thread_time() - prepared)))
    return found

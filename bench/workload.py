"""What the demo's frames cost at every operating point: packets by really coding them, answers by really running tails.

frames --edge's own head and encoder--> a packet for every operating point --> sizes, compute times
packets that a replay sent --server's own decoder and tail--> its answers
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..edge.encoder import Encoder
from ..edge.frames import open_sources
from ..edge.head import Head
from ..edge.local import Local
from ..models.bitstream import Packet
from ..models.bundle import Bundle
from ..models.edge_half import load_edge_half
from ..models.exceptions import DataError
from ..models.operating_point import Kind, OperatingPoint
from ..models.preprocessing import prepare

T = TypeVar("T")
Labels = tuple[int, ...]
"""Class indices, best first, at most five."""
BATCH = 16


@dataclass(frozen=True)
class Workload:
    """Some frames at every operating point.

    Attributes:
        points: of the bundle.
        packets: bytes of the packet, by frame and by index of the point; b"" for `local`.
        sizes: int64 [frames, points], their lengths.
        uncut: the uncut model's five best labels of every frame.
        seconds: median processor seconds on this machine by `OperatingPoint.stage`, preparing and coding included.
    """

    points: tuple[OperatingPoint, ...]
    packets: list[list[bytes]]
    sizes: npt.NDArray[np.int64]
    uncut: list[Labels]
    seconds: dict[str, float]

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self.packets)

    def device_seconds(self, uncut_s: float) -> dict[str, float]:
        """Seconds by stage on a device that takes `uncut_s` for the uncut model."""
        factor = uncut_s / self.seconds["uncut"]
        return {stage: seconds * factor for stage, seconds in self.seconds.items() if stage != "uncut"}


def measure(sources: Sequence[str], edge_half: Path, frames: int, processes: int) -> Workload:
    """Code the first `frames` frames of the sources at every operating point.

    Args:
        sources: as the edge takes them.
        edge_half: folder of an edge half.
        frames: how many; there must be as many.
        processes: that share the work.

    Raises:
        DataError: the sources hold fewer frames, or one cannot be read.
    """
    # Not forked: the parent may have threads of PyTorch and gRPC.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        jobs = [pool.submit(_measure_part, list(sources), edge_half, (n, frames, processes)) for n in range(processes)]
        parts = [job.result() for job in jobs]
    packets: list[list[bytes]] = [[]] * frames
    uncut: list[Labels] = [()] * frames
    times: dict[str, list[float]] = {}
    for part in parts:
        for index, coded, labels in part["frames"]:
            packets[index], uncut[index] = coded, labels
        for stage, each in part["times"].items():
            times.setdefault(stage, []).extend(each)
    if not all(packets):
        raise DataError(f"{', '.join(sources)} hold fewer than {frames} frames")
    points = load_edge_half(edge_half).operating_points
    sizes = np.array([[len(packet) for packet in row] for row in packets], np.int64)
    return Workload(points, packets, sizes, uncut, {s: statistics.median(t) for s, t in times.items()})


def _measure_part(sources: list[str], edge_half: Path, share: tuple[int, int, int]) -> dict[str, Any]:
    """Every `share[2]`-th of `share[1]` frames, beginning with number `share[0]`; in a process of its own."""
    bundle = load_edge_half(edge_half)
    coder = _Coder(bundle, edge_half)
    pictures = (picture for source in open_sources(sources) for picture in source.frames())
    found = []
    first, count, step = share
    for index, picture in islice(enumerate(pictures), first, count, step):
        if not isinstance(picture, Image.Image):
            raise picture
        found.append((index, *coder.code(picture, index)))
    return {"frames": found, "times": coder.times}


class _Coder:
    """Codes a frame at every operating point of a bundle and notes processor times."""

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        self.times: dict[str, list[float]] = {}
        self._bundle = bundle
        self._head, self._local, self._encoder = Head(bundle, folder), Local(folder), Encoder(bundle)

    def code(self, picture: Image.Image, frame: int) -> tuple[list[bytes], Labels]:
        """Packets in order of the points, and the uncut model's labels."""
        pixels, prepare_s = _timed(lambda: prepare(picture, self._bundle.preprocessing))
        best, uncut_s = _timed(lambda: self._local(pixels))
        self._note("uncut", uncut_s)
        self._note("local", prepare_s + uncut_s)
        latents = {s.name: _timed(lambda s=s: self._head(s.name, pixels)) for s in self._bundle.splits}  # type: ignore[misc]
        packets = []
        for point in self._bundle.operating_points:
            if point.kind is Kind.LOCAL:
                packets.append(b"")
                continue
            before = prepare_s
            if point.kind is Kind.FEATURE:
                latent, head_s = latents[point.split]
                before += head_s
                packet, seconds = _timed(lambda p=point, z=latent: self._encoder.feature(z, p, frame))  # type: ignore[misc]
            else:
                packet, seconds = _timed(lambda p=point: self._encoder.image(pixels, p, frame))  # type: ignore[misc]
            packets.append(packet)
            self._note(point.stage, before + seconds)
        return packets, tuple(label.index for label in best)

    def _note(self, stage: str, seconds: float) -> None:
        self.times.setdefault(stage, []).append(seconds)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    began = time.thread_time()
    result = work()
    return result, time.thread_time() - began


class Answers:
    """What the server's own decoders and tails say to packets of a workload; each is asked once."""

    def __init__(self, bundle: Bundle, workload: Workload) -> None:
        """Load the tails.

        Raises:
            BackboneError: the backbone's weights are missing.
        """
        from ..server.decoder import PacketDecoder  # torch, which measuring does without
        from ..server.engine import TailKey
        from ..server.tail import load_tails

        self._workload, self._decoder = workload, PacketDecoder(bundle)
        self._tails = load_tails([bundle], "cpu", 0)
        self._key: Callable[[OperatingPoint], TailKey] = lambda point: TailKey(bundle.fingerprint, point.split)
        self._known: dict[tuple[int, int], Labels] = {}

    def ask(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Answer (frame, index of the point) pairs, in batches of one tail."""
        by_tail: dict[Any, list[tuple[int, int]]] = {}
        for frame, index in dict.fromkeys(pairs):
            point = self._workload.points[index]
            if point.kind is Kind.LOCAL:
                self._known[frame, index] = self._workload.uncut[frame]
            elif (frame, index) not in self._known:
                by_tail.setdefault(self._key(point), []).append((frame, index))
        for key, asked in by_tail.items():
            for at in range(0, len(asked), BATCH):
                batch = asked[at : at + BATCH]
                outputs = self._tails[key]([self._input(*pair) for pair in batch])
                for pair, (output, *_) in zip(batch, outputs, strict=True):
                    self._known[pair] = tuple(label.index for label in output.labels)

    def labels(self, frame: int, index: int) -> Labels:
        """The answer to that frame at that point; `ask` comes first."""
        return self._known[frame, index]

    def _input(self, frame: int, index: int) -> Any:
        packet = Packet.from_bytes(self._workload.packets[frame][index])
        return self._decoder.decode(packet, self._workload.points[index])

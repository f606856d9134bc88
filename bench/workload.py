"""What the demo's frames cost at operating points: packets by really coding them, answers by really running models.

    frames --the edge's own head and encoder--> packets --> sizes, compute times
    feature packets --the server's own decoder and tail--> answers
    image packets --decoded--> the uncut model (the edge's copy of it, in ONNX Runtime) --> answers

Only what is asked for is coded: a replay uses one operating point a frame, and a bundle has dozens. Until then a size
is estimated from those of neighbouring frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..models.bitstream import Packet
from ..models.bundle import Bundle
from ..models.exceptions import DataError
from ..models.operating_point import Kind
from .coders import Coders, Labels, StageTimes

if TYPE_CHECKING:
    from ..server.decoder import PacketDecoder
    from ..server.engine import Tail, TailKey

Pair = tuple[int, int]
"""Frame, and index of the operating point in the bundle."""
SAMPLE_EVERY = 20
"""One frame of so many is coded at every operating point, for first estimates of sizes."""
_TIMED = 20
"""At most so many frames are computed at every stage, for compute times."""
_BATCH = 8


class Workload:
    """Some frames, coded at operating points on demand. A context manager; its work is done by other processes.

    Attributes:
        points: the bundle's operating points.
        sample: frames that are coded at every point from the start.
        uncut: the uncut model's five best labels of every frame.
        seconds: median processor seconds on this machine by `OperatingPoint.stage`.
    """

    def __init__(self, sources: Sequence[str], bundle: Bundle, frames: int, processes: int) -> None:
        """Let the processes read the frames; `begin` comes next.

        Args:
            sources: as the edge takes them.
            bundle: loaded from a folder.
            frames: how many; the sources hold at least as many.
            processes: that share the work.

        Raises:
            DataError: the bundle lies in no folder.
        """
        if bundle.folder is None:
            raise DataError(f"bundle {bundle.name} lies in no folder; load it from one")
        self.points = bundle.operating_points
        self.sample = range(SAMPLE_EVERY // 2, frames, SAMPLE_EVERY)
        self.uncut: list[Labels] = []
        self.seconds: dict[str, StageTimes] = {}
        self._packets: dict[Pair, bytes] = {}
        self._sizes = np.zeros((frames, len(self.points)))
        self._known = np.zeros((frames, len(self.points)), np.bool_)
        self._known[:, [i for i, p in enumerate(self.points) if p.kind is Kind.LOCAL]] = True
        self._coders = Coders(sources, bundle.folder, frames, processes)

    def ready(self) -> None:
        """Wait until the frames are read."""
        self._coders.ready()

    def begin(self, edge_half: Path) -> None:
        """Run the uncut model on every frame and code the sample, with the graphs in this folder.

        Raises:
            DataError: the sources hold fewer frames, or one cannot be read.
        """
        self._coders.use(edge_half)
        self.uncut = self._coders.uncut()
        self.seconds = self._coders.times(range(0, self.frames, math.ceil(self.frames / _TIMED)))
        self.code((f, i) for f in self.sample for i in range(len(self.points)))

    def __enter__(self) -> Workload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._coders.close()

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self._sizes)

    def known(self, pair: Pair) -> bool:
        """Whether the frame was coded at that point."""
        return bool(self._known[pair])

    def packet(self, pair: Pair) -> bytes:
        """The packet of a frame that was coded at that point."""
        return self._packets[pair]

    def code(self, pairs: Iterable[Pair]) -> None:
        """Code frames at points; what is known is left out."""
        asked = [pair for pair in dict.fromkeys(pairs) if not self._known[pair]]
        for pair, packet in self._coders.code(asked):
            self._packets[pair], self._sizes[pair], self._known[pair] = packet, len(packet), True

    def answer_images(self, pairs: Iterable[Pair]) -> list[tuple[Pair, Labels]]:
        """The uncut model's labels for image packets that were coded."""
        return self._coders.answer_images([(pair, self._packets[pair]) for pair in pairs])

    def answer_exits(self, pairs: Iterable[Pair]) -> list[tuple[Pair, Labels]]:
        """The exits' labels for frames at their points."""
        return self._coders.answer_exits(pairs)

    def neighbours(self, index: int) -> list[int]:
        """The point; and of a feature point those of its stage one rate level finer and coarser, too."""
        if self.points[index].kind is not Kind.FEATURE:
            return [index]
        stage = [i for i, p in enumerate(self.points) if p.stage == self.points[index].stage]
        at = stage.index(index)
        return stage[max(0, at - 1) : at + 2]

    def sizes(self) -> npt.NDArray[np.float64]:
        """float64 [frames, points] in bytes: real ones where they are known, else estimates from the bundle's medians,
        scaled as the nearest frames of the same kind of packet are."""
        sizes = self._sizes.copy()
        medians = np.array([max(p.bytes_median, 1.0) for p in self.points])
        for kind in (Kind.FEATURE, Kind.IMAGE):
            columns = np.array([p.kind is kind for p in self.points])
            if not columns.any():
                continue
            known = self._known[:, columns]
            with np.errstate(invalid="ignore"):
                ratios = np.where(known, sizes[:, columns] / medians[columns], 0.0).sum(1) / known.sum(1)
            seen = np.flatnonzero(np.isfinite(ratios))
            scale = np.interp(np.arange(len(sizes)), seen, ratios[seen]) if len(seen) else np.ones(len(sizes))
            guess = scale[:, None] * medians[columns]
            sizes[:, columns] = np.where(known, sizes[:, columns], np.ceil(guess))
        return sizes

    def device_seconds(self, uncut_s: float) -> dict[str, float]:
        """Seconds by stage on a device that takes `uncut_s` for the uncut model. As on the edge's emulated device,
        preparing takes what it takes on this machine."""
        factor = uncut_s / self.seconds["local"].compute_s
        return {stage: each.prepare_s + each.compute_s * factor for stage, each in self.seconds.items()}


class Answers:
    """What a server says to the packets of a workload; each is asked once."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        """Load the tails, each to be run by one thread at a time of `threads`.

        Raises:
            BackboneError: the backbone's weights are missing.
        """
        from ..server.decoder import PacketDecoder
        from ..server.engine import TailKey
        from ..server.tail import load_tails

        self._decoder: PacketDecoder = PacketDecoder(bundle)
        # One thread a batch and several batches: PyTorch's own threads wait for each other on a machine that is busy.
        self._tails = load_tails([bundle], "cpu", 1)
        self._threads = threads
        self._keys: list[TailKey] = [TailKey(bundle.fingerprint, p.split) for p in bundle.operating_points]
        self._known: dict[Pair, Labels] = {}

    def ask(self, workload: Workload, pairs: Iterable[Pair]) -> None:
        """Answer frames at points at which they were coded."""
        by_kind: dict[Kind, list[Pair]] = {kind: [] for kind in Kind}
        for pair in dict.fromkeys(pairs):
            if pair not in self._known:
                by_kind[workload.points[pair[1]].kind].append(pair)
        exits = [pair for pair in by_kind[Kind.LOCAL] if workload.points[pair[1]].is_exit]
        self._known.update((pair, workload.uncut[pair[0]]) for pair in by_kind[Kind.LOCAL] if pair not in exits)
        self._known.update(workload.answer_exits(exits))
        self._known.update(workload.answer_images(by_kind[Kind.IMAGE]))
        by_tail: dict[TailKey, list[Pair]] = {}
        for pair in by_kind[Kind.FEATURE]:
            by_tail.setdefault(self._keys[pair[1]], []).append(pair)
        with ThreadPoolExecutor(self._threads) as pool:
            jobs: list[Future[list[tuple[Pair, Labels]]]] = []
            for key, asked in by_tail.items():
                batches = (asked[at : at + _BATCH] for at in range(0, len(asked), _BATCH))
                jobs += [pool.submit(self._run, self._tails[key], workload, batch) for batch in batches]
            for job in jobs:
                self._known.update(job.result())

    def labels(self, pair: Pair) -> Labels:
        """The answer to that frame at that point; `ask` comes first."""
        return self._known[pair]

    def _run(self, tail: Tail, workload: Workload, batch: list[Pair]) -> list[tuple[Pair, Labels]]:
        inputs: list[Any] = []
        for pair in batch:
            packet = Packet.from_bytes(workload.packet(pair))
            inputs.append(self._decoder.decode(packet, workload.points[pair[1]]))
        outputs = tail(inputs)
        return [
            (pair, tuple(label.index for label in output.labels))
            for pair, (output, *_) in zip(batch, outputs, strict=True)
        ]


def agreement(pairs: Sequence[Pair], answers: Answers, workload: Workload) -> float:
    """Share of the pairs for which the uncut model's label is the answer; not a number of none."""
    if not pairs:
        return math.nan
    return sum(answers.labels(p)[:1] == workload.uncut[p[0]][:1] for p in pairs) / len(pairs)

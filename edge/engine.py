"""Engine: everything that the device computes for a frame, stage by stage, each timed (and stretched if emulated).

picture --prepare--> pixels --head--> latent --compress--> packet       a `feature` point
picture --prepare--> pixels --JPEG or WebP--> packet                    an `image` point
picture --prepare--> pixels --uncut model--> labels                     the `local` point
picture --prepare--> pixels --head--> features --exit--> labels         a `local` point with a split point

It is called from one thread, since the device has one core.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageFilter

from ..models.bundle import Bundle, Preprocessing
from ..models.edge_half import has_local
from ..models.operating_point import Kind, OperatingPoint
from ..models.preprocessing import prepare
from ..protos.messages import Label
from .device import Device
from .encoder import Encoder, VideoPacket
from .exceptions import ConfigError
from .head import Abandon, Head, Reached
from .local import Exits, Local
from .references import Earlier

Pixels = npt.NDArray[np.uint8]
UNCUT_ROUNDS = 15
WARM_UP_RUNS = 2
MOVED = (4, 2)
"""Pixels by which the camera moves between two frames where stages are timed."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A frame that is ready to be sent. Times in seconds.

    Attributes:
        packet: the packet's bytes; none where `empty`, or what the exit said, kept the frame on the device.
        pixels: uint8 [S, S, 3], kept for a local answer should the stream break; None where the head takes fewer.
        prepare_s, compute_s, compress_s: scaling; head and encoder, or picture coding; entropy coding.
        presence: the filter's score; None where there is none.
        empty: whether it is below the bundle's threshold.
        video: more about the packet, where the server keeps frames to predict others from.
        again: codes the same frame at another rate level of its stage, for the coder's time alone; raises as `encode`.
        own: what the exit at the split point said, where it was asked; its time is in `compute_s`.
    """

    packet: bytes
    pixels: Pixels | None
    prepare_s: float
    compute_s: float
    compress_s: float
    presence: float | None = None
    empty: bool = False
    video: VideoPacket | None = None
    again: Callable[[OperatingPoint], Encoded] | None = None
    own: LocalAnswer | None = None

    @property
    def coder_s(self) -> float:
        """What coding took, which is what coding it again would take."""
        return self.compress_s or self.compute_s

    @property
    def alone_bytes(self) -> float:
        """About what the packet would take as a key frame."""
        return float(len(self.packet)) if self.video is None else self.video.alone_bytes

    @property
    def share(self) -> float | None:
        """What it takes, as a share of that; None where the server keeps no frames to predict others from."""
        return None if self.video is None else len(self.packet) / self.video.alone_bytes

    @property
    def seconds(self) -> float:
        """All that the device computed for it."""
        return self.prepare_s + self.compute_s + self.compress_s


@dataclass(frozen=True, slots=True)
class LocalAnswer:
    """What the device says by itself, best label first. Times in seconds; prepare_s is 0 if done before.

    `confidence` is the probability that the best label is the uncut model's, 0..1, and `point` the exit's; None if that
    model said it.
    """

    labels: tuple[Label, ...]
    prepare_s: float
    compute_s: float
    confidence: float | None = None
    point: OperatingPoint | None = None

    @property
    def seconds(self) -> float:
        """All that the device computed for it."""
        return self.prepare_s + self.compute_s


class Engine:
    """The edge half of one bundle on one device."""

    def __init__(self, bundle: Bundle, folder: Path, device: Device, threads: int = 1, hysteresis: float = 0.0) -> None:
        """Keep the parts; graphs are loaded on first use or by `warm_up`."""
        self.bundle, self.device = bundle, device
        self._head, self._local, self._exits, self._encoder = (
            Head(bundle, folder, threads),
            Local(folder, threads),
            Exits(bundle, folder, threads),
            Encoder(bundle, hysteresis),
        )

    def encode(
        self,
        picture: Image.Image,
        point: OperatingPoint,
        frame_id: int,
        abandon: Abandon | None = None,
        *,
        filtered: bool = False,
        earlier: Earlier | None = None,
        sure: float | None = None,
    ) -> Encoded:
        """From a captured picture to the bytes that are sent for it; none if it is `filtered` and holds nothing.

        With `sure` the exit at the split point is asked, if there is one: if its confidence is at least that, its
        answer is enough and there are no bytes.

        Where the server keeps frames to predict others from, `earlier` says which one this one can be predicted from.

        Raises:
            EngineError: the head cannot be run.
            AbandonedError: it was stopped by `abandon`.
        """
        abandon = abandon or Abandon()

        def run(stage: Callable[[], T]) -> tuple[T, float]:
            abandon.check()
            done = self.device.run(stage, sleep=abandon.wait)
            abandon.check()
            return done

        how = self._how(point)
        pixels, prepare_s = self._prepare(picture, how)
        # A local answer needs the uncut model's own size.
        kept = pixels if how == self.bundle.preprocessing else None
        if point.kind is Kind.IMAGE:

            def picture_of(other: OperatingPoint) -> Encoded:
                packet, seconds = run(lambda: self._encoder.image(pixels, other, frame_id))
                return Encoded(packet, kept, prepare_s, seconds, 0.0, again=picture_of)

            return picture_of(point)
        asked = sure is not None
        reached, compute_s = run(lambda: self._head.reach(point.split, pixels, abandon, ask=asked))
        latent, presence = reached.latent, reached.presence
        empty = presence is not None and presence < self.bundle.filter_threshold(point.split)
        if empty and filtered:
            return Encoded(b"", kept, prepare_s, compute_s, 0.0, presence, empty)
        own = None
        if reached.features is not None and sure is not None:
            own = self._exit_answer(point.split, reached)
            compute_s += own.compute_s
            if (own.confidence or 0.0) >= sure:
                return Encoded(b"", kept, prepare_s, compute_s, 0.0, presence, empty, own=own)
        made = Encoded(b"", kept, prepare_s, compute_s, 0.0, presence, empty, own=own)

        def coded(other: OperatingPoint) -> Encoded:
            if earlier is None:
                packet, seconds = run(lambda: self._encoder.feature(latent, other, frame_id))
                return replace(made, packet=packet, compress_s=seconds, again=coded)
            video, seconds = run(lambda: self._encoder.video(latent, other, frame_id, earlier))
            return replace(made, packet=video.packet, compress_s=seconds, video=video, again=coded)

        return coded(point)

    def answer(
        self, picture: Image.Image | None, pixels: Pixels | None, point: OperatingPoint | None = None
    ) -> LocalAnswer:
        """Labels from a captured picture, or from pixels uint8 [S, S, 3] that were prepared for the uncut model.

        Args:
            picture, pixels: either.
            point: of kind `local`; None for the uncut model's.

        Raises:
            EngineError: the uncut model, or head and exit, cannot be run.
        """
        split = point.split if point is not None else ""
        how = self.bundle.preprocessing_at(split) if split else self.bundle.preprocessing
        if pixels is not None and how == self.bundle.preprocessing:
            ready, prepare_s = pixels, 0.0
        elif pixels is not None:
            # The frame itself is gone; what is left of it is the square that the uncut model takes.
            ready, prepare_s = self._prepare(Image.fromarray(pixels), replace(how, fit="stretch"))
        elif picture is not None:
            ready, prepare_s = self._prepare(picture, how)
        else:
            raise ValueError("either a picture or its pixels are needed")
        if split:
            (labels, confidence), compute_s = self.device.run(lambda: self._early(split, ready))
            return LocalAnswer(labels, prepare_s, compute_s, confidence, point)
        labels, compute_s = self.device.run(lambda: self._local(ready))
        return LocalAnswer(labels, prepare_s, compute_s)

    def warm_up(self, points: Iterable[OperatingPoint]) -> None:
        """Load and run every stage of `points`, and make the coder of every rate level.

        No frame shall wait because its point is a new one: the first run of a graph takes longer than any other, and in
        the second one ONNX Runtime allocates what it saw in the first that it needs.
        """
        points, picture = tuple(points), reference_picture()
        self._encoder.warm_up(points)
        for point in one_a_stage(points).values():
            for _ in range(WARM_UP_RUNS):
                self._seconds(picture, point)

    def time_stages(self, points: Iterable[OperatingPoint], rounds: int, predicted: bool = False) -> dict[str, float]:
        """Median seconds by `OperatingPoint.stage` on this device, preparing included.

        Stages take turns, so that a moment in which the machine is busy does not fall on one of them alone.

        Args:
            points: whose stages.
            rounds: of each.
            predicted: frames are coded as in a stream whose server keeps frames, which takes half as long again.
        """
        stages, picture = one_a_stage(points), reference_picture()
        earlier = {name: self._before(picture, point) for name, point in stages.items() if predicted}
        times: dict[str, list[float]] = {name: [] for name in stages}
        for _ in range(rounds):
            for name, point in stages.items():
                times[name].append(self._seconds(picture, point, earlier.get(name)))
        return {name: statistics.median(each) for name, each in times.items()}

    def emulate(self, uncut_ms: float) -> float:
        """Set the device's factor so that the uncut model takes `uncut_ms`. Returns the factor.

        Raises:
            ConfigError: this machine is slower than that, or the bundle has no uncut model for the device.
        """
        if not has_local(self.bundle):
            raise ConfigError(
                f"bundle {self.bundle.name} has no uncut model for the device to measure; give --device-speed instead "
                "of --device-uncut-ms"
            )
        pixels = prepare(reference_picture(), self.bundle.preprocessing)
        self._local(pixels)
        times = [self.device.cpu_time(lambda: self._local(pixels)) for _ in range(UNCUT_ROUNDS)]
        factor = uncut_ms / 1000 / statistics.median(times)
        if factor < 1:
            raise ConfigError(
                f"the uncut model takes {statistics.median(times) * 1000:.1f} ms here, more than the {uncut_ms:g} ms "
                "of --device-uncut-ms; give more, or leave it out"
            )
        self.device.factor = factor
        return factor

    def _exit_answer(self, split: str, reached: Reached) -> LocalAnswer:
        """What the exit says behind a head that has run; its seconds without what the head's graph took for it."""
        (labels, confidence), compute_s = self.device.run(lambda: self._exits(split, reached))
        return LocalAnswer(labels, 0.0, compute_s, confidence, self.bundle.exit_point(split))

    def _early(self, split: str, pixels: Pixels) -> tuple[tuple[Label, ...], float]:
        """What an exit says of pixels, and how sure it is."""
        return self._exits(split, self._head.reach(split, pixels, ask=True))

    def _how(self, point: OperatingPoint) -> Preprocessing:
        return self.bundle.preprocessing_at(point.split) if point.split else self.bundle.preprocessing

    def _prepare(self, picture: Image.Image, how: Preprocessing) -> tuple[Pixels, float]:
        return self.device.run(lambda: prepare(picture, how), stretched=False)

    def _before(self, picture: Image.Image, point: OperatingPoint) -> Earlier | None:
        """What a picture's frame can be predicted from where the camera has moved a little since the one before."""
        if point.kind is not Kind.FEATURE:
            return None
        pixels = prepare(ImageChops.offset(picture, *MOVED), self._how(point))
        key_frame = self._encoder.video(self._head(point.split, pixels), point, 0, Earlier(None, 0, 0))
        return Earlier(key_frame.reference, 1, 0)

    def _seconds(self, picture: Image.Image, point: OperatingPoint, earlier: Earlier | None = None) -> float:
        """What `encode` or `answer` takes for this picture, without the waiting of an emulated device."""
        pixels, prepare_s = self._prepare(picture, self._how(point))
        return prepare_s + self.device.time(lambda: self._compute(pixels, point, earlier))

    def _compute(self, pixels: Pixels, point: OperatingPoint, earlier: Earlier | None) -> None:
        if point.is_exit:
            self._early(point.split, pixels)
        elif point.kind is Kind.LOCAL:
            self._local(pixels)
        elif point.kind is Kind.IMAGE:
            self._encoder.image(pixels, point, 0)
        elif earlier is not None:
            self._encoder.video(self._head(point.split, pixels), point, 1, earlier)
        else:
            self._encoder.feature(self._head(point.split, pixels), point, 0)


def one_a_stage(points: Iterable[OperatingPoint]) -> dict[str, OperatingPoint]:
    """One point a stage: of several rate levels the middle one stands for all."""
    by_stage: dict[str, list[OperatingPoint]] = {}
    for point in points:
        by_stage.setdefault(point.stage, []).append(point)
    return {stage: same[len(same) // 2] for stage, same in by_stage.items()}


def reference_picture(width: int = 640, height: int = 480, seed: int = 0) -> Image.Image:
    """A picture to time stages with: noise that fades with its frequency, as photographs have it."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for radius in (32, 8, 2):
        noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        layer = np.asarray(noise.filter(ImageFilter.BoxBlur(radius)), np.float64) - 127.5
        total += layer / max(float(layer.std()), 1e-6) * np.sqrt(radius)
    return Image.fromarray(np.clip(127.5 + total * (40 / total.std()), 0, 255).astype(np.uint8))

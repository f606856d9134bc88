"""`headrace eval video`: what predicting frames from earlier ones saves, in whole packets that were decoded again.

video --every so many frames--> head, encoder --> latents --> symbols --> key frame            }  bytes
                                                                     \\-> predicted, or a key frame  }  of each
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..edge.exceptions import SourceError
from ..edge.frames import Video
from ..models.bitstream import MAX_BACK, Packet
from ..models.bottleneck import Encoder
from ..models.bundle import Bundle, Preprocessing, short
from ..models.codec import Codec
from ..models.exceptions import DataError, HeadraceError
from ..models.operating_point import Kind, OperatingPoint
from ..models.preprocessing import prepare
from ..models.split import bar_columns
from ..models.temporal import Reference
from ..models.zoo.catalogue import backbone_of

BATCH = 8


@dataclass(frozen=True, slots=True)
class Row:
    """One operating point at one frame rate: means over the frames, in bytes of whole packets.

    Attributes:
        fps: frames a second.
        frames: how many were coded.
        key_bytes: each frame by itself.
        bytes: predicted where that is smaller.
        ratio: the second over the first.
        predicted: share of the frames that were.
        error: mean square error of the symbols as a share of what plain rounding gives; 1 without hysteresis.
    """

    point: str
    fps: float
    frames: int
    key_bytes: float
    bytes: float
    ratio: float
    predicted: float
    error: float


@dataclass(frozen=True, slots=True)
class Lag:
    """How frames are predicted.

    Attributes:
        behind: frames by which answers lag, 0..30. At 0 a frame is predicted from the one before it.
        hysteresis: see `Codec.hold`; 0 keeps the symbols.
    """

    behind: int = 0
    hysteresis: float = 0.0


class _Chain:
    """Codes the frames of one operating point at one rate, each predicted from the one `behind` before the last."""

    def __init__(self, point: OperatingPoint, step: int, how: Lag) -> None:
        self.point, self.step, self._behind, self._hysteresis = point, step, how.behind, how.hysteresis
        self._errors = np.zeros(2)
        self._kept: list[tuple[int, Reference | None]] = []
        self._received: dict[int, Reference | None] = {}
        self.sizes: list[tuple[int, int, bool]] = []

    def add(self, codec: Codec, other: Codec, latent: npt.NDArray[np.float32], at: int) -> None:
        """Code the latent of frame `at` and decode it again.

        Raises:
            HeadraceError: it did not come back as it went in.
        """
        number = at // self.step
        earlier_id, earlier = self._kept[-1 - self._behind] if len(self._kept) > self._behind else (number, None)
        symbols = sent = codec.quantise(latent, self.point)
        if self._hysteresis and earlier is not None:
            sent = codec.hold(latent, self.point, earlier, self._hysteresis)
        coded = codec.compress_video(sent, self.point, number, earlier, number - earlier_id)
        if not coded.packet.back and sent is not symbols:
            coded, sent = codec.compress_video(symbols, self.point, number), symbols
        alone = codec.compress_symbols(symbols, self.point, number)
        packet = Packet.from_bytes(coded.packet.to_bytes())
        reference = None if packet.reference_id is None else self._received[packet.reference_id]
        received, self._received[number] = other.decompress_video(packet, reference)
        if not np.array_equal(received, other.decompress(codec.compress_symbols(sent, self.point, number))):
            raise HeadraceError(f"frame {number} of {self.point.name} does not decode to the symbols that were sent")
        self._received.pop(number - MAX_BACK - 1, None)
        self._kept = [*self._kept[-self._behind :], (number, coded.reference)][-1 - self._behind :]
        scaled = latent * codec.bundle.gain(self.point.split, self.point.rate_level)[:, None, None]
        self._errors += [float(np.square(scaled - each, dtype=np.float64).sum()) for each in (sent, symbols)]
        self.sizes.append((len(alone.to_bytes()), len(coded.packet.to_bytes()), packet.back > 0))

    def row(self, fps: float) -> Row:
        alone, sent, predicted = (np.array(column, np.float64) for column in zip(*self.sizes, strict=True))
        return Row(
            self.point.name,
            fps,
            len(sent),
            float(alone.mean()),
            float(sent.mean()),
            float(sent.sum() / alone.sum()),
            float(predicted.mean()),
            float(self._errors[0] / self._errors[1]) if self._errors[1] else 1.0,
        )


def evaluate_video(
    bundle: Bundle,
    video: Path,
    rates: Sequence[float] = (),
    how: Lag = Lag(),
    *,
    limit: int = 0,
    json_file: Path | None = None,
    console: Console | None = None,
) -> list[Row]:
    """Measure every feature point, print a table and write the rows.

    Args:
        bundle: with tables for predicted frames.
        video: a file that PyAV reads.
        rates: frames a second; of the video every so many frames are taken as comes nearest. Empty: all of them.
        how: from which frames the others are predicted, and whether symbols are held.
        limit: most frames of the video, before some are left out; 0 for all.
        json_file: where rows are written; None for nowhere.
        console: where the table goes; standard output by default.

    Raises:
        DataError: the bundle has no such tables, the video cannot be read, or answers lag too far.
    """
    codec, other = Codec(bundle), Codec(bundle)
    if not codec.predicts:
        raise DataError(f"bundle {bundle.name} has no tables for predicted frames; add them with `headrace temporal`")
    if not 0 <= how.behind < MAX_BACK:
        raise DataError(f"answers that lag by {how.behind} frames are not within 0..{MAX_BACK - 1}")
    if not 0 <= how.hysteresis <= 0.5:
        raise DataError(f"a hysteresis of {how.hysteresis} is not within 0..0.5")
    try:
        source = Video(str(video), video)
    except SourceError as error:
        raise DataError(str(error)) from error
    steps = [(rate, max(1, round(source.fps / rate))) for rate in rates or (source.fps,)]
    points = [p for p in bundle.operating_points if p.kind is Kind.FEATURE]
    chains = [(rate, _Chain(p, step, how)) for rate, step in steps for p in points]
    with Progress(*bar_columns(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("frames", total=limit or None)
        for at, latents in enumerate(_latents(bundle, source, limit)):
            for point in points:
                for _, chain in chains:
                    if chain.point is point and at % chain.step == 0:
                        chain.add(codec, other, latents[point.split], at)
            progress.advance(bar)
    if not chains or not chains[0][1].sizes:
        raise DataError(f"{video} holds no frames, or bundle {bundle.name} no operating point of kind feature")
    rows = [chain.row(rate) for rate, chain in chains]
    _show(rows, bundle, video, console or Console())
    if json_file is not None:
        found = {"bundle": bundle.name, "fingerprint": short(bundle.fingerprint), "video": video.name, **asdict(how)}
        json_file.write_text(json.dumps({**found, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return rows


def _latents(bundle: Bundle, source: Video, limit: int) -> Iterator[dict[str, npt.NDArray[np.float32]]]:
    """Frame by frame: split point -> latent float32 [K, H, W]."""
    backbone = backbone_of(bundle)
    networks = {s.name: (backbone.head(s.name), Encoder.of(bundle, s.name)) for s in bundle.splits}
    hows = {name: bundle.preprocessing_at(name) for name in networks}
    batch: dict[Preprocessing, list[npt.NDArray[np.uint8]]] = {how: [] for how in hows.values()}

    def run() -> Iterator[dict[str, npt.NDArray[np.float32]]]:
        with torch.inference_mode():
            pixels = {how: torch.from_numpy(np.stack(frames)) for how, frames in batch.items()}
            found = {name: encoder(*head(pixels[hows[name]])).numpy() for name, (head, encoder) in networks.items()}
        for latents in zip(*found.values(), strict=True):
            yield dict(zip(found, latents, strict=True))
        for frames in batch.values():
            frames.clear()

    for at, picture in enumerate(source.frames()):
        if limit and at >= limit:
            break
        if isinstance(picture, SourceError):
            raise DataError(str(picture))
        for how, frames in batch.items():
            frames.append(prepare(picture, how))
        if at % BATCH == BATCH - 1:
            yield from run()
    if any(batch.values()):
        yield from run()


def _show(rows: Sequence[Row], bundle: Bundle, video: Path, console: Console) -> None:
    for fps in dict.fromkeys(row.fps for row in rows):
        table = Table(title=f"{video.name} at {fps:g} frames/s, bundle {bundle.name}, bytes of whole packets")
        for name in ("point", "each by itself", "predicted", "ratio", "frames predicted", "error"):
            table.add_column(name, justify="left" if name == "point" else "right")
        for row in rows:
            if row.fps == fps:
                cells = (
                    f"{row.key_bytes:.0f}",
                    f"{row.bytes:.0f}",
                    f"{row.ratio:.3f}",
                    f"{row.predicted:.2f}",
                    f"{row.error:.2f}",
                )
                table.add_row(row.point, *cells)
        console.print(table)

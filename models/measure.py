"""What an operating point costs and gives on photographs: real packets, decoded again, through the real tail."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from .backbones import Backbone
from .bitstream import Packet
from .bottleneck import Decoder, Encoder
from .bundle import Bundle, Preprocessing
from .codec import Codec
from .exceptions import DataError
from .image_codec import decode_image, encode_image
from .operating_point import Kind, OperatingPoint
from .preprocessing import UNREADABLE, prepare
from .quantiser import quantise
from .repair.tail import repaired, tail_of
from .tasks import Answer, Task

BATCH = 8
"""Photographs at once; larger batches of 224x224 fall out of a small machine's cache and take longer."""
AREA = (0.45, 1.0)
"""Share of a photograph that a crop covers, before preprocessing cuts the middle out of it."""
ASPECT = (3 / 4, 4 / 3)
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")


@dataclass(frozen=True, slots=True)
class Crop:
    """A random part of a photograph, drawn from (seed, index) alone; the same part at every size of the pixels."""

    path: Path
    seed: int
    index: int


View = Path | Crop
"""A whole photograph, or a part of one."""


def views_of(paths: Sequence[Path], number: int, seed: int) -> list[View]:
    """Every photograph whole, and then in parts until there are `number` views of each: where few photographs are left
    to measure on, several views of each say more."""
    parts = [Crop(path, seed, at * number + n) for at, path in enumerate(paths) for n in range(1, number)]
    return [*paths, *parts]


@dataclass
class Measured:
    """Per photograph: whole packets in bytes, slices alone, the tables' own entropy in bits (0 for images), answer."""

    packet_bytes: list[int] = field(default_factory=list)
    slice_bytes: list[int] = field(default_factory=list)
    entropy_bits: list[float] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def agreement(self, task: Task, reference: Sequence[Answer]) -> float:
        """Mean agreement with the answers of `reference`, 0..1."""
        return float(np.mean([task.agreement(a, r) for a, r in zip(self.answers, reference, strict=True)]))


def find_pictures(folder: Path) -> list[Path]:
    """Picture files below a folder, sorted by path.

    Raises:
        DataError: no such folder, or none in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give one that holds photographs")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES)
    if not found:
        raise DataError(f"{folder} holds no photographs ({', '.join(PICTURES)})")
    return found


def load_pixels(view: View, how: Preprocessing) -> npt.NDArray[np.uint8]:
    """One photograph, or a part of one, as uint8 [S, S, 3].

    Raises:
        DataError: the file cannot be read as a picture.
    """
    if isinstance(view, Crop):
        return random_crop(view.path, how, view.seed, view.index)
    try:
        with Image.open(view) as picture:
            return prepare(picture, how)
    except UNREADABLE as error:
        raise DataError(f"{view} cannot be read as a picture ({error}); remove it or save it anew") from error


def random_crop(path: Path, how: Preprocessing, seed: int, index: int) -> npt.NDArray[np.uint8]:
    """A random box of a photograph, preprocessed like a photograph of its own, and flipped half of the time."""
    rng = np.random.default_rng((seed, index))
    picture = _opened(path)
    area = picture.width * picture.height * rng.uniform(*AREA)
    aspect = np.exp(rng.uniform(*np.log(ASPECT)))
    width = int(np.clip(round((area * aspect) ** 0.5), 1, picture.width))
    height = int(np.clip(round((area / aspect) ** 0.5), 1, picture.height))
    left = int(rng.integers(0, picture.width - width + 1))
    top = int(rng.integers(0, picture.height - height + 1))
    pixels = prepare(picture.crop((left, top, left + width, top + height)), how)
    return pixels[:, ::-1].copy() if rng.random() < 0.5 else pixels


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as a photograph: {error}; take it out of the folder") from error


def pixel_batches(paths: Sequence[Path], how: Preprocessing) -> Iterator[Tensor]:
    """Photographs as uint8 [B, S, S, 3], B <= BATCH."""
    for at in range(0, len(paths), BATCH):
        yield _pixels(paths[at : at + BATCH], how)


def _pixels(paths: Sequence[View], how: Preprocessing) -> Tensor:
    return torch.from_numpy(np.stack([load_pixels(p, how) for p in paths]))


def measure(
    backbone: Backbone,
    bundle: Bundle,
    paths: Sequence[View],
    points: Sequence[OperatingPoint],
    note: Callable[[int], None] = lambda _: None,
    reference: bool = True,
) -> tuple[list[Answer], Mapping[int, Measured]]:
    """Send every photograph through every operating point.

    Args:
        backbone, bundle: as they would be on both sides.
        paths: photographs, or parts of some.
        points: of kinds `feature` and `image` (`local` is the uncut model).
        note: called with the number of photographs done, after each batch.
        reference: whether the uncut model answers as well.

    Returns:
        The uncut model's answer per photograph (none without `reference`), and what was measured per operating point's
        id.
    """
    codec = Codec(bundle)
    results = {p.id: Measured() for p in points}
    by_split = {s.name: [p for p in points if p.split == s.name] for s in bundle.splits}
    images = [p for p in points if p.kind is Kind.IMAGE]
    networks = _networks(backbone, bundle, [name for name, chosen in by_split.items() if chosen])
    hows = {name: bundle.preprocessing_at(name) for name in networks}
    uncut, task = backbone.uncut, backbone.task
    answers: list[Answer] = []
    with torch.inference_mode():
        for at in range(0, len(paths), BATCH):
            batch = paths[at : at + BATCH]
            sizes = {how: _pixels(batch, how) for how in {bundle.preprocessing, *hows.values()}}
            pixels = sizes[bundle.preprocessing]
            if reference:
                answers += task.answers(uncut(pixels))
            for name, (head, encoder, decoder, tail) in networks.items():
                latents = encoder(*head(sizes[hows[name]])).numpy()
                for point in by_split[name]:
                    symbols = _through_codec(codec, latents, point, results[point.id])
                    gain = torch.from_numpy(bundle.gain(name, point.rate_level)).expand(len(symbols), -1)
                    results[point.id].answers += task.answers(tail(decoder(symbols, gain)))
            for point in images:
                received = _through_image_codec(pixels.numpy(), point, results[point.id])
                results[point.id].answers += task.answers(uncut(received))
            note(len(pixels))
    return answers, results


def measure_prefixes(
    backbone: Backbone,
    bundle: Bundle,
    paths: Sequence[Path],
    points: Sequence[OperatingPoint],
    note: Callable[[int], None] = lambda _: None,
) -> Mapping[tuple[int, int], Measured]:
    """Send of every photograph only the first slices, at every operating point.

    Args:
        backbone, bundle, paths, note: as of `measure`.
        points: of kind `feature`.

    Returns:
        What was measured (but for the entropy, which is 0) per operating point's id and number of slices, for all
        numbers below that of a whole packet.
    """
    codec = Codec(bundle)
    networks = _networks(backbone, bundle, {p.split for p in points})
    found = {(p.id, n): Measured() for p in points for n in range(1, _slices(bundle, p))}
    with torch.inference_mode():
        for at in range(0, len(paths), BATCH):
            batch = paths[at : at + BATCH]
            for name, (head, encoder, decoder, tail) in networks.items():
                latents = encoder(*head(_pixels(batch, bundle.preprocessing_at(name)))).numpy()
                for point in (p for p in points if p.split == name):
                    whole = [codec.compress(latent, point, 0) for latent in latents]
                    gain = torch.from_numpy(bundle.gain(name, point.rate_level)).expand(len(whole), -1)
                    for count in range(1, _slices(bundle, point)):
                        into, received = found[point.id, count], []
                        for packet in whole:
                            data = packet.prefix(count).to_bytes()
                            into.packet_bytes.append(len(data))
                            into.slice_bytes.append(sum(map(len, packet.slices[:count])))
                            into.entropy_bits.append(0.0)
                            received.append(codec.decompress(Packet.from_bytes(data)))
                        symbols = torch.from_numpy(np.stack(received))
                        into.answers += backbone.task.answers(tail(decoder(symbols, gain)))
            note(len(batch))
    return found


def _slices(bundle: Bundle, point: OperatingPoint) -> int:
    return len(bundle.split(point.split).slices[point.rate_level])


def _networks(
    backbone: Backbone, bundle: Bundle, names: Iterable[str]
) -> dict[str, tuple[nn.Module, nn.Module, nn.Module, nn.Module]]:
    """Head, encoder, decoder and tail of split points, the last two with the bundle's repair."""
    return {
        name: (
            backbone.head(name),
            Encoder.of(bundle, name),
            *repaired(bundle, name, Decoder.of(bundle, name), tail_of(bundle, name, backbone)),
        )
        for name in names
    }


def _through_codec(codec: Codec, latents: npt.NDArray[np.float32], point: OperatingPoint, into: Measured) -> Tensor:
    """Latents [B, K, H, W] to packets and back to symbols int32 [B, K, H, W]."""
    received = []
    for latent in latents:
        packet = codec.compress(latent, point, 0)
        data = packet.to_bytes()
        symbols = quantise(latent, codec.bundle.gain(point.split, point.rate_level))
        into.packet_bytes.append(len(data))
        into.slice_bytes.append(sum(len(s) for s in packet.slices))
        into.entropy_bits.append(codec.entropy_bits(symbols, point))
        received.append(codec.decompress(Packet.from_bytes(data)))
    return torch.from_numpy(np.stack(received))


def _through_image_codec(pixels: npt.NDArray[np.uint8], point: OperatingPoint, into: Measured) -> Tensor:
    """Pixels [B, S, S, 3] to packets and back."""
    received = []
    for each in pixels:
        file = encode_image(each, point.codec, point.rate_level)
        data = Packet(point.id, 0, (file,)).to_bytes()
        into.packet_bytes.append(len(data))
        into.slice_bytes.append(len(file))
        into.entropy_bits.append(0.0)
        received.append(decode_image(Packet.from_bytes(data).slices[0], each.shape[0]))
    return torch.from_numpy(np.stack(received))

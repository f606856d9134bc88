"""Packets to inputs: what an encoder wrote comes out, and whatever else is said no to in words."""

import io
import struct
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from headrace.models.bitstream import Packet
from headrace.models.bundle import Bundle
from headrace.models.operating_point import Kind
from headrace.server.decoder import PacketDecoder, frame_id_of, webp_size
from headrace.server.engine import FeatureInput, ImageInput
from headrace.server.exceptions import InvalidError
from PIL import Image

EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"
"""Makes WebP take its extended form."""


@pytest.fixture(scope="module")
def decoder(bundle: Bundle) -> PacketDecoder:
    return PacketDecoder(bundle)


def picture(side: int = 224, mode: str = "RGB") -> Image.Image:
    ramp = np.add.outer(np.arange(side), np.arange(side)) % 256
    return Image.fromarray(ramp.astype(np.uint8)).convert(mode)


def coded(image: Image.Image, codec: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, codec, **options)
    return file.getvalue()


def decode_image(decoder: PacketDecoder, codec: str, *slices: bytes) -> ImageInput:
    point = next(p for p in decoder.bundle.operating_points if p.codec == codec)
    found = decoder.decode(Packet(point.id, 1, slices), point)
    assert isinstance(found, ImageInput)
    return found


@pytest.mark.parametrize("split", ["blocks.2", "blocks.3", "blocks.5"])
@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_a_prefix_gives_its_symbols_and_zeros(
    decoder: PacketDecoder, make_packet: Callable[..., Packet], split: str, kept: int
) -> None:
    packet = make_packet(5, f"{split}@2")
    point = decoder.bundle.operating_point(packet.operating_point)
    whole, part = decoder.decode(packet, point), decoder.decode(packet.prefix(kept), point)
    assert isinstance(whole, FeatureInput) and isinstance(part, FeatureInput)
    sent = decoder.bundle.order(split)[: decoder.bundle.split(split).slices[2][kept - 1]]
    expected = np.zeros_like(whole.symbols)
    expected.reshape(-1)[sent] = whole.symbols.reshape(-1)[sent]
    assert expected.any() and np.array_equal(part.symbols, expected)
    assert np.array_equal(part.gain, decoder.bundle.gain(split, 2))


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_come_out_as_pixels(decoder: PacketDecoder, codec: str, mode: str) -> None:
    pixels = decode_image(decoder, codec, coded(picture(mode=mode), codec, quality=95)).pixels
    assert (pixels.shape, pixels.dtype) == ((224, 224, 3), np.uint8)
    assert np.abs(pixels.astype(int) - np.asarray(picture())).mean() < 8


def test_lossless_webp_is_exact(decoder: PacketDecoder) -> None:
    pixels = decode_image(decoder, "webp", coded(picture(), "webp", lossless=True)).pixels
    assert np.array_equal(pixels, np.asarray(picture()))


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: coded(picture(223), d), r"is \(223, 223\), the backbone takes \(224, 224\)"),
        (lambda d: coded(picture(), "png"), "cannot be decoded"),
        (lambda d: coded(picture(), "webp" if d == "jpeg" else "jpeg"), "cannot be decoded"),
        (lambda d: coded(picture(), d)[:200], "cannot be decoded"),
        (lambda d: b"", "cannot be decoded"),
        (lambda d: b"GIF89a" + bytes(100), "cannot be decoded"),
    ],
)
def test_other_images_are_refused(
    decoder: PacketDecoder, codec: str, damage: Callable[[str], bytes], message: str
) -> None:
    with pytest.raises(InvalidError, match=message):
        decode_image(decoder, codec, damage(codec))


def test_a_jpeg_that_declares_a_huge_size_is_refused_before_it_is_decoded(decoder: PacketDecoder) -> None:
    data = bytearray(coded(picture(), "jpeg"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 65000, 65000)
    with pytest.raises(InvalidError, match=r"65000|exceeds limit"):
        decode_image(decoder, "jpeg", bytes(data))


def test_a_webp_that_declares_a_huge_canvas_never_reaches_the_reader(decoder: PacketDecoder) -> None:
    data = bytearray(coded(picture(), "webp", exif=EXIF))
    assert data[12:16] == b"VP8X"
    data[24:30] = (16383).to_bytes(3, "little") * 2
    with pytest.raises(InvalidError, match=r"is \(16384, 16384\)"):
        decode_image(decoder, "webp", bytes(data))


@pytest.mark.parametrize("options", [{"quality": 50}, {"lossless": True}, {"exif": EXIF}])
@pytest.mark.parametrize("size", [(1, 1), (224, 224), (300, 7)])
def test_webp_sizes_are_read_from_the_header(size: tuple[int, int], options: dict[str, object]) -> None:
    assert webp_size(coded(Image.new("RGB", size, (9, 80, 200)), "webp", **options)) == size


def test_an_image_packet_has_one_slice(decoder: PacketDecoder) -> None:
    data = coded(picture(), "jpeg")
    with pytest.raises(InvalidError, match="one slice, this one 2"):
        decode_image(decoder, "jpeg", data, data)


def test_a_local_point_sends_nothing(decoder: PacketDecoder) -> None:
    point = next(p for p in decoder.bundle.operating_points if p.kind is Kind.LOCAL)
    with pytest.raises(InvalidError, match="answered on the device"):
        decoder.decode(Packet(point.id, 1, (b"",)), point)


def test_too_many_slices_and_slices_of_noise_are_refused_or_decode_to_bounded_symbols(
    decoder: PacketDecoder, make_packet: Callable[..., Packet]
) -> None:
    packet = make_packet(1)
    point = decoder.bundle.operating_point(packet.operating_point)
    with pytest.raises(InvalidError, match="4 slices, the packet 5"):
        decoder.decode(replace(packet, slices=(*packet.slices, b"")), point)
    for seed in range(20):
        noise = np.random.default_rng(seed).bytes(4 * seed + 1)
        try:
            found = decoder.decode(replace(packet, slices=(noise,)), point)
        except InvalidError:
            continue
        assert isinstance(found, FeatureInput)
        assert np.abs(found.symbols.astype(np.int64)).max() < 2**15


def test_the_frame_id_of_a_damaged_packet_is_still_read(make_packet: Callable[..., Packet]) -> None:
    for frame_id in (0, 127, 128, 2**32 - 1):
        data = make_packet(frame_id).to_bytes()
        assert frame_id_of(data) == frame_id
        assert frame_id_of(data[:40]) == frame_id
    for garbage in (b"", b"\xff" * 40, b"\x94", b"\x94\x01", b"\x94\x01\x02\xcf" + b"\xff" * 8, b"\x94\x01\x02\xc0"):
        assert frame_id_of(garbage) == 0

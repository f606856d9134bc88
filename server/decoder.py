"""Decoder's first half: a packet's bytes -> what a tail takes. Runs in worker threads, never on the event loop.

feature packet ──► entropy coder ──► symbols int32 [K, H, W] ──► FeatureInput
image packet ───► header checked ──► JPEG or WebP decoded ─────► ImageInput
"""

from __future__ import annotations

import io
import struct

import msgpack
import numpy as np
import numpy.typing as npt
from PIL import Image

from ..models.bitstream import Packet
from ..models.bundle import Bundle
from ..models.codec import Codec
from ..models.exceptions import BitstreamError, HeadraceError
from ..models.operating_point import Kind, OperatingPoint
from ..models.quantiser import SYMBOL_LIMIT
from ..models.temporal import Reference
from .engine import FeatureInput, ImageInput, TailInput, TailKey
from .exceptions import InvalidError

_IMAGE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that are damaged or are no images."""


class PacketDecoder:
    """Decodes the packets of one bundle. Safe to use from several threads."""

    def __init__(self, bundle: Bundle) -> None:
        """Keep the bundle; coders are made on first use, or all at once by `warm_up`."""
        self.bundle = bundle
        self.keys = {p.id: TailKey(bundle.fingerprint, p.split) for p in bundle.operating_points}
        """Which tail takes frames of an operating point."""
        self._codec = Codec(bundle)

    def read(self, data: bytes, limit: int) -> tuple[Packet, OperatingPoint]:
        """What of a packet can be told without decoding it, in microseconds: whatever is wrong so far is said here.

        Args:
            data: the packet's bytes.
            limit: most bytes.

        Raises:
            InvalidError: they are no undamaged packet of an operating point of this bundle for which something is sent,
                or there are too many.
        """
        try:
            packet = Packet.from_bytes(data, limit)
            point = self.bundle.operating_point(packet.operating_point)
        except HeadraceError as error:
            raise InvalidError(str(error)) from error
        if point.kind is Kind.LOCAL:
            raise InvalidError(f"operating point {point.name} is answered on the device; nothing is sent for it")
        if packet.back and not (point.kind is Kind.FEATURE and self.predicts):
            raise InvalidError(f"no packet of {point.name} can be predicted under bundle {self.bundle.name}")
        return packet, point

    @property
    def predicts(self) -> bool:
        """Whether packets of this bundle can be predicted."""
        return self._codec.predicts

    @property
    def reference_bytes(self) -> int:
        """Most that what is kept of a frame takes."""
        return self._codec.reference_bytes()

    def decode(self, packet: Packet, point: OperatingPoint) -> TailInput:
        """Decode a key frame or image of operating point `point`.

        Raises:
            InvalidError: the packet cannot be decoded; the text says why.
        """
        if packet.back:
            raise InvalidError("a predicted packet can only be decoded on the stream that it belongs to")
        return self._decode(packet, point, None, keep=False)[0]

    def decode_video(
        self, packet: Packet, point: OperatingPoint, earlier: Reference | None
    ) -> tuple[TailInput, Reference | None]:
        """Decode a packet of a stream, given what was kept of the frame that it is predicted from.

        Returns:
            What the tail takes, and what later frames can be predicted from; None where the packet is an image, or
            slices are missing.

        Raises:
            InvalidError: the packet cannot be decoded; the text says why.
        """
        return self._decode(packet, point, earlier, keep=True)

    def _decode(
        self, packet: Packet, point: OperatingPoint, earlier: Reference | None, *, keep: bool
    ) -> tuple[TailInput, Reference | None]:
        try:
            if point.kind is Kind.FEATURE:
                if not keep:
                    return self._features(self._codec.decompress(packet), point), None
                symbols, reference = self._codec.decompress_video(packet, earlier)
                return self._features(symbols, point), reference
            if point.kind is Kind.IMAGE:
                return self._image(packet, point), None
            raise InvalidError(f"operating point {point.name} is answered on the device; nothing is sent for it")
        except InvalidError:
            raise
        except HeadraceError as error:
            raise InvalidError(str(error)) from error

    def warm_up(self) -> None:
        """Make the coders of every operating point."""
        self._codec.prepare(self.bundle.operating_points)
        for point in self.bundle.operating_points:
            if point.kind is Kind.FEATURE:
                self._codec.decompress(Packet(point.id, 0, (b"",)))

    def _features(self, symbols: npt.NDArray[np.int32], point: OperatingPoint) -> FeatureInput:
        # An encoder clips; more can only come from bytes that no encoder wrote.
        if symbols.max() > SYMBOL_LIMIT or symbols.min() < -SYMBOL_LIMIT:
            raise BitstreamError(f"the packet decodes to symbols beyond +-{SYMBOL_LIMIT}")
        return FeatureInput(symbols, self.bundle.gain(point.split, point.rate_level))

    def _image(self, packet: Packet, point: OperatingPoint) -> ImageInput:
        if len(packet.slices) != 1:
            raise InvalidError(f"an image packet has one slice, this one {len(packet.slices)}")
        data, side = packet.slices[0], self.bundle.preprocessing.size
        try:
            size = webp_size(data) if point.codec == "webp" else None
            if size in (None, (side, side)):
                with Image.open(io.BytesIO(data), formats=(point.codec.upper(),)) as picture:
                    size = picture.size
                    if size == (side, side):
                        return ImageInput(np.array(picture.convert("RGB"), np.uint8))
        except _IMAGE_ERRORS as error:
            raise InvalidError(f"the image of {point.name} cannot be decoded as {point.codec}: {error}") from error
        raise InvalidError(f"the image of {point.name} is {size}, the backbone takes {(side, side)}")


def webp_size(data: bytes) -> tuple[int, int]:
    """Width and height that a WebP file declares (RFC 9649), without a decoder.

    Pillow's WebP reader allocates the declared canvas as it opens the file, up to 2 GB; so the size is looked at first.

    Raises:
        ValueError: not a WebP file.
    """
    chunk, head = data[12:16], data[20:30]
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(head) < 10:
        raise ValueError("not a WebP file")
    if chunk == b"VP8 " and head[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", head[6:10])
        return width & 0x3FFF, height & 0x3FFF
    if chunk == b"VP8L" and head[0] == 0x2F:
        bits = int.from_bytes(head[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8X":
        return int.from_bytes(head[4:7], "little") + 1, int.from_bytes(head[7:10], "little") + 1
    raise ValueError("not a WebP file of a known kind")


def frame_id_of(data: bytes) -> int:
    """The frame id of a packet that may be damaged, so that its result can name it; 0 where it cannot be read."""
    unpacker = msgpack.Unpacker(max_buffer_size=64, max_str_len=0, max_bin_len=0, max_array_len=0, max_map_len=0)
    try:
        unpacker.feed(data[:16])
        if unpacker.read_array_header() != 4:
            return 0
        unpacker.skip()
        unpacker.skip()
        frame_id = unpacker.unpack()
    except (ValueError, msgpack.exceptions.UnpackException):
        return 0
    return frame_id if type(frame_id) is int and 0 <= frame_id < 2**32 else 0

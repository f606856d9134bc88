"""The packet: what a frame is on the wire or on disk.

    msgpack array of 4:  version | operating point | frame id | body
    body:                CRC-32 (4 bytes, little endian) | n | length of each slice but the last (LEB128) | slices
    n:                   number of slices in the lower 3 bits; above them how many frame ids its reference lies back


The CRC covers every byte of the packet but its own four. With ids below 128, frame ids of 32 bits, at most five slices
and fewer than 16 KiB a slice (fewer than 64 KiB in all), everything besides the slices is at most 24 bytes.
A packet is a prefix of slices, in order of importance: `Packet.prefix(n)` is a packet too. In version 2 the slices of a
feature packet are consecutive sections of one entropy-coded stream (see `entropy_coder`). Version 3 are predicted
frames (see `temporal`), which only who holds their reference can decode; a **key frame**, whose reference lies 0 back,
is of version 2.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import msgpack

from .exceptions import BitstreamError, LimitError
from .operating_point import MAX_ID

VERSION = 2
PREDICTED = 3
"""Version of a predicted frame's packet. Who reads only `VERSION` is never sent one (see `messages.Welcome`)."""
MAX_SLICES = 5
MAX_BACK = 31
"""Most frame ids that a reference may lie back."""
_COUNT_BITS = 3
MAX_SLICE_BYTES = 2**14 - 1
"""Of every slice but the last, so that its length is at most two bytes."""
MAX_PACKET_BYTES = 2**20
"""Default limit for what is read from a peer."""
_CRC_BYTES = 4


@dataclass(frozen=True, slots=True)
class Packet:
    """One coded frame.

    Attributes:
        operating_point: 0..127, an id of the bundle's operating points.
        frame_id: 0..2**32-1, chosen by the edge.
        slices: 1..5 byte strings in order of importance.
        back: how many frame ids before it the frame has which it is predicted from, 1..31; 0: a key frame.
    """

    operating_point: int
    frame_id: int
    slices: tuple[bytes, ...]
    back: int = 0

    @property
    def reference_id(self) -> int | None:
        """Frame id of what it is predicted from; None for a key frame. Ids begin again after 2**32-1."""
        return (self.frame_id - self.back) % 2**32 if self.back else None

    def prefix(self, count: int) -> Packet:
        """The packet with only its first `count` slices, 1 <= count.

        Raises:
            BitstreamError: count is below 1.
        """
        if count < 1:
            raise BitstreamError(f"a packet keeps at least one slice, asked for {count}")
        return replace(self, slices=self.slices[:count])

    def to_bytes(self) -> bytes:
        """The packet's bytes.

        Raises:
            BitstreamError: a field is out of its range.
        """
        if not 0 <= self.operating_point <= MAX_ID or not 0 <= self.frame_id < 2**32:
            raise BitstreamError(f"operating point {self.operating_point} or frame id {self.frame_id} is out of range")
        if not 1 <= len(self.slices) <= MAX_SLICES:
            raise BitstreamError(f"a packet has 1 to {MAX_SLICES} slices, this one {len(self.slices)}")
        if not 0 <= self.back <= MAX_BACK:
            raise BitstreamError(f"a reference lies 1 to {MAX_BACK} frames back, this one {self.back}")
        lengths = bytearray([len(self.slices) | self.back << _COUNT_BITS])
        for each in self.slices[:-1]:
            if len(each) > MAX_SLICE_BYTES:
                raise BitstreamError(f"a slice of {len(each)} bytes is over the limit of {MAX_SLICE_BYTES}")
            lengths += bytes([len(each)]) if len(each) < 128 else bytes([len(each) & 127 | 128, len(each) >> 7])
        rest = b"".join((lengths, *self.slices))
        packer = msgpack.Packer()
        front: bytes = (
            packer.pack_array_header(4)
            + packer.pack(PREDICTED if self.back else VERSION)
            + packer.pack(self.operating_point)
            + packer.pack(self.frame_id)
            + _bin_header(_CRC_BYTES + len(rest))
        )
        crc = zlib.crc32(rest, zlib.crc32(front))
        return front + crc.to_bytes(_CRC_BYTES, "little") + rest

    @classmethod
    def from_bytes(cls, data: bytes, limit: int = MAX_PACKET_BYTES) -> Packet:
        """Read a packet.

        Args:
            data: the packet's bytes, nothing before or behind.
            limit: most bytes that are looked at.

        Raises:
            LimitError: `data` is longer than `limit`.
            BitstreamError: `data` is not an undamaged packet of this version.
        """
        if len(data) > limit:
            raise LimitError(f"a packet of {len(data)} bytes is over the limit of {limit}")
        try:
            # The limits keep msgpack from allocating what a damaged length declares.
            fields = msgpack.unpackb(
                data,
                max_bin_len=len(data),
                max_array_len=4,
                max_map_len=0,
                max_str_len=0,
                max_ext_len=0,
                use_list=False,
            )
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise BitstreamError(f"{len(data)} bytes are not a packet: {error!r}") from error
        if not isinstance(fields, tuple) or len(fields) != 4:
            raise BitstreamError("not a packet: its msgpack is not an array of 4")
        version, point, frame_id, body = fields
        if type(version) is not int or version not in (VERSION, PREDICTED):
            raise BitstreamError(f"packet version {version!r} is not {VERSION} or {PREDICTED}; update the older side")
        if type(point) is not int or type(frame_id) is not int or not isinstance(body, bytes):
            raise BitstreamError("not a packet: its fields have the wrong types")
        if not 0 <= point <= MAX_ID or not 0 <= frame_id < 2**32:
            raise BitstreamError(f"operating point {point} or frame id {frame_id} is out of range")
        slices, back = _read_body(body, zlib.crc32(data[: len(data) - len(body)]))
        if (version == PREDICTED) != (back > 0):
            raise BitstreamError(f"a packet of version {version} cannot have its reference {back} frames back")
        return cls(point, frame_id, slices, back)


_UINT_BYTES = {0xCC: 1, 0xCD: 2, 0xCE: 4}
"""msgpack's unsigned integers: bytes after the first one."""


def peek(data: bytes) -> tuple[int, int] | None:
    """Operating point and frame id of what begins as a packet does, in a microsecond: neither the CRC nor what follows
    is looked at. None: it begins otherwise."""
    if len(data) < 9 or data[0] != 0x94 or data[1] not in (VERSION, PREDICTED) or data[2] > MAX_ID:
        return None
    if data[3] < 0x80:
        return data[2], data[3]
    size = _UINT_BYTES.get(data[3])
    return None if size is None else (data[2], int.from_bytes(data[4 : 4 + size], "big"))


def _bin_header(size: int) -> bytes:
    """The msgpack header of a byte string; written by hand because the CRC covers it before the body is known."""
    if size < 2**8:
        return b"\xc4" + size.to_bytes(1, "big")
    if size < 2**16:
        return b"\xc5" + size.to_bytes(2, "big")
    return b"\xc6" + size.to_bytes(4, "big")


def _read_body(body: bytes, crc: int) -> tuple[tuple[bytes, ...], int]:
    """Check the CRC, which is continued from `crc` over the front; the slices, and how far back the reference lies."""
    rest = body[_CRC_BYTES:]
    if len(rest) < 1 or zlib.crc32(rest, crc) != int.from_bytes(body[:_CRC_BYTES], "little"):
        raise BitstreamError("the packet is damaged: its CRC does not fit")
    count, back = rest[0] & (1 << _COUNT_BITS) - 1, rest[0] >> _COUNT_BITS
    if not 1 <= count <= MAX_SLICES:
        raise BitstreamError(f"the packet declares {count} slices, the limit is {MAX_SLICES}")
    lengths, at = [], 1
    for _ in range(count - 1):
        low = rest[at : at + 1]
        if low and low[0] & 128:
            high = rest[at + 1 : at + 2]
            if not high or high[0] & 128:
                raise BitstreamError("the packet's slice lengths cannot be read")
            lengths.append(low[0] & 127 | high[0] << 7)
            at += 2
        elif low:
            lengths.append(low[0])
            at += 1
        else:
            raise BitstreamError("the packet ends within its slice lengths")
    if sum(lengths) > len(rest) - at:
        raise BitstreamError(f"the slices are {sum(lengths)} bytes long, the packet holds {len(rest) - at}")
    slices = []
    for length in lengths:
        slices.append(rest[at : at + length])
        at += length
    return (*slices, rest[at:]), back

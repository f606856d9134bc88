"""Entropic Student on photographs: every one coded into a packet like ours, decoded again, answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ..backbones import Backbone
from ..bitstream import Packet
from ..entropy_coder import SymbolCoder
from ..exceptions import BitstreamError
from ..measure import Measured, pixel_batches
from .student_file import LearnedStudent


class StudentCodec:
    """Latents of one size <-> packets of one slice, by the coder of our own packets."""

    def __init__(self, student: LearnedStudent, side: int) -> None:
        """For latents float32 [24, side, side]."""
        channels = len(student.tables)
        self._shape = (channels, side, side)
        self._medians = student.medians.numpy()
        indexes = np.repeat(np.arange(channels), side * side)
        self._coder = SymbolCoder(student.tables, indexes, (len(indexes),))

    def symbols(self, latent: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
        """int32 [24, h, w]: whole numbers about the channels' medians."""
        whole: npt.NDArray[np.int32] = np.rint(latent - self._medians).astype(np.int32)
        return whole

    def rounded(self, symbols: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """The latent that symbols stand for."""
        latent: npt.NDArray[np.float32] = symbols.astype(np.float32) + self._medians
        return latent

    def packet(self, symbols: npt.NDArray[np.int32]) -> bytes:
        """A whole packet, header and checksum included; operating point and frame id are 0, as for ours."""
        return Packet(0, 0, self._coder.encode(symbols.reshape(-1))).to_bytes()

    def received(self, data: bytes) -> npt.NDArray[np.int32]:
        """The symbols of a packet.

        Raises:
            BitstreamError: it is damaged, or is not one of these.
        """
        slices = Packet.from_bytes(data).slices
        if len(slices) != 1:
            raise BitstreamError(f"an Entropic Student's packet has one slice, this one {len(slices)}")
        return self._coder.decode(slices).reshape(self._shape)

    def bits(self, symbols: npt.NDArray[np.int32]) -> float:
        """What the tables say that they take."""
        return self._coder.bits(symbols.reshape(-1))


def measure_student(
    backbone: Backbone,
    student: LearnedStudent,
    paths: Sequence[Path],
    note: Callable[[int], None] = lambda _: None,
) -> Measured:
    """Packets and answers on photographs.

    Args:
        backbone: whose preprocessing and task they are; the student has its own copy of the tail.
        student: for that backbone.
        paths: photographs.
        note: called with the number of photographs done, after each batch.

    Raises:
        DataError: a photograph cannot be read.
    """
    found, codec = Measured(), None
    with torch.inference_mode():
        for pixels in pixel_batches(paths, backbone.preprocessing):
            (latents,) = student.encoder(pixels)
            codec = codec or StudentCodec(student, latents.shape[-1])
            received = []
            for latent in latents.numpy():
                symbols = codec.symbols(latent)
                data = codec.packet(symbols)
                found.packet_bytes.append(len(data))
                found.slice_bytes.append(sum(map(len, Packet.from_bytes(data).slices)))
                found.entropy_bits.append(codec.bits(symbols))
                received.append(codec.rounded(codec.received(data)))
            found.answers += backbone.task.answers(student.answer(torch.from_numpy(np.stack(received))))
            note(len(pixels))
    return found

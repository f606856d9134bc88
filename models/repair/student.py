"""Student: the server's half of one split point with what a repair learns, on its way there.

symbols, gain --Decoder--> features --Denoiser, Restorer--> features --tail, its weights + deltas--> outputs
                 fixed                 learned               fixed          learned
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from .deltas import Deltas
from .restorer import Restorer
from .tail import TAIL, Denoiser


class Student(nn.Module):
    """Decoder, denoiser and changed tail of one split point: symbols [B, K, H, W], gain [B, K] -> outputs.

    Only the denoiser, or the restorer in its place, and the deltas are its parameters.
    """

    def __init__(
        self, decoder: nn.Module, tail: nn.Module, denoiser: Denoiser | Restorer | None, rank: int, seed: int
    ) -> None:
        """Begin as the unrepaired half; the tail stays the backbone's."""
        super().__init__()
        self._fixed = (decoder,)  # in a tuple, so that it is not a submodule
        self.denoiser = denoiser
        self.tail = Deltas(tail, rank, seed)

    def forward(self, symbols: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
        """The tail's outputs."""
        (decoder,) = self._fixed
        features = decoder(symbols, gain)
        if self.denoiser is not None:
            features = self.denoiser(features, gain)
        outputs: tuple[Tensor, ...] = self.tail(features)
        return outputs

    def tensors(self) -> dict[str, npt.NDArray[np.float16]]:
        """What a bundle holds of it, see `repaired`, without the split point's name."""
        found = self.denoiser.tensors() if self.denoiser is not None else {}
        denoiser = {key: value.detach().half().cpu().contiguous().numpy() for key, value in found.items()}
        return denoiser | {f"{TAIL}/{name}": value for name, value in self.tail.tensors().items()}

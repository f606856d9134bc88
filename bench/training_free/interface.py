"""What every training-free codec offers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Features = npt.NDArray[np.float32]


class FeatureCodec(Protocol):
    """One codec at one rate setting, fixed after calibration."""

    @property
    def setting(self) -> str:
        """Name of the rate setting, unique among the settings of a codec."""

    def encode(self, features: Features) -> bytes:
        """Code float32 [C, H, W]."""

    def decode(self, data: bytes) -> Features:
        """float32 [C, H, W] from what `encode` gave."""


Calibrate = Callable[[Features], Sequence[FeatureCodec]]
"""Features float32 [N, C, H, W] of the calibration photographs -> codecs, one a rate setting."""

"""The plain one: uniform quantisation of the features as they are, and a counted entropy table a channel.

Every channel loses its calibration mean, is divided by one step for the whole tensor, rounded, and coded under the
table of its own symbols in the calibration photographs. What a transform brings is what this lacks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .interface import Features
from .static_coder import StaticDecoder, StaticEncoder, StaticTables, channel_tables

STEPS = (1.25, 1.5, 1.75, 2.0, 2.2, 2.4, 2.7, 3.0)
"""Steps in units of the features' standard deviation over the whole tensor."""


class QuantiseOnly:
    """One step."""

    def __init__(self, features: Features, step: float) -> None:
        """Calibrate on float32 [N, C, H, W]; `step` in standard deviations of the tensor."""
        self.setting = f"step {step:g}"
        self._mean = features.mean((0, 2, 3), dtype=np.float64).astype(np.float32)[:, None, None]
        self._step = np.float32(step * features.std())
        self._tables = StaticTables.of(channel_tables(np.rint((features - self._mean) / self._step).astype(np.int32)))
        shape = features.shape[1:]
        self._indexes = np.broadcast_to(np.arange(shape[0], dtype=np.int32)[:, None, None], shape)

    def encode(self, features: Features) -> bytes:
        """Code float32 [C, H, W]."""
        out = StaticEncoder(self._tables)
        out.put(np.rint((features - self._mean) / self._step).astype(np.int32), self._indexes)
        return out.flush()

    def decode(self, data: bytes) -> Features:
        """float32 [C, H, W] from what `encode` gave."""
        symbols = StaticDecoder(self._tables, data).take(self._indexes)
        features: Features = symbols.astype(np.float32) * self._step + self._mean
        return features


def calibrate(features: Features) -> Sequence[QuantiseOnly]:
    """One codec for each of `STEPS`."""
    return [QuantiseOnly(features, step) for step in STEPS]

"""Quantiser: latent <-> integer symbols. This is the one place where floats become integers, on the edge, once.

    latent [K, H, W]  --- x gain[level, k] --->  round to nearest  --->  symbols int32
    symbols int32     --- / gain[level, k] --->  latent estimate

A rate level is a row of gains; changing it changes no weights and costs nothing (gain vectors as in Cui et al.,
"Asymmetric Gained Deep Image Compression With Continuous Rate Adaptation", CVPR 2021).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SYMBOL_LIMIT = 2**15 - 1
"""Symbols are clipped to +-SYMBOL_LIMIT, so that a broken head cannot overflow the coder's escapes."""


def quantise(latent: npt.NDArray[np.float32], gain: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """Turn a latent into symbols.

    Args:
        latent: float32 [K, H, W].
        gain: float32 [K], positive; channel k is multiplied by gain[k] before rounding (half to even).

    Returns:
        int32 [K, H, W] in -SYMBOL_LIMIT..SYMBOL_LIMIT; not-a-number becomes 0.
    """
    scaled = np.rint(latent * gain[:, None, None])
    np.nan_to_num(scaled, copy=False, nan=0.0, posinf=SYMBOL_LIMIT, neginf=-SYMBOL_LIMIT)
    return np.clip(scaled, -SYMBOL_LIMIT, SYMBOL_LIMIT).astype(np.int32)


def dequantise(symbols: npt.NDArray[np.int32], gain: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Turn symbols int32 [K, H, W] into a latent estimate float32 [K, H, W]; undoes `quantise` up to rounding."""
    return symbols.astype(np.float32) / gain[:, None, None]

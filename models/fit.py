"""Fits one map of a cut: features and gradients of the calibration photographs -> what a bundle holds of it.

features, gradients --closed form--> transform --> components, in order of importance --> symbols at each rate level
                                                                   classes and tables, slices <--
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .bitstream import MAX_SLICE_BYTES
from .closed_form import ClosedForm, fit_closed_form
from .entropy_model import TableCounts, scale_classes
from .quantiser import quantise

DISTORTIONS = tuple(round(0.014 * 1.3**i, 4) for i in range(10))
"""Rate levels, finest first: by how much, in nats, quantising the calibration photographs disturbs the answer, to
second order. In trials 0.06 kept 0.98 of the accuracy, 0.09 kept 0.95 and 0.12 kept 0.9, wherever it was cut."""
BOX_DISTORTIONS = tuple(round(0.03 * 1.3**i, 4) for i in range(10))
"""The same for detectors, whose probe is a projection of scores and corners and not in nats."""
SLICE_SHARES = (0.4, 0.65, 0.85)
"""Shares of a rate level's bits at which the first slices end; the last slice holds the rest."""
NEGLIGIBLE = 0.01
"""Mean magnitude of symbols below which a component is not sent: coding what hardly ever happens costs more time and
bytes than it gives."""
STEPS_FROM = 64
"""Calibration photographs from which the quantiser's steps are found."""
MOST_BYTES = 2**15
"""Mean bytes of a frame that no rate level is to go beyond: what takes more is better sent as a picture. Where the
finest levels would (wide maps of large inputs, weights that were never trained), their steps are coarser."""
COARSER = 1.15
"""Ratio of the steps of levels that are all held by `MOST_BYTES`, so that they still are several."""
SLICE_BYTES = (MAX_SLICE_BYTES + 1) // 2
"""Mean bytes of every slice but the last at most: half of what a packet has room for, since frames differ."""
MAX_NUMBERS = 2**26
"""Features that are fitted together, 256 MiB a copy; of larger maps fewer photographs are taken."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class FittedMap:
    """One map's part of a bundle.

    Attributes:
        features: (C, H, W).
        latent_channels: K <= C; channels of the latent behind which every symbol is 0 even at the finest rate level.
        slices: per rate level, number of components at which each slice ends.
        arrays: the tensors that `Bundle` documents, without the name of the split before them.
    """

    features: tuple[int, int, int]
    latent_channels: int
    slices: tuple[tuple[int, ...], ...]
    arrays: Mapping[str, Array]


def fit_map(features: Tensor, gradients: Tensor, distortions: Sequence[float] = DISTORTIONS) -> FittedMap:
    """Fit transform, quantiser, entropy model and slices of a map.

    Args:
        features: float32 [N, C, H, W] of the calibration photographs; H and W may be 1. At most `MAX_NUMBERS` are used.
        gradients: float32 [M, C, H, W]; half the mean square of their product with a small disturbance of the features
            is the divergence of the answer in nats (see `closed_form.fisher_gradients`).
        distortions: of the rate levels, rising.
    """
    most = max(MAX_NUMBERS // features[0].numel(), 1)
    features, gradients = features[:most], gradients[:most]
    form = fit_closed_form(features, gradients)
    with torch.inference_mode():
        latents = form.encode(features).numpy()
    shape = (features.shape[1], features.shape[2], features.shape[3])
    levels = _gains(latents, form.sensitivities.numpy(), distortions)
    coding = fit_coding(latents, levels)
    kept = coding.latent_channels
    return FittedMap(shape, kept, coding.slices, {**coding.arrays, **_matrices(form, kept)})


@dataclass(frozen=True)
class FittedCoding:
    """How a map's latents are quantised and coded; fields as `FittedMap` has them, arrays without the transform."""

    latent_channels: int
    slices: tuple[tuple[int, ...], ...]
    arrays: Mapping[str, Array]


def fit_coding(latents: npt.NDArray[np.float32], levels: Sequence[np.float32]) -> FittedCoding:
    """Fit order, entropy model and slices to latents [N, K, H, W], for rate levels of these gains, finest first."""
    order, kept = _order(latents, levels)
    latents = latents[:, :kept]
    counts, classes = TableCounts(), []
    for gain in levels:
        symbols = _symbols(latents, gain, order)
        coded = _coded(np.abs(symbols).mean(0))
        classes.append(scale_classes(symbols[:, :coded]))
        counts.add(symbols[:, :coded], classes[-1])
    tables, where = counts.freeze()
    arrays: dict[str, Array] = {
        "gains": np.repeat(np.array(levels, np.float32)[:, None], kept, 1),
        "order": order,
        "cdf": tables.cdf,
        "sizes": tables.sizes,
        "offsets": tables.offsets,
    }
    slices = []
    for level, gain in enumerate(levels):
        indexes = where[classes[level]]
        symbols = _symbols(latents, gain, order[: len(indexes)])
        bits = tables.bits(symbols, np.broadcast_to(indexes, symbols.shape))
        slices.append(_slice_ends(bits.sum(0), len(bits)))
        arrays[f"{level}/indexes"] = indexes
    return FittedCoding(kept, tuple(slices), arrays)


def _symbols(
    latents: npt.NDArray[np.float32], gain: np.float32, components: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """Symbols int32 [N, n] of the components of latents [N, K, H, W]."""
    gains = np.full(latents.shape[1], gain, np.float32)
    return np.stack([quantise(latent, gains).reshape(-1)[components] for latent in latents])


def _gains(
    latents: npt.NDArray[np.float32], sensitivities: npt.NDArray[np.float32], distortions: Sequence[float]
) -> list[np.float32]:
    """Gains of the rate levels that disturb the answer by `distortions`, on latents [N, K, H, W]."""
    sample = latents[:STEPS_FROM]

    def disturbed(step: float) -> float:
        error = sample - np.rint(sample / np.float32(step)) * np.float32(step)
        return float((np.square(error).mean(0, dtype=np.float64) * sensitivities).sum() / 2)

    unit = max(float(sample.std()), 1e-12)
    coarse = unit * np.geomspace(1e-3, 1e3, 16)
    reached = np.array([disturbed(step) for step in coarse])
    low = min(max(int(np.searchsorted(reached, distortions[0])) - 1, 0), len(coarse) - 2)
    high = min(int(np.searchsorted(reached, distortions[-1])), len(coarse) - 1)
    steps = np.geomspace(coarse[low], coarse[max(high, low + 1)], 24)
    # A map whose loss disturbs the answer by less than is asked for gets the coarsest step that is tried.
    rising = np.maximum.accumulate([disturbed(step) for step in steps])
    logarithms = np.interp(np.log(distortions), np.log(rising + 1e-30), np.log(steps))
    found = np.exp(logarithms)
    least = _finest_step(sample, float(found[0]), unit * 1e6)
    return [np.float32(1 / max(step, least * COARSER**i)) for i, step in enumerate(found)]


def _finest_step(sample: npt.NDArray[np.float32], wanted: float, largest: float) -> float:
    """The smallest step from `wanted` on at which latents [N, K, H, W] take `MOST_BYTES` a frame; 0 where `wanted` is
    one: nothing then is held."""

    def takes_more(step: float) -> bool:
        return most_bits(np.abs(np.rint(sample / np.float32(step))).mean(0)) > 8 * MOST_BYTES

    if not takes_more(wanted):
        return 0.0
    low, high = np.log(wanted), np.log(largest)
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if takes_more(float(np.exp(middle))) else (low, middle)
    return float(np.exp(high))


def most_bits(magnitudes: npt.NDArray[np.float32]) -> float:
    """Bits of integers of which the mean magnitudes are known: those of two-sided geometric distributions, which have
    the largest entropy of all that are symmetric."""
    mean = magnitudes[magnitudes > 0].astype(np.float64)
    ratio = (np.sqrt(1 + np.square(mean)) - 1) / mean
    return float((np.log2((1 + ratio) / (1 - ratio)) - mean * np.log2(ratio)).sum())


def _order(latents: npt.NDArray[np.float32], gains: Sequence[np.float32]) -> tuple[npt.NDArray[np.int32], int]:
    """Components that are coded, as places in [K, H, W] laid flat, most important first; and K, the channels kept."""
    places = latents.shape[2] * latents.shape[3]
    everything = np.arange(latents[0].size, dtype=np.int32)
    # By what a middling rate level sends of them; what it sends of none is put in order by the latents themselves.
    weight = np.abs(_symbols(latents, gains[len(gains) // 2], everything)).mean(0)
    order = np.lexsort((-np.abs(latents).mean(0).reshape(-1), -weight)).astype(np.int32)
    order = order[: _coded(np.abs(_symbols(latents, gains[0], everything)).mean(0))]
    return order, int(order.max()) // places + 1


def _coded(magnitudes: npt.NDArray[np.float64]) -> int:
    """How many components are sent, given the mean magnitudes float64 [n] of their symbols."""
    least = min(len(SLICE_SHARES) + 1, len(magnitudes))  # a slice has at least one
    return max(int((magnitudes >= NEGLIGIBLE).sum()), least)


def _matrices(form: ClosedForm, kept: int) -> dict[str, Array]:
    channels, rows, columns = (torch.stack((e, d)).numpy() for e, d in zip(form.encoders, form.decoders, strict=True))
    return {
        "mean": form.mean.numpy(),
        "encoder": np.ascontiguousarray(channels[0, :kept]),
        "decoder": np.ascontiguousarray(channels[1, :, :kept]),
        "weights": form.weights[:kept].contiguous().numpy(),
        "rows": rows,
        "columns": columns,
    }


def _slice_ends(bits: npt.NDArray[np.float64], frames: int) -> tuple[int, ...]:
    """Component at which each slice ends, given what each takes in all frames: at about `SLICE_SHARES` of the bits, at
    most `SLICE_BYTES` a frame and at least one component a slice."""
    count, total = len(bits), max(bits.sum(), 1e-12)
    shares, most = np.cumsum(bits) / total, 8 * SLICE_BYTES * frames / total
    ends: list[int] = []
    for i, wanted in enumerate(SLICE_SHARES):
        share = min(wanted, (i + 1) * most)
        last = count - len(SLICE_SHARES) + i
        end = min(int(np.searchsorted(shares, share)) + 1, last)
        if end > (ends[-1] if ends else 0):
            ends.append(end)
        elif last > (ends[-1] if ends else 0):
            ends.append(ends[-1] + 1 if ends else 1)
    return (*ends, count)

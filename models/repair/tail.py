"""Repair: what a server may add behind the entropy decoder so that coarse symbols are answered better.

    symbols, gain --Decoder--> features --Denoiser--> features + change --tail + deltas--> scores
                    as before             learned                         learned

Nothing of it is on the edge or in the bitstream, so a bundle's fingerprint does not cover it: a server with repair
serves devices whose half was exported without, and the other way round. The tensors, float16, have their own file:

    SPLIT/denoise/LAYER/weight, .../bias       convolutions of the denoiser, first to last
    SPLIT/denoise/mean, .../deviation          of the features' channels [C], by which it normalises
    SPLIT/denoise/resample/weight, .../bias, .../size
                                               of a detector on fewer pixels, to the grid of all: see `resample`
    SPLIT/restore/...                          what stands in the denoiser's place behind a light head: see `restorer`
    SPLIT/tail/NAME, .../left, .../right       what is added to the tail's tensor NAME, see `deltas`
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backbones import Backbone
from ..bundle import Bundle
from ..exceptions import BundleError
from ..learning.eight_bits import as_floats
from .deltas import with_deltas
from .resample import Resample, own_cut
from .restorer import RESTORE, Restorer

DENOISE, RESAMPLE, TAIL = "denoise", "denoise/resample", "tail"


class Denoiser(nn.Module):
    """features float32 [B, C, H, W] and each frame's gain [B, K] -> features float32 [B, C, H, W], nearer to the uncut.

    It knows what features look like, which the linear decoder does not. Its change is in units of the quantiser's step,
    so that what a coarse rate level needs does no harm at a fine one. It begins as the identity.
    """

    def __init__(
        self, mean: Tensor, deviation: Tensor, gain: float, hidden: int, resample: Resample | None = None
    ) -> None:
        """Mean and deviation float32 [C] of the features; a middling gain; channels of the hidden layers; what goes
        before, where the features are of fewer pixels than the tail's."""
        super().__init__()
        self.resample = resample
        channels = len(mean)
        self.gain = gain
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(channels + 1, hidden, 1),
                nn.Conv2d(hidden, hidden, 3, padding=1),
                nn.Conv2d(hidden, hidden, 3, padding=1),
                nn.Conv2d(hidden, channels, 1),
            ]
        )
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)
        self.mean, self.deviation = nn.Buffer(mean[:, None, None]), nn.Buffer(deviation[:, None, None])
        self.to(memory_format=torch.channels_last)

    def forward(self, features: Tensor, gain: Tensor) -> Tensor:
        """Add what the quantiser took away, as far as it can be told."""
        if self.resample is not None:
            features = self.resample(features)
        step = (self.gain / gain.mean(1))[:, None, None, None]
        # Steps span less than one decade; their logarithm is of the size of the normalised features.
        level = step.log().expand(-1, 1, *features.shape[2:])
        hidden = torch.cat([(features - self.mean) / self.deviation, level], 1)
        for layer in self.layers[:-1]:
            hidden = functional.relu(layer(hidden))
        change: Tensor = self.layers[-1](hidden)
        return features + change * self.deviation * step

    def tensors(self) -> dict[str, Tensor]:
        """What a bundle holds of it, without the split point's name."""
        found = {f"{DENOISE}/{key.replace('.', '/')}": value for key, value in self.layers.state_dict().items()}
        found |= {f"{DENOISE}/{key}": getattr(self, key).flatten() for key in ("mean", "deviation")}
        if self.resample is not None:
            found |= {f"{RESAMPLE}/{key}": value for key, value in self.resample.tensors().items()}
        return found


class DenoisingDecoder(nn.Module):
    """A decoder with a denoiser or a restorer behind it; called like the decoder."""

    def __init__(self, decoder: nn.Module, denoiser: nn.Module) -> None:
        super().__init__()
        self.decoder, self.denoiser = decoder, denoiser

    def forward(self, symbols: Tensor, gain: Tensor) -> Tensor:
        """symbols [B, K, H, W], gain [B, K] -> features float32 [B, C, H, W]."""
        features: Tensor = self.denoiser(self.decoder(symbols, gain), gain)
        return features


def tail_of(bundle: Bundle, split: str, backbone: Backbone) -> nn.Module:
    """The tail behind a split point's decoder: at the backbone's own size where the repair resamples to it."""
    return backbone.tail(own_cut(split) if f"{split}/{RESAMPLE}/size" in bundle.repair else split)


def repaired(bundle: Bundle, split: str, decoder: nn.Module, tail: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Decoder and tail of a split point with the bundle's repair, or the same two where it holds none.

    Args:
        bundle: with or without repair.
        split: name of a split point.
        decoder: symbols [B, K, H, W], gain [B, K] -> features [B, C, H, W].
        tail: features -> outputs, see `tail_of`; it is copied, not changed.

    Raises:
        BundleError: a tensor of the repair does not fit the tail, or is of a part that this version does not know.
    """
    tensors = repair_of(bundle, split)
    if not tensors:
        return decoder, tail
    if unknown := {key.split("/")[0] for key in tensors} - {DENOISE, RESTORE, TAIL}:
        raise BundleError(
            f"the repair of {split} in bundle {bundle.name} has a part {min(unknown)!r} that this version does not "
            "know and would answer worse without; bring the server up to date, or learn it anew with `headrace repair`"
        )
    deltas = {key.removeprefix(f"{TAIL}/"): value for key, value in tensors.items() if key.startswith(f"{TAIL}/")}
    try:
        denoiser: nn.Module | None = None
        if f"{DENOISE}/deviation" in tensors:
            denoiser = _denoiser(tensors, mean_gain(bundle, split))
        if restores(bundle, split):
            denoiser = Restorer.of(tensors, mean_gain(bundle, split))
        if denoiser is not None:
            decoder = DenoisingDecoder(decoder, denoiser).requires_grad_(False).eval()
        return decoder, with_deltas(tail, deltas)
    except (KeyError, RuntimeError) as error:
        raise BundleError(
            f"the repair of {split} in bundle {bundle.name} does not fit its backbone: {error}; "
            "learn it anew with `headrace repair`"
        ) from error


def repair_of(bundle: Bundle, split: str) -> dict[str, Tensor]:
    """What a bundle holds of a split point's repair, float32, without its name."""
    start = f"{split}/"
    stored = {key.removeprefix(start): value for key, value in bundle.repair.items() if key.startswith(start)}
    return {key: torch.from_numpy(value) for key, value in as_floats(stored).items()}


def said_without(bundle: Bundle, names: Collection[str]) -> list[str]:
    """What the provenance says of the repairs of other split points than these, each on its own."""
    said = str(bundle.provenance.get("repair", "")).split("; ")
    return [part for part in said if part and part.split()[0] not in names]


def restores(bundle: Bundle, split: str) -> bool:
    """Whether a split point's repair has a restorer."""
    return f"{split}/{RESTORE}/deviation" in bundle.repair


def mean_gain(bundle: Bundle, split: str) -> float:
    """The middle of a split point's gains on a logarithmic scale."""
    return float(np.exp(np.log(bundle.tensors[f"{split}/gains"].mean(1)).mean()))


def _denoiser(tensors: Mapping[str, Tensor], gain: float) -> Denoiser:
    mean, deviation = tensors[f"{DENOISE}/mean"], tensors[f"{DENOISE}/deviation"]
    start = f"{RESAMPLE}/"
    found = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
    resample = Resample.of(found) if found else None
    denoiser = Denoiser(mean, deviation, gain, len(tensors[f"{DENOISE}/0/weight"]), resample)
    layers = range(len(denoiser.layers))
    state = {f"{i}.{part}": tensors[f"{DENOISE}/{i}/{part}"] for i in layers for part in ("weight", "bias")}
    denoiser.layers.load_state_dict(state)
    return denoiser

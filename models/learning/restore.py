"""A head that was made light and a restorer on the server, taught together.

pixels -> light head -> latent -> quantiser -> decoder -> restorer -> features -> latent     the device, then the server
pixels -> whole head -> latent, the target

What a light head cannot compute is lost to a server that takes its latent for the whole head's. Here the latent need
not be that any more: it is to be something from which the server, which has the time, can tell the whole head's.
Symbols are rounded (with the gradient of what was not rounded: Bengio, Leonard and Courville, 2013) at a rate level of
each view's own, and their bytes are priced by what a level costs the whole head: how much less of its latent's variance
the next finer level loses, for how many bytes more. Without a price the head would say more in more bytes.

The target is dense, so neither the rest of the backbone nor a GPU is needed. What comes after it, towards the answers,
is `repair`, which begins with the restorer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..bottleneck import Decoder, Encoder
from ..exceptions import DataError
from ..repair.data import arriving
from ..repair.restorer import RESTORE, Restorer
from ..repair.tail import mean_gain, repair_of, restores
from .course import PART, Course
from .eight_bits import in_eight_bits
from .light import Arrays, Light, half

ODDS = (4, 3, 2, 2, 2, 1, 1)
"""Of rate levels, from the finest on. At coarser ones the quantiser loses so much that a light head is as good."""
SILENT = 1e-3
"""Least mean magnitude of a symbol: one that is all but never sent has the price of this."""


class Restored:
    """A light head with its restorer: what `Light` asks for."""

    def __init__(self, light: Light, restorer: Restorer, split: str) -> None:
        self._light, self.restorer, self._split = light, restorer, split
        self.parameters: Mapping[str, nn.Parameter] = {
            **{f"restorer/{name}": value for name, value in restorer.named_parameters()},
            **light.parameters,
        }
        self.students: Mapping[str, Callable[[Tensor], Tensor]] = light.students
        self.clipped: Sequence[int] = light.clipped

    def tensors(self) -> Arrays:
        """Of the head."""
        return self._light.tensors()

    def repair(self) -> Arrays:
        """The restorer, kernels in eight bits."""
        found = {f"{self._split}/{key}": half(value) for key, value in self.restorer.tensors().items()}
        return in_eight_bits(found)


class RestoreCourse(Course):
    """A lesson of one head of the backbone's own and its restorer."""

    def prepare(self) -> None:
        """Raises:
        DataError: the lesson is of a learned encoder, or the split point has a single rate level.
        """
        bundle, (spec, *others) = self.bundle, self.lesson.specs
        if others or spec.learned is not None:
            raise DataError(f"{spec.name} is a learned encoder's, whose synthesis learned with it; nothing to restore")
        if spec.rate_levels < 2:
            raise DataError(f"{spec.name} has one rate level; bytes have a price only where there are two")
        self._split, levels = spec.name, range(spec.rate_levels)
        self._encoder, self._decoder = Encoder.of(bundle, spec.name), Decoder.of(bundle, spec.name)
        self._gains = torch.from_numpy(np.stack([bundle.gain(spec.name, level) for level in levels]))
        sent = [arriving(bundle, spec.name, level)[-1] for level in levels]
        self._sent = torch.from_numpy(np.stack(sent)).float()
        odds = np.array((ODDS + (0,) * spec.rate_levels)[: spec.rate_levels], np.float64)
        self._odds = odds / odds.sum()
        latents = torch.cat([self.wanted(pixels)[spec.name] for pixels in self.apart])
        self._prices = self._priced(latents)

    def networks(self, clips: Collection[int] | None, hidden: Sequence[int] = ()) -> Light:
        """As the bundle has them, but for clips and hidden channels; a restorer that it has goes on."""
        light = super().networks(clips, hidden)
        gain = mean_gain(self.bundle, self._split)
        if restores(self.bundle, self._split):
            return Restored(light, Restorer.of(repair_of(self.bundle, self._split), gain), self._split)
        with torch.no_grad():
            latents = torch.cat([light.students[self._split](pixels) for pixels in self.apart])
            gains = self._gains[:1].expand(len(latents), -1)
            features = self._decoder(self._symbols(latents, torch.zeros(len(latents), dtype=torch.int64)), gains)
        deviation = features.std((0, 2, 3))
        torch.manual_seed(self.how.seed)
        restorer = Restorer(features.mean((0, 2, 3)), deviation.clamp_min(1e-3 * float(deviation.mean())), gain)
        return Restored(light, restorer, self._split)

    def arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """What the bundle has that the lesson depends on, a restorer that it begins with too."""
        start = f"{self._split}/{RESTORE}/"
        return {**super().arrays(), **{k: v for k, v in self.bundle.repair.items() if k.startswith(start)}}

    def step(self, networks: Light, step: int) -> Iterator[Tensor]:
        """The sum of a step's errors and of its bytes' prices, part by part."""
        assert isinstance(networks, Restored)
        pixels = self.views.at(step)
        wanted = self.wanted(pixels)[self._split]
        rng = np.random.default_rng((self.how.seed, 3, step, self.team.rank))
        chosen = torch.from_numpy(rng.choice(len(self._odds), len(pixels), p=self._odds))
        for at in range(0, len(pixels), PART):
            part = slice(at, at + PART)
            losses = self._losses(networks, pixels[part], wanted[part], chosen[part])
            yield losses.sum() / len(pixels)

    def _losses(self, networks: Restored, pixels: Tensor, wanted: Tensor, levels: Tensor) -> Tensor:
        latents = networks.students[self._split](pixels)
        symbols, gains = self._symbols(latents, levels), self._gains[levels]
        restored: Tensor = self._encoder(networks.restorer(self._decoder(symbols, gains), gains))
        errors = (restored - wanted).square().sum((1, 2, 3)) / self.varied[self._split]
        magnitudes = (latents * gains[:, :, None, None]).abs()
        losses: Tensor = errors + (magnitudes * self._prices[levels]).sum((1, 2, 3))
        return losses

    def _symbols(self, latents: Tensor, levels: Tensor) -> Tensor:
        """Those of whole packets, float32, rounded; their gradient is that of what was not."""
        scaled = latents * self._gains[levels][:, :, None, None]
        rounded = scaled + (scaled.round() - scaled).detach()
        return rounded * self._sent[levels]

    def _priced(self, latents: Tensor) -> Tensor:
        """What a magnitude of 1 costs, float32 [L, K, h, w], in shares of the latent's variance.

        Of a symbol whose magnitudes fall off geometrically (both ways alike) each step further costs as many bits; how
        many, its mean magnitude tells.
        """
        points = [self.bundle.feature_point(self._split, level) for level in range(len(self._gains))]
        lost, bits = [], []
        for level in range(len(points)):
            levels = torch.full((len(latents),), level)
            found = self._symbols(latents, levels) / self._gains[level][:, None, None]
            lost.append(float((found - latents).square().sum((1, 2, 3)).mean()) / self.varied[self._split])
            mean = (latents * self._gains[level][:, None, None]).abs().mean(0).clamp_min(SILENT)
            ratio = ((1 + mean**2).sqrt() - 1) / mean
            bits.append(-ratio.log2() * self._sent[level])
        slopes = [
            max(b - a, 0.0) / max(8 * (p.bytes_median - q.bytes_median), 1.0)
            for a, b, p, q in zip(lost, lost[1:], points, points[1:], strict=False)
        ]
        slopes.append(slopes[-1])
        if not all(math.isfinite(slope) for slope in slopes):
            raise DataError(f"{self.called}: its latents are not finite on the photographs given")
        return torch.stack(bits) * torch.tensor(slopes)[:, None, None, None]

"""The networks that `lighten` teaches: all widths of a learned encoder together, or one head of the backbone's own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..backbones import Backbone, Pixels
from ..bottleneck import Encoder
from ..bundle import Bundle, SplitSpec
from ..chain import Chain
from ..cutting.cuts import Head
from ..cutting.own_head import OwnHead
from ..exceptions import DataError
from .cut import HEAD, own_heads
from .narrow import narrow
from .resume import resume_encoder
from .slimmable import SlimmableEncoder

Arrays = dict[str, npt.NDArray[Any]]


class Light(Protocol):
    """Networks that learn together, from what the bundle has."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What learns, by name."""

    @property
    def students(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Split point -> pixels uint8 [B, S, S, 3] -> latent float32 [B, K, h, w]."""

    @property
    def clipped(self) -> Sequence[int]:
        """Numbers of its ReLU6s, before any was changed."""

    def tensors(self) -> Arrays:
        """What the bundle will hold of them, see `cut`."""

    def repair(self) -> Arrays:
        """What the server's half has learned along, see `repair.restorer`; empty for nothing."""


class LightEncoder:
    """All widths of a learned encoder, which share their weights."""

    def __init__(
        self,
        backbone: Backbone,
        bundle: Bundle,
        specs: Sequence[SplitSpec],
        clips: Collection[int] | None,
        pixels: Tensor,
        hidden: Sequence[int],
    ) -> None:
        """From the bundle's weights. Normalisations keep the statistics of `pixels` uint8 [B, S, S, 3]; scale and
        offset learn.

        Raises:
            DataError: `hidden` channels are given.
        """
        if hidden:
            raise DataError("a learned encoder has its widths; hidden channels are for heads of the backbone's own")
        learned = {s.name: s.learned for s in specs if s.learned is not None}
        (self._name,) = {each.name for each in learned.values()}
        self._normalise = Pixels(backbone.preprocessing)
        widths = {each.width: each.channels for each in learned.values()}
        self.encoder = SlimmableEncoder(widths, specs[0].features[0], clips)
        resume_encoder(bundle.learned, self._name, self.encoder, self._normalise(pixels))
        self.encoder.eval().to(memory_format=torch.channels_last)
        self.parameters: Mapping[str, nn.Parameter] = dict(self.encoder.named_parameters())
        self.students: Mapping[str, Callable[[Tensor], Tensor]] = {
            name: partial(self._latent, each.width, Encoder.of(bundle, name)) for name, each in learned.items()
        }
        layers = self.encoder.layers(next(iter(widths)))
        self.clipped: Sequence[int] = [
            at for at, layer in enumerate(layers) if layer.layer.activated and not layer.layer.leaky
        ]

    def _latent(self, width: str, transform: Encoder, pixels: Tensor) -> Tensor:
        latent: Tensor = transform(self.encoder(self._normalise(pixels), width))
        return latent

    def tensors(self) -> Arrays:
        """Of all widths."""
        return {f"{self._name}/encoder/{key}": half(value) for key, value in self.encoder.parts().items()}

    def repair(self) -> Arrays:
        """Nothing."""
        return {}


class LightCut:
    """The backbone's own head at one split point."""

    def __init__(
        self,
        backbone: Backbone,
        bundle: Bundle,
        specs: Sequence[SplitSpec],
        clips: Collection[int] | None,
        pixels: Tensor,
        hidden: Sequence[int],
    ) -> None:
        """From the backbone's weights, or a light head's; `pixels` are what channels are chosen by, see `narrow`.

        Raises:
            DataError: it has fewer hidden channels than it is to keep.
        """
        (spec,) = specs
        self._name = spec.name
        sized, cut = backbone.at(spec.name)
        head, normalise = Head(sized.traced, sized.cut(cut)), Pixels(sized.preprocessing)
        self._head, before = OwnHead(head, clips), None
        if spec.clips is not None:
            self._head, before = (own_heads(bundle)[spec.name].applied(head) for _ in range(2))
        if hidden:
            with torch.no_grad():
                narrow(self._head, OwnHead(head), hidden, normalise(pixels), before)
        self.parameters: Mapping[str, nn.Parameter] = self._head.learnable()
        self._head.to(memory_format=torch.channels_last)
        self._chain = Chain(normalise, self._head, Encoder.of(bundle, spec.name))
        self.students: Mapping[str, Callable[[Tensor], Tensor]] = {spec.name: self._latent}
        self.clipped: Sequence[int] = range(self._head.clips)

    def _latent(self, pixels: Tensor) -> Tensor:
        latent: Tensor = self._chain(pixels)[0]
        return latent

    def tensors(self) -> Arrays:
        """Of the head."""
        return {f"{self._name}/{HEAD}/{key}": half(value) for key, value in self._head.weights().items()}

    def repair(self) -> Arrays:
        """Nothing."""
        return {}


def half(value: Tensor) -> npt.NDArray[np.float16]:
    """As a bundle holds it."""
    return value.detach().half().contiguous().numpy()

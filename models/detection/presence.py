"""The filter's network: features at a cut -> how likely something of interest is in the frame.

features [B, C, H, W] --pool to at most 16x16, normalise, 1x1, three 3x3, 1x1--> a logit a place
                                                            logits --log-sum-exp--> score [B]

While it is learned its convolutions are normalised by the batch (Ioffe and Szegedy, "Batch Normalization", 2015); what
is stored has that folded into them, and the input's normalisation too.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..bundle import Bundle
from ..exceptions import BundleError

PLACES = 16
"""Most rows and columns that are looked at; larger maps are pooled."""
WIDTH = 64
DEPTH = 3
PRIOR = -10.0
"""Logit of a place to begin with; most hold nothing."""


class Block(nn.Module):
    """float32 [B, W, h, w] -> the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.around = nn.Conv2d(width, width, 3, padding=1)
        self.around_norm: nn.Module = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.around_norm(self.around(x)))


class Presence(nn.Module):
    """features float32 [B, C, H, W] -> score float32 [B], higher the likelier something of interest is there."""

    mean: Tensor | None
    deviation: Tensor | None

    def __init__(self, channels: int, side: int, width: int = WIDTH, depth: int = DEPTH) -> None:
        """For maps of `channels` and at most `side` rows or columns; `depth` blocks of `width` channels."""
        super().__init__()
        self.factor = -(-side // PLACES)
        seen = channels * (2 if self.factor > 1 else 1)
        self.register_buffer("mean", torch.zeros(seen))
        self.register_buffer("deviation", torch.ones(seen))
        self.stem = nn.Conv2d(seen, width, 1)
        self.stem_norm: nn.Module = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.out = nn.Conv2d(width, 1, 1)
        nn.init.constant_(self.get_parameter("out.bias"), PRIOR)

    def pooled(self, features: Tensor) -> Tensor:
        """What is looked at: maxima and means of `factor` x `factor` places."""
        if self.factor == 1:
            return features
        return torch.cat(
            (functional.max_pool2d(features, self.factor), functional.avg_pool2d(features, self.factor)), 1
        )

    def places(self, pooled: Tensor) -> Tensor:
        """A logit a place, float32 [B, h, w]."""
        known = pooled
        if self.mean is not None and self.deviation is not None:
            known = (pooled - self.mean[:, None, None]) / self.deviation[:, None, None]
        known = functional.relu(self.stem_norm(self.stem(known)))
        for block in self.blocks:
            known = block(known)
        logits: Tensor = self.out(known)
        return logits[:, 0]

    def score(self, pooled: Tensor) -> Tensor:
        """Of frames as they are looked at, float32 [B]."""
        return self.places(pooled).flatten(1).logsumexp(1)

    def forward(self, features: Tensor) -> Tensor:
        return self.score(self.pooled(features))

    def multiply_accumulates(self, rows: int, columns: int) -> int:
        """Of a frame whose features have that many."""
        places = (rows // self.factor) * (columns // self.factor)
        return places * sum(p.numel() for p in self.parameters() if p.ndim > 1)

    def fold(self) -> Presence:
        """Put the normalisations into the convolutions, and round to what is stored; it learns no more."""
        self.requires_grad_(False).eval()
        for owner, name in ((self, "stem"), *((block, "around") for block in self.blocks)):
            convolution, norm = getattr(owner, name), getattr(owner, f"{name}_norm")
            if isinstance(norm, nn.BatchNorm2d):
                assert norm.running_var is not None and norm.running_mean is not None
                scale = norm.weight / (norm.running_var + norm.eps).sqrt()
                convolution.weight *= scale[:, None, None, None]
                convolution.bias.copy_((convolution.bias - norm.running_mean) * scale + norm.bias)
                setattr(owner, f"{name}_norm", nn.Identity())
        if self.mean is not None and self.deviation is not None:
            self.stem.weight /= self.deviation[:, None, None]
            self.get_parameter("stem.bias").sub_(self.stem.weight.flatten(1) @ self.mean)
            self.mean = self.deviation = None
        for value in self.parameters():
            value.copy_(value.half().float())
        return self

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """What a bundle holds of it when it is folded, float16, without the split point's name."""
        return {f"filter/{k.replace('.', '/')}": v.detach().half().cpu().numpy() for k, v in self.state_dict().items()}

    @classmethod
    def of(cls, bundle: Bundle, split: str) -> Presence:
        """The bundle's filter at a split point.

        Raises:
            BundleError: its layers are others.
        """
        spec, start = bundle.split(split), f"{split}/filter/"
        state = {
            key.removeprefix(start).replace("/", "."): torch.from_numpy(value.copy()).float()
            for key, value in bundle.tensors.items()
            if key.startswith(start) and not key.endswith("/threshold")
        }
        try:
            return cls.from_state(state, spec.features)
        except (KeyError, RuntimeError) as error:
            raise BundleError(
                f"bundle {bundle.name}: the filter of {split} has other layers than this version knows; learn it anew "
                "with `headrace filter`"
            ) from error

    @classmethod
    def from_state(cls, state: dict[str, Tensor], features: tuple[int, int, int]) -> Presence:
        """The folded filter whose tensors are given, float32, for features [C, H, W]."""
        depth = sum(key.endswith(".around.weight") for key in state)
        made = cls(features[0], max(features[1:]), len(state["stem.weight"]), depth).fold()
        made.load_state_dict(state)
        return made

"""Restorer: what a server adds behind the entropy decoder because the device's head is light.

    symbols, gain --Decoder--> features --Restorer--> features nearer to the whole head's --tail--> scores

A head that was made light gives features that are off by what it cannot compute any more. Much of that can be told
from the rest of the map, by a network that has the server's time. It is learned with the head, towards what the whole
head gives (`learning.restore`), and stands in the denoiser's place: it knows the quantiser's step too. float16, or
kernels in eight bits:

    SPLIT/restore/enter/weight, .../bias       1x1, from the features' channels and the step
    SPLIT/restore/inner/NUMBER/weight, .../bias
                                               3x3, two a residual block (He et al., CVPR 2016)
    SPLIT/restore/leave/weight, .../bias       1x1, to what is added
    SPLIT/restore/mean, .../deviation          of the features' channels [C], by which it normalises
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

RESTORE = "restore"
HIDDEN = 64
BLOCKS = 2
QUIET = 0.01
"""Of the usual deviation, what a residual block's last weights begin with."""


class Restorer(nn.Module):
    """features float32 [B, C, H, W] and each frame's gain [B, K] -> features float32 [B, C, H, W], nearer to the uncut.

    It begins as the identity.
    """

    def __init__(
        self, mean: Tensor, deviation: Tensor, gain: float, hidden: int = HIDDEN, blocks: int = BLOCKS
    ) -> None:
        """Mean and deviation float32 [C] of the features; a middling gain; channels inside; residual blocks."""
        super().__init__()
        channels = len(mean)
        self.gain = gain
        self.enter = nn.Conv2d(channels + 1, hidden, 1)
        self.inner = nn.ModuleList([nn.Conv2d(hidden, hidden, 3, padding=1) for _ in range(2 * blocks)])
        self.leave = nn.Conv2d(hidden, channels, 1)
        for parameter in self.leave.parameters():
            nn.init.zeros_(parameter)
        for name, weight in self.inner.named_parameters():
            if name.endswith("weight") and int(name.split(".")[0]) % 2:
                nn.init.normal_(weight, 0, QUIET / (9 * hidden) ** 0.5)
        self.mean, self.deviation = nn.Buffer(mean[:, None, None]), nn.Buffer(deviation[:, None, None])
        self.to(memory_format=torch.channels_last)

    def forward(self, features: Tensor, gain: Tensor) -> Tensor:
        """Add what the head could not compute, and the quantiser took away, as far as it can be told."""
        level = (self.gain / gain.mean(1)).log()[:, None, None, None].expand(-1, 1, *features.shape[2:])
        given = torch.cat([(features - self.mean) / self.deviation, level], 1)
        hidden = functional.relu(self.enter(given.contiguous(memory_format=torch.channels_last)))
        for first, second in zip(self.inner[::2], self.inner[1::2], strict=True):
            hidden = hidden + second(functional.relu(first(functional.relu(hidden))))
        change: Tensor = self.leave(functional.relu(hidden))
        return features + change * self.deviation

    def tensors(self) -> dict[str, Tensor]:
        """What a bundle holds of it, without the split point's name."""
        layers = {key: value for key, value in self.state_dict().items() if key not in ("mean", "deviation")}
        found = {f"{RESTORE}/{key.replace('.', '/')}": value for key, value in layers.items()}
        return found | {f"{RESTORE}/{key}": getattr(self, key).flatten() for key in ("mean", "deviation")}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], gain: float) -> Restorer:
        """From what a bundle holds, float32, without the split point's name.

        Raises:
            KeyError: a tensor is missing.
            RuntimeError: one has another shape.
        """
        found = {key.removeprefix(f"{RESTORE}/"): value for key, value in tensors.items() if key.startswith(RESTORE)}
        blocks = sum(key.startswith("inner/") and key.endswith("/weight") for key in found) // 2
        made = cls(found["mean"], found["deviation"], gain, len(found["enter/weight"]), blocks)
        shaped = {key: found[key.replace(".", "/")] for key in made.state_dict()}
        made.load_state_dict({key: value.view_as(made.state_dict()[key]) for key, value in shaped.items()})
        return made

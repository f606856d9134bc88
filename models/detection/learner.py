"""How a filter learns from the uncut detector's own scores, whichever way its views are made.

Every place is told the best score of the candidates whose centre it holds, the frame the best of all, as odds around
the score from which a box counts. Towards the end frames that hold something weigh more: what a filter is for is to
tell others from the two doubtful ones in a hundred, and where few may be missed, missing one is worth many that stay
(an operating point of the ROC curve is a ratio of costs; Provost and Fawcett, "Robust Classification for Imprecise
Environments", 2001). What is kept is the average of the weights over the last of the steps, with a memory of a thousand
(Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .presence import Presence

RATE = 4e-3
WARM = 0.08
"""Share of the steps in which the rate rises; after it falls, as a cosine does."""
DECAY = 0.05
PLACES_WEIGHT = 0.3
"""Of the places' losses, beside that of the frame."""
SHARPNESS = 2.0
"""Of a frame's score over that which is learned: 1 would let many doubtful places add up to a sure one."""
HOLDING = 4.0
"""What a frame that holds something weighs in the end; 1 to begin with."""
MEMORY = 0.999
"""Of the weights' average, a step."""
LARGEST = 2.0
"""Norm of a gradient, at most."""


class Learner:
    """A filter while it learns."""

    def __init__(self, presence: Presence, sample: Tensor, confident: float) -> None:
        """Take what is looked at of some views, float32 [B, C, h, w], as what the filter will see.

        Args:
            presence: to be learned, on the device where its views will be.
            sample: what is looked at of some views, to be normalised by.
            confident: score from which a box counts.
        """
        self.presence, self._confident, self._steps = presence, confident, 0
        presence.mean = sample.mean((0, 2, 3))
        presence.deviation = sample.std((0, 2, 3)).clamp_min(1e-3)
        presence.to(memory_format=torch.channels_last).train()
        self._parameters = list(presence.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self._parameters if p.ndim > 1]},
            {"params": [p for p in self._parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._optimiser = torch.optim.AdamW(groups, RATE, weight_decay=DECAY, fused=sample.device.type == "cuda")
        self._average = {k: v.clone() for k, v in presence.state_dict().items()}

    def step(self, pooled: Tensor, places: Tensor, best: Tensor, share: float) -> Tensor:
        """Learn from a batch.

        Args:
            pooled: what is looked at, [B, C, h, w].
            places: best score of interest at each place, [B, h, w].
            best: of the whole view, [B].
            share: of the learning that lies behind, 0..1.

        Returns:
            The loss, which nothing waits for.
        """
        rate = RATE * min(1.0, share / WARM + 0.02) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, share))) + 1e-6
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        device = pooled.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = self.presence.places(pooled)
        logits = logits.float() / SHARPNESS
        divergence = functional.binary_cross_entropy_with_logits
        told, whole = (odds(scores.float(), self._confident) for scores in (places, best))
        at_places = divergence(logits, told, reduction="none").sum((1, 2))
        holding = 1 + (HOLDING - 1) * share
        of_frame = divergence(logits.flatten(1).logsumexp(1), whole, weight=1 + (holding - 1) * whole)
        loss = of_frame * 2 / (1 + holding) + PLACES_WEIGHT * at_places.mean()
        self._optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._parameters, LARGEST)
        self._optimiser.step()
        self._steps += 1
        self._remember()
        return loss.detach()

    def _remember(self) -> None:
        new = 1 - min(MEMORY, (1 + self._steps) / (10 + self._steps))
        pairs = [(self._average[k], v) for k, v in self.presence.state_dict().items() if v.dtype.is_floating_point]
        torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], new)

    def average(self) -> dict[str, Tensor]:
        """State of the average so far, not folded."""
        return {k: v.clone() for k, v in self._average.items()}

    def finish(self) -> Presence:
        """The average, folded, on the CPU."""
        self.presence.load_state_dict(self._average)
        return self.presence.cpu().fold()


def odds(scores: Tensor, confident: float) -> Tensor:
    """Scores as what is learned of them: 1/2 at the score from which a box counts, in odds as far from it as before.

    Told the scores themselves, a filter would learn the few sure objects well and leave open what it has to know,
    whether a doubtful one counts.
    """
    return (scores.logit(1e-4) - math.log(confident / (1 - confident))).sigmoid()

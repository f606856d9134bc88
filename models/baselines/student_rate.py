"""The rate of a learned codec, steered to the bytes that are asked for while it learns.

What a bit is worth (beta) is moved until rounded latents take what was asked for: an integrating control, bounded in
how fast and how far beta goes, so that what it cannot reach does not run away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

HEADER = 22
"""Bytes of a packet beside its slice."""
COARSER = 8.0
"""How many times the rate that is asked for is allowed at first, ..."""
REACHED = 0.5
"""... falling to it in this share of the learning."""
FREE = 0.04
"""Until this share of it beta stays as it began, ..."""
HELD = 0.92
"""... and from this one on it stays as it is."""
GAIN = 30.0
"""How fast beta moves: its logarithm, for a rate off by a factor of e, in all of the learning."""
WORTH = 0.03
"""Beta at first times the bits that are asked for. Little: where bits cost much from the first step, none are used."""
DEARER, CHEAPER = math.log(300.0), math.log(4.0)
"""Most that beta moves from there, as logarithms. At a fourth bits are as good as free, and where fewer than allowed
are used even so, beta must not run further away from where it will be needed."""
LONGEST = 0.02
"""Share of the learning that a step counts for at most; a process that stood still has not learned meanwhile."""


class Steering:
    """Beta of several students, each towards bytes of its own."""

    def __init__(self, targets: Sequence[int], device: torch.device) -> None:
        """For packets of `targets` bytes."""
        self.wanted = 8.0 * (torch.tensor(targets, device=device) - HEADER)
        self._first = (WORTH / self.wanted).log()
        self.log_betas = self._first.clone()
        self._share: float | None = None

    def beta(self, number: int) -> Tensor:
        """What a bit is worth to a student now."""
        return self.log_betas[number].exp()

    def follow(self, bits: dict[int, Tensor], share: float) -> None:
        """Move on.

        Args:
            bits: of the rounded latent of a view, its mean, for each student that learned.
            share: of the learning that is done, 0..1.
        """
        moved = min(share - (share if self._share is None else self._share), LONGEST)
        self._share = share
        if not FREE < share < HELD:
            return
        coarser = COARSER ** (1 - min(share / REACHED, 1))
        for number, found in bits.items():
            off = (found.detach() / (coarser * self.wanted[number])).clamp_min(1e-6).log().clamp(-1, 1)
            at, first = self.log_betas[number], self._first[number]
            self.log_betas[number] = (at + GAIN * moved * off).clamp(first - CHEAPER, first + DEARER)

    def divide(self, one: int) -> None:
        """All go on from the beta of one, dearer where fewer bytes are asked for: the same share of the loss."""
        self.log_betas.copy_(self.log_betas[one] + (self.wanted[one] / self.wanted).log())

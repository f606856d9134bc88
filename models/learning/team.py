"""Team: the processes that learn one thing together, as `torchrun` starts them; or one alone.

Each draws views of its own, and gradients are averaged, as in `torch.nn.parallel.DistributedDataParallel`; that one is
not used, because it wants one forward pass a step, and a slimmable network has one a width.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True, slots=True)
class Team:
    """One process's place.

    Attributes:
        rank: 0 <= rank < size.
        size: number of processes.
        device: this one's.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this one reports, writes checkpoints and makes the bundle."""
        return self.rank == 0

    @classmethod
    @contextmanager
    def joined(cls, device: str) -> Iterator[Team]:
        """Join the team that `torchrun` started, if it did, on "cpu" or "cuda"; leave it at the end."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            yield cls(0, 1, torch.device(device))
            return
        local = int(os.environ.get("LOCAL_RANK", "0"))
        distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        try:
            where = torch.device(device, local) if device == "cuda" else torch.device(device)
            yield cls(distributed.get_rank(), size, where)
        finally:
            distributed.destroy_process_group()

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the team; what had none counts as 0."""
        if self.size == 1:
            return
        given = list(parameters)
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in given])
        distributed.all_reduce(flat)
        self._hand_out(flat / self.size, [self._gradient(p) for p in given])

    def average(self, values: Iterable[Tensor]) -> None:
        """Replace floating-point tensors, such as running statistics, by their means over the team."""
        if self.size == 1:
            return
        given = [v for v in values if v.is_floating_point()]
        flat = torch.cat([v.flatten() for v in given])
        distributed.all_reduce(flat)
        self._hand_out(flat / self.size, given)

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            distributed.barrier()

    @staticmethod
    def _gradient(parameter: nn.Parameter) -> Tensor:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    @staticmethod
    def _hand_out(flat: Tensor, to: Iterable[Tensor]) -> None:
        at = 0
        with torch.no_grad():
            for each in to:
                each.copy_(flat[at : at + each.numel()].reshape(each.shape))
                at += each.numel()


ALONE = Team(0, 1, torch.device("cpu"))

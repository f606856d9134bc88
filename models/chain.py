"""Modules in a row, each of which may give several tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Chain(nn.Module):
    """Modules in a row; a tuple that one gives is the next one's arguments."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.modules_in_row = nn.ModuleList(modules)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values: tuple[Tensor, ...] = inputs
        for module in self.modules_in_row:
            given = module(*values)
            values = given if isinstance(given, tuple) else (given,)
        return values


class Beside(Chain):
    """A tail whose first part gives maps at later cuts behind its outputs; they are handed on beside the answer."""

    def __init__(self, tail: nn.Module, rest: nn.Module, packs: Sequence[nn.Module], maps: Sequence[int]) -> None:
        super().__init__(tail, rest)
        self._packs, self._maps = tuple(packs), tuple(maps)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        first, rest = self.modules_in_row
        values = first(*inputs)
        at = len(values) - sum(self._maps)
        found: list[Tensor] = [*rest(*values[:at])]
        for pack, number in zip(self._packs, self._maps, strict=True):
            found += flat_tensors(pack(*values[at : at + number]))
            at += number
        return tuple(found)


def flat_tensors(values: object) -> tuple[Tensor, ...]:
    """The tensors of any nesting of tuples, lists and dictionaries, in order."""
    if isinstance(values, Tensor):
        return (values,)
    if isinstance(values, dict):
        return flat_tensors(list(values.values()))
    if isinstance(values, list | tuple):
        return tuple(t for v in values for t in flat_tensors(v))
    return ()

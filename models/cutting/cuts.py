"""Cuts: every place of a traced module where all that is still needed is one tensor, or a few.

A tensor through which every path from the input to the outputs goes (a dominator of the graph) is the only one that is
alive after its operation, in whatever order the operations run. So one sweep over them finds all such places:

    x -> conv -> relu -> [a] -> conv -> conv -> add -> [b] -> ...
                          └───────────────────┘
          alive after:     a      a,·    a,·     b             single cuts at a and b, none between

Where no single tensor is alive for long (a feature pyramid, a cell that reads the last two cells), the cuts behind
whole blocks are taken at which at most `MAX_MAPS` tensors are. The list is then reduced to what a user would choose
from: ends of blocks instead of every activation, and of a run of places between two layers the narrowest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, fx, nn

from ..exceptions import BackboneError
from .costs import macs_of
from .graph import Traced
from .graph_passes import operation_name
from .layout import MapLayout, layout_of

MAX_MAPS = 4
GAP = 0.15
"""Share of the MACs between two single cuts from which on cuts of several tensors are offered between them, and of
a block from which on they are offered inside it."""
_CONTAINERS = ("torch.nn.modules.container.",)


@dataclass(frozen=True, eq=False)
class Cut:
    """One place to cut.

    Attributes:
        name: path of the module behind which it is, such as `layer2.0`; of nested ones the outermost that has a number.
        aliases: the other modules that end there.
        maps: layout of each tensor that crosses it.
        nodes: those tensors.
        index: of the operation behind which it is, in `Traced.data`.
        macs: multiply-accumulates of one frame before it.
    """

    name: str
    aliases: tuple[str, ...]
    maps: tuple[MapLayout, ...]
    nodes: tuple[fx.Node, ...] = field(repr=False)
    index: int
    macs: int

    @property
    def elements(self) -> int:
        """Numbers that cross it, of one frame."""
        return sum(prod(m.shape) for m in self.maps)

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(C, H, W) of each map."""
        return tuple(m.shape for m in self.maps)


class Head(nn.Module):
    """input -> tuple of maps float32 [B, C, H, W]."""

    def __init__(self, traced: Traced, cut: Cut, after: Cut | None = None) -> None:
        """From the traced module's input, or from the maps of an earlier cut."""
        super().__init__()
        self._before = after.maps if after else ()
        self._maps = cut.maps
        self.operations = traced.segment(after.nodes if after else (traced.input,), cut.nodes)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        tensors = [m.from_map(x) for m, x in zip(self._before, inputs, strict=True)] if self._before else inputs
        return tuple(m.to_map(x) for m, x in zip(self._maps, self.operations(*tensors), strict=True))


class Tail(nn.Module):
    """maps float32 [B, C, H, W], one argument each -> tuple of the traced module's outputs, and of the maps at later
    cuts where some are asked for."""

    def __init__(self, traced: Traced, cut: Cut, beside: Sequence[Cut] = ()) -> None:
        """Shares the traced module's weights."""
        super().__init__()
        self._maps, self._beside = cut.maps, tuple(m for later in beside for m in later.maps)
        nodes = [node for later in beside for node in later.nodes]
        self.operations = traced.segment(cut.nodes, (*traced.outputs, *nodes))

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.operations(*(m.from_map(x) for m, x in zip(self._maps, maps, strict=True)))
        at = len(found) - len(self._beside)
        return *found[:at], *(m.to_map(x) for m, x in zip(self._beside, found[at:], strict=True))


def find_cuts(traced: Traced, goes_on: bool = False) -> tuple[Cut, ...]:
    """All cuts worth offering, in the order of execution; the same on every machine.

    Args:
        traced: the module.
        goes_on: whether layers follow behind the traced part.

    Raises:
        BackboneError: there is none; the text says why.
    """
    inside = _Blocks(traced)
    places = _places(traced, inside.macs, goes_on)
    kept = _ends_of_blocks(_runs([p for p in places if len(p.nodes) == 1], inside), inside)
    kept += _several(places, kept, inside, sum(inside.macs.values()))
    if not kept:
        raise BackboneError(_why_none(traced, inside.macs, goes_on))
    return _named(sorted(kept, key=lambda p: p.index), inside)


@dataclass(frozen=True, eq=False)
class _Place:
    """After operation `index`: what is alive, and what was spent."""

    index: int
    nodes: tuple[fx.Node, ...]
    maps: tuple[MapLayout, ...]
    macs: int

    @property
    def elements(self) -> int:
        return sum(prod(m.shape) for m in self.maps)


def _alive(
    traced: Traced, macs: Mapping[fx.Node, int], goes_on: bool
) -> Iterator[tuple[int, tuple[fx.Node, ...], int]]:
    """Every place between the first layer and the last one: its operation, what is alive after it, and MACs before it.

    Places at which the input itself is still needed are left out.
    """
    order = {n: i for i, n in enumerate(traced.data)}
    last_use = {n: max((order[u] for u in n.users if u in order), default=-1) for n in traced.data}
    for node in traced.outputs:
        last_use[node] = len(order)
    total, before = sum(macs.values()) + goes_on, 0
    alive: list[fx.Node] = []
    for i, node in enumerate(traced.data):
        alive = [n for n in [*alive, node] if last_use[n] > i]
        before += macs[node]
        if 0 < before < total and traced.input not in alive:
            yield i, tuple(alive), before


def _places(traced: Traced, macs: Mapping[fx.Node, int], goes_on: bool) -> list[_Place]:
    """Every place at which few enough tensors are alive, and all of them can be sent."""
    places = []
    for i, alive, before in _alive(traced, macs, goes_on):
        maps = [_layout(traced, n) for n in alive] if 1 <= len(alive) <= MAX_MAPS else [None]
        if all(m is not None for m in maps):
            places.append(_Place(i, alive, tuple(m for m in maps if m), before))
    return places


def _layout(traced: Traced, node: fx.Node) -> MapLayout | None:
    shape = traced.shape(node)
    value = node.meta.get("val")
    if shape is None or not isinstance(value, Tensor) or value.dtype != torch.float32 or 0 in shape:
        return None
    return layout_of(node, shape)


def _runs(places: Sequence[_Place], inside: _Blocks) -> list[_Place]:
    """Of the places between two layers the last that ends a block, and the narrowest where that is narrower still."""
    runs: dict[int, list[_Place]] = {}
    for place in places:
        runs.setdefault(place.macs, []).append(place)
    kept = []
    for run in runs.values():
        ends = [p for p in run if any(inside.is_block(path) for path in inside.ending(p.index))]
        # Of equals the last one that ends a module, by which it is called.
        narrowest = min(reversed(run), key=lambda p: (p.elements, not inside.ending(p.index)))
        if not ends or narrowest.elements < ends[-1].elements:
            kept.append(narrowest)
        kept += ends[-1:]
    return sorted(kept, key=lambda p: p.index)


class _Blocks:
    """Which modules the operations belong to, and where each ends."""

    def __init__(self, traced: Traced) -> None:
        self.macs = {n: macs_of(n) for n in traced.data}
        self.paths: list[dict[str, str]] = [_stack(n) for n in traced.data]
        self.operations = [operation_name(n) for n in traced.data]
        self.first: dict[str, int] = {}
        self.last: dict[str, int] = {}
        self.layers: dict[str, int] = {}
        self.types: dict[str, str] = {}
        for i, (node, stack) in enumerate(zip(traced.data, self.paths, strict=True)):
            for path, kind in stack.items():
                self.first.setdefault(path, i)
                self.last[path] = i
                self.types[path] = kind
                self.layers[path] = self.layers.get(path, 0) + (self.macs[node] > 0)

    def is_block(self, path: str) -> bool:
        """Whether it is more than one layer and no mere list of modules."""
        return self.layers[path] >= 2 and not self.types[path].startswith(_CONTAINERS)

    def is_leaf(self, path: str) -> bool:
        """Whether a block holds too few others to be a chain of blocks."""
        return sum(p.startswith(f"{path}." if path else "") and self.is_block(p) for p in self.layers if p != path) < 3

    def macs_in(self, path: str) -> int:
        """Multiply-accumulates of a module."""
        return sum(self.macs[n] for n, stack in zip(self.macs, self.paths, strict=True) if path in stack)

    def ending(self, index: int) -> list[str]:
        """Paths of the modules that end with the operation, outermost first."""
        return [p for p in self.paths[index] if self.last[p] == index]

    def around(self, index: int) -> list[str]:
        """Paths of the blocks that go on behind the operation, outermost first."""
        return [p for p in self.paths[index] if self.last[p] > index and self.is_block(p)]


def _ends_of_blocks(places: Sequence[_Place], inside: _Blocks) -> list[_Place]:
    """Without the places inside a block that has cuts on both sides and is narrower there.

    A place that ends a block of its own (such as one of a stage's) may be as wide as the end of what it is in.
    """
    kept = []
    for place in places:
        ends = any(inside.is_block(path) for path in inside.ending(place.index))
        useful = True
        for path in inside.around(place.index):
            end = next((p for p in places if p.index >= inside.last[path]), None)
            before = next((p for p in reversed(places) if p.index < inside.first[path]), None)
            if end is None:
                continue  # the model's own last part: there is nothing else to offer
            narrowest = min(p.elements for p in (before, end) if p is not None)
            useful &= place.elements <= end.elements if ends else place.elements < narrowest
        if useful:
            kept.append(place)
    return kept


def _several(places: Sequence[_Place], single: Sequence[_Place], inside: _Blocks, total: int) -> list[_Place]:
    """Cuts of several tensors where single ones are far apart, outside of small blocks."""
    marks = sorted({0, total, *(p.macs for p in single)})
    few = {p.index for p in places}
    found: dict[int, _Place] = {}
    for place in places:
        before = max(m for m in marks if m <= place.macs)
        after = min((m for m in marks if m > place.macs), default=total)
        if len(place.nodes) < 2 or place.macs == before or after - before < GAP * total:
            continue
        within = any(
            inside.last[path] in few and (inside.is_leaf(path) or inside.macs_in(path) < GAP * total)
            for path in inside.around(place.index)
        )
        known = found.get(place.macs)
        if not within and (known is None or place.elements <= known.elements):
            found[place.macs] = place
    return list(found.values())


def _named(places: Sequence[_Place], inside: _Blocks) -> tuple[Cut, ...]:
    taken: dict[str, int] = {}
    cuts = []
    for place in places:
        ending = [p for p in inside.ending(place.index) if p]
        numbered = [p for p in ending if any(c.isdigit() for c in p)]
        if numbered or ending:
            name = (numbered or ending)[0]
        else:
            within = [p for p in inside.paths[place.index] if p]
            name = ".".join([*within[-1:], inside.operations[place.index].strip("_")])
        taken[name] = taken.get(name, 0) + 1
        if taken[name] > 1:
            name = f"{name}.{taken[name]}"
        cuts.append(Cut(name, tuple(p for p in ending if p != name), place.maps, place.nodes, place.index, place.macs))
    return tuple(cuts)


def _stack(node: fx.Node) -> dict[str, str]:
    """Paths and types of the modules that an operation belongs to, outermost first; the root is ""."""
    found: dict[str, str] = {}
    for path, kind in node.meta.get("nn_module_stack", {}).values():
        found[str(path)] = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return found


def _why_none(traced: Traced, macs: Mapping[fx.Node, int], goes_on: bool) -> str:
    if sum(1 for m in macs.values() if m) + goes_on < 2:
        return "it cannot be cut: there is only one layer, so nothing lies between head and tail"
    least = min((len(alive) for _, alive, _ in _alive(traced, macs, goes_on)), default=0)
    if least == 0:
        return "it cannot be cut: its input is needed to the end, so sending less than that is not enough"
    if least > MAX_MAPS:
        return f"it cannot be cut: {least} tensors or more are needed at every place, {MAX_MAPS} at most can be sent"
    return (
        "it cannot be cut: at every place where few enough tensors are needed, one of them is not float32, does not "
        "have the batch first, or has more than three axes behind it"
    )

"""Backbones: the uncut models, with everything that cutting them needs. Where they come from is `zoo`.

pixels uint8 [B, S, S, 3] --Pixels--> float32 [B, 3, S, S] --front--> tensors --rest--> outputs, which a task reads
                                                            ^ traced, and cut anywhere inside
    head: pixels -> one map at the cut       tail: map -> outputs           uncut: pixels -> outputs

Where several tensors cross a cut, the head packs them into one map and the tail unpacks them (`maps`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from .bundle import Array, BackboneSpec, Preprocessing
from .chain import Beside, Chain, flat_tensors
from .cutting.costs import Costs, measure_costs
from .cutting.cuts import Cut, Head, Tail, find_cuts
from .cutting.graph import Traced, trace
from .cutting.maps import Pack, Packing, Unpack
from .exceptions import BackboneError
from .learning.cut import INPUT, HeadWeights, LearnedCut
from .tasks import CLASSIFICATION, Task

EXACT = 1e-5
"""Most that head and tail joined may differ from the uncut model, relative to the largest output."""
PROOF_BATCH = 3
"""Frames in the proof's larger batch; the other one has 1."""
SIZED = re.compile(r"(.+)-(\d+)px")
"""A split point's name with a size."""
MIN_SIZE = 32
"""Pixels; smaller pictures are nothing that a classifier was made for."""


class Pixels(nn.Module):
    """uint8 [B, S, S, 3] on 0..255 -> float32 [B, 3, S, S], (pixel - mean) / std."""

    def __init__(self, how: Preprocessing) -> None:
        super().__init__()
        self.mean, self.std = how.mean, how.std
        for name, value in (("means", how.mean), ("stds", how.std)):
            if isinstance(value, tuple):
                self.register_buffer(name, torch.tensor(value, dtype=torch.float32)[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        # NHWC bytes seen as NCHW are already in the memory format that convolutions are fastest in.
        values = pixels.permute(0, 3, 1, 2).float()
        mean = self.get_buffer("means") if isinstance(self.mean, tuple) else self.mean
        std = self.get_buffer("stds") if isinstance(self.std, tuple) else self.std
        return values - mean if self.std == 1.0 else (values - mean) / std


class Scores(nn.Module):
    """logits float32 [B, classes] -> scores that sum to 1."""

    def forward(self, *logits: Tensor) -> tuple[Tensor, ...]:
        return (torch.softmax(logits[0], 1),)


class AsTheyAre(nn.Module):
    """Outputs that need nothing more."""

    def forward(self, *outputs: Tensor) -> tuple[Tensor, ...]:
        return outputs


@dataclass(frozen=True)
class Parts:
    """A model as a source gives it.

    Attributes:
        front: float32 [B, 3, S, S] -> tensors in any nesting; this part is traced and cut.
        rest: those tensors, one argument each -> tuple of outputs, as the task takes them.
        task: what the outputs mean.
        preprocessing: from a picture to pixels.
        labels: one text a class.
        class_ids: WordNet ids in index order, by which labelled folders name their classes.
        splits: split points to take when none are named; empty for a spread over the compute.
        any_size: whether a detector can be run on fewer pixels and still gives corners in pixels of its own input.
    """

    front: nn.Module
    rest: nn.Module
    task: Task
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    class_ids: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    any_size: bool = False


@dataclass(eq=False)
class Backbone:
    """An uncut model that can be cut. Tracing and measuring are done when they are first needed, and kept.

    Attributes:
        spec: name, and where the weights come from; parts: the model.
        state: module whose state are its weights; program: file of torch.export that it was read from.
        learned: cuts whose head is a learned encoder, by name; `head`, `tail` and `shape` know them like its own.
        own_heads: what heads at some of its own cuts have in place of its weights, by name; `head` knows them.
        narrow_exits: what local exits have that is not its own, see `exits.narrow`.
    """

    spec: BackboneSpec
    parts: Parts = field(repr=False)
    state: nn.Module | None = field(default=None, repr=False)
    program: Path | None = None
    learned: Mapping[str, LearnedCut] = field(default_factory=dict, repr=False)
    own_heads: Mapping[str, HeadWeights] = field(default_factory=dict, repr=False)
    narrow_exits: Mapping[str, Mapping[str, Array]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for module in (self.parts.front, self.parts.rest):
            module.eval().requires_grad_(False)
        self.parts.front.to(memory_format=torch.channels_last)

    @property
    def preprocessing(self) -> Preprocessing:
        """From a picture to pixels."""
        return self.parts.preprocessing

    @property
    def task(self) -> Task:
        """What the outputs mean."""
        return self.parts.task

    @property
    def labels(self) -> tuple[str, ...]:
        """One text a class."""
        return self.parts.labels

    @property
    def class_ids(self) -> tuple[str, ...]:
        """WordNet ids in index order, where the classes have some."""
        return self.parts.class_ids

    @cached_property
    def traced(self) -> Traced:
        """The front as a graph.

        Raises:
            BackboneError: it cannot be traced.
        """
        return trace(self.parts.front, self.example(2))

    @cached_property
    def costs(self) -> Costs:
        """What each operation costs, measured here."""
        return measure_costs(self.traced, self.example(1), self.parts.rest if self._goes_on else None)

    @cached_property
    def cuts(self) -> tuple[Cut, ...]:
        """Every place to cut, in the order of execution.

        Raises:
            BackboneError: there is none.
        """
        try:
            return find_cuts(self.traced, self._goes_on)
        except BackboneError as error:
            raise BackboneError(f"{self.spec.name}: {error}") from error

    @property
    def split_points(self) -> tuple[str, ...]:
        """Names of the cuts."""
        return tuple(c.name for c in self.cuts)

    def at(self, split: str) -> tuple[Backbone, str]:
        """The backbone at the size that a split point's name asks for, and the cut's own name.

        `blocks.2-160px` is the cut `blocks.2` of the same network run on 160 x 160 pixels: fewer places, so less
        compute and fewer bytes, at some loss of accuracy, and nothing to be learned.

        Raises:
            BackboneError: it cannot be run at another size.
        """
        found = SIZED.fullmatch(split)
        if found is None:
            return self, split
        cut, size = found[1], int(found[2])
        if size == self.preprocessing.size:
            return self, cut
        if size not in self._sizes:
            sizes = self.task.name == CLASSIFICATION or self.parts.any_size
            if not sizes or self.program is not None:
                raise BackboneError(f"{self.spec.name} can only be cut at its own size, not at {size} pixels")
            if not MIN_SIZE <= size < self.preprocessing.size:
                raise BackboneError(
                    f"{split}: the size is not within {MIN_SIZE}..{self.preprocessing.size} pixels, the backbone's own"
                )
            parts = replace(self.parts, preprocessing=self.preprocessing.at(size))
            self._sizes[size] = Backbone(self.spec, parts, self.state)
        return self._sizes[size], cut

    def cut(self, split: str) -> Cut:
        """The cut of that name, or behind the module of that path.

        Raises:
            BackboneError: there is none.
        """
        sized, split = self.at(split)
        if sized is not self:
            return sized.cut(split)
        for cut in self.cuts:
            if split == cut.name or split in cut.aliases:
                return cut
        close = difflib.get_close_matches(split, self.split_points, 3)
        raise BackboneError(
            f"{self.spec.name} cannot be cut after {split!r}; "
            f"{'close to it: ' + ', '.join(close) + '; ' if close else ''}it can after {', '.join(self.split_points)}"
        )

    @property
    def uncut(self) -> nn.Module:
        """pixels uint8 [B, S, S, 3] -> tuple of outputs."""
        return Chain(self.traced_part, self.parts.rest).eval()

    @property
    def traced_part(self) -> nn.Module:
        """pixels uint8 [B, S, S, 3] -> tuple of the traced part's outputs."""
        operations = self.traced.segment((self.traced.input,), self.traced.outputs)
        return Chain(Pixels(self.preprocessing), operations).eval()

    def packing(self, split: str) -> Packing:
        """How the tensors that cross a split point make one map.

        Raises:
            BackboneError: they do not; the text says why.
        """
        sized, split = self.at(split)
        if sized is not self:
            return sized.packing(split)
        try:
            return Packing(self.cut(split).shapes)
        except BackboneError as error:
            raise BackboneError(f"{self.spec.name} after {split}: {error}; cut elsewhere") from error

    def shape(self, split: str) -> tuple[int, int, int]:
        """(C, H, W) of the one map that a head gives.

        Raises:
            BackboneError: no such split point, or its tensors do not make one map.
        """
        if split == INPUT:
            return (3, self.preprocessing.size, self.preprocessing.size)
        return self.learned[split].shape if split in self.learned else self.packing(split).packed

    def head(self, split: str) -> nn.Module:
        """pixels uint8 [B, S, S, 3] -> tuple of one map float32 [B, C, H, W] at the split point.

        Raises:
            BundleError: what a bundle learned does not fit.
        """
        if split in self.learned:
            # A tenth of a narrow encoder's time is the division by the deviation; the weights do it for nothing.
            encoder = self.learned[split].encoder.undivided(self.preprocessing.std)
            return Chain(Pixels(replace(self.preprocessing, std=1.0)), encoder).eval()
        if split == INPUT:
            return Chain(Pixels(self.preprocessing)).eval()
        sized, cut = self.at(split)
        own, head = self.own_heads.get(split), Head(sized.traced, sized.cut(cut))
        parts = (Pixels(sized.preprocessing), own.applied(head) if own else head, Pack(sized.packing(cut)))
        return Chain(*parts).eval()

    def has_head(self, split: str) -> bool:
        """Whether what runs there is a head of its own, and not the first operations of the backbone."""
        return split in self.learned or split in self.own_heads

    def between(self, first: str, second: str) -> nn.Module:
        """The map at one split point -> tuple of the map at a later one."""
        head = Head(self.traced, self.cut(second), self.cut(first))
        return Chain(Unpack(self.packing(first)), head, Pack(self.packing(second))).eval()

    def head_parts(self, splits: Sequence[str]) -> list[tuple[str, nn.Module]]:
        """The head cut into parts, so that a photograph passes every stage once for all these split points."""
        # Of a sized backbone the names still say the size, its cuts do not.
        cuts = {name: SIZED.sub(r"\1", name) for name in splits}
        ordered = sorted(cuts, key=lambda name: self.cut(cuts[name]).index)
        pairs = pairwise(["", *(cuts[name] for name in ordered)])
        return [
            (name, self.between(before, cut) if before else self.head(cut))
            for name, (before, cut) in zip(ordered, pairs, strict=True)
        ]

    def tail(self, split: str) -> nn.Module:
        """map float32 [B, C, H, W] -> tuple of outputs; gradients reach the map."""
        if split in self.learned:
            cut = self.learned[split]
            return Chain(cut.synthesis, cut.changes.applied(self.tail(cut.anchor))).eval()
        if split == INPUT:
            operations = self.traced.segment((self.traced.input,), self.traced.outputs)
            return Chain(operations, self.parts.rest).eval()
        sized, split = self.at(split)
        if sized is not self:
            return sized.tail(split)
        return Chain(self._traced_tail(split), self.parts.rest).eval()

    def tail_beside(self, split: str, later: Sequence[str]) -> nn.Module:
        """As `tail` at a cut of the backbone itself, its weights by the same names; behind the outputs it gives the map
        at each of some later split points.

        Raises:
            BackboneError: no such split point, or one of `later` is not behind it.
        """
        if not later:
            return self.tail(split)
        cut, beside = self.cut(split), [self.cut(each) for each in later]
        for name, each in zip(later, beside, strict=True):
            if each.index <= cut.index:
                raise BackboneError(f"{name} is not behind {split}")
        tail = Chain(Unpack(self.packing(split)), Tail(self.traced, cut, beside))
        packs = [Pack(self.packing(each)) for each in later]
        return Beside(tail, self.parts.rest, packs, [len(each.maps) for each in beside]).eval()

    def _traced_tail(self, split: str) -> nn.Module:
        return Chain(Unpack(self.packing(split)), Tail(self.traced, self.cut(split))).eval()

    def rejoin_error(self, split: str, seed: int = 0) -> float:
        """How far head and tail joined are from the model as it was given (untraced, normalisations not folded).

        On random pixels in batches of 1 and of `PROOF_BATCH`, at the end of the traced part: what may follow it is one
        module for both.

        Returns:
            Largest absolute difference over the largest absolute output, of any output.
        """
        sized, split = self.at(split)
        if sized is not self:
            return sized.rejoin_error(split, seed)
        head = Chain(Pixels(self.preprocessing), Head(self.traced, self.cut(split)), Pack(self.packing(split))).eval()
        tail = self._traced_tail(split)
        return max(self._difference(head, tail, batch, seed) for batch in (1, PROOF_BATCH))

    def prove(self, split: str) -> float:
        """The rejoin error of a split point.

        Raises:
            BackboneError: it is larger than `EXACT`.
        """
        error = self.rejoin_error(split)
        if not error <= EXACT:
            raise BackboneError(
                f"{self.spec.name} cut after {split}: head and tail joined differ from the uncut model by {error:.1e} "
                f"of its largest output, more than {EXACT:.0e}; cut elsewhere"
            )
        return error

    def verify(self, spec: BackboneSpec) -> None:
        """Check that these are the weights that a bundle was made from.

        Raises:
            BackboneError: another digest.
        """
        if spec != self.spec:
            raise BackboneError(
                f"the bundle was made from {spec.package} with weights {spec.sha256[:16]}, installed are "
                f"{self.spec.sha256[:16]}; install the package's version that the bundle names, or split anew"
            )

    def example(self, batch: int, seed: int = 0) -> Tensor:
        """Random input of the front, as the head's first layer gives it: float32 [batch, 3, S, S]."""
        return Pixels(self.preprocessing)(self._random_pixels(batch, seed))  # type: ignore[no-any-return]

    @property
    def _goes_on(self) -> bool:
        return any(True for _ in self.parts.rest.parameters())

    def _random_pixels(self, batch: int, seed: int) -> Tensor:
        size = self.preprocessing.size
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (batch, size, size, 3), generator=generator, dtype=torch.uint8)

    def _difference(self, head: nn.Module, tail: nn.Module, batch: int, seed: int) -> float:
        key = (batch, seed)
        with torch.inference_mode():
            if key not in self._references:
                frames = torch.split(self.example(batch, seed), 1 if self.traced.frame_by_frame else batch)
                given = [flat_tensors(self.parts.front(each)) for each in frames]
                self._references[key] = [torch.cat(each) for each in zip(*given, strict=True)]
            joined = tail(*head(self._random_pixels(batch, seed)))
            return max(
                float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
                for a, b in zip(joined, self._references[key], strict=True)
            )

    @cached_property
    def _sizes(self) -> dict[int, Backbone]:
        return {}

    @cached_property
    def _references(self) -> dict[tuple[int, int], Sequence[Tensor]]:
        return {}

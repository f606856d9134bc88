"""A user's own model as a backbone: a factory by its import path, or a file of torch.export."""

from __future__ import annotations

import hashlib
import importlib
import io
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import AsTheyAre, Parts, Scores
from ..bundle import Preprocessing
from ..chain import flat_tensors
from ..exceptions import BackboneError
from ..tasks import (
    BOTH,
    CLASSIFICATION,
    DETECTION,
    SEGMENTATION,
    Classification,
    Detection,
    Segmentation,
    Several,
    Task,
)
from .sources import FILE, Found, Source, one_line, with_weights

SIZE = 224
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""ImageNet's, which most training code normalises with."""
_RESTRICT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def load_factory(source: Source) -> Found:
    """A module from `package.module:factory`, called without arguments.

    Raises:
        BackboneError: it cannot be imported or called, or gives no module.
    """
    path, _, name = source.name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does
    try:
        factory: Any = importlib.import_module(path)
        for part in name.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError) as error:
        raise BackboneError(
            f"{source.name} cannot be imported: {error}; run from where `import {path}` works"
        ) from error

    def make(_: bool) -> nn.Module:
        module = factory()
        if not isinstance(module, nn.Module):
            raise BackboneError(f"{source.name} gives {type(module).__name__}, not a torch.nn.Module")
        return module

    module, weights = with_weights(source, make, path, pretrained=False)
    if not weights:
        # Whoever serves it gets these weights with the bundle: a factory may draw others next time.
        weights = FILE
    return Found(_parts(source, module, SIZE), path, state=module, weights=weights)


def load_program(source: Source) -> Found:
    """A module from a file of `torch.export.save`.

    Such a file is code as much as weights: load none from a source that you would not run a program from. Pickles that
    lie in it are read by PyTorch's restricted reader, which builds tensors and nothing else.

    Raises:
        BackboneError: it cannot be read, or takes other input than one batch of square RGB pictures.
    """
    path = Path(source.name)
    if source.weights is not None or source.seed is not None:
        raise BackboneError(f"{path} holds its weights; leave --weights and --random-weights out")
    try:
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if source.sha256 not in ("", digest):
            raise BackboneError(f"{path} has digest {digest[:16]}, the bundle says {source.sha256[:16]}; split anew")
        with _tensors_alone():
            program = torch.export.load(io.BytesIO(data))
    except BackboneError:
        raise
    except Exception as error:  # what a damaged archive raises depends on where it is damaged
        raise BackboneError(f"{path} cannot be read as a file of torch.export: {one_line(error)}") from error
    module = _Program(program)
    shape = module.input_shape
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or not isinstance(shape[2], int):
        raise BackboneError(f"{path} takes {list(shape)}; a backbone takes [B, 3, S, S]")
    if source.size not in (0, shape[2]):
        raise BackboneError(f"{path} takes {shape[2]} pixels, not {source.size}; leave --size out")
    parts = _parts(source, module, shape[2])
    return Found(parts, "torch.export", sha256=digest, weights=FILE, program=path)


@contextmanager
def _tensors_alone() -> Iterator[None]:
    """Let `torch.load` read nothing but tensors, even where PyTorch's own code asks for more."""
    before = os.environ.get(_RESTRICT)
    os.environ[_RESTRICT] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_RESTRICT]
        else:
            os.environ[_RESTRICT] = before


class _Program(nn.Module):
    """An exported program as a module; `graph.trace` takes the program as it is."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.program = program
        self.run: Callable[..., Any] = program.module(check_guards=False)
        names = set(program.graph_signature.user_inputs)
        inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
        self.input_shape: tuple[Any, ...] = tuple(inputs[0].meta["val"].shape) if len(inputs) == 1 else ()

    def forward(self, pixels: Tensor) -> Any:
        if isinstance(self.input_shape[0], int) and len(pixels) != self.input_shape[0]:
            frames = [flat_tensors(self.run(p[None])) for p in pixels]
            return tuple(torch.cat(each) for each in zip(*frames, strict=True))
        return self.run(pixels)

    def eval(self) -> _Program:
        """Nothing: an exported program has no modes."""
        return self


class _Boxes(nn.Module):
    """A user's detector gives scores [B, A, K] and corners [B, A, 4]; nothing is left to do."""

    def forward(self, *outputs: Tensor) -> tuple[Tensor, ...]:
        if len(outputs) < 2 or outputs[0].ndim != 3 or outputs[1].shape[-1] != 4:
            raise BackboneError(
                f"a detector gives scores [B, A, K] in 0..1 and corners [B, A, 4] in pixels of its input, this one "
                f"{[list(o.shape) for o in outputs]}"
            )
        return outputs


def _parts(source: Source, module: nn.Module, size: int) -> Parts:
    size = source.size or size
    rest, task = _meaning(source, size)
    how = source.preprocessing or Preprocessing(
        math.floor(size / 0.875) if source.task == CLASSIFICATION else size,
        size,
        MEAN,
        STD,
        "crop" if source.task == CLASSIFICATION else "letterbox",
        "bilinear",
    )
    return Parts(module, rest, task, how, source.labels)


class _Each(nn.Module):
    """Gives every task's outputs to what is left to do for it."""

    def __init__(self, task: Several, rests: Sequence[nn.Module]) -> None:
        super().__init__()
        self.task, self.rests = task, nn.ModuleList(rests)

    def forward(self, *outputs: Tensor) -> tuple[Tensor, ...]:
        if len(outputs) != self.task.takes:
            raise BackboneError(
                f"a model for {self.task.name} gives {self.task.takes} tensors, the first task's first, this one "
                f"{[list(o.shape) for o in outputs]}"
            )
        return tuple(t for rest, own in zip(self.rests, self.task.apart(outputs), strict=True) for t in rest(*own))


def _meaning(source: Source, size: int) -> tuple[nn.Module, Task]:
    if BOTH in source.task:
        parts = [_meaning(replace(source, task=name), size) for name in source.task.split(BOTH)]
        several = Several([task for _, task in parts])
        return _Each(several, [rest for rest, _ in parts]), several
    if source.task == CLASSIFICATION:
        return Scores(), Classification()
    if source.task == DETECTION:
        return _Boxes(), Detection(size)
    if source.task == SEGMENTATION:
        return AsTheyAre(), Segmentation()
    raise BackboneError(
        f"say what the outputs of {source.name} mean with --task: {CLASSIFICATION} (logits [B, classes]), {DETECTION} "
        f"(scores [B, A, K], corners [B, A, 4]) or {SEGMENTATION} (logits [B, classes, H, W]), or several of them, as "
        f"{CLASSIFICATION}{BOTH}{DETECTION}, for a model that gives the outputs of one after the other"
    )

"""Sources: what was asked for, what was found, and where weights come from. The models themselves are in `zoo`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..backbones import Parts
from ..bundle import Preprocessing
from ..exceptions import BackboneError, DataError

RANDOM, FILE = "random:", "file"
"""Kinds of `BackboneSpec.weights`."""


@dataclass(frozen=True, slots=True)
class Source:
    """What `headrace split` was asked for.

    Attributes:
        name: of the backbone, see the module's docstring.
        task: what its outputs mean; "" for what the name says by itself.
        weights: a safetensors file of its state; None for the pretrained ones.
        seed: draw the weights with this seed instead; None: don't.
        size: side of the input in pixels; 0 for the model's own.
        preprocessing: instead of the model's own; None: its own.
        labels: instead of its own.
        sha256: digest that a .pt2 file has to have, hex; "" for any.
    """

    name: str
    task: str = ""
    weights: Path | None = None
    seed: int | None = None
    size: int = 0
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] = ()
    sha256: str = ""


@dataclass(frozen=True)
class Found:
    """A model that a source made, before its digest is taken.

    Attributes:
        parts: the model.
        package: what gives the architecture or the weights.
        state: module whose state the weights are; None where `sha256` is known.
        sha256: digest of the weights' file, where there is one.
        weights: see `BackboneSpec`.
        program: a .pt2 file that the bundle has to carry.
    """

    parts: Parts
    package: str
    state: nn.Module | None = None
    sha256: str = ""
    weights: str = ""
    program: Path | None = None


def source(name: str, task: str, weights: Path | None, seed: int | None, size: int, labels: Path | None) -> Source:
    """What the command line asked for; see `Source`.

    Raises:
        DataError: the file of labels cannot be read.
        BackboneError: both a file of weights and a seed are given.
    """
    if weights is not None and seed is not None:
        raise BackboneError("weights come from a file or are drawn at random: give --weights or --random-weights")
    names: tuple[str, ...] = ()
    if labels is not None:
        try:
            names = tuple(line.strip() for line in labels.read_text().splitlines() if line.strip())
        except (OSError, ValueError) as error:
            raise DataError(f"{labels} cannot be read as a list of labels: {one_line(error)}") from error
    return Source(name, task, weights, seed, size, labels=names)


def with_weights(
    source: Source, make: Callable[[bool], nn.Module], package: str, pretrained: bool = True
) -> tuple[nn.Module, str]:
    """A model with the weights that were asked for, and what the spec says about them.

    Args:
        source: says which weights.
        make: builds the model; True asks for pretrained weights.
        package: for the error.
        pretrained: whether there are any to ask for.

    Raises:
        BackboneError: they cannot be had, or do not fit.
    """
    if source.seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(source.seed)
            return make(False), f"{RANDOM}{source.seed}"
    if source.weights is not None:
        model = make(False)
        load_state(model, source.weights)
        return model, FILE
    if not pretrained:
        return make(False), ""
    try:
        return make(True), ""
    except Exception as error:  # what a download raises depends on the library and the network
        raise BackboneError(
            f"the pretrained weights of {source.name} cannot be fetched through {package} "
            f"({type(error).__name__}: {one_line(error)}); give --weights FILE.safetensors, or --random-weights SEED "
            "to try it without"
        ) from error


def load_state(model: nn.Module, path: Path) -> None:
    """Fill a model from a safetensors file of its state.

    Raises:
        BackboneError: the file cannot be read, or holds other tensors.
    """
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise BackboneError(f"{path} cannot be read as safetensors: {one_line(error)}") from error
    except RuntimeError as error:
        raise BackboneError(f"{path} does not hold the weights of this model: {one_line(error)}") from error


def state_digest(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of a module's state, in the order of the names; hex."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__

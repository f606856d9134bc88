"""A learned Entropic Student in a file, one a rate.

    encoder/NAME, prior/NAME           float32, as `entropic_student` and CompressAI call their parameters
    decoder/NAME                       float16
    tail/PART/NAME                     float16, added to the weights of a part of the tail, see `student_lesson`
    tables/cdf, tables/sizes, tables/offsets
                                       int32, of the channels one after another, see `entropy_coder`

A safetensors file, whose metadata say which backbone it is for, the rate, and how it was learned.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ..backbones import Backbone, Pixels
from ..chain import Chain
from ..entropy_coder import EntropyTables
from ..exceptions import BundleError, DataError
from ..repair.deltas import weights
from .entropic_student import ANCHOR, LATENT, Student, StudentDecoder, StudentEncoder
from .student_lesson import tail_parts

KIND, VERSION, SUFFIX = "entropic_student", 2, ".safetensors"
MAX_BYTES = 64 * 2**20
CONSTANT = "_reparam."
"""Part of the names of CompressAI's constants, which half precision would make 0."""
_REMEDY = "give a file that `headrace eval train-student` wrote, or a folder of such files"


@dataclass(frozen=True)
class StudentFacts:
    """What a file says of itself.

    Attributes:
        backbone, weights: name, and the digest of the weights.
        target: bytes that were asked for.
        beta: what a bit was worth in the end, in the errors of `student_lesson`.
        views: how many were learned from, both stages.
        said: how it was learned.
    """

    backbone: str
    weights: str
    target: int
    beta: float
    views: int
    said: str


@dataclass(frozen=True, eq=False)
class LearnedStudent:
    """A student as it is measured; both modules are frozen.

    Attributes:
        name: of its operating point.
        facts: see there.
        digest: of the file.
        encoder: pixels uint8 [B, S, S, 3] -> latent float32 [B, 24, h, w].
        medians: float32 [24, 1, 1], about which it is rounded.
        tables: one a channel.
        answer: latent, rounded -> tuple of outputs.
    """

    name: str
    facts: StudentFacts
    digest: str
    encoder: nn.Module
    medians: Tensor
    tables: EntropyTables
    answer: nn.Module


def student_tensors(student: Student, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file holds; the prior must have been frozen."""
    tables = student.tables()
    found = {f"encoder/{k}": v for k, v in _learned(student.encoder).items()}
    found |= {f"prior/{k}": v for k, v in student.prior.named_parameters()}
    found |= {f"decoder/{k}": v.half() for k, v in _learned(student.decoder).items()}
    found |= {f"tail/{k}": v.half() for k, v in changes.items()}
    whole = {"cdf": tables.flat(), "sizes": tables.sizes, "offsets": tables.offsets}
    found |= {f"tables/{k}": torch.from_numpy(np.ascontiguousarray(v)) for k, v in whole.items()}
    return {k: v.detach().cpu().contiguous().clone() for k, v in found.items()}


def write_student(path: Path, tensors: Mapping[str, Tensor], facts: StudentFacts) -> None:
    """Write a file, whole or not at all."""
    said = {"kind": KIND, "version": str(VERSION), "facts": json.dumps(asdict(facts))}
    partial = path.with_suffix(".partial")
    partial.write_bytes(save_tensors(dict(tensors), said))
    partial.replace(path)


def student_files(place: Path) -> list[Path]:
    """The file, or the files of the folder.

    Raises:
        DataError: there are none.
    """
    if place.is_file():
        return [place]
    found = sorted(place.glob(f"*{SUFFIX}")) if place.is_dir() else []
    if not found:
        raise DataError(f"{place} holds no Entropic Student; {_REMEDY}")
    return found


def read_student(path: Path, backbone: Backbone) -> LearnedStudent:
    """Read a file for a backbone.

    Raises:
        DataError: it cannot be read, is not such a file, or is for other weights.
    """
    digest, facts, tensors = _read(path)
    if facts.weights != backbone.spec.sha256:
        raise DataError(
            f"{path} was learned for {facts.backbone} with weights {facts.weights[:16]}, this bundle's backbone is "
            f"{backbone.spec.name} with {backbone.spec.sha256[:16]}; learn one with `headrace eval train-student`"
        )
    try:
        encoder, decoder = StudentEncoder(), StudentDecoder(backbone.shape(ANCHOR)[0])
        for module, place in ((encoder, "encoder/"), (decoder, "decoder/")):
            stored = {k: v.float() for k, v in _below(tensors, place).items()}
            module.load_state_dict({k: v for k, v in module.state_dict().items() if CONSTANT in k} | stored)
            module.requires_grad_(False).eval()
        quantiles = tensors["prior/quantiles"]
        whole: dict[str, Any] = {k: v.numpy().astype(np.int32) for k, v in _below(tensors, "tables/").items()}
        tables = EntropyTables.of_flat(whole["cdf"], whole["sizes"], whole["offsets"])
        if quantiles.shape != (LATENT, 1, 3) or len(tables) != LATENT:
            raise ValueError(f"{len(tables)} tables and quantiles {tuple(quantiles.shape)} for {LATENT} channels")
        parts = _changed_parts(backbone, _below(tensors, "tail/"))
    except (KeyError, ValueError, RuntimeError, BundleError) as error:
        raise DataError(f"{path} is damaged or of another version: {error}; {_REMEDY}") from error
    return LearnedStudent(
        name=f"entropic-student-{facts.target}",
        facts=facts,
        digest=digest,
        encoder=Chain(Pixels(backbone.preprocessing), encoder).eval(),
        medians=quantiles[:, :, 1:2].clone(),
        tables=tables,
        answer=Chain(decoder, *parts).eval(),
    )


def _read(path: Path) -> tuple[str, StudentFacts, dict[str, Tensor]]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} is over {MAX_BYTES} bytes, which no Entropic Student is; {_REMEDY}")
        with safe_open(path, "pt") as stored:
            said = stored.metadata() or {}
            if said.get("kind") != KIND or said.get("version") != str(VERSION):
                raise DataError(f"{path} is not an Entropic Student of version {VERSION}; {_REMEDY}")
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - not a mapping
        facts = StudentFacts(**json.loads(said["facts"]))
        return hashlib.sha256(path.read_bytes()).hexdigest(), facts, tensors
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is not an Entropic Student: {error}; {_REMEDY}") from error


def _changed_parts(backbone: Backbone, changes: Mapping[str, Tensor]) -> Sequence[nn.Module]:
    parts = [copy.deepcopy(part) for part in tail_parts(backbone)]
    with torch.no_grad():
        for key, change in changes.items():
            number, name = key.split("/", 1)
            weights(parts[int(number)])[name.replace("/", ".")] += change.float()
    return parts


def _learned(module: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in module.state_dict().items() if CONSTANT not in k}


def _below(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}

"""Learned cuts: what a bundle holds of an encoder and its synthesis, and a backbone's head and tail made of them.

    NAME/encoder/FAMILY/LAYER/weight            float16, shared by all widths of a family (`slimmable.family`): each
                                                takes the first channels of it
    NAME/encoder/FAMILY/LAYER/WIDTH/scale, .../bias  float16 [channels], a width's normalisation
    NAME/synthesis/LAYER...                     float16, convolutions of the synthesis, or their kernels in eight bits
    SPLIT/head/NUMBER                           float16, weights of a head at a cut of the backbone's own that
                                                was made light: see `lighten`
    NAME/tail/TENSOR...                         float16, what is added to the rest of the backbone, if anything: see
                                                `repair.deltas`; or, of the larger ones, in eight bits (`eight_bits`)

pixels --encoder at a width--> latent ~~~closed form, coder~~~> latent --synthesis--> features --rest of backbone-->
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..bundle import Bundle, LearnedSpec, SplitSpec
from ..cutting.cuts import Head
from ..cutting.own_head import OwnHead
from ..exceptions import BundleError
from ..repair.deltas import Deltas, with_deltas
from ..repair.lean import KEPT, lean
from .eight_bits import as_floats, in_eight_bits
from .slimmable import PlainEncoder, SlimmableEncoder, family
from .synthesis import Synthesis, SynthesisShape

HEAD = "head"
INPUT = "input"
"""The anchor in front of the whole backbone: what the synthesis gives is its input, and the server runs all of it."""

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class LearnedCut:
    """A head and what undoes it.

    Attributes:
        encoder: normalised pixels float32 [B, 3, S, S] -> latent [B, K, h, w].
        synthesis: latent -> features at the anchor.
        anchor: a stage of the backbone, or its input.
        shape: (K, h, w).
        changes: of the rest of the backbone.
    """

    encoder: PlainEncoder
    synthesis: nn.Module
    anchor: str
    shape: tuple[int, int, int]
    changes: Changes


@dataclass(frozen=True)
class HeadWeights:
    """What a head of the backbone's own has that the backbone has not.

    Attributes:
        clips: of its ReLU6s, those that are left.
        weights: float32, as `OwnHead.weights` names them.
    """

    clips: tuple[int, ...]
    weights: Mapping[str, Tensor]

    def applied(self, head: Head) -> OwnHead:
        """The head with them.

        Raises:
            BundleError: they do not fit.
        """
        try:
            return OwnHead(head, self.clips).take(self.weights)
        except KeyError as error:
            raise BundleError(f"what was learned for a head does not fit it: {error} is missing") from error


class Changes:
    """What is added to the weights behind an anchor, for all widths."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Tensors as `Deltas` gives them; none for a tail as it is."""
        self._tensors = tensors
        self._changed: nn.Module | None = None

    def applied(self, tail: nn.Module) -> nn.Module:
        """The changed tail, made once: the widths' tails are one in memory.

        Raises:
            BundleError: they do not fit.
        """
        if not self._tensors:
            return tail
        if self._changed is None:
            try:
                self._changed = with_deltas(tail, self._tensors)
            except (KeyError, RuntimeError) as error:
                raise BundleError(f"what was learned does not fit its backbone: {error}; train it anew") from error
        return self._changed


def tensors_of(
    name: str,
    encoder: SlimmableEncoder,
    synthesis: Synthesis,
    tail: Deltas | None = None,
    kept: float = KEPT,
    eight_bits: bool = False,
) -> dict[str, npt.NDArray[Any]]:
    """What a bundle holds of trained networks; of the energy of the tail's changes a share `kept`, see `lean`, and the
    server's kernels in eight bits where that is asked for."""
    changes = lean(tail.tensors(), kept) if tail is not None else {}
    server: dict[str, npt.NDArray[Any]] = {
        **{f"{name}/synthesis/{key.replace('.', '/')}": _half(v) for key, v in synthesis.folded().state().items()},
        **{f"{name}/tail/{key}": value for key, value in changes.items()},
    }
    parts = {f"{name}/encoder/{key}": _half(value) for key, value in encoder.parts().items()}
    return parts | (in_eight_bits(server) if eight_bits else server)


def learned_cuts(bundle: Bundle) -> dict[str, LearnedCut]:
    """The learned cuts of a bundle, by the names of their split points; several widths share one synthesis.

    Raises:
        BundleError: what was learned is missing or does not fit.
    """
    syntheses: dict[tuple[str, tuple[int, ...]], Synthesis] = {}
    changes: dict[str, Changes] = {}
    found: dict[str, LearnedCut] = {}
    for spec in bundle.splits:
        if spec.learned is None:
            continue
        if not bundle.learned:
            raise BundleError(_lacking(bundle, spec.name))
        try:
            key = (spec.learned.name, spec.learned.synthesis)
            if key not in syntheses:
                syntheses[key] = _synthesis(bundle.learned, spec.learned)
            name = spec.learned.name
            if name not in changes:
                changes[name] = Changes(under(bundle.learned, f"{name}/tail/"))
            found[spec.name] = LearnedCut(
                _encoder(bundle.learned, spec), syntheses[key], spec.learned.anchor, spec.features, changes[name]
            )
        except (KeyError, RuntimeError, TypeError) as error:
            raise BundleError(
                f"what bundle {bundle.name} learned does not fit its split point {spec.name}: {error}; train it anew"
            ) from error
    return found


def own_heads(bundle: Bundle) -> dict[str, HeadWeights]:
    """Heads of the backbone's own split points that have other weights than the backbone, by their names.

    Raises:
        BundleError: what was learned is missing.
    """
    found = {}
    for spec in bundle.splits:
        if spec.learned is not None or spec.clips is None:
            continue
        weights = under(bundle.learned, f"{spec.name}/{HEAD}/")
        if not weights:
            raise BundleError(_lacking(bundle, spec.name))
        found[spec.name] = HeadWeights(spec.clips, weights)
    return found


def synthesis_numbers(shape: SynthesisShape) -> tuple[int, ...]:
    """A synthesis's size in a row, as `LearnedSpec` has it."""
    return (shape.latent, *shape.features, shape.scale, *(n for level in shape.levels for n in level))


def _synthesis_shape(numbers: Sequence[int]) -> SynthesisShape:
    latent, channels, height, width, scale, *rest = numbers
    levels = tuple((rest[i], rest[i + 1], rest[i + 2]) for i in range(0, len(rest), 3))
    return SynthesisShape(latent, (channels, height, width), scale, levels)


def _synthesis(tensors: Arrays, spec: LearnedSpec) -> Synthesis:
    mine = {key.replace("/", "."): value for key, value in under(tensors, f"{spec.name}/synthesis/").items()}
    return Synthesis.of(_synthesis_shape(spec.synthesis), mine)


def _encoder(tensors: Arrays, spec: SplitSpec) -> PlainEncoder:
    assert spec.learned is not None
    plain = PlainEncoder(spec.learned.channels, spec.features[0], spec.clips)
    prefix = f"{spec.learned.name}/encoder/{family(spec.learned.channels)}"
    with torch.no_grad():
        for at, layer in enumerate(plain.layers):
            assert isinstance(layer, nn.Conv2d) and layer.bias is not None
            made, given = layer.weight.shape[:2]
            scale = _float(tensors[f"{prefix}/{at}/{spec.learned.width}/scale"])
            layer.weight.copy_(_float(tensors[f"{prefix}/{at}/weight"])[:made, :given] * scale[:, None, None, None])
            layer.bias.copy_(_float(tensors[f"{prefix}/{at}/{spec.learned.width}/bias"]))
    return plain.merged()


def under(tensors: Arrays, prefix: str) -> dict[str, Tensor]:
    """Float32 tensors of a bundle whose names begin with a prefix, by what follows it.

    Raises:
        KeyError: one in eight bits has no steps.
    """
    found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return {key: torch.from_numpy(value) for key, value in as_floats(found).items()}


def _lacking(bundle: Bundle, split: str) -> str:
    return (
        f"bundle {bundle.name} lacks what was learned for {split}: it is an edge's half, or its learned.safetensors is "
        "missing; copy the whole bundle again"
    )


def _half(tensor: Tensor) -> npt.NDArray[np.float16]:
    return tensor.detach().half().cpu().contiguous().numpy()


def _float(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))

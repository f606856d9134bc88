"""The bundle: what both sides load. A folder of two files, and more on the edge:

    bundle.msgpack        manifest: task, backbone (digest), preprocessing, labels, splits, operating points
    bundle.safetensors    per split: gains, matrices of encoder and decoder, entropy tables (integers) and their use
    learned.safetensors   server's half only, where an encoder was learned: see `learning.cut`
    repair.safetensors    server's half only, where it was learned: see `repaired`
    exits.safetensors     server's half only, where an exit was learned: see `exits.narrow`
    backbone.safetensors  the backbone's weights, or backbone.pt2 all of it, where no package has them
    edge.msgpack          edge half only: digests of the files below
    head-SPLIT.onnx       edge half only: pixels -> latent
    exit-SPLIT.onnx       edge half only: features -> scores, where the split point has an exit
    uncut.onnx            edge half only: pixels -> scores, for local answers

The **fingerprint** is a SHA-256 over all tensors and over every part of the manifest that the two sides must share;
measured values (bytes, accuracy, times), labels and provenance are left out, so that measuring anew keeps it. So is the
repair, which the edge neither has nor needs; the manifest states the digest of its file. So are local exits, of which
the server knows nothing (see `bundle_exits`). The digest of what was learned
is in the fingerprint; the edge has it as the graphs of its heads.
Nothing here is pickle, and nothing is read before its size is known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from .bundle_checks import check_coding, check_learned, check_repair
from .bundle_exits import check_exits, exit_fields, read_exit_fields
from .bundle_files import (
    MALFORMED,
    MAX_MANIFEST_BYTES,
    MAX_TENSORS_BYTES,
    Array,
    digest,
    head_file,
    packed,
    read_digested,
    read_limited,
    read_msgpack,
    replace_files,
    rounded,
    short,
    tensors_file,
    unpacked,
)
from .bundle_specs import (
    FITS,
    INTERPOLATIONS,
    MAX_SIDE,
    BackboneSpec,
    ExitSpec,
    FilterSpec,
    LearnedSpec,
    Preprocessing,
    SplitSpec,
    filter_spec,
    plain,
    preprocessing_of,
    split_fields,
    split_identity,
    split_spec,
)
from .entropy_coder import EntropyTables
from .exceptions import BundleError, OperatingPointError
from .operating_point import Kind, OperatingPoint

FORMAT = 2
MANIFEST, TENSORS, EDGE_MANIFEST, UNCUT = "bundle.msgpack", "bundle.safetensors", "edge.msgpack", "uncut.onnx"
REPAIR, LEARNED, EXITS = "repair.safetensors", "learned.safetensors", "exits.safetensors"
FEATURES = "features"
"""Output of a head's graph, beside `latent`, where its split point has an exit: what the encoder takes."""
PRESENCE = "presence"
"""Output of a head's graph, beside `latent`, where the bundle has a filter: the score float32 [1] of the frame."""
COMPACT_FROM = 4 * 10**6
"""A bundle with larger tensors than this keeps its matrices and maps in half precision."""
TEMPORAL = "temporal"


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
    Where a split point has a filter, `SPLIT/filter/threshold` float32 [1] and `SPLIT/filter/...`, its layers, float16.
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
    """Tensors float16 (or int8 with steps) that only the server uses, see `repaired`; none where none was learned."""
    filter: FilterSpec | None = None
    learned: Mapping[str, Array] = field(default_factory=dict)
    """Tensors float16, or int8 (`learning.eight_bits`), of encoders and syntheses, named as `learning.cut` says; only
    where they were learned, and not on the edge."""
    learned_digest: bytes = b""
    """SHA-256 of their file, which the edge knows too."""
    exit_specs: tuple[ExitSpec, ...] = ()
    narrow_exits: Mapping[str, Array] = field(default_factory=dict)
    """Tensors of exits that were learned, by `SPLIT/...`; not on the edge, which has their graphs."""

    @cached_property
    def fingerprint(self) -> bytes:
        """SHA-256, 32 bytes."""
        digest = hashlib.sha256()
        shared = {
            "format": FORMAT,
            "task": self.task,
            "backbone": plain(self.backbone),
            "preprocessing": plain(self.preprocessing),
            "splits": [split_identity(s) for s in self.splits],
            "operating_points": [p.identity() for p in self.operating_points if not p.is_exit],
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

    def feature_point(self, split: str, level: int) -> OperatingPoint:
        """The operating point that sends a split point's features at a rate level.

        Raises:
            OperatingPointError: there is none.
        """
        for point in self.operating_points:
            if (point.kind, point.split, point.rate_level) == (Kind.FEATURE, split, level):
                return point
        raise OperatingPointError(f"bundle {self.name} has no operating point {split}@{level}")

    def exit(self, split: str) -> ExitSpec | None:
        """The exit at a split point, if it has one."""
        return next((s for s in self.exit_specs if s.split == split), None)

    def exit_point(self, split: str) -> OperatingPoint:
        """The operating point of the exit at a split point that has one."""
        return next(p for p in self.operating_points if p.is_exit and p.split == split)

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

    def filters(self, split: str) -> bool:
        """Whether a split point has a filter; not all need one."""
        return self.filter is not None and f"{split}/filter/threshold" in self.tensors

    def filter_threshold(self, split: str) -> float:
        """The score below which a frame holds nothing of interest; only where there is a filter."""
        return float(self._tensor(f"{split}/filter/threshold")[0])

    def _filter_fields(self) -> dict[str, Any]:
        return {"filter": asdict(self.filter)} if self.filter else {}

    def _learned_fields(self) -> dict[str, Any]:
        return {"learned": self.learned_digest} if self.learned_digest else {}

    def for_edge(self) -> Bundle:
        """The bundle as the edge gets it."""
        return replace(self, repair={}, learned={}, narrow_exits={})

    def with_learned(self, tensors: Mapping[str, Array]) -> Bundle:
        """The same with these tensors float16 of encoders and syntheses."""
        return replace(
            self, learned=tensors, learned_digest=hashlib.sha256(tensors_file(tensors)).digest() if tensors else b""
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
            check_coding(self, s)
            threshold = self.tensors.get(f"{s.name}/filter/threshold")
            if threshold is not None and (threshold.shape != (1,) or threshold.dtype != np.float32):
                raise BundleError(f"bundle {self.name} is damaged: the filter of {s.name}; learn it anew")
        if self.filter and not any(self.filters(s.name) for s in self.splits):
            raise BundleError(f"bundle {self.name} is damaged: it has no filter; learn it anew")
        if self.filter and not all(0 <= i < len(self.labels) for i in self.filter.classes):
            raise BundleError(f"bundle {self.name}: its filter is for classes that have no label")
        self.temporal_tables()
        check_repair(self)
        check_learned(self)
        check_exits(self)
        return self

    def manifest(self) -> dict[str, Any]:
        """Plain values, as they are packed."""
        return {
            "format": FORMAT,
            "name": self.name,
            "task": self.task,
            "backbone": plain(self.backbone),
            "preprocessing": plain(self.preprocessing),
            "labels": list(self.labels),
            "splits": [split_fields(s) for s in self.splits],
            "operating_points": [p.to_dict() for p in self.operating_points if not p.is_exit],
            "provenance": dict(self.provenance),
            **self._filter_fields(),
            "fingerprint": self.fingerprint,
            **({"repair": hashlib.sha256(tensors_file(self.repair)).digest()} if self.repair else {}),
            **self._learned_fields(),
            **exit_fields(self),
        }

    def save(self, folder: Path) -> None:
        """Write manifest and tensors into `folder`, which is made if need be. A bundle that is there stays whole until
        all of this one is written."""
        parts = {REPAIR: self.repair, LEARNED: self.learned, EXITS: self.narrow_exits}
        files = {name: tensors_file(found) for name, found in parts.items() if found}
        files |= {TENSORS: save_tensors(packed(self.tensors)), MANIFEST: msgpack.packb(self.manifest())}
        replace_files(folder, files, gone=parts.keys() - files.keys())

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
            tensors = unpacked(load_tensors(read_limited(folder / TENSORS, MAX_TENSORS_BYTES)))
        except (SafetensorError, *MALFORMED) as error:
            raise BundleError(f"{folder / TENSORS} is not a bundle's safetensors file: {error}") from error
        try:
            exit_specs, exit_points, narrow = read_exit_fields(manifest)
            bundle = cls(
                name=manifest["name"],
                task=manifest["task"],
                backbone=BackboneSpec(**manifest["backbone"]),
                preprocessing=preprocessing_of(manifest["preprocessing"]),
                labels=tuple(manifest["labels"]),
                splits=tuple(split_spec(s) for s in manifest["splits"]),
                operating_points=(*map(OperatingPoint.from_dict, manifest["operating_points"]), *exit_points),
                tensors=tensors,
                provenance=manifest["provenance"],
                folder=folder,
                filter=filter_spec(manifest["filter"]) if "filter" in manifest else None,
                repair=read_digested(folder / REPAIR, manifest["repair"]) if "repair" in manifest else {},
                # The edge's half has the digest alone.
                learned=read_digested(folder / LEARNED, manifest["learned"]) if (folder / LEARNED).is_file() else {},
                learned_digest=digest(manifest["learned"]) if "learned" in manifest else b"",
                exit_specs=exit_specs,
                narrow_exits=read_digested(folder / EXITS, narrow) if narrow else {},
            )
            bundle.check()
            stated, found = digest(manifest["fingerprint"]), bundle.fingerprint
        except MALFORMED as error:
            raise BundleError(f"{folder / MANIFEST} is not a bundle's manifest: {error!r}") from error
        if found != stated:
            raise BundleError(
                f"{folder} does not give its own fingerprint ({short(found)} instead of {short(stated)}); the bundle "
                "is damaged, fetch it again"
            )
        return bundle


__all__ = [
    "FITS",
    "INTERPOLATIONS",
    "MAX_MANIFEST_BYTES",
    "MAX_SIDE",
    "Array",
    "BackboneSpec",
    "Bundle",
    "ExitSpec",
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

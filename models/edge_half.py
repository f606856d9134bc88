"""The edge's half of a bundle: a folder that a device can run from without torch, verified file by file.

bundle.msgpack, bundle.safetensors    as in `bundle`
head-SPLIT.onnx                       input `pixels` uint8 [1, S, S, 3] -> `latent` float32 [1, K, H, W], and, where the
                                      split point has an exit, `features` float32 [1, C, H, W]; where that exit is
                                      narrow, also an optional input `ask` bool [] -> `scores` as below, or float32
                                      [1, 0] where it is false, as it is unless given
exit-SPLIT.onnx                       input `features` as above -> `scores` float32 [1, classes], sum 1
uncut.onnx                            input `pixels` uint8 [1, S, S, 3] -> `scores` float32 [1, classes], sum 1;
                                      only where the bundle has a local operating point
edge.msgpack                          fingerprint; size and SHA-256 of every file above
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import msgpack

from .bundle import EDGE_MANIFEST, MANIFEST, MAX_MANIFEST_BYTES, TENSORS, UNCUT, Bundle, head_file, read_msgpack
from .bundle_files import MALFORMED, digest, exit_file
from .exceptions import BundleError

ASK, SCORES = "ask", "scores"
"""Input of a head's graph that has its exit inside, and output of every graph that answers."""
MAX_FILE_BYTES = 512 * 2**20
"""Most that one file of an edge half may have; checked before it is read or received."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: bytes


def file_names(bundle: Bundle, splits: Collection[str] = ()) -> tuple[str, ...]:
    """Names of the files that an edge half of `bundle` holds, without the manifest that lists them.

    Args:
        bundle: any.
        splits: only the heads of these split points; empty for all.

    Raises:
        OperatingPointError: the bundle has no such split point.
    """
    chosen = [bundle.split(name) for name in splits] or bundle.splits
    uncut = (UNCUT,) if has_local(bundle) else ()
    exits = tuple(exit_file(s.name) for s in chosen if bundle.exit(s.name) is not None)
    return (MANIFEST, TENSORS, *(head_file(s.name) for s in chosen), *exits, *uncut)


def has_local(bundle: Bundle) -> bool:
    """Whether the device can answer by the uncut model, which it needs for that."""
    return any(p.is_uncut for p in bundle.operating_points)


def write_edge_manifest(folder: Path, bundle: Bundle) -> None:
    """Write `edge.msgpack` over the files that lie in `folder`; the last step of an export."""
    files = {name: _entry(folder / name) for name in file_names(bundle)}
    content = {
        "fingerprint": bundle.fingerprint,
        "files": {name: {"size": e.size, "sha256": e.sha256} for name, e in files.items()},
    }
    (folder / EDGE_MANIFEST).write_bytes(msgpack.packb(content))


def read_edge_manifest(folder: Path) -> tuple[bytes, dict[str, FileEntry]]:
    """Fingerprint and files of an edge half.

    Raises:
        BundleError: there is none, or it cannot be read.
    """
    content = read_msgpack(folder / EDGE_MANIFEST, MAX_MANIFEST_BYTES)
    try:
        files = {str(name): FileEntry(int(e["size"]), digest(e["sha256"])) for name, e in content["files"].items()}
        return digest(content["fingerprint"]), files
    except MALFORMED as error:
        raise BundleError(f"{folder / EDGE_MANIFEST} is not an edge half's manifest: {error!r}") from error


def load_edge_half(folder: Path, splits: Collection[str] = ()) -> Bundle:
    """Verify every file of an edge half by its digest and load the bundle in it.

    Args:
        folder: where it lies.
        splits: the heads of these split points are looked for, others need not be there; empty for all.

    Raises:
        BundleError: a file is missing, has another size or digest, or the fingerprints differ.
        OperatingPointError: the bundle has no such split point.
    """
    fingerprint, files = read_edge_manifest(folder)
    bundle = Bundle.load(folder)
    if bundle.fingerprint != fingerprint:
        raise BundleError(f"{folder} mixes files of two bundles; delete it and fetch or export it again")
    for name in file_names(bundle, splits):
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{path} is missing; export the edge half again with `headrace export`")
        if name not in files or _entry(path) != files[name]:
            raise BundleError(f"{path} does not have the digest that {EDGE_MANIFEST} states; fetch it again")
    return bundle


def _entry(path: Path) -> FileEntry:
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise BundleError(f"{path} has {size} bytes, the limit is {MAX_FILE_BYTES}")
    with path.open("rb") as file:
        return FileEntry(size, hashlib.file_digest(file, "sha256").digest())

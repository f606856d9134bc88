"""Files of a bundle: read within limits, verified by digest, tensors kept no wider than they need to be."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from .exceptions import BundleError, LimitError

MAX_MANIFEST_BYTES = 4 * 2**20
MAX_TENSORS_BYTES = 64 * 2**20
HALVED = ("mean", "weights", "encoder", "decoder")
HALF_LARGEST = 60_000.0
NARROW_FROM = 4096

Array = npt.NDArray[Any]


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


def widened(name: str, stored: Array) -> Array:
    """The inverse of `_narrow`."""
    return stored.astype(np.float32) if stored.dtype == np.float16 and _halved(name) else stored


def narrow(name: str, array: Array) -> Array:
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


def exit_file(split: str) -> str:
    """Name of the ONNX file of a split's exit."""
    return f"exit-{split}.onnx"


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


def tensors_file(tensors: Mapping[str, Array]) -> bytes:
    data: bytes = save_tensors({k: np.ascontiguousarray(v) for k, v in tensors.items()})
    return data


def read_digested(path: Path, digest: bytes) -> Mapping[str, Array]:
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

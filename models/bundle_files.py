"""Files of a bundle: read within limits, verified by digest, tensors kept no wider than they need to be."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from .entropy_coder import MAX_ENTRIES
from .exceptions import BundleError, LimitError

MAX_MANIFEST_BYTES = 4 * 2**20
MAX_TENSORS_BYTES = 64 * 2**20
HALVED = ("mean", "weights", "encoder", "decoder")
HALF_LARGEST = 60_000.0
NARROW_FROM = 4096
CDF, ORDER = "/cdf", "/order"
CDF_TOTAL = 2**16
"""What every entropy table ends with (16 bits)."""
ALWAYS_FLAT = "temporal/"
"""Tables that lie row after row in memory too."""

MALFORMED = (TypeError, KeyError, ValueError, AttributeError, IndexError, OverflowError)
"""What values of a wrong type or size raise where a manifest is read; whoever reads makes one error of ours of them."""

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


def packed(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Tensors as they are stored, losing nothing: float16 in place of float32 and uint16 in place of int32 where that
    is enough, entropy tables row after row without their padding, the 65,536 that each ends with as 0. Small arrays
    are not worth the look."""
    found = {}
    for name, array in tensors.items():
        sizes = tensors.get(f"{name.removesuffix(CDF)}/sizes")
        if name.endswith(CDF) and array.ndim == 2 and sizes is not None:
            found[name] = _wrapped(_without_padding(array, sizes), sizes)
        else:
            found[name] = _narrow(name, np.ascontiguousarray(array))
    return found


def unpacked(stored: Mapping[str, Array]) -> dict[str, Array]:
    """The inverse of `packed`; what was stored wider stays as it is.

    Raises:
        ValueError: entropy tables do not have the length that their sizes say.
    """
    return {name: _unpacked(name, array, stored) for name, array in stored.items()}


def _unpacked(name: str, array: Array, stored: Mapping[str, Array]) -> Array:
    if array.dtype == np.float16 and _halved(name):
        return array.astype(np.float32)
    if array.dtype == np.uint16 and name.endswith(ORDER):
        return array.astype(np.int32)
    if name.endswith(CDF) and array.ndim == 1 and not name.startswith(ALWAYS_FLAT):
        sizes = stored.get(f"{name.removesuffix(CDF)}/sizes")
        return _with_padding(array if array.dtype != np.uint16 else _unwrapped(array, sizes), sizes)
    return array


def _narrow(name: str, array: Array) -> Array:
    if array.nbytes < NARROW_FROM:
        return array
    if array.dtype == np.float32 and _halved(name):
        kind = "float16"
    elif array.dtype == np.int32 and name.endswith(ORDER):
        kind = "uint16"
    else:
        return array
    with np.errstate(over="ignore"):
        narrower: Array = array.astype(kind)
    return narrower if np.array_equal(narrower.astype(array.dtype), array) else array


def _without_padding(cdf: Array, sizes: Array) -> Array:
    rows = [row[:size] for row, size in zip(cdf, sizes.tolist(), strict=False)]
    flat: Array = np.concatenate(rows) if rows else cdf
    try:
        same = np.array_equal(_with_padding(flat, sizes), cdf)
    except ValueError:  # tables that do not fit together are refused where they are used
        same = False
    return flat if same else cdf


def _wrapped(flat: Array, sizes: Array) -> Array:
    """Tables that lie row after row as uint16, if nothing is lost by it."""
    if flat.ndim != 1 or flat.dtype != np.int32 or len(flat) != sizes.sum():
        return flat
    narrow = flat.astype(np.uint16)
    return narrow if np.array_equal(_unwrapped(narrow, sizes), flat) else flat


def _unwrapped(narrow: Array, sizes: Array | None) -> Array:
    flat = narrow.astype(np.int32)
    if sizes is not None and sizes.ndim == 1 and len(sizes) and sizes.min() >= 1 and len(flat) == sizes.sum():
        flat[np.cumsum(sizes) - 1] = CDF_TOTAL
    return flat


def _with_padding(flat: Array, sizes: Array | None) -> Array:
    if sizes is None or sizes.ndim != 1 or len(sizes) == 0 or sizes.min() < 1 or len(flat) != sizes.sum():
        raise ValueError(f"entropy tables do not lie in {len(flat)} numbers")
    if len(sizes) * int(sizes.max()) > MAX_ENTRIES:
        raise ValueError(f"{len(sizes)} entropy tables of up to {sizes.max()} values are over {MAX_ENTRIES} in all")
    cdf = np.zeros((len(sizes), int(sizes.max())), flat.dtype)
    for row, begin, size in zip(cdf, np.cumsum(sizes) - sizes, sizes, strict=True):
        row[:size] = flat[begin : begin + size]
    return cdf


def digest(value: object) -> bytes:
    """A SHA-256 as a manifest states it.

    Raises:
        ValueError: it is none. (`bytes` of a number would be as many zeros.)
    """
    if not isinstance(value, bytes) or len(value) != hashlib.sha256().digest_size:
        raise ValueError(f"{value!r:.40} is no SHA-256")
    return value


def replace_files(folder: Path, files: Mapping[str, bytes], gone: Collection[str] = ()) -> None:
    """Write files into a folder, which is made if need be: all of them beside those of the same names first, which then
    are replaced in this order, and those that are to be gone removed. Where one cannot be written, what was there stays
    as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f".{name}.{os.getpid()}" for name in files}
    try:
        for name, data in files.items():
            partial[name].write_bytes(data)
        for name, path in partial.items():
            path.replace(folder / name)
        for name in gone:  # of an earlier bundle: taken for this one's by nobody, but shipped with it
            (folder / name).unlink(missing_ok=True)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


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

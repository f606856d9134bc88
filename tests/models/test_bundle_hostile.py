"""Bundles that were damaged, made up, or are in the way: one error of ours, and nothing is lost."""

from __future__ import annotations

import copy
import errno
import io
import random
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import msgpack
import pytest
from headrace.models.bundle import LEARNED, MANIFEST, REPAIR, Bundle
from headrace.models.class_map import decode_class_map
from headrace.models.edge_half import EDGE_MANIFEST, read_edge_manifest
from headrace.models.exceptions import BundleError, DataError, HeadraceError, LimitError
from headrace.models.export import export_edge_half
from headrace.models.image_codec import decode_image
from headrace.models.learning.album import read_photograph
from headrace.models.measure import load_pixels, random_crop

COMMITTED = Path(__file__).parents[2] / "models" / "bundles" / "efficientnet_lite0"
GIGABYTES = 20 * 2**30
VALUES: list[Any] = [
    None,
    -1,
    0,
    2**63,
    1.5,
    float("nan"),
    "x",
    "../../y",
    b"z",
    [],
    [1],
    [[1]],
    {},
    {"a": 1},
    True,
    GIGABYTES,
]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(COMMITTED, tmp_path / "bundle")
    return tmp_path / "bundle"


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a manifest; of long lists the first three."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return [at, *(place for key, each in inner for place in places(each, (*at, key)))]


def test_whatever_stands_in_a_manifest_one_error_of_ours_comes_of_it(copied: Path) -> None:
    """Of all places and values as many as a few seconds allow; which they are is in the seed."""
    good = msgpack.unpackb((copied / MANIFEST).read_bytes())
    tried = [(place, value) for place in places(good) for value in VALUES if place and place[0] not in {"provenance"}]
    chosen = random.Random(7).sample(tried, 250)
    chosen += [(("exits", "learned"), GIGABYTES), (("fingerprint",), GIGABYTES), (("learned",), GIGABYTES)]
    refused = 0
    for place, value in chosen:
        made = copy.deepcopy(good)
        inner = made
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        (copied / MANIFEST).write_bytes(msgpack.packb(made))
        try:
            Bundle.load(copied)
        except HeadraceError:
            refused += 1
    assert refused > 150  # labels, accuracies and the like may have other values


def test_an_edge_manifest_of_made_up_numbers_takes_no_memory(tmp_path: Path) -> None:
    for content in (
        {"fingerprint": GIGABYTES, "files": {}},
        {"fingerprint": b"", "files": {"a": {"size": 1, "sha256": GIGABYTES}}},
    ):
        (tmp_path / EDGE_MANIFEST).write_bytes(msgpack.packb(content))
        with pytest.raises(BundleError, match="not an edge half's manifest"):
            read_edge_manifest(tmp_path)


@pytest.mark.parametrize("full_at", range(1, 6))
def test_a_disk_that_is_full_leaves_the_bundle_that_is_there(
    copied: Path, monkeypatch: pytest.MonkeyPatch, full_at: int
) -> None:
    bundle, written, write = Bundle.load(copied), [0], Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        written[0] += 1
        if written[0] == full_at:
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    before = sorted(p.name for p in copied.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            bundle.save(copied)
    assert sorted(p.name for p in copied.iterdir()) == before
    found = Bundle.load(copied)
    assert found.fingerprint == bundle.fingerprint and found.repair.keys() == bundle.repair.keys()


def test_a_devices_half_is_not_written_over_the_whole_bundle(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds a whole bundle"):
        export_edge_half(Bundle.load(copied), copied)
    shutil.copytree(COMMITTED, tmp_path / "another")
    with pytest.raises(DataError, match="give another folder"):
        export_edge_half(Bundle.load(copied), tmp_path / "another")
    assert (copied / LEARNED).is_file() and (copied / REPAIR).is_file()


def bomb(kind: bytes = b"\x08\x02") -> bytes:
    """A PNG of 60,000 x 60,000 pixels, as its header says."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">II", 60_000, 60_000) + kind + b"\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_a_picture_that_declares_too_much_is_refused_by_name(tmp_path: Path) -> None:
    how = Bundle.load(COMMITTED).preprocessing
    with pytest.raises(LimitError, match="class map"):
        decode_class_map(bomb(b"\x08\x00"))
    with pytest.raises(HeadraceError):
        decode_image(io.BytesIO(bomb()).getvalue(), 224)
    path = tmp_path / "panorama.png"
    path.write_bytes(bomb())
    for read in (read_photograph, lambda p: load_pixels(p, how), lambda p: random_crop(p, how, 0, 0)):
        with pytest.raises(DataError, match=r"panorama\.png"):
            read(path)

"""The cache of edge halves that the server hands out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from headrace.models.bundle import UNCUT, Bundle, head_file
from headrace.models.edge_half import load_edge_half, write_edge_manifest
from headrace.models.exceptions import OperatingPointError
from headrace.server.edge_halves import EdgeHalves
from headrace.server.exceptions import EdgeHalfError

GOLDEN = Path(__file__).parent.parent / "data" / "golden_bundle"


@pytest.fixture
def served(tmp_path: Path) -> Bundle:
    """A bundle whose backbone is not installed, so that nothing can be exported for it."""
    bundle = Bundle.load(GOLDEN)
    bundle.save(tmp_path / "served")
    return replace(bundle, folder=tmp_path / "served")


def write_half(folder: Path, bundle: Bundle) -> None:
    bundle.save(folder)
    for name in (*(head_file(s.name) for s in bundle.splits), UNCUT):
        (folder / name).write_bytes(b"graph of " + name.encode())
    write_edge_manifest(folder, bundle)


def measured_anew(bundle: Bundle) -> Bundle:
    points = tuple(replace(p, accuracy=0.123) for p in bundle.operating_points)
    anew = replace(bundle, operating_points=points)
    assert bundle.folder is not None
    anew.save(bundle.folder)
    return anew


async def test_a_half_that_fits_is_taken_as_it_is(served: Bundle, tmp_path: Path) -> None:
    cached = tmp_path / "cache" / served.fingerprint.hex()
    write_half(cached, served)
    before = {p.name: p.stat().st_mtime_ns for p in cached.iterdir()}
    assert await EdgeHalves(tmp_path / "cache").folder(served) == cached
    assert {p.name: p.stat().st_mtime_ns for p in cached.iterdir()} == before


async def test_a_bundle_that_was_measured_anew_gives_its_new_values(served: Bundle, tmp_path: Path) -> None:
    cached = tmp_path / "cache" / served.fingerprint.hex()
    write_half(cached, served)
    anew = measured_anew(served)
    assert anew.fingerprint == served.fingerprint
    half = load_edge_half(await EdgeHalves(tmp_path / "cache").folder(anew))
    assert {p.accuracy for p in half.operating_points} == {0.123}
    assert (cached / UNCUT).read_bytes() == b"graph of " + UNCUT.encode(), "the graphs stay"
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [cached.name], "nothing temporary is left"


async def test_a_damaged_half_is_exported_again(served: Bundle, tmp_path: Path) -> None:
    cached = tmp_path / "cache" / served.fingerprint.hex()
    write_half(cached, served)
    (cached / UNCUT).write_bytes(b"damaged")
    with pytest.raises(EdgeHalfError, match="cannot be exported"):
        await EdgeHalves(tmp_path / "cache").folder(served)


async def test_only_the_heads_that_are_asked_for_are_given(served: Bundle, tmp_path: Path) -> None:
    write_half(tmp_path / "cache" / served.fingerprint.hex(), served)
    halves, split = EdgeHalves(tmp_path / "cache"), served.splits[-1].name
    names = [chunk.name async for chunk in halves.chunks(served, [split]) if chunk.name]
    assert names == ["bundle.msgpack", "bundle.safetensors", head_file(split), UNCUT, "edge.msgpack"]
    with pytest.raises(OperatingPointError, match="no split point 'nowhere'"):
        await anext(halves.chunks(served, ["nowhere"]))

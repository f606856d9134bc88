from dataclasses import replace
from pathlib import Path

import headrace
import msgpack
import numpy as np
import pytest
from headrace.models.bundle import MANIFEST, TENSORS, UNCUT, Bundle, head_file
from headrace.models.bundle_files import packed, unpacked
from headrace.models.edge_half import load_edge_half, write_edge_manifest
from headrace.models.exceptions import BundleError, HeadraceError, LimitError, OperatingPointError
from headrace.models.operating_point import Kind

COMMITTED = Path(headrace.__file__).parent / "models" / "bundles" / "efficientnet_lite0"


def test_comes_back_from_disk(small_bundle, tmp_path):
    small_bundle.save(tmp_path / "b")
    again = Bundle.load(tmp_path / "b")
    assert again.fingerprint == small_bundle.fingerprint
    assert again.operating_points == small_bundle.operating_points
    assert again.splits == small_bundle.splits


def test_measuring_anew_keeps_the_fingerprint(small_bundle):
    points = tuple(replace(p, accuracy=0.5, bytes_median=1.0, edge_share=0.1) for p in small_bundle.operating_points)
    assert replace(small_bundle, operating_points=points, provenance={"x": 1}).fingerprint == small_bundle.fingerprint


def test_what_decodes_differently_has_another_fingerprint(small_bundle):
    gains = small_bundle.tensors["a/gains"] * np.float32(1.0001)
    assert (
        replace(small_bundle, tensors={**small_bundle.tensors, "a/gains": gains}).fingerprint
        != small_bundle.fingerprint
    )
    points = small_bundle.operating_points[:-1]
    assert replace(small_bundle, operating_points=points).fingerprint != small_bundle.fingerprint


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_damage_is_noticed_in_every_part_of_a_file(small_bundle, tmp_path, name):
    small_bundle.save(tmp_path)
    data = (tmp_path / name).read_bytes()
    unnoticed = 0
    for at in np.linspace(0, len(data) - 1, 60).astype(int):
        damaged = bytearray(data)
        damaged[at] ^= 0x55
        (tmp_path / name).write_bytes(damaged)
        try:
            unnoticed += Bundle.load(tmp_path).fingerprint != small_bundle.fingerprint
        except HeadraceError:
            continue
    assert unnoticed == 0


def test_errors_name_the_thing(small_bundle, tmp_path):
    with pytest.raises(BundleError, match="nowhere"):
        Bundle.load(tmp_path / "nowhere")
    small_bundle.save(tmp_path)
    manifest = msgpack.unpackb((tmp_path / MANIFEST).read_bytes())
    (tmp_path / MANIFEST).write_bytes(msgpack.packb({**manifest, "format": 99}))
    with pytest.raises(BundleError, match="format 99"):
        Bundle.load(tmp_path)
    (tmp_path / MANIFEST).write_bytes(bytes(5 * 2**20))
    with pytest.raises(LimitError, match="limit"):
        Bundle.load(tmp_path)
    with pytest.raises(OperatingPointError, match="99"):
        small_bundle.operating_point(99)
    with pytest.raises(OperatingPointError, match="nope"):
        small_bundle.split("nope")


def test_tensors_that_do_not_fit_are_refused(small_bundle):
    tensors = {**small_bundle.tensors, "a/decoder": np.zeros((2, 2), np.float32)}
    with pytest.raises(BundleError, match="a/decoder"):
        replace(small_bundle, tensors=tensors).check()
    for missing in ("b/cdf", "b/order", "b/1/indexes", "b/rows", "b/weights"):
        tensors = {k: v for k, v in small_bundle.tensors.items() if k != missing}
        with pytest.raises(BundleError, match=missing):
            replace(small_bundle, tensors=tensors).check()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("b/weights", lambda a: a * 0, "weights of b is not positive"),
        ("b/gains", lambda a: -a, "gains of b is not positive"),
        ("b/order", lambda a: np.concatenate((a[:-1], a[:1])), "order of b is not int32 without repetition"),
        ("b/order", lambda a: a.astype(np.int64), "order of b is not int32 without repetition"),
        ("b/order", lambda a: a - 1000, "order of b does not fit a latent of 48 numbers"),
        ("b/order", lambda a: a + 6, "order of b does not fit a latent of 48 numbers"),
        ("b/order", lambda a: a[:20], "b rate level 0 does not fit its order"),
        ("b/1/indexes", lambda a: a[:0], "b rate level 1 does not fit its order"),
        ("b/1/indexes", lambda a: a.astype(np.int32), "b rate level 1 does not fit its order"),
        ("b/1/indexes", lambda a: a + np.uint8(100), "b rate level 1 lacks entropy tables"),
        ("b/1/indexes", lambda a: a[:-1], r"slices .* of b do not fit 31 components"),
        ("b/sizes", lambda a: a[:-1], "do not fit together"),
        ("b/cdf", lambda a: a[:, ::-1], "is not a cumulative distribution"),
    ],
)
def test_integers_that_would_decode_to_nonsense_are_refused(small_bundle, name, change, message):
    tensors = {**small_bundle.tensors, name: change(small_bundle.tensors[name])}
    with pytest.raises(BundleError, match=message):
        replace(small_bundle, tensors=tensors).check()


def test_slices_that_do_not_rise_are_refused(small_bundle):
    a, b = small_bundle.splits
    for ends in ((0, *b.slices[0][1:]), (*b.slices[0][:-1], 1), ()):
        broken = replace(b, slices=(ends, *b.slices[1:]))
        with pytest.raises(BundleError, match="do not fit"):
            replace(small_bundle, splits=(a, broken)).check()


def test_an_edge_half_is_verified_file_by_file(small_bundle, tmp_path):
    small_bundle.save(tmp_path)
    for name in (head_file("a"), head_file("b"), UNCUT):
        (tmp_path / name).write_bytes(b"onnx" + name.encode())
    write_edge_manifest(tmp_path, small_bundle)
    assert load_edge_half(tmp_path).fingerprint == small_bundle.fingerprint
    (tmp_path / head_file("a")).write_bytes(b"ONNX" + head_file("a").encode())
    with pytest.raises(BundleError, match=r"head-a\.onnx does not have the digest"):
        load_edge_half(tmp_path)
    (tmp_path / head_file("a")).unlink()
    with pytest.raises(BundleError, match=r"head-a\.onnx is missing"):
        load_edge_half(tmp_path)


def test_the_committed_bundle_is_small_and_complete():
    assert sum(p.stat().st_size for p in COMMITTED.iterdir()) <= 5_000_000
    bundle = Bundle.load(COMMITTED)
    features = [p for p in bundle.operating_points if p.kind is Kind.FEATURE]
    assert {p.split for p in features} >= {"blocks.2", "blocks.3", "blocks.5", "blocks.2.0", "blocks.2.0-144px"}
    for spec in bundle.splits:
        assert spec.rate_levels >= 6
        assert all(len(ends) >= 4 for ends in spec.slices)
    for point in bundle.operating_points:
        if point.kind is Kind.LOCAL:
            assert point.bytes_median == 0
        else:
            assert 0 < point.bytes_median <= point.bytes_p95
            assert 0 < point.accuracy <= 1
    assert {p.codec for p in bundle.operating_points if p.kind is Kind.IMAGE} == {"webp", "jpeg"}
    assert {"command", "data", "seed"} <= bundle.provenance.keys()


def test_a_large_bundle_keeps_matrices_in_half_precision(small_bundle, tmp_path, monkeypatch):
    bundle = small_bundle
    monkeypatch.setattr("headrace.models.bundle_files.NARROW_FROM", 0)
    bundle.save(tmp_path / "small")
    assert bundle.compact() is bundle, "a small one is as it was"
    monkeypatch.setattr("headrace.models.bundle.COMPACT_FROM", 0)
    compact = bundle.compact()
    compact.save(tmp_path / "compact")
    loaded = Bundle.load(tmp_path / "compact")
    assert loaded.fingerprint == compact.fingerprint != bundle.fingerprint
    for name, array in bundle.tensors.items():
        assert loaded.tensors[name].dtype == array.dtype
        np.testing.assert_allclose(loaded.tensors[name], array, rtol=1e-3, atol=1e-3)
    sizes = [(tmp_path / n / "bundle.safetensors").stat().st_size for n in ("small", "compact")]
    assert sizes[1] < sizes[0]


def test_what_is_stored_is_narrow_and_comes_back_as_it_was():
    tables = np.zeros((3, 2000), np.int32)
    sizes = np.array([3, 2000, 5], np.int32)
    for row, size in zip(tables, sizes, strict=True):
        row[:size] = np.arange(size)
    tensors = {
        "a/cdf": tables,
        "a/sizes": sizes,
        "a/order": np.arange(3000, dtype=np.int32)[::-1].copy(),
        "b/order": np.arange(3000, dtype=np.int32) + 2**16 - 100,
        "temporal/cdf": np.arange(9, dtype=np.int32),
        "c/cdf": np.array([[0, 7, 2**16, 0], [0, 1, 2, 2**16]], np.int32),
        "c/sizes": np.array([3, 4], np.int32),
    }
    stored = packed(tensors)
    assert stored["a/cdf"].shape == (2008,) and stored["a/order"].dtype == np.uint16
    assert stored["c/cdf"].dtype == np.uint16 and stored["c/cdf"].tolist() == [0, 7, 0, 0, 1, 2, 0]
    assert stored["b/order"].dtype == np.int32 and stored["a/cdf"].dtype == np.int32, "they do not fit"
    found = unpacked(stored)
    assert all(np.array_equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())
    assert all(np.array_equal(v, tensors[k]) for k, v in unpacked(tensors).items()), "files that are wider are read too"
    with pytest.raises(ValueError, match="do not lie in 2007 numbers"):
        unpacked(stored | {"a/cdf": stored["a/cdf"][:-1]})
    with pytest.raises(ValueError, match="are over"):
        unpacked({"a/cdf": np.zeros(2**23, np.int8), "a/sizes": np.array([1, 1, 2**23 - 2], np.int32)})

"""Fetching the edge half: what arrives whole is kept, what does not verify leaves nothing behind."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from headrace.edge import fetch
from headrace.edge.exceptions import ConfigError, FetchError, StreamError
from headrace.edge.fetch import Cache, fetch_edge_half, receive
from headrace.models.bundle import Bundle
from headrace.models.edge_half import MAX_FILE_BYTES, load_edge_half
from headrace.protos.messages import BundleChunk


async def stream(*chunks: BundleChunk) -> AsyncIterator[BundleChunk]:
    for chunk in chunks:
        yield chunk


def chunk(name: str = "a.onnx", data: bytes = b"abc", **fields) -> BundleChunk:
    """The first chunk of a file, right unless the test makes it wrong."""
    right = {"fingerprint": bytes(32), "size": len(data), "sha256": hashlib.sha256(data).digest(), "files_left": 0}
    return BundleChunk(name=name, data=data, **(right | fields))


async def test_an_edge_half_is_fetched_verified_and_remembered(server, tmp_path):
    cache = Cache(tmp_path / "cache")
    assert cache.last_from(server.address) is None
    bundle = await fetch_edge_half(server.address, cache)
    assert bundle.fingerprint == server.fingerprint
    assert bundle.folder == cache.bundle_folder(bundle.fingerprint)
    assert load_edge_half(bundle.folder).fingerprint == server.fingerprint
    again = cache.last_from(server.address)
    assert again is not None and again.fingerprint == bundle.fingerprint
    assert sorted(p.name for p in cache.folder.iterdir()) == ["bundles", "servers"], "nothing temporary is left"
    assert cache.last_from("another:1") is None


async def test_a_damaged_copy_in_the_cache_is_replaced(server, tmp_path):
    cache = Cache(tmp_path)
    bundle = await fetch_edge_half(server.address, cache)
    (bundle.folder / "uncut.onnx").write_bytes(b"damaged")
    assert cache.last_from(server.address) is None
    bundle = await fetch_edge_half(server.address, cache)
    assert load_edge_half(bundle.folder).fingerprint == server.fingerprint
    assert (await fetch_edge_half(server.address, cache)).folder == bundle.folder, "one that is whole stays"


async def test_a_bundle_that_was_not_asked_for_is_refused(server, tmp_path):
    with pytest.raises(FetchError, match=r"asked server .* for bundle 0707"):
        await fetch_edge_half(server.address, Cache(tmp_path), fingerprint=b"\x07" * 32)
    assert not (tmp_path / "bundles").exists()


async def test_of_the_bundle_that_is_held_nothing_is_received(server, tmp_path):
    held = await fetch_edge_half(server.address, Cache(tmp_path / "one"))
    assert await fetch_edge_half(server.address, Cache(tmp_path / "two"), held=held) is held
    assert not (tmp_path / "two" / "bundles").exists()


async def test_a_cache_that_cannot_be_made_is_named(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"--cache-dir .*file/cache cannot be written to"):
        await fetch_edge_half(server.address, Cache(tmp_path / "file" / "cache"))


async def test_no_server_is_a_stream_error(tmp_path):
    with pytest.raises(StreamError, match=r"server 127\.0\.0\.1:1 gave no edge half"):
        await fetch_edge_half("127.0.0.1:1", Cache(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("index", [0, 3, -1])
async def test_files_that_do_not_belong_together_are_refused(server, tmp_path, edge_half, index):
    """Each file has the digest that is stated for it, and yet the half does not verify."""
    names = ["bundle.msgpack", "bundle.safetensors", "head-stage.1.onnx", "uncut.onnx", "edge.msgpack"]
    fingerprint = Bundle.load(edge_half).fingerprint

    def chunks() -> AsyncIterator[BundleChunk]:
        files = []
        for i, name in enumerate(names):
            data = (edge_half / name).read_bytes()
            if i == index % len(names):
                data = data[:-1] + bytes([data[-1] ^ 1])
            files.append(chunk(name, data, fingerprint=fingerprint, files_left=len(names) - 1 - i))
        return stream(*files)

    server.chunks = chunks
    with pytest.raises(FetchError, match="is not accepted"):
        await fetch_edge_half(server.address, Cache(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([chunk(sha256=bytes(32))], r"a\.onnx does not have the SHA-256"),
        ([chunk(sha256=b"")], "states no SHA-256"),
        ([chunk("../a.onnx")], "no plain file name"),
        ([chunk("/etc/passwd")], "no plain file name"),
        ([chunk(".hidden")], "no plain file name"),
        ([chunk("a/b")], "no plain file name"),
        ([chunk("a\\b")], "no plain file name"),
        ([chunk("a\n")], "no plain file name"),
        ([chunk("a" * 101)], "no plain file name"),
        ([chunk(size=MAX_FILE_BYTES + 1)], "over the limit"),
        ([chunk(files_left=1), chunk(files_left=0)], "twice"),
        ([chunk(files_left=64)], "more than 64 files"),
        ([chunk(size=2)], "more of file a.onnx than it declared"),
        ([chunk(size=4)], r"a\.onnx ends 1 bytes early"),
        ([chunk(files_left=2)], "incomplete: 2 files"),
        ([chunk("")], "names no file"),
        ([], "incomplete"),
        ([chunk(files_left=1), chunk("b.onnx", fingerprint=b"\x01" * 32)], "mixes the files of two bundles"),
    ],
)
async def test_what_is_wrong_is_refused_by_name(chunks, message, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(FetchError, match=message):
        await receive(stream(*chunks), folder)
    assert {p.name for p in tmp_path.iterdir()} == {"in"}
    assert {p.name for p in folder.iterdir()} <= {"a.onnx"}


async def test_the_limit_on_all_files_together_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_TOTAL_BYTES", 5)
    chunks = [chunk("a", b"abc", files_left=1), chunk("b", b"def", files_left=0)]
    with pytest.raises(FetchError, match="file b of 3 bytes is over the limit"):
        await receive(stream(*chunks), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


async def test_a_file_may_be_empty_and_come_in_many_pieces(tmp_path):
    data = b"0123456789"
    whole = chunk("b", data, files_left=0)
    whole.data = data[:4]
    chunks = [chunk("a", b"", files_left=1), whole, BundleChunk(data=data[4:7]), BundleChunk(data=data[7:])]
    assert await receive(stream(*chunks), tmp_path) == bytes(32)
    assert (tmp_path / "a").read_bytes() == b""
    assert (tmp_path / "b").read_bytes() == data


def test_a_pointer_that_leads_nowhere_is_no_bundle(tmp_path):
    cache = Cache(tmp_path)
    (tmp_path / "servers").mkdir()
    for text in ("zz", "", "00" * 32, "../../etc"):
        (tmp_path / "servers" / "host_1").write_text(text)
        assert cache.last_from("host:1") is None


def test_two_processes_may_put_the_same_half(tmp_path, edge_half):
    import shutil

    cache = Cache(tmp_path)
    for name in ("one", "two"):
        shutil.copytree(edge_half, tmp_path / name)
    fingerprint = Bundle.load(edge_half).fingerprint
    first = cache.put(tmp_path / "one", fingerprint)
    second = cache.put(tmp_path / "two", fingerprint)
    assert first.folder == second.folder == Path(tmp_path / "bundles" / fingerprint.hex())

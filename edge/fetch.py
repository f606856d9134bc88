"""Fetching the edge half from the server, and the cache that keeps it.

    CACHE/bundles/FINGERPRINT/      an edge half, as `models.edge_half` describes it
    CACHE/servers/ADDRESS           fingerprint (hex) of the bundle that this server gave last

Files are received into a temporary folder beside, checked, and moved into place at once. What lies in the cache is
verified again on every start.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Any, BinaryIO

import grpc
import structlog

from ..models.bundle import Bundle, short
from ..models.edge_half import MAX_FILE_BYTES, load_edge_half
from ..models.exceptions import BundleError, HeadraceError
from ..protos.messages import BundleChunk, GetBundleRequest, HeadraceStub
from .access import PLAIN, Access
from .exceptions import ConfigError, FetchError, StreamError
from .stream import CHANNEL_OPTIONS

log = structlog.get_logger(__name__)

MAX_FILES = 64
MAX_TOTAL_BYTES = 2 * MAX_FILE_BYTES
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
"""File names that are accepted: no separators, no leading dot."""


class Cache:
    """Edge halves that were fetched before."""

    def __init__(self, folder: Path, splits: Collection[str] = ()) -> None:
        """Keep where and what; the folder is made when something is put into it.

        Args:
            folder: of the cache.
            splits: split points whose heads are wanted; empty for all.
        """
        self.folder, self.splits = folder, tuple(splits)

    def bundle_folder(self, fingerprint: bytes) -> Path:
        """Where the edge half of that fingerprint lies, if it does."""
        return self.folder / "bundles" / fingerprint.hex()

    def last_from(self, server: str) -> Bundle | None:
        """The edge half that this server gave last, verified; None if there is none or it is damaged."""
        try:
            folder = self.bundle_folder(bytes.fromhex(self._pointer(server).read_text().strip()))
        except (OSError, ValueError):
            return None
        return self._verified(folder)

    def remember(self, server: str, fingerprint: bytes) -> None:
        """Note which bundle this server gave."""
        pointer = self._pointer(server)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        partial = pointer.with_name(f"{pointer.name}.{os.getpid()}")
        partial.write_text(fingerprint.hex())
        partial.replace(pointer)

    def put(self, received: Path, fingerprint: bytes) -> Bundle:
        """Verify the received folder and move it into place; another process may have done so meanwhile.

        Raises:
            BundleError: it does not verify.
        """
        if load_edge_half(received, self.splits).fingerprint != fingerprint:
            raise BundleError(f"the server sent another bundle than the {short(fingerprint)} it had announced")
        target = self.bundle_folder(fingerprint)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            received.rename(target)
        except OSError:
            present = self._verified(target)
            if present is not None:
                return present
            away = Path(tempfile.mkdtemp(prefix="replaced-", dir=self.folder))
            target.rename(away / target.name)
            received.rename(target)
            shutil.rmtree(away, ignore_errors=True)
        return load_edge_half(target, self.splits)

    def _verified(self, folder: Path) -> Bundle | None:
        if not folder.is_dir():
            return None
        try:
            return load_edge_half(folder, self.splits)
        except HeadraceError as error:
            log.warning(
                "a cached edge half is damaged, or lacks a head, and will be fetched again",
                folder=str(folder),
                reason=str(error),
            )
            return None

    def _pointer(self, server: str) -> Path:
        return self.folder / "servers" / re.sub(r"[^A-Za-z0-9.-]", "_", server)


async def fetch_edge_half(
    server: str,
    cache: Cache,
    *,
    fingerprint: bytes = b"",
    timeout_s: float = 300.0,
    access: Access = PLAIN,
    held: Bundle | None = None,
) -> Bundle:
    """Get an edge half from the server into the cache.

    Args:
        server: host:port.
        cache: where it is kept.
        fingerprint: 32 bytes, or empty for the bundle that the server serves by default.
        timeout_s: for all of it.
        access: how the server is reached.
        held: what this device runs already; if the server announces that, nothing more is received, and this is it.

    Raises:
        StreamError: the server cannot be reached, or broke off.
        ConfigError: its bundle has no such split points, or a file of `access` or the cache's folder cannot be used.
        FetchError: what it sent is not accepted.
    """
    channel = access.channel(server, CHANNEL_OPTIONS)
    temporary = None
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix="fetch-", dir=cache.folder))
        request = GetBundleRequest(fingerprint=fingerprint, splits=cache.splits)
        stub: Any = HeadraceStub(channel)  # type: ignore[no-untyped-call]
        chunks: AsyncIterator[Any] = stub.GetBundle(request, timeout=timeout_s, metadata=access.metadata()).__aiter__()
        received = await receive(chunks, temporary, held.fingerprint if held is not None else b"")
        if held is not None and received == held.fingerprint:
            return held
        if fingerprint and received != fingerprint:
            raise FetchError(f"asked server {server} for bundle {short(fingerprint)}, it sent {short(received)}")
        bundle = await asyncio.to_thread(cache.put, temporary, received)
        cache.remember(server, received)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
            raise ConfigError(f"server {server} cannot give what --splits asks for: {error.details()}") from error
        raise StreamError(f"server {server} gave no edge half: {error.code().name}: {error.details()}") from error
    except BundleError as error:
        raise FetchError(f"the edge half from server {server} is not accepted: {error}") from error
    except OSError as error:
        raise ConfigError(f"--cache-dir {cache.folder} cannot be written to: {error}; give another folder") from error
    finally:
        await channel.close(None)
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    log.info("edge half fetched", server=server, bundle=bundle.name, fingerprint=short(received))
    return bundle


async def receive(chunks: AsyncIterator[BundleChunk], folder: Path, held: bytes = b"") -> bytes:
    """Write the files of a GetBundle stream into `folder`, each checked by size and digest. Of the bundle whose
    fingerprint is `held` nothing is received.

    Returns:
        The fingerprint that the stream states.

    Raises:
        FetchError: a name, a size or a digest is not accepted, or the stream is incomplete.
    """
    fingerprint, names, total, files_left = b"", set[str](), 0, 1
    file: _Incoming | None = None
    try:
        async for chunk in chunks:
            if chunk.name:
                if file is not None:
                    file.finish()
                _check_start(chunk, names, total)
                if fingerprint and chunk.fingerprint and chunk.fingerprint != fingerprint:
                    raise FetchError("the server mixes the files of two bundles")
                fingerprint = fingerprint or chunk.fingerprint
                if held and fingerprint == held:
                    return fingerprint
                names.add(chunk.name)
                total += chunk.size
                file = _Incoming(folder / chunk.name, chunk.size, chunk.sha256)
            if file is None:
                raise FetchError("the server's first chunk names no file")
            file.add(chunk.data)
            files_left = chunk.files_left
        if file is not None:
            file.finish()
    finally:
        if file is not None:
            file.close()
    if files_left or len(fingerprint) != 32:
        raise FetchError(f"the server's edge half is incomplete: {files_left} files are missing")
    return fingerprint


def _check_start(chunk: BundleChunk, names: set[str], total: int) -> None:
    """Everything that a file declares is checked before a byte of it is written."""
    if not PLAIN_NAME.fullmatch(chunk.name):
        raise FetchError(f"the server names a file {chunk.name[:100]!r}, which is no plain file name")
    if chunk.name in names:
        raise FetchError(f"the server sends file {chunk.name} twice")
    if len(names) >= MAX_FILES or chunk.files_left >= MAX_FILES:
        raise FetchError(f"the server sends more than {MAX_FILES} files")
    if chunk.size > MAX_FILE_BYTES or total + chunk.size > MAX_TOTAL_BYTES:
        raise FetchError(f"file {chunk.name} of {chunk.size} bytes is over the limit of {MAX_FILE_BYTES}")
    if len(chunk.sha256) != 32:
        raise FetchError(f"the server states no SHA-256 for file {chunk.name}")


class _Incoming:
    """A file that is being received."""

    def __init__(self, path: Path, size: int, sha256: bytes) -> None:
        self._path, self._left, self._sha256 = path, size, sha256
        self._digest = hashlib.sha256()
        self._file: BinaryIO = path.open("xb")

    def add(self, data: bytes) -> None:
        if len(data) > self._left:
            raise FetchError(f"the server sends more of file {self._path.name} than it declared")
        self._left -= len(data)
        self._digest.update(data)
        self._file.write(data)

    def finish(self) -> None:
        self.close()
        if self._left:
            raise FetchError(f"file {self._path.name} ends {self._left} bytes early")
        if self._digest.digest() != self._sha256:
            raise FetchError(f"file {self._path.name} does not have the SHA-256 that the server stated")

    def close(self) -> None:
        self._file.close()

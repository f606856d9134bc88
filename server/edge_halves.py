"""Edge halves for devices: exported once for each bundle, kept in a cache by fingerprint, read back in chunks.

An export takes a core for half a minute and holds Python's lock for most of it. It runs in a process of its own, at
low priority, so that frames are answered meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from ..models.bundle import EDGE_MANIFEST, Bundle, short
from ..models.edge_half import FileEntry, file_names, load_edge_half, read_edge_manifest, write_edge_manifest
from ..models.exceptions import HeadraceError
from .exceptions import EdgeHalfError

log = structlog.get_logger(__name__)

CHUNK_BYTES = 256 * 1024
_LAST_LINES = 400
"""Characters of a failed export's output that go into the error."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of one file; `entry` and `name` are in the first chunk of each file only."""

    name: str
    entry: FileEntry | None
    data: bytes
    files_left: int


class EdgeHalves:
    """The cache of exported edge halves."""

    def __init__(self, cache_dir: Path) -> None:
        """Keep the folder; it is made when the first half is exported."""
        self._cache_dir = cache_dir
        self._exports: dict[bytes, asyncio.Task[Path]] = {}

    async def folder(self, bundle: Bundle) -> Path:
        """The folder of the bundle's edge half; exported now if the cache does not hold it undamaged.

        Raises:
            EdgeHalfError: the export failed, or the cache cannot be written.
        """
        export = self._exports.get(bundle.fingerprint)
        if export is None or export.done():
            export = asyncio.create_task(self._provide(bundle))
            self._exports[bundle.fingerprint] = export
        # All who ask at once wait for one export, and a device that hangs up does not stop it: it will ask again.
        return await asyncio.shield(export)

    async def close(self) -> None:
        """Stop what is being exported."""
        for export in self._exports.values():
            export.cancel()
        await asyncio.gather(*self._exports.values(), return_exceptions=True)

    async def chunks(self, bundle: Bundle, splits: Collection[str] = ()) -> AsyncIterator[Chunk]:
        """The files of the edge half in chunks of at most `CHUNK_BYTES`; the manifest comes last.

        Args:
            bundle: which.
            splits: only the heads of these split points; empty for all.

        Raises:
            EdgeHalfError: see `folder`.
            OperatingPointError: the bundle has no such split point.
        """
        names = (*file_names(bundle, splits), EDGE_MANIFEST)
        folder = await self.folder(bundle)
        _, entries = await asyncio.to_thread(read_edge_manifest, folder)
        for left, name in zip(reversed(range(len(names))), names, strict=True):
            with (folder / name).open("rb") as file:
                data = await asyncio.to_thread(file.read, CHUNK_BYTES)
                # The manifest does not list itself; it fits one chunk.
                entry = entries.get(name) or FileEntry(len(data), hashlib.sha256(data).digest())
                yield Chunk(name, entry, data, left)
                while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
                    yield Chunk("", None, data, left)

    async def _provide(self, bundle: Bundle) -> Path:
        target = self._cache_dir / bundle.fingerprint.hex()
        cached = await asyncio.to_thread(_cached, target, bundle.fingerprint)
        if cached is None or cached.manifest() != bundle.for_edge().manifest():
            await self._export(bundle, target, cached)
        return target

    async def _export(self, bundle: Bundle, target: Path, cached: Bundle | None) -> None:
        """Put a half into the cache. Of one that is there and was only measured anew, the graphs are kept."""
        if bundle.folder is None:
            raise EdgeHalfError(f"bundle {bundle.name} was not loaded from a folder; save it and serve it from there")
        if cached is None:
            log.info("exporting the edge half, this takes about half a minute", fingerprint=short(bundle.fingerprint))
        try:
            self._cache_dir.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix="export-", dir=self._cache_dir))
        except OSError as error:
            raise EdgeHalfError(
                f"the cache {self._cache_dir} cannot be written ({error.strerror}); choose another --cache-dir"
            ) from error
        try:
            half = scratch / "half"
            if cached is None or cached.exit_specs != bundle.exit_specs:
                await _run_export(bundle.folder, half)
            else:
                await asyncio.to_thread(_with_manifest_of, bundle, target, half)
            await asyncio.to_thread(load_edge_half, half)
            # Whoever reads the cache sees a whole half or none. Another server may have been faster.
            present = await asyncio.to_thread(_cached, target, bundle.fingerprint)
            if present is None or present.manifest() != bundle.for_edge().manifest():
                shutil.rmtree(target, ignore_errors=True)
                half.rename(target)
        except (OSError, HeadraceError) as error:
            raise EdgeHalfError(f"the edge half of {bundle.name} cannot be exported: {error}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        log.info("exported the edge half", folder=str(target))


def _cached(folder: Path, fingerprint: bytes) -> Bundle | None:
    """The undamaged edge half of that fingerprint, if the folder holds it."""
    try:
        found = load_edge_half(folder)
    except HeadraceError:
        return None
    return found if found.fingerprint == fingerprint else None


def _with_manifest_of(bundle: Bundle, half: Path, target: Path) -> None:
    """Copy an edge half and give the copy the bundle's measured values; the fingerprint does not cover those."""
    shutil.copytree(half, target)
    replace(bundle.for_edge(), folder=target).save(target)
    write_edge_manifest(target, bundle)


async def _run_export(bundle_folder: Path, target: Path) -> None:
    """Run this module as a program."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        __name__,
        str(bundle_folder),
        str(target),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, errors = await process.communicate()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if process.returncode:
        raise EdgeHalfError(errors.decode(errors="replace")[-_LAST_LINES:].strip() or f"exit code {process.returncode}")


def _main() -> None:
    from ..models.export import export_edge_half

    os.nice(5)
    export_edge_half(Bundle.load(Path(sys.argv[1])), Path(sys.argv[2]))


if __name__ == "__main__":
    _main()

"""A watched folder of bundles: what is put there is served, what is taken away or replaced is retired.

Every subfolder with a manifest is a bundle. It is looked at once a second, by names, sizes and times of files: that
works on network volumes too, where notifications don't. A folder that cannot be loaded is named in the log once, what
it held before is served on, and it is tried again when it changes: so a bundle may also be copied there in pieces.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import TypeAlias

import structlog

from ..models.bundle import MANIFEST
from ..models.exceptions import HeadraceError
from .bundles import Bundles
from .exceptions import StartError

log = structlog.get_logger(__name__)

EVERY_S = 1.0
"""How often the folder is looked at."""

Signature: TypeAlias = tuple[tuple[str, int, int, int], ...]
"""Of a bundle's folder: name, size, time of change and inode of each file."""


class BundleDir:
    """Keeps what is served equal to what lies in a folder."""

    def __init__(self, folder: Path, bundles: Bundles, stay: Collection[bytes] = ()) -> None:
        """Nothing is read yet; `stay`: fingerprints of bundles that are served whatever becomes of the folder."""
        self._folder, self._bundles, self._stay = folder, bundles, frozenset(stay)
        self._seen: dict[str, Signature] = {}
        self._fingerprints: dict[str, bytes] = {}

    async def run(self) -> None:
        """Look again and again until cancelled."""
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                await self.scan()
            except StartError as error:  # unmounted for a moment: what is served is served on
                log.warning("the folder of bundles cannot be read", error=str(error))
            except Exception:
                log.exception("the folder of bundles could not be followed")

    async def scan(self) -> None:
        """Look once: load what is new or changed, then retire what is gone or was replaced.

        Raises:
            StartError: the folder cannot be read.
        """
        found = await asyncio.to_thread(_signatures, self._folder)
        before = set(self._fingerprints.values())
        for name, signature in found.items():
            if self._seen.get(name) == signature:
                continue
            self._seen[name] = signature
            try:
                served = await self._bundles.load(self._folder / name)
            except HeadraceError as error:
                log.error("a bundle cannot be loaded", folder=str(self._folder / name), error=str(error))
                continue
            except Exception:  # whatever it is, the other folders are followed
                log.exception("a bundle cannot be loaded", folder=str(self._folder / name))
                continue
            self._fingerprints[name] = served.bundle.fingerprint
        for name in [n for n in self._seen if n not in found]:
            del self._seen[name]
            self._fingerprints.pop(name, None)
        for fingerprint in before - set(self._fingerprints.values()) - self._stay:
            await self._bundles.retire(fingerprint)


def _signatures(folder: Path) -> dict[str, Signature]:
    """What lies in the folder, by subfolder, in order of their names."""
    try:
        names = sorted(p.name for p in folder.iterdir() if (p / MANIFEST).is_file() and not p.name.startswith("."))
    except OSError as error:
        raise StartError(f"the folder of bundles {folder} cannot be read: {error.strerror}") from error
    found = {}
    for name in names:
        try:
            files = [(f.name, f.stat()) for f in sorted((folder / name).iterdir())]
        except OSError:  # it is being taken away
            continue
        found[name] = tuple((n, s.st_size, s.st_mtime_ns, s.st_ino) for n, s in files)
    return found

"""The TCP proxy as a process of its own, so that nothing else on this machine's event loop shows in its timing.

It says where it listens in one JSON line on standard output. The first line of its standard input is the link's
description; then `begin [SECONDS AGO]` starts the schedule and `rate MBITS` leaves it; the end of its input ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from ..cores import keep_to
from ..exceptions import LinkError
from .proxy import TcpProxyLink
from .record import LinkRecord
from .spec import LinkSpec

_MOST_LINE_BYTES = 2**26
"""A description holds its traces."""


class LinkProcess:
    """An `EmulatedLink` in another process."""

    edge_prefix: tuple[str, ...] = ()
    server_prefix: tuple[str, ...] = ()

    def __init__(self, process: asyncio.subprocess.Process, address: str, kind: str, record: Path) -> None:
        """Use `start`."""
        self.address, self.kind = address, kind
        self.server_host = ""
        self._process, self._record = process, record

    @classmethod
    async def start(cls, connect: str, spec: LinkSpec, *, record: Path, cores: Collection[int] = ()) -> LinkProcess:
        """Start the process, on `cores` if any are given, and wait until it listens.

        Args:
            connect: "host:port" of the server behind the link.
            spec: the link.
            record: file for what passed.

        Raises:
            LinkError: it ended instead.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", __name__, "--connect", connect, "--record", str(record)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        keep_to(process.pid, cores)
        link = cls(process, "", "", record)
        link._tell(spec.to_json())
        line = await process.stdout.readline() if process.stdout is not None else b""
        if not line:
            raise LinkError(f"the emulated link ended with code {await process.wait()} before it listened")
        said = json.loads(line)
        link.address, link.kind = said["address"], said["kind"]
        link.server_host = connect.rpartition(":")[0]
        return link

    def begin(self, ago_s: float = 0.0) -> None:
        """See `EmulatedLink`."""
        self._tell(f"begin {ago_s}")

    def set_rate(self, up_bps: float) -> None:
        """See `EmulatedLink`."""
        self._tell(f"rate {up_bps / 1e6}")

    def record(self) -> LinkRecord:
        """See `EmulatedLink`; complete once it is closed."""
        return LinkRecord.from_json(self._record.read_text())

    async def close(self) -> None:
        """See `EmulatedLink`."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._process.wait()

    def _tell(self, command: str) -> None:
        if self._process.stdin is not None:
            self._process.stdin.write(f"{command}\n".encode())


async def _serve(options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    reader = asyncio.StreamReader(limit=_MOST_LINE_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    link = TcpProxyLink(options.connect, LinkSpec.from_json((await reader.readline()).decode()))
    await link.open()
    sys.stdout.write(json.dumps({"event": "listening", "address": link.address, "kind": link.kind}) + "\n")
    sys.stdout.flush()
    obeying = asyncio.create_task(_obey(reader, link, ended))
    await ended.wait()
    obeying.cancel()
    await link.close()
    options.record.write_text(link.record().to_json())


async def _obey(reader: asyncio.StreamReader, link: TcpProxyLink, ended: asyncio.Event) -> None:
    while line := await reader.readline():
        command, _, value = line.decode().strip().partition(" ")
        if command == "begin":
            link.begin(float(value or 0))
        elif command == "rate":
            link.set_rate(float(value) * 1e6)
    ended.set()


def main(arguments: Sequence[str] | None = None) -> int:
    """The link as a process, for `LinkProcess`. (For people there is `headrace emulate --listen ... --to ...`.)"""
    parser = argparse.ArgumentParser(prog="headrace.bench.links.process", description=__doc__)
    parser.add_argument("--connect", required=True, help="HOST:PORT of the server behind the link")
    parser.add_argument("--record", type=Path, required=True, help="file for what passed when (JSON)")
    asyncio.run(_serve(parser.parse_args(arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

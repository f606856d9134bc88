"""The emulated link as a process of its own, so that nothing else on this machine's event loop shows in its timing.

It says where it listens in one JSON line on standard output. Its schedule begins with the first connection, or, with
`--begin stdin`, when it reads the line `begin`; `rate MBITS` leaves the schedule; the end of standard input ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from .cores import keep_to
from .link import DEFAULT_QUEUE_BYTES, LinkRecord, TcpProxyLink
from .schedule import Phase, RateSchedule, parse_phases


class LinkProcess:
    """An `EmulatedLink` in another process; schedule and rates as in `TcpProxyLink`."""

    def __init__(self, process: asyncio.subprocess.Process, address: str, kind: str, record: Path) -> None:
        """Use `start`."""
        self.address, self.kind = address, kind
        self._process, self._record = process, record

    @classmethod
    async def start(
        cls,
        connect: str,
        phases: Sequence[Phase],
        *,
        delay_s: float,
        record: Path,
        queue_bytes: int = DEFAULT_QUEUE_BYTES,
        cores: Collection[int] = (),
    ) -> LinkProcess:
        """Start the process, on `cores` if any are given, and wait until it listens.

        Raises:
            OSError: it ended instead.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", __name__, "--begin", "stdin", "--connect", connect, "--record", str(record)),
            *("--phases", ",".join(f"{p.mbps}:{p.seconds}" for p in phases)),
            *("--delay-ms", str(delay_s * 1000), "--queue-bytes", str(queue_bytes)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        keep_to(process.pid, cores)
        line = await process.stdout.readline() if process.stdout is not None else b""
        if not line:
            raise OSError(f"the emulated link ended with code {await process.wait()} before it listened")
        said = json.loads(line)
        return cls(process, said["address"], said["kind"], record)

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
    link = TcpProxyLink(
        options.connect,
        RateSchedule.of_phases(options.phases),
        delay_s=options.delay_ms / 1000,
        queue_bytes=options.queue_bytes,
        begin_with_connection=options.begin == "connection",
    )
    await link.open(options.listen)
    _say({"event": "listening", "address": link.address, "kind": link.kind})
    if options.begin == "stdin":
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        listening = asyncio.create_task(_obey(reader, link, ended))
        await ended.wait()
        listening.cancel()
    else:
        await ended.wait()
    await link.close()
    if options.record is not None:
        options.record.write_text(link.record().to_json())


async def _obey(reader: asyncio.StreamReader, link: TcpProxyLink, ended: asyncio.Event) -> None:
    """`begin [SECONDS AGO]`, or `rate MBITS`, a line; the end of the input is the end of the link."""
    while line := await reader.readline():
        command, _, value = line.decode().strip().partition(" ")
        if command == "begin":
            link.begin(float(value or 0))
        elif command == "rate":
            link.set_rate(float(value) * 1e6)
    ended.set()


def _say(message: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """The link as a process: `python -m headrace.bench.link_process --connect HOST:PORT --phases 8:10,0:4,2:10`."""
    parser = argparse.ArgumentParser(
        prog="headrace.bench.link_process", description="Emulated link: a shaping TCP proxy."
    )
    parser.add_argument("--listen", default="127.0.0.1:0", help="HOST:PORT; port 0 is any free one")
    parser.add_argument("--connect", required=True, help="HOST:PORT of the server behind the link")
    parser.add_argument("--phases", type=parse_phases, required=True, help="MBITS:SECONDS,... up; 0 is an outage")
    parser.add_argument("--delay-ms", type=float, default=12.0, help="one way")
    parser.add_argument("--queue-bytes", type=int, default=DEFAULT_QUEUE_BYTES)
    parser.add_argument("--begin", choices=("stdin", "connection"), default="connection", help="the schedule's start")
    parser.add_argument("--record", type=Path, default=None, help="file for what passed when (JSON)")
    asyncio.run(_serve(parser.parse_args(arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

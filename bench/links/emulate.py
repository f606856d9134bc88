"""`headrace emulate`: any edge and any server behind an emulated link, or a proxy between two addresses.

Standard output is the edge's; what the server and the link say goes to standard error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ...models.exceptions import DataError
from ..exceptions import LinkError
from .emulators import choose, open_link
from .listening import listening_on
from .namespaces import dying_with_parent
from .proxy import TcpProxyLink
from .record import EmulatedLink, LinkRecord, SideCounts
from .spec import LinkSpec

DEFAULT_PORT = 50051
END_WAIT_S = 20.0
"""How long a process may take to end once it is asked to."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two commands to be joined by a link.

    Attributes:
        server, edge: commands, in which `{host}`, `{port}` (where the server is to listen) and `{server}`
            (`host:port` that the edge connects to) are filled in.
        port: where the server listens; 0: 50051 in a namespace of its own, any free one on loopback.
        emulator: "auto" or a name.
        congestion, slow_start_after_idle: TCP's settings at both ends.
        server_wait_s: how long the server may take until it listens.
    """

    server: str
    edge: str
    port: int = 0
    emulator: str = "auto"
    congestion: str = "reno"
    slow_start_after_idle: bool = True
    server_wait_s: float = 120.0


def run(
    spec: LinkSpec, *, pair: Pair | None = None, listen: str = "", to: str = "", json_file: Path | None = None
) -> int:
    """Emulate a link until the edge ends (a pair) or until a signal (a proxy).

    Args:
        spec: the link.
        pair: two commands to start.
        listen, to: for a proxy, "host:port" to listen on and of the server.
        json_file: where to write what passed.

    Returns:
        Exit code: the edge's; 128 and the signal's number after a signal to a pair.

    Raises:
        DataError: a value cannot be used.
        LinkError: the link cannot be made, or the server did not begin.
    """
    whole_pair, whole_proxy = pair is not None and bool(pair.server and pair.edge), bool(listen and to)
    if whole_pair == whole_proxy or (pair is not None) == bool(listen or to):
        raise DataError(
            "say what to put behind the link: --server COMMAND and --edge COMMAND, "
            "or --listen HOST:PORT and --to HOST:PORT for a proxy between two addresses"
        )
    if json_file is not None and not json_file.parent.is_dir():
        raise DataError(f"--json {json_file}: there is no folder {json_file.parent}; make it first")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    work = _run_proxy(spec, listen, to, console) if pair is None else _run_pair(spec, pair, console)
    return asyncio.run(_summarised(work, spec, console, json_file))


@dataclass(slots=True)
class _Ran:
    kind: str
    seconds: float
    code: int
    record: LinkRecord


async def _summarised(work: Awaitable[_Ran], spec: LinkSpec, console: Console, json_file: Path | None) -> int:
    ran = await work
    console.print(_table(ran))
    if json_file is not None:
        said = {"emulator": ran.kind, "link": spec.describe(), "seconds": round(ran.seconds, 3), "code": ran.code}
        json_file.write_text(json.dumps(said | json.loads(ran.record.to_json())) + "\n")
    return ran.code


async def _run_proxy(spec: LinkSpec, listen: str, to: str, console: Console) -> _Ran:
    link = TcpProxyLink(to, spec, begin_with_connection=True)
    async with _signals() as stopped:
        try:
            await link.open(listen)
        except OSError as error:
            raise LinkError(f"--listen {listen}: {error.strerror}; choose another address, port 0 for any") from error
        began = time.monotonic()
        console.print(f"headrace: {link.kind}, {link.address} -> {to}: {spec.describe()}")
        console.print("headrace: the schedule begins with the first connection; end with Ctrl-C")
        await stopped.wait()
        await link.close()
    return _Ran(link.kind, time.monotonic() - began, 0, link.record())


async def _run_pair(spec: LinkSpec, pair: Pair, console: Console) -> _Ran:
    server, edge = (_words(name, text) for name, text in (("--server", pair.server), ("--edge", pair.edge)))
    emulator, why = choose(pair.emulator)
    console.print(f"headrace: {why}: {spec.describe()}")
    if emulator == "proxy" and pair.congestion != "reno":
        console.print(f"headrace: a proxy cannot set congestion control; {pair.congestion} is left out")
    port = pair.port or (_free_port() if emulator == "proxy" else DEFAULT_PORT)
    async with _signals() as stopped:
        link = await open_link(
            emulator,
            spec,
            port,
            congestion=pair.congestion,
            slow_start_after_idle=pair.slow_start_after_idle,
        )
        try:
            seconds, code = await _join(link, server, edge, port, pair.server_wait_s, stopped)
        finally:
            await link.close()
    return _Ran(link.kind, seconds, code, link.record())


async def _join(
    link: EmulatedLink, server: list[str], edge: list[str], port: int, patience_s: float, stopped: _Stop
) -> tuple[float, int]:
    """Server, then edge, until the edge ends or a signal comes: how long the edge ran, and the exit code.

    Raises:
        LinkError: the server did not listen in time, or ended with an error before the edge.
    """
    values = {"{host}": link.server_host, "{port}": str(port), "{server}": link.address}
    async with _process(link.server_prefix, server, values, to_stderr=True) as serving:
        await _until_listening(serving, link.server_host, port, patience_s, stopped)
        if code := stopped.code():
            return 0.0, code
        began = time.monotonic()
        link.begin()
        async with _process(link.edge_prefix, edge, values) as running:
            waits = (running.wait(), serving.wait(), stopped.wait())
            edge_ends, server_ends, stop = (asyncio.create_task(each) for each in waits)
            await asyncio.wait((edge_ends, server_ends, stop), return_when=asyncio.FIRST_COMPLETED)
            if serving.returncode == 0:  # it has done what it was started for
                await asyncio.wait((edge_ends, stop), return_when=asyncio.FIRST_COMPLETED)
            for task in (edge_ends, server_ends, stop):
                task.cancel()
            seconds = time.monotonic() - began
            if code := stopped.code():
                return seconds, code
            if running.returncode is None:
                raise LinkError(f"the server ended with code {serving.returncode} while the edge was running")
        return seconds, running.returncode if running.returncode >= 0 else 128 - running.returncode


@asynccontextmanager
async def _process(
    prefix: Sequence[str], words: Sequence[str], values: dict[str, str], *, to_stderr: bool = False
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A command with its placeholders filled in; asked to end, and waited for, in the end."""
    filled = list(words)
    for name, value in values.items():
        filled = [word.replace(name, value) for word in filled]
    process = await asyncio.create_subprocess_exec(
        *dying_with_parent(),
        *prefix,
        *filled,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=sys.stderr.fileno() if to_stderr else None,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), END_WAIT_S)
            except TimeoutError:
                process.kill()
                await process.wait()


async def _until_listening(
    server: asyncio.subprocess.Process, host: str, port: int, patience_s: float, stopped: _Stop
) -> None:
    end = time.monotonic() + patience_s
    while not stopped.code():
        if server.returncode is not None:
            raise LinkError(f"the server ended with code {server.returncode} before it listened on {host}:{port}")
        found = listening_on(server.pid, port)
        if host in found or "any" in found:
            return
        if time.monotonic() > end:
            where = f", only on {', '.join(sorted(found))}" if found else ""
            raise LinkError(
                f"the server does not listen on {host}:{port} after {patience_s:g} s{where}; "
                "does its command say `--host {host} --port {port}`? (--server-wait gives it longer)"
            )
        await asyncio.sleep(0.05)


class _Stop:
    """The first signal that asks this program to end."""

    def __init__(self) -> None:
        self._number = 0
        self._event = asyncio.Event()

    def code(self) -> int:
        """The exit code that it asks for, 0 as long as there is none."""
        return 128 + self._number if self._number else 0

    def set(self, number: int) -> None:
        self._number = self._number or number
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()


@asynccontextmanager
async def _signals() -> AsyncIterator[_Stop]:
    loop, stop = asyncio.get_running_loop(), _Stop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop.set, number)
    try:
        yield stop
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


def _words(flag: str, command: str) -> list[str]:
    """A command's words; `headrace` is this very program, also where root's PATH lacks it."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise DataError(f"{flag} {command!r} cannot be read: {error}") from error
    if not words:
        raise DataError(f"{flag} is an empty command")
    if words[0] == "headrace":
        return [sys.executable, "-m", "headrace.cli", *words[1:]]
    if shutil.which(words[0]) is None:
        raise DataError(f"{flag}: there is no program {words[0]!r}; write its whole path")
    return words


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _table(ran: _Ran) -> Table:
    table = Table(title=f"{ran.kind}, {ran.seconds:.1f} s", title_justify="left")
    table.add_column("")
    table.add_column("up", justify="right")
    table.add_column("down", justify="right")
    rows: dict[str, Callable[[SideCounts], str]] = {
        "packets passed": lambda c: f"{c.packets}",
        "bytes passed": lambda c: f"{c.bytes}",
        "mean Mbit/s": lambda c: f"{8e-6 * c.bytes / max(ran.seconds, 1e-9):.3f}",
        "lost at random": lambda c: f"{c.lost}",
        "dropped, queue full": lambda c: f"{c.overflowed}",
        "longest wait in the queue, ms": lambda c: f"{1000 * c.queue_s_max:.0f}" if c.queue_bytes_max else "?",
        "most bytes in the queue": lambda c: f"{c.queue_bytes_max}" if c.queue_bytes_max else "?",
    }
    for name, text in rows.items():
        table.add_row(name, text(ran.record.up_counts), text(ran.record.down_counts))
    return table

"""Server and edge as real processes, started as a user would start them, for the demo, the benchmarks and the tests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models.exceptions import HeadraceError
from .cores import keep_to

Flags = Mapping[str, object]
"""Settings by field name (`deadline_ms=250`); a sequence repeats its flag, None leaves it out."""


class Process:
    """One `headrace` command whose standard output is JSON lines. Its log goes to a file."""

    def __init__(self, process: asyncio.subprocess.Process, command: str, log: Path) -> None:
        """Use `start`."""
        self.log, self._process, self._command = log, process, command

    @classmethod
    async def start(
        cls, command: str, flags: Flags, log: Path, cores: Collection[int] = (), prefix: Sequence[str] = ()
    ) -> Process:
        """Start `headrace COMMAND --flags`, on `cores` if any are given; standard error is appended to `log`. `prefix`
        is put before the command, such as an emulated link's `edge_prefix`."""
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                *(*prefix, sys.executable, "-m", "headrace.cli", command, *arguments(flags)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                limit=2**20,
            )
        keep_to(process.pid, cores)
        return cls(process, command, log)

    async def lines(self) -> AsyncIterator[dict[str, Any]]:
        """What it says, until its standard output ends; lines that are no JSON are for people and left out."""
        if self._process.stdout is None:
            return
        async for line in self._process.stdout:
            with contextlib.suppress(json.JSONDecodeError):
                said = json.loads(line)
                if isinstance(said, dict):
                    yield said

    async def event(self, name: str) -> dict[str, Any]:
        """The next line of that event; others before it are left out.

        Raises:
            HeadraceError: the process ended without it. The text holds the end of its log.
        """
        async for said in self.lines():
            if said.get("event") == name:
                return said
        code = await self._process.wait()
        raise HeadraceError(f"`headrace {self._command}` ended with code {code} before {name!r}:\n{self.log_end()}")

    def terminate(self) -> None:
        """Ask it to finish (SIGTERM)."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once (SIGKILL), as a crash would."""
        self._signal(signal.SIGKILL)

    async def wait(self, timeout_s: float | None = None) -> int:
        """Its exit code. After `timeout_s` seconds it is killed."""
        try:
            return await asyncio.wait_for(self._process.wait(), timeout_s)
        except TimeoutError:
            self.kill()
            return await self._process.wait()

    async def stop(self) -> int:
        """Ask it to finish, and wait up to 15 s until it has."""
        self.terminate()
        return await self.wait(15)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.returncode is None

    def log_end(self, lines: int = 12) -> str:
        """The last lines of its log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:]) or "(it logged nothing)"

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)


class Server(Process):
    """`headrace serve`; `address`, `metrics` and `fingerprint` are what it says when it listens."""

    address: str
    metrics: str | None
    fingerprint: str

    @classmethod
    async def listening(
        cls, flags: Flags, log: Path, cores: Collection[int] = (), prefix: Sequence[str] = ()
    ) -> Server:
        """Start a server, on `cores` if any are given, and wait until it listens. `prefix` as in `start`.

        Raises:
            HeadraceError: it ended instead.
        """
        started = await cls.start("serve", flags, log, cores, prefix)
        server = cls(started._process, "serve", log)
        try:
            said = await server.event("listening")
        except BaseException:
            server.kill()
            raise
        server.address, server.metrics, server.fingerprint = said["address"], said["metrics"], said["fingerprint"]
        return server

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.address.rpartition(":")[2])


def arguments(flags: Flags) -> list[str]:
    """Settings as command line arguments: `{"deadline_ms": 250}` becomes `--deadline-ms 250`."""
    found: list[str] = []
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            found += [flag if value else "--no-" + flag[2:]]
        elif value is not None:
            values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            for each in values:
                found += [flag, str(each)]
    return found

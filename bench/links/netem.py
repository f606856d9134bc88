"""A link in the kernel: two network namespaces joined by a veth pair, whose ends are shaped by netem and tbf.

    edge's veth  ->  netem: loss, delay, jitter  ->  tbf: rate, queue in bytes  ->  server's veth       (and back)

netem holds packets that are under way, tbf those that wait for their turn. A schedule is followed in steps of 50 ms
(each the mean of the schedule over it); tbf knows no rate of 0, so in an outage 200 bit/s and one packet at its
beginning pass. Unlike the other emulators, netem lets packets overtake by jitter, and only newer ones take a seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import shutil
import socket
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path

from ..cores import keep_to
from ..exceptions import LinkError
from .namespaces import ADDRESSES, ENDS, End, Namespaces, ip, run_tool
from .record import RECORD_BIN_S, LinkRecord, SideCounts
from .spec import MTU_BYTES, SIDES, LinkSpec, Side

_STEP_S = 0.05
_SAMPLES = 50
_LEAST_BPS, _MOST_BPS = 200.0, 10e9
_BURST_S = 0.001
_NUDGE_AFTER_S = 0.01
"""`tc` has changed the rate by then."""
_DISCARD_PORT = 9
_UNDER_WAY_PACKETS = 100_000
_ENDS_OF: dict[Side, End] = {"up": "edge", "down": "server"}


class NetemLink:
    """An `EmulatedLink`; `open` makes it."""

    kind = "netem between network namespaces"

    def __init__(self, spec: LinkSpec, spaces: Namespaces, port: int) -> None:
        """Use `open`."""
        self.spaces, self._spec = spaces, spec
        self.server_host = ADDRESSES["server"]
        self.address = f"{self.server_host}:{port}"
        self.edge_prefix, self.server_prefix = spaces.prefix("edge"), spaces.prefix("server")
        self._shapers = {side: _Shaper(spec, side, spaces) for side in SIDES}
        self._record = LinkRecord()
        self._origin: float | None = None
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        spec: LinkSpec,
        port: int,
        *,
        congestion: str = "reno",
        slow_start_after_idle: bool = True,
        cores: Collection[int] = (),
    ) -> NetemLink:
        """Make namespaces, devices and queueing disciplines. Arguments as in `TunRelayLink.open`.

        Raises:
            LinkError: it cannot be made here.
        """
        spaces = Namespaces(congestion=congestion, slow_start_after_idle=slow_start_after_idle)
        try:
            link = cls(spec, spaces, port)
        except BaseException:
            spaces.close()
            raise
        try:
            _join(spaces)
            for shaper in link._shapers.values():
                await shaper.start(cores)
        except BaseException:
            await link.close()
            raise
        link._task = asyncio.create_task(link._follow())
        return link

    def begin(self, ago_s: float = 0.0) -> None:
        """See `EmulatedLink`."""
        self._origin = asyncio.get_running_loop().time() - ago_s
        for shaper in self._shapers.values():
            shaper.rates = self._spec.rates(shaper.side).shifted(self._origin)

    def set_rate(self, up_bps: float) -> None:
        """See `EmulatedLink`."""
        now = asyncio.get_running_loop().time()
        for side, bps in (("up", up_bps), ("down", self._spec.down_beside(up_bps, now - (self._origin or now)))):
            shaper = self._shapers["up" if side == "up" else "down"]
            shaper.rates = shaper.rates.changed(now, bps)
            shaper.follow(now)

    def record(self) -> LinkRecord:
        """See `EmulatedLink`. What waited is not known."""
        return self._record

    async def refresh(self) -> LinkRecord:
        """What has passed until now."""
        up, down = (self._shapers[side] for side in SIDES)
        self._record = LinkRecord(RECORD_BIN_S, up.passed, down.passed, 0, up.counts(), down.counts())
        return self._record

    async def close(self) -> None:
        """See `EmulatedLink`.

        Raises:
            LinkError: the schedule was not followed to the end.
        """
        ended: Sequence[BaseException | None] = ()
        if self._task is not None:
            self._task.cancel()
            ended = await asyncio.gather(self._task, return_exceptions=True)
        try:
            if self._task is not None:
                await self.refresh()
            for shaper in self._shapers.values():
                await shaper.stop()
        finally:
            self._task = None
            self.spaces.close()
        for error in ended:
            if isinstance(error, Exception):
                raise LinkError(f"the link stopped following its schedule: {error!r}") from error

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            for shaper in self._shapers.values():
                shaper.follow(now)
                shaper.count(now, self._origin)
            await asyncio.sleep(_STEP_S - (loop.time() - now))


class _Shaper:
    """The queueing disciplines of one end, and a `tc` that changes them."""

    def __init__(self, spec: LinkSpec, side: Side, spaces: Namespaces) -> None:
        self.side, self.rates = side, spec.rates(side).shifted(1e12)
        self.passed: dict[int, int] = {}
        self._spec, self._namespace = spec, spaces.names[_ENDS_OF[side]]
        self._device = device_name(_ENDS_OF[side])
        self._other = ADDRESSES[_ENDS_OF["down" if side == "up" else "up"]]
        self._nudge = spaces.within(_ENDS_OF[side], lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._netem = bool(spec.delay_s or spec.jitter_s or spec.loss)
        self._set_bps = math.nan
        self._seen_bytes = 0
        self._tc: asyncio.subprocess.Process | None = None

    async def start(self, cores: Collection[int]) -> None:
        if self._netem:
            self._run("add", "root", "handle", "1:", *netem_arguments(self._spec, self.side))
        self._set_bps = _clamped(self.rates.rate(0.0))
        self._run("add", *self._place(), *tbf_arguments(self._set_bps, self._spec.queue_bytes))
        self._tc = await asyncio.create_subprocess_exec(
            *("tc", "-n", self._namespace, "-force", "-batch", "-"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
        )
        keep_to(self._tc.pid, cores)

    def follow(self, now: float) -> None:
        """Set the schedule's mean rate over the next step, if it is another one."""
        step = _STEP_S / _SAMPLES
        bps = _clamped(sum(min(self.rates.rate(now + n * step), _MOST_BPS) for n in range(_SAMPLES)) / _SAMPLES)
        if bps != self._set_bps and self._tc is not None and self._tc.stdin is not None:
            was_out, self._set_bps = self._set_bps == _LEAST_BPS, bps
            change = ["qdisc", "change", "dev", self._device, *self._place()]
            change += tbf_arguments(bps, self._spec.queue_bytes)
            self._tc.stdin.write((" ".join(change) + "\n").encode())
            if was_out:
                asyncio.get_running_loop().call_later(_NUDGE_AFTER_S, self._wake)

    def _wake(self) -> None:
        """Send a datagram: tbf looks at its new rate when its old timer ends, or when something arrives."""
        with contextlib.suppress(OSError):
            self._nudge.sendto(b"", (self._other, _DISCARD_PORT))

    def count(self, now: float, origin: float | None) -> None:
        """Note what the device has sent since the last time; `tc` lives in its namespace and shows it."""
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{self._tc.pid if self._tc else 0}/net/dev").read_text().splitlines()
            shown = [int(line.split()[9]) for line in lines if line.strip().startswith(f"{self._device}:")]
            sent = shown[0] if shown else 0  # `tc` may not have entered it yet
            if origin is not None and now >= origin and sent > self._seen_bytes:
                key = int((now - origin) / RECORD_BIN_S)
                self.passed[key] = self.passed.get(key, 0) + sent - self._seen_bytes
            self._seen_bytes = max(self._seen_bytes, sent)

    def counts(self) -> SideCounts:
        shown = json.loads(run_tool(["tc", "-n", self._namespace, "-s", "-j", "qdisc", "show", "dev", self._device]))
        kinds = {each["kind"]: each for each in shown}
        tbf = kinds["tbf"]
        # A discipline's drops include its child's.
        lost = kinds["netem"]["drops"] - tbf["drops"] if "netem" in kinds else 0
        return SideCounts(tbf["packets"], tbf["bytes"], max(lost, 0), tbf["drops"])

    async def stop(self) -> None:
        if self._tc is not None and self._tc.stdin is not None:
            self._tc.stdin.close()
            await self._tc.wait()
        self._nudge.close()

    def _place(self) -> tuple[str, ...]:
        return ("parent", "1:1", "handle", "10:") if self._netem else ("root", "handle", "10:")

    def _run(self, verb: str, *arguments: str) -> None:
        run_tool(["tc", "-n", self._namespace, "qdisc", verb, "dev", self._device, *arguments])


def reason_against() -> str:
    """Why netem cannot be used by a program that may make namespaces, with the remedy; "" if it can."""
    if shutil.which("tc") is None:
        return "the program `tc` is missing (install the package iproute2)"
    command = ["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    said = " ".join((done.stderr or done.stdout).split()).removeprefix("Error: ")
    return f"the kernel has no netem ({said or f'code {done.returncode}'}); try `modprobe sch_netem`"


def netem_arguments(spec: LinkSpec, side: Side) -> list[str]:
    """What to tell `tc qdisc add` of one side's losses and delays."""
    mean, spread = spec.delay_s + spec.jitter_s / 2, spec.jitter_s / 2
    found = ["netem", "limit", str(_UNDER_WAY_PACKETS), "delay", f"{mean * 1e6:.0f}us"]
    if spread:
        found.append(f"{spread * 1e6:.0f}us")
    if spec.loss:
        found += ["loss", "random", f"{spec.loss:.4%}"]
        usage = subprocess.run(["tc", "qdisc", "add", "netem", "help"], capture_output=True, text=True, check=False)
        if "seed" in usage.stderr:
            found += ["seed", str(spec.dice(side).getrandbits(32))]
    return found


def tbf_arguments(bps: float, queue_bytes: int) -> list[str]:
    """What to tell `tc qdisc` of a rate and a queue."""
    burst = max(MTU_BYTES + 100, int(bps / 8 * _BURST_S))
    return ["tbf", "rate", f"{bps:.0f}bit", "burst", str(burst), "limit", str(queue_bytes)]


def device_name(end: End) -> str:
    """Of the device in that end's namespace."""
    return f"hr{os.getpid()}{end[0]}"


def _clamped(bps: float) -> float:
    return round(min(max(bps, _LEAST_BPS), _MOST_BPS))


def _join(spaces: Namespaces) -> None:
    """A veth pair between the namespaces, that hands over single packets as a network card does."""
    edge, server = (device_name(end) for end in ENDS)
    peer = ["peer", "name", server, "netns", spaces.names["server"]]
    ip("link", "add", edge, "netns", spaces.names["edge"], "type", "veth", *peer)
    for end in ENDS:
        ip("-n", spaces.names[end], "link", "set", device_name(end), "gso_max_segs", "1")
        spaces.assign(end, device_name(end))

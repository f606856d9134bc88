"""A link in user space: two network namespaces, a TUN device in each, and a process that carries the packets across.

    edge's namespace                    relay process                     server's namespace
    TCP, unmodified -> TUN ->  loss -> queue -> rate -> delay, jitter  -> TUN -> TCP, unmodified      (and back)

Real TCP with real losses, real congestion control and a real queue; it needs root, but nothing of the kernel that
distributions leave out. The relay is a process of its own, so that its timing is nobody else's: it is given the two
open devices, reads the link's description as the first line of its standard input and then commands (`begin SECONDS
AGO`, `rate BITS`, `record`), and ends with it. The devices are gone when the relay is.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from ..cores import keep_to
from ..exceptions import LinkError
from .namespaces import ADDRESSES, ENDS, End, Namespaces
from .packet_queue import PacketQueue
from .record import RECORD_BIN_S, LinkRecord
from .spec import SIDES, LinkSpec

TUN = Path("/dev/net/tun")
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_READ_BYTES = 65536
_PACKETS_A_TURN = 64
"""Most packets read from one device before those that are due are delivered."""
_LONGEST_SLEEP_S = 1.0


class TunRelayLink:
    """An `EmulatedLink`; `open` makes it."""

    kind = "TUN relay between network namespaces"

    def __init__(self, spaces: Namespaces, process: asyncio.subprocess.Process, port: int) -> None:
        """Use `open`."""
        self.spaces, self._process = spaces, process
        self.server_host = ADDRESSES["server"]
        self.address = f"{self.server_host}:{port}"
        self.edge_prefix, self.server_prefix = spaces.prefix("edge"), spaces.prefix("server")
        self._record = LinkRecord()
        self._closed = False

    @classmethod
    async def open(
        cls,
        spec: LinkSpec,
        port: int,
        *,
        congestion: str = "reno",
        slow_start_after_idle: bool = True,
        cores: Collection[int] = (),
    ) -> TunRelayLink:
        """Make namespaces and devices and start the relay, on `cores` if any are given.

        Args:
            spec: the link.
            port: where the server will listen.
            congestion, slow_start_after_idle: see `Namespaces`.

        Raises:
            LinkError: it cannot be made here.
        """
        spaces = Namespaces(congestion=congestion, slow_start_after_idle=slow_start_after_idle)
        devices: list[int] = []
        try:
            for end in ENDS:
                devices.append(_open_device(spaces, end))
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", __name__, *map(str, devices)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                pass_fds=devices,
                limit=2**24,
            )
            keep_to(process.pid, cores)
            link = cls(spaces, process, port)
            link._tell(spec.to_json())
            if not await link._answer():
                raise LinkError(f"the relay ended with code {await process.wait()} before it began")
        except BaseException:
            spaces.close()
            raise
        finally:
            for device in devices:
                os.close(device)
        return link

    def begin(self, ago_s: float = 0.0) -> None:
        """See `EmulatedLink`."""
        self._tell(f"begin {ago_s}")

    def set_rate(self, up_bps: float) -> None:
        """See `EmulatedLink`."""
        self._tell(f"rate {up_bps}")

    def record(self) -> LinkRecord:
        """See `EmulatedLink`."""
        return self._record

    async def refresh(self) -> LinkRecord:
        """What has passed until now."""
        self._tell("record")
        if answer := await self._answer():
            self._record = LinkRecord.from_json(answer)
        return self._record

    async def cpu_s(self) -> float:
        """Seconds of processor time that the relay has taken so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def close(self) -> None:
        """See `EmulatedLink`.

        Raises:
            LinkError: the relay had ended before.
        """
        if self._closed:
            return
        self._closed = True
        try:
            await self.refresh()
            if self._process.stdin is not None:
                self._process.stdin.close()
            code = await self._process.wait()
        finally:
            self.spaces.close()
        if code != 0:
            raise LinkError(f"the relay ended with code {code}; nothing has passed since then")

    def _tell(self, command: str) -> None:
        if self._process.stdin is not None:
            self._process.stdin.write(f"{command}\n".encode())

    async def _answer(self) -> str:
        line = await self._process.stdout.readline() if self._process.stdout is not None else b""
        return line.decode().strip()


def reason_against() -> str:
    """Why a TUN device cannot be opened here, with the remedy; "" if it can."""
    try:
        os.close(os.open(TUN, os.O_RDWR))
    except OSError as error:
        return f"{TUN} cannot be opened ({error.strerror}); try `modprobe tun`, or give the container that device"
    return ""


def _open_device(spaces: Namespaces, end: End) -> int:
    """Open and set up a TUN device in a namespace; returns its file descriptor."""
    name = f"hr{os.getpid()}{end[0]}"

    def attach() -> int:
        device = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
        try:
            fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22s", name.encode(), _IFF_TUN | _IFF_NO_PI, b""))
        except OSError:
            os.close(device)
            raise
        return device

    try:
        device = spaces.within(end, attach)
    except OSError as error:
        raise LinkError(f"no TUN device can be made ({error}); is {TUN} there, and may this program use it?") from error
    try:
        spaces.assign(end, name)
    except BaseException:
        os.close(device)
        raise
    return device


class _Relay:
    """The relay process: packets between two devices, commands on standard input."""

    def __init__(self, devices: Sequence[int], spec: LinkSpec, commands: bytes) -> None:
        edge, server = devices
        self._spec, self._origin = spec, float("inf")
        self._sides = tuple(PacketQueue(spec, side) for side in SIDES)
        self._ways = {edge: (self._sides[0], server), server: (self._sides[1], edge)}
        self._commands = commands

    def run(self) -> None:
        """Until standard input ends."""
        sources = [*self._ways, sys.stdin.fileno()]
        while True:
            now = time.monotonic()
            wait = min(min(side.next_at() for side in self._sides) - now, _LONGEST_SLEEP_S)
            # `select` wakes with microseconds' accuracy, where `epoll` rounds up to milliseconds.
            ready, _, _ = select.select(sources, (), (), max(wait, 0.0))
            for source in ready:
                if source not in self._ways:
                    if not self._obey():
                        return
                else:
                    self._read(source)
            now = time.monotonic()
            for side, out in self._ways.values():
                for packet in side.take(now):
                    _deliver(out, packet)

    def _read(self, device: int) -> None:
        side = self._ways[device][0]
        for _ in range(_PACKETS_A_TURN):
            try:
                packet = os.read(device, _READ_BYTES)
            except BlockingIOError:
                return
            side.offer(packet, time.monotonic())

    def _obey(self) -> bool:
        read = os.read(sys.stdin.fileno(), _READ_BYTES)
        *lines, self._commands = (self._commands + read).split(b"\n")
        now = time.monotonic()
        up, down = self._sides
        for line in lines:
            command, _, value = line.decode().partition(" ")
            if command == "begin":
                self._origin = now - float(value)
                for side in self._sides:
                    side.begin(self._origin)
            elif command == "rate":
                up.set_rate(now, float(value))
                down.set_rate(now, self._spec.down_beside(float(value), max(now - self._origin, 0.0)))
            elif command == "record":
                record = LinkRecord(RECORD_BIN_S, up.passed, down.passed, 0, up.counts, down.counts)
                sys.stdout.write(record.to_json() + "\n")
                sys.stdout.flush()
        return bool(read)


def _deliver(device: int, packet: bytes) -> None:
    try:
        os.write(device, packet)
    except OSError as error:
        # A device takes what it can, as a network card does; one that is gone ends the program by its input's end.
        if error.errno not in (errno.EAGAIN, errno.ENOBUFS, errno.EIO, errno.EINVAL):
            raise


def main(arguments: Sequence[str] | None = None) -> int:
    """The relay as a process; its arguments are the numbers of two open TUN devices, the edge's first."""
    devices = [int(number) for number in (sys.argv[1:] if arguments is None else arguments)]
    # An interrupt from the terminal is for the program that started this one, which ends the input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line, rest = _first_line()
    spec = LinkSpec.from_json(line.decode())
    sys.stdout.write(json.dumps({"event": "relaying"}) + "\n")
    sys.stdout.flush()
    _Relay(devices, spec, rest).run()
    return 0


def _first_line() -> tuple[bytes, bytes]:
    """The description, and what has been read behind it: a buffer would hide that from `select`."""
    read = b""
    while b"\n" not in read and (more := os.read(sys.stdin.fileno(), _READ_BYTES)):
        read += more
    line, _, rest = read.partition(b"\n")
    return line, rest


if __name__ == "__main__":
    sys.exit(main())

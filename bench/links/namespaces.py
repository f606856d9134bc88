"""Two network namespaces, the ends of an emulated link, that a program makes for itself (as root) and removes again.

    headrace-PID-START-N-edge      10.77.0.1      PID and START (its start time in kernel ticks) tell which program
    headrace-PID-START-N-server    10.77.0.2      made them, and whether it still runs; N counts within it

Nothing leads out of them: their traffic meets no other network, and their addresses no other addresses. What a killed
program has left behind is removed by the next one. `ip netns exec NAME bash` looks inside while it runs.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from ..exceptions import LinkError

End = Literal["edge", "server"]
ENDS: tuple[End, End] = ("edge", "server")
ADDRESSES: dict[End, str] = {"edge": "10.77.0.1", "server": "10.77.0.2"}
_IPV4 = Path("/proc/sys/net/ipv4")
_FOLDER = Path("/run/netns")
_NAME = re.compile(r"headrace-(\d+)-(\d+)-\d+-(?:edge|server)")
_numbers = itertools.count()
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


class Namespaces:
    """The two ends. Use it as a context manager, or call `close`."""

    def __init__(self, *, congestion: str = "reno", slow_start_after_idle: bool = True) -> None:
        """Make them, after removing those of programs that have ended.

        Args:
            congestion: TCP's congestion control in both, such as reno, cubic or bbr.
            slow_start_after_idle: whether TCP forgets its congestion window in a pause, which is the kernel's default.

        Raises:
            LinkError: this program may not, or namespaces cannot use that congestion control.
        """
        if why := reason_against():
            raise LinkError(why)
        _check_congestion(congestion)
        remove_stale()
        prefix = f"headrace-{os.getpid()}-{_started(os.getpid())}-{next(_numbers)}"
        self.names: dict[End, str] = {end: f"{prefix}-{end}" for end in ENDS}
        settings = {
            "net/ipv4/tcp_congestion_control": congestion,
            "net/ipv4/tcp_slow_start_after_idle": str(int(slow_start_after_idle)),
            "net/ipv6/conf/all/disable_ipv6": "1",
        }
        try:
            for end, name in self.names.items():
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
                self.within(end, lambda: _write_settings(settings))
        except OSError as error:
            self.close()
            raise LinkError(f"a network namespace's settings cannot be written: {error}") from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Namespaces:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prefix(self, end: End) -> tuple[str, ...]:
        """What to put before a command to run it there."""
        return ("ip", "netns", "exec", self.names[end])

    def within(self, end: End, action: Callable[[], T]) -> T:
        """Call something there: in a thread that enters the namespace. A socket or device made there stays there."""
        done: list[T] = []
        failed: list[BaseException] = []

        def enter() -> None:
            try:
                with (_FOLDER / self.names[end]).open() as file:
                    if _libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
                        raise OSError(ctypes.get_errno(), f"{self.names[end]} cannot be entered")
                done.append(action())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return done[0]

    def socket(self, end: End) -> socket.socket:
        """A TCP socket there, which does not block."""
        made = self.within(end, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        made.setblocking(False)
        return made

    def assign(self, end: End, device: str) -> None:
        """Give a device there its address, point to point, and switch it on."""
        other = ADDRESSES["server" if end == "edge" else "edge"]
        ip("-n", self.names[end], "addr", "add", ADDRESSES[end], "peer", other, "dev", device)
        # Long enough for a relay that waits for its turn on a busy machine: what is dropped there is not counted.
        ip("-n", self.names[end], "link", "set", device, "txqueuelen", "10000", "up")

    def close(self) -> None:
        """Remove them, with the devices in them."""
        for name in self.names.values():
            _remove(name)


def congestion_controls() -> tuple[list[str], list[str]]:
    """TCP's congestion controls that a namespace may use, and those that the kernel has."""
    has = (_IPV4 / "tcp_available_congestion_control").read_text().split()
    try:
        return (_IPV4 / "tcp_allowed_congestion_control").read_text().split(), has
    except OSError:  # this program is in a namespace itself
        return has, has


def _check_congestion(name: str) -> None:
    allowed, has = congestion_controls()
    if name in allowed:
        return
    if name in has:
        raise LinkError(
            f"TCP congestion control {name!r} is not allowed in namespaces, only {', '.join(allowed)}; choose one of "
            f"them, or `sysctl -w net.ipv4.tcp_allowed_congestion_control='{' '.join([*allowed, name])}'`"
        )
    raise LinkError(
        f"the kernel has no TCP congestion control {name!r}, only {', '.join(has)}; "
        f"choose one of them, or try `modprobe tcp_{name}`"
    )


def reason_against() -> str:
    """Why this program cannot make namespaces, with the remedy; "" if it can."""
    if not hasattr(_libc, "setns") or not Path("/proc/self/ns/net").exists():
        return "network namespaces are a thing of Linux"
    if shutil.which("ip") is None:
        return "the program `ip` is missing (install the package iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root (sudo)"
    try_it = ["unshare", "--net", "ip", "link", "set", "lo", "up"]
    done = subprocess.run(try_it, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return (
            f"this root may not make network namespaces ({done.stderr.strip()}); "
            "a container needs CAP_SYS_ADMIN and CAP_NET_ADMIN"
        )
    return ""


def remove_stale() -> list[str]:
    """Remove what programs that have ended have left behind; returns the names."""
    found = []
    for path in sorted(_FOLDER.glob("headrace-*")):
        match = _NAME.fullmatch(path.name)
        if match and _started(int(match[1])) != match[2]:
            _remove(path.name)
            found.append(path.name)
    return found


def ip(*arguments: str) -> str:
    """Run `ip` and return what it says.

    Raises:
        LinkError: it failed.
    """
    return run_tool(["ip", *arguments])


def run_tool(command: Sequence[str]) -> str:
    """Run a program of iproute2 and return what it says.

    Raises:
        LinkError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LinkError(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def dying_with_parent() -> tuple[str, ...]:
    """What stands before a command so that it is killed when its parent is; nothing where util-linux is missing.

    Not `preexec_fn`: it makes Python fork, and gRPC's threads, where the parent has some, now and then abort the child.
    """
    return ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()


def _started(pid: int) -> str:
    """A process's start time in kernel ticks; "" when there is no such process, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _write_settings(settings: dict[str, str]) -> None:
    for name, value in settings.items():
        path = Path("/proc/sys") / name
        if path.exists():
            path.write_text(value)


def _remove(name: str) -> None:
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

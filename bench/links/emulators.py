"""Which emulator this machine can use for a link under real processes, and why not a better one.

netem          the kernel's own                          root, sch_netem
TUN relay      user space, real TCP over two namespaces  root, /dev/net/tun
TCP proxy      user space, loopback                      nothing; hides loss and congestion control
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from ..exceptions import LinkError
from . import namespaces, netem, tun_relay
from .netem import NetemLink
from .proxy import TcpProxyLink
from .record import EmulatedLink
from .spec import LinkSpec
from .tun_relay import TunRelayLink

Emulator = Literal["netem", "tun", "proxy"]
KINDS: dict[Emulator, str] = {"netem": NetemLink.kind, "tun": TunRelayLink.kind, "proxy": TcpProxyLink.kind}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an emulator can be used here: `why_not` is empty if so, else it names the obstacle and the remedy."""

    emulator: Emulator
    why_not: str = ""


def probe() -> list[Verdict]:
    """Try all of them, the best first. Nothing stays behind on the machine."""
    obstacle = namespaces.reason_against()
    return [
        Verdict("netem", obstacle or netem.reason_against()),
        Verdict("tun", obstacle or tun_relay.reason_against()),
        Verdict("proxy"),
    ]


def choose(wanted: str = "auto", verdicts: list[Verdict] | None = None) -> tuple[Emulator, str]:
    """The emulator to use, and a line for people: which, and why not those before it.

    Args:
        wanted: "auto" for the best one, or a name.
        verdicts: what `probe` said; None: ask it.

    Raises:
        LinkError: the wanted one cannot be used here, or there is none of that name.
    """
    verdicts = probe() if verdicts is None else verdicts
    if wanted == "auto":
        usable = next(verdict.emulator for verdict in verdicts if not verdict.why_not)
        reasons: dict[str, list[str]] = {}
        for verdict in takewhile(lambda verdict: verdict.why_not, verdicts):
            reasons.setdefault(verdict.why_not, []).append(verdict.emulator)
        passed_over = "; ".join(f"not {' nor '.join(names)}: {why}" for why, names in reasons.items())
        return usable, KINDS[usable] + (f" ({passed_over})" if passed_over else "")
    for verdict in verdicts:
        if verdict.emulator == wanted:
            if verdict.why_not:
                raise LinkError(
                    f"the emulator {wanted!r} cannot be used: {verdict.why_not}. "
                    f"Here works: {', '.join(v.emulator for v in verdicts if not v.why_not)}"
                )
            return verdict.emulator, KINDS[verdict.emulator]
    raise LinkError(f"there is no emulator {wanted!r}; choose auto, {', '.join(KINDS)}")


async def open_link(
    emulator: Emulator,
    spec: LinkSpec,
    port: int,
    *,
    congestion: str = "reno",
    slow_start_after_idle: bool = True,
    cores: Collection[int] = (),
) -> EmulatedLink:
    """Make a link to a server that will listen on `port` of the link's `server_host`.

    Args:
        emulator: as `choose` said.
        spec: the link.
        port: where the server will listen.
        congestion, slow_start_after_idle: TCP's settings at both ends; a proxy cannot set them.
        cores: cores that a process of the link keeps to, if any are given.

    Raises:
        LinkError: it cannot be made.
    """
    if emulator == "proxy":
        return await TcpProxyLink(f"127.0.0.1:{port}", spec).open()
    make = NetemLink.open if emulator == "netem" else TunRelayLink.open
    return await make(spec, port, congestion=congestion, slow_start_after_idle=slow_start_after_idle, cores=cores)

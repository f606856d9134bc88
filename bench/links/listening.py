"""On which addresses something listens in a process's network namespace, without sending it anything."""

from __future__ import annotations

import ipaddress
from pathlib import Path

_LISTEN = "0A"


def listening_on(pid: int, port: int) -> set[str]:
    """IPv4 addresses on which any process listens on a TCP port, as seen from the namespace of process `pid`.

    "any" stands for all of them. Empty when there is none, or no such process.
    """
    found: set[str] = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            local, state = (line.split()[n] for n in (1, 3))
            address, _, number = local.partition(":")
            if state == _LISTEN and int(number, 16) == port:
                found.add(_text(address))
    return found


def _text(address: str) -> str:
    """The kernel's hexadecimal words, each of them in this machine's byte order."""
    words = [int(address[at : at + 8], 16).to_bytes(4, "little") for at in range(0, len(address), 8)]
    found = ipaddress.ip_address(b"".join(words))
    if found.is_unspecified:
        return "any"
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)

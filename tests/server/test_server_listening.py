"""Where the server listens."""

from __future__ import annotations

import socket
import urllib.request
from contextlib import closing

import grpc
import pytest
from headrace.server.config import ServerSettings
from headrace.server.exceptions import StartError
from headrace.server.listening import make_grpc, open_port
from headrace.server.metrics import Metrics, MetricsEndpoint, Probes


def has_ipv6() -> bool:
    try:
        with closing(socket.socket(socket.AF_INET6)) as trial:
            trial.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 on loopback")


@pytest.mark.parametrize("host", ["127.0.0.1", *(pytest.param(h, marks=needs_ipv6) for h in ("::1", "[::1]", "::"))])
async def test_addresses_of_both_kinds_are_listened_on(host: str) -> None:
    server = make_grpc(ServerSettings.load(), [])
    port = open_port(server, host, 0, None, "--port")
    await server.start()
    try:
        target = f"127.0.0.1:{port}" if host == "127.0.0.1" else f"[::1]:{port}"
        async with grpc.aio.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
            await channel.channel_ready()
    finally:
        await server.stop(None)


async def test_a_port_that_is_taken_is_named() -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=rf"cannot listen on 127\.0\.0\.1:{port} .* Choose another --port"):
            open_port(make_grpc(ServerSettings.load(), []), "127.0.0.1", port, None, "--port")


@needs_ipv6
def test_metrics_are_served_by_ipv6_too() -> None:
    endpoint = MetricsEndpoint(Metrics(), Probes(), "::1", 0)
    try:
        with urllib.request.urlopen(f"http://{endpoint.address}/livez", timeout=10) as answer:
            assert answer.status == 200
    finally:
        endpoint.close()

"""How the edge reaches its server: TLS, its own certificate, its token; and what it does when it is not let in."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from headrace.edge.access import Access
from headrace.edge.config import EdgeSettings
from headrace.edge.exceptions import ConfigError, StreamError
from headrace.edge.fetch import Cache, fetch_edge_half
from headrace.edge.stream import Backoff, StreamClient
from headrace.protos import messages
from headrace.protos.messages import Hello, Welcome
from structlog.testing import capture_logs


class Asking(grpc.aio.ServerInterceptor):
    """Lets in whoever shows the token; keeps what was shown."""

    def __init__(self) -> None:
        self.token = "hr_0123456789ab_secret"
        self.shown: list[str | None] = []

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        shown = dict(details.invocation_metadata).get("authorization")
        self.shown.append(shown)
        handler = await continuation(details)
        if shown == f"Bearer {self.token}":
            return handler

        async def refuse(request: Any, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is unknown")

        make = grpc.stream_stream_rpc_method_handler if handler.stream_stream else grpc.unary_stream_rpc_method_handler
        return make(refuse, handler.request_deserializer, handler.response_serializer)


class Secured:
    """A scripted server's service behind TLS, devices' certificates and a token."""

    def __init__(self, script: Any, folder: Path) -> None:
        self.script, self.asking, self.folder = script, Asking(), folder
        self.ca = trustme.CA()
        self.ca.cert_pem.write_to_path(folder / "ca.pem")
        device = self.ca.issue_cert("camera.example")
        device.cert_chain_pems[0].write_to_path(folder / "device.pem")
        device.private_key_pem.write_to_path(folder / "device.key")
        (folder / "token").write_text(self.asking.token + "\n")

    async def start(self) -> None:
        own = self.ca.issue_cert("vision.example")
        key, chain = own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes()
        credentials = grpc.ssl_server_credentials([(key, chain)], self.ca.cert_pem.bytes(), True)
        self.server = grpc.aio.server(interceptors=[self.asking], options=[("grpc.so_reuseport", 0)])
        messages.add_HeadraceServicer_to_server(self.script.service(), self.server)
        self.address = f"127.0.0.1:{self.server.add_secure_port('127.0.0.1:0', credentials)}"
        await self.server.start()

    def settings(self, **more: Any) -> EdgeSettings:
        names = {"tls_ca": "ca.pem", "tls_cert": "device.pem", "tls_key": "device.key", "token_file": "token"}
        files = {name: self.folder / file for name, file in names.items()}
        return EdgeSettings.load(**({"server": self.address, "tls_server_name": "vision.example"} | files | more))


@pytest.fixture
async def secured(server: Any, tmp_path: Path) -> Any:
    made = Secured(server, tmp_path)
    await made.start()
    yield made
    await made.server.stop(None)


class Handler:
    """Waits for a Welcome."""

    def __init__(self) -> None:
        self.welcomed: asyncio.Queue[Welcome] = asyncio.Queue()

    def on_welcome(self, welcome: Welcome, round_trip_s: float) -> None:
        self.welcomed.put_nowait(welcome)

    def on_result(self, result: Any) -> None:
        pass

    def on_broken(self, reason: str) -> None:
        pass

    def next_to_write(self) -> None:
        return None


def client(address: str, handler: Handler, access: Access) -> StreamClient:
    backoff = Backoff(0.01, 0.05, random.Random(1))
    return StreamClient(address, handler, backoff, connect_timeout_s=10.0, clock=time.monotonic, access=access)


async def test_it_greets_through_tls_with_certificate_and_token(secured: Any, server: Any) -> None:
    handler = Handler()
    stream = client(secured.address, handler, Access.of(secured.settings()))
    task = asyncio.create_task(stream.run(Hello(server.fingerprint, 1, "camera")))
    welcome = await asyncio.wait_for(handler.welcomed.get(), 20)
    assert welcome.fingerprint == server.fingerprint
    assert secured.asking.shown == [f"Bearer {secured.asking.token}"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_wrong_token_is_tried_again_and_a_new_one_in_the_file_is_used(secured: Any, server: Any) -> None:
    (secured.folder / "token").write_text("hr_0123456789ab_wrong")
    handler = Handler()
    stream = client(secured.address, handler, Access.of(secured.settings()))
    with capture_logs() as logs:
        task = asyncio.create_task(stream.run(Hello(server.fingerprint, 1, "camera")))
        async with asyncio.timeout(20):
            while len(secured.asking.shown) < 3:
                await asyncio.sleep(0.01)
        (secured.folder / "token").write_text(secured.asking.token)
        await asyncio.wait_for(handler.welcomed.get(), 20)
    assert any("UNAUTHENTICATED: the token is unknown" in line.get("reason", "") for line in logs)
    assert "secret" not in str(logs) and "wrong" not in str(logs)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(
    "change",
    [
        {"tls_server_name": "other.example"},
        {"tls_cert": None, "tls_key": None},
        {"tls_ca": None},
    ],
)
async def test_a_server_or_device_that_is_not_believed_gets_no_token(secured: Any, server: Any, change: Any) -> None:
    stream = client(secured.address, Handler(), Access.of(secured.settings(**change, tls=True)))
    with capture_logs() as logs:
        task = asyncio.create_task(stream.run(Hello(server.fingerprint, 1, "camera")))
        async with asyncio.timeout(20):
            while len(logs) < 2:
                await asyncio.sleep(0.01)
    assert all("UNAVAILABLE" in line["reason"] or "no greeting" in line["reason"] for line in logs)
    assert secured.asking.shown == []
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_the_edge_half_is_fetched_the_same_way(secured: Any, server: Any, tmp_path: Path) -> None:
    access = Access.of(secured.settings())
    bundle = await fetch_edge_half(secured.address, Cache(tmp_path / "cache"), access=access)
    assert bundle.fingerprint == server.fingerprint
    (secured.folder / "token").write_text("hr_0123456789ab_wrong")
    with pytest.raises(StreamError, match="UNAUTHENTICATED"):
        await fetch_edge_half(secured.address, Cache(tmp_path / "cache"), access=access)


def test_a_token_does_not_travel_in_plain_text_unless_that_is_said_aloud(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("hr_0123456789ab_secret\n")
    for server in ("192.0.2.7:50051", "vision.example:50051", "[2001:db8::1]:50051"):
        with pytest.raises(ConfigError, match="in plain text"):
            Access.of(EdgeSettings.load(server=server, token_file=token))
        assert Access.of(EdgeSettings.load(server=server, token_file=token, insecure=True)).token_file == token
        assert Access.of(EdgeSettings.load(server=server, token_file=token, tls=True)).tls
    for server in ("127.0.0.1:1", "localhost:1", "[::1]:1"):
        assert not Access.of(EdgeSettings.load(server=server, token_file=token)).tls


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tls-ca: .*nowhere cannot be read"):
        Access.of(EdgeSettings.load(tls_ca=tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="go together"):
        EdgeSettings.load(tls_cert=tmp_path / "x")
    for content in ("", "two words", "a\nb\n"):
        (tmp_path / "token").write_text(content)
        with pytest.raises(ConfigError, match="does not hold one token alone"):
            Access.of(EdgeSettings.load(token_file=tmp_path / "token"))

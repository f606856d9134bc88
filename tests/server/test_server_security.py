"""Who is let in: TLS, certificates of devices, tokens, admin calls; over real gRPC, with certificates made here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace.models.bitstream import VERSION, Packet
from headrace.protos import messages
from headrace.protos.messages import Frame, Hello, Status, Welcome
from headrace.server import guard, token_commands
from headrace.server.auth import Scope, TokenFile, make_token, read_tokens, write_tokens
from headrace.server.config import ServerSettings
from headrace.server.exceptions import SettingsError
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from .authority import PAST, Authority

MakePacket = Callable[..., Packet]
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def other_authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "other")


@pytest.fixture
def tls(authority: Authority) -> dict[str, Path]:
    """Settings of a server with a good certificate."""
    cert, key = authority.issue("127.0.0.1", "server")
    return {"tls_cert": cert, "tls_key": key}


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


async def greeting(
    server: Any, credentials: grpc.ChannelCredentials | None, token: str | None = None
) -> Welcome | tuple[grpc.StatusCode, str]:
    """What a device that connects anew is told: a Welcome, or status and text."""
    address = server.server.address
    channel = grpc.aio.secure_channel(address, credentials) if credentials else grpc.aio.insecure_channel(address)
    async with channel:
        metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        call = messages.HeadraceStub(channel).Stream(metadata=metadata)
        try:
            await call.write(messages.hello_request(Hello(server.bundle.fingerprint, VERSION, "device")))
            welcome = messages.read_response(await call.read())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return await call.code(), str(await call.details())
        if isinstance(welcome, Welcome):
            return welcome
        return await call.code(), str(await call.details())


async def refusal(server: Any, token: str | None) -> tuple[grpc.StatusCode, str]:
    """Status and text of a call that is refused before anything of it is read.

    It writes nothing: of a call that ends while it is written to, gRPC's client says INTERNAL (grpc/grpc#36066).
    """
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    call = server.stub.Stream(metadata=metadata)
    return await call.code(), str(await call.details())


# TLS


async def test_a_frame_goes_through_tls(start: Any, authority: Authority, tls: Any, make_packet: MakePacket) -> None:
    server = await start(**tls)
    async with grpc.aio.secure_channel(server.server.address, authority.credentials()) as channel:
        server.channel = channel
        stream = await server.stream()
        await stream.send(make_packet(5))
        assert (await stream.result()).status is Status.OK


async def test_only_who_speaks_tls_and_knows_the_authority_gets_through(
    start: Any, authority: Authority, other_authority: Authority, tls: Any
) -> None:
    server = await start(**tls)
    assert isinstance(await greeting(server, authority.credentials()), Welcome)
    code, text = await greeting(server, other_authority.credentials())
    assert code is grpc.StatusCode.UNAVAILABLE and "CERTIFICATE_VERIFY_FAILED" in text
    assert (await greeting(server, None))[0] is grpc.StatusCode.UNAVAILABLE
    assert isinstance(await greeting(server, authority.credentials()), Welcome), "others are unharmed"


async def test_a_certificate_for_another_name_is_not_believed(start: Any, authority: Authority) -> None:
    cert, key = authority.issue("other.example", "server")
    code, _ = await greeting(await start(tls_cert=cert, tls_key=key), authority.credentials())
    assert code is grpc.StatusCode.UNAVAILABLE


async def test_certificates_are_read_again_and_an_expired_one_is_not_believed(
    start: Any, authority: Authority, tls: Any
) -> None:
    server = await start(**tls)
    assert isinstance(await greeting(server, authority.credentials()), Welcome)
    authority.issue("127.0.0.1", "server", **PAST)
    code, text = await greeting(server, authority.credentials())
    assert code is grpc.StatusCode.UNAVAILABLE and "expired" in text
    authority.issue("127.0.0.1", "server")
    assert isinstance(await greeting(server, authority.credentials()), Welcome)


async def test_files_that_do_not_fit_leave_the_certificate_as_it_was(
    start: Any, authority: Authority, tls: Any
) -> None:
    server = await start(**tls)
    stranger = authority.issue("127.0.0.1", "stranger")
    tls["tls_key"].write_bytes(stranger[1].read_bytes())
    with capture_logs() as logs:
        assert isinstance(await greeting(server, authority.credentials()), Welcome)
        assert isinstance(await greeting(server, authority.credentials()), Welcome)
    assert [line["event"] for line in logs].count("the certificate stays as it was") == 1
    tls["tls_cert"].write_bytes(stranger[0].read_bytes())
    assert isinstance(await greeting(server, authority.credentials()), Welcome)


async def test_mtls_lets_in_only_devices_of_the_authority(
    start: Any, authority: Authority, other_authority: Authority, tls: Any
) -> None:
    server = await start(**tls, tls_client_ca=authority.file)
    device = authority.issue("camera-7.example")
    assert isinstance(await greeting(server, authority.credentials(device)), Welcome)
    strange, expired = other_authority.issue("camera-8.example"), authority.issue("camera-9.example", **PAST)
    strangers_eyes = Authority(authority.folder.parent / "eyes")
    strangers_eyes.file.write_bytes(authority.file.read_bytes())
    for credentials in (
        authority.credentials(),
        strangers_eyes.credentials(strange),
        authority.credentials(expired),
    ):
        assert (await greeting(server, credentials))[0] is grpc.StatusCode.UNAVAILABLE
    assert isinstance(await greeting(server, authority.credentials(device)), Welcome), "others are unharmed"


def test_files_that_cannot_be_used_are_named(authority: Authority, tls: Any, tmp_path: Path) -> None:
    load = ServerSettings.load
    with pytest.raises(SettingsError, match="go together"):
        load(tls_cert=tls["tls_cert"])
    with pytest.raises(SettingsError, match="takes --tls-cert"):
        load(tls_client_ca=authority.file)
    with pytest.raises(SettingsError, match=r"--tls-cert: .*nowhere cannot be read"):
        load(tls_cert=tmp_path / "nowhere", tls_key=tls["tls_key"]).certificates()
    with pytest.raises(SettingsError, match="cannot be used together"):
        load(tls_cert=tls["tls_cert"], tls_key=authority.issue("x.y")[1]).certificates()
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("certificate")
    with pytest.raises(SettingsError, match=r"--tls-client-ca: .*nonsense"):
        load(**tls, tls_client_ca=nonsense).certificates()


# Listening beyond this machine


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "server.example"])
def test_listening_beyond_this_machine_has_to_be_safe_or_said_aloud(host: str, tls: Any, tokens: Path) -> None:
    token_commands.add(tokens, "camera")
    with pytest.raises(SettingsError, match=r"takes --tls-cert and --tls-key and --tokens .* or say --insecure"):
        ServerSettings.load(host=host)
    with pytest.raises(SettingsError, match=r"takes --tokens \(or --tls-client-ca\); or say"):
        ServerSettings.load(host=host, **tls)
    with pytest.raises(SettingsError, match="takes --tls-cert and --tls-key; or say"):
        ServerSettings.load(host=host, tokens=tokens)
    with pytest.raises(SettingsError, match="takes --tls-cert"):
        ServerSettings.load(admin_host=host, admin_port=0)
    assert ServerSettings.load(host=host, **tls, tokens=tokens).host == host
    assert ServerSettings.load(host=host, **tls, tls_client_ca=tls["tls_cert"]).host == host
    assert ServerSettings.load(host=host, insecure=True).insecure


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_this_machine_needs_nothing(host: str) -> None:
    assert ServerSettings.load(host=host).host == host


# Tokens


async def test_a_call_needs_a_token_that_is_in_the_file(start: Any, tokens: Path, make_packet: MakePacket) -> None:
    good = token_commands.add(tokens, "camera-1")
    for days in (-1.0, 9e9, float("nan")):
        with pytest.raises(SettingsError, match="--days"):
            token_commands.add(tokens, "camera-2", days=days)
    late = token_commands.add(tokens, "camera-2", days=1e-9)
    time.sleep(0.001)
    server = await start(tokens=tokens)
    assert isinstance(await greeting(server, None, good), Welcome)
    stranger, _ = make_token("stranger")
    forged = good[:15] + stranger[15:]
    for wrong in (stranger, forged, late, good + "x", good[:-1], "", "hr_", "hr__", "x" * 8000, good.upper()):
        with capture_logs() as logs:
            assert await refusal(server, wrong) == (UNAUTHENTICATED, guard.UNKNOWN), wrong
        assert not any(wrong in str(line) for line in logs if wrong)
    code, text = await refusal(server, None)
    assert code is UNAUTHENTICATED and "--token-file" in text
    stub = server.stub
    for call in (
        stub.Infer(messages.infer_request(server.bundle.fingerprint, Frame(make_packet(1).to_bytes()))),
        stub.GetBundle(messages.GetBundleRequest()),
    ):
        assert await call.code() is UNAUTHENTICATED
    metadata = (("authorization", f"Bearer {good}"),)
    request = messages.infer_request(server.bundle.fingerprint, Frame(make_packet(1).to_bytes()))
    assert messages.read_result(await stub.Infer(request, metadata=metadata)).status is Status.OK
    refused = server.server.metrics.registry.get_sample_value
    assert refused("headrace_server_refused_calls_total", {"reason": "wrong_token"}) == 10
    assert refused("headrace_server_refused_calls_total", {"reason": "no_token"}) == 3


async def test_two_tokens_in_one_call_are_none(start: Any, tokens: Path) -> None:
    good = token_commands.add(tokens, "camera-1")
    server = await start(tokens=tokens)
    call = server.stub.Stream(metadata=(("authorization", f"Bearer {good}"), ("authorization", "Bearer x")))
    assert await call.code() is UNAUTHENTICATED


async def test_health_checks_need_no_token(start: Any, tokens: Path) -> None:
    token_commands.add(tokens, "camera-1")
    server = await start(tokens=tokens)
    answer = await health_pb2_grpc.HealthStub(server.channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_device_is_named_by_its_token_and_the_token_is_never_logged(start: Any, tokens: Path) -> None:
    good = token_commands.add(tokens, "camera-1")
    server = await start(tokens=tokens)
    with capture_logs(processors=[merge_contextvars]) as logs:
        assert isinstance(await greeting(server, None, good), Welcome)
        await server.service_has_streams(0)
    opened = next(line for line in logs if line["event"] == "stream opened")
    assert (opened["token"], opened["device"]) == ("camera-1", "device")
    assert good.split("_", 2)[2] not in str(logs)


async def test_a_token_that_is_taken_back_ends_its_streams_and_no_other(
    start: Any, tokens: Path, make_packet: MakePacket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "REFRESH_S", 0.01)
    one, two = token_commands.add(tokens, "one"), token_commands.add(tokens, "two")
    server = await start(tokens=tokens)
    streams = []
    for token in (one, two):
        call = server.stub.Stream(metadata=(("authorization", f"Bearer {token}"),))
        await call.write(messages.hello_request(Hello(server.bundle.fingerprint, VERSION)))
        assert isinstance(messages.read_response(await call.read()), Welcome)
        streams.append(call)
    token_commands.revoke(tokens, "one")
    with pytest.raises(grpc.aio.AioRpcError, match="taken back") as caught:
        await streams[0].read()
    assert caught.value.code() is UNAUTHENTICATED
    assert (await refusal(server, one))[0] is UNAUTHENTICATED
    await streams[1].write(messages.frame_request(Frame(make_packet(3).to_bytes())))
    assert messages.read_response(await streams[1].read()).status is Status.OK
    three = token_commands.add(tokens, "three")
    async with asyncio.timeout(30):
        while not isinstance(await greeting(server, None, three), Welcome):
            await asyncio.sleep(0.02)
    await server.service_has_streams(1)


def test_a_broken_file_leaves_the_tokens_as_they_were(tokens: Path) -> None:
    good = token_commands.add(tokens, "camera")
    file = TokenFile(tokens)
    before = tokens.read_text()
    tokens.write_text("nonsense\n")
    with capture_logs() as logs:
        assert not file.refresh() and not file.refresh()
    assert file.check(good) is not None
    assert len(logs) == 1 and "line 1" in logs[0]["reason"]
    tokens.unlink()
    assert not file.refresh() and file.check(good) is not None
    tokens.write_text(before.replace("camera", "renamed"))
    assert file.refresh()
    token = file.check(good)
    assert token is not None and token.name == "renamed"


def test_tokens_expire_by_the_clock(tokens: Path) -> None:
    now = 1_800_000_000.0
    secret, token = make_token("camera", expires=now + 10)
    write_tokens(tokens, [token])
    file = TokenFile(tokens, clock=lambda: now)
    assert file.check(secret) == token and file.valid(token)
    now += 10
    assert file.check(secret) is None and not file.valid(token)


def test_the_file_holds_no_secret_and_is_its_owners(tokens: Path) -> None:
    secrets = [token_commands.add(tokens, name, scope) for name, scope in (("a", Scope.DEVICE), ("b", Scope.ADMIN))]
    text = tokens.read_text()
    assert not any(secret.split("_", 2)[2] in text for secret in secrets)
    assert tokens.stat().st_mode & 0o777 == 0o600
    found = list(read_tokens(tokens).values())
    assert [(t.name, t.scope) for t in found] == [("a", Scope.DEVICE), ("b", Scope.ADMIN)]
    assert found[0].salt != found[1].salt
    assert [line.split()[-1] for line in token_commands.listing(tokens)] == ["a", "b"]
    assert not list(tokens.parent.glob(".tokens*"))


def test_what_is_wrong_with_a_file_of_tokens_is_said(tokens: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        read_tokens(tokens)
    token_commands.add(tokens, "a")
    with pytest.raises(SettingsError, match="no token of the name or id 'b'"):
        token_commands.revoke(tokens, "b")
    with pytest.raises(SettingsError, match="no name for a token"):
        token_commands.add(tokens, "a b")
    line = tokens.read_text().splitlines()[1]
    for wrong in (f"{line}\n{line}\n", f"{line} x\n", line.replace("device", "root"), "abc device 00 00 - a\n"):
        tokens.write_text(wrong)
        with pytest.raises(SettingsError, match=r"line \d"):
            read_tokens(tokens)
    tokens.write_text(line)
    tokens.chmod(0o666)
    with pytest.raises(SettingsError, match="everybody may write"):
        read_tokens(tokens)


# Admin calls


async def test_admin_calls_are_on_a_listener_of_their_own_and_need_a_token_of_their_own(
    start: Any, tokens: Path
) -> None:
    device, admin = token_commands.add(tokens, "camera"), token_commands.add(tokens, "ops", Scope.ADMIN)

    async def rule(request: bytes, context: Any) -> bytes:
        return b"done"

    def add(server: grpc.aio.Server) -> None:
        method = grpc.unary_unary_rpc_method_handler(rule)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("headrace.test.Admin", {"Do": method}),))

    server = await start(tokens=tokens, admin_port=0, admin_services=[add])
    assert server.server.admin_address is not None

    async def call(address: str, token: str | None) -> Any:
        async with grpc.aio.insecure_channel(address) as channel:
            metadata = () if token is None else (("authorization", f"Bearer {token}"),)
            called = channel.unary_unary("/headrace.test.Admin/Do")(b"", metadata=metadata)
            return await called.code()

    assert await call(server.server.admin_address, admin) is grpc.StatusCode.OK
    assert await call(server.server.admin_address, device) is grpc.StatusCode.PERMISSION_DENIED
    assert await call(server.server.admin_address, None) is UNAUTHENTICATED
    assert await call(server.server.address, admin) is grpc.StatusCode.UNIMPLEMENTED
    assert (await refusal(server, admin))[0] is grpc.StatusCode.PERMISSION_DENIED
    assert isinstance(await greeting(server, None, device), Welcome)

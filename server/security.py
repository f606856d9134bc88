"""Settings of who may connect, and the rule that a server does not listen to strangers unless told so aloud."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field
from pydantic_settings import BaseSettings

from .exceptions import SettingsError

if TYPE_CHECKING:
    from .tls import Certificates


class SecuritySettings(BaseSettings):
    """The part of `ServerSettings` that says who may connect."""

    tls_cert: Path | None = Field(
        None,
        description="PEM file with the server's certificate chain. With it devices connect by TLS. It is read again "
        "when it changes.",
    )
    tls_key: Path | None = Field(None, description="PEM file with the certificate's key.")
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file with the authorities that sign devices' certificates. With it every device has to show "
        "one.",
    )
    tokens: Path | None = Field(
        None,
        description="File of tokens, as `headrace token` makes it. With it every call has to bring one (health checks "
        "need none). It is read again when it changes; streams of tokens that are gone are ended.",
    )
    insecure: bool = Field(
        False,
        description="Listen beyond this machine although connections are not encrypted, or anybody may connect. "
        "Without this, that takes --tls-cert and either --tokens or --tls-client-ca.",
    )
    admin_host: str = Field("127.0.0.1", description="Address of the listener for admin calls.")
    admin_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port of the listener for admin calls, which devices' listener does not know; 0 takes any free "
        "one. With --tokens it takes a token of the scope admin. Off when not given.",
    )
    max_streams_per_device: int = Field(
        16,
        ge=1,
        le=100_000,
        description="Open streams of one token, of one certificate, or (without either) of one connection; one more is "
        "refused.",
    )
    unread_s: float = Field(
        20.0,
        gt=0,
        le=3600,
        description="A stream whose device has read no result for so long, while some wait, is ended.",
    )

    def check_security(self, host: str) -> None:
        """Raise when the settings do not fit together, or would let in strangers unasked.

        Args:
            host: that devices are to connect to.

        Raises:
            SettingsError: which, and what to do.
        """
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingsError("--tls-cert and --tls-key go together: a certificate and its key")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise SettingsError(
                "--tls-client-ca asks devices for certificates, which takes --tls-cert and --tls-key too"
            )
        if self.insecure:
            return
        outside = [h for h in (host, *([] if self.admin_port is None else [self.admin_host])) if not loopback(h)]
        lacking = self.lacks()
        if outside and lacking:
            raise SettingsError(
                f"to listen on {outside[0]}, beyond this machine, takes {' and '.join(lacking)}; "
                "or say --insecure, when everybody who can reach it may be trusted"
            )

    def lacks(self) -> list[str]:
        """What is missing before strangers are kept out: flags, or nothing."""
        tls = [] if self.tls_cert is not None else ["--tls-cert and --tls-key"]
        known = [] if self.tokens is not None or self.tls_client_ca is not None else ["--tokens (or --tls-client-ca)"]
        return tls + known

    def certificates(self) -> Certificates | None:
        """What listeners show; None for plain text.

        Raises:
            SettingsError: the files cannot be used.
        """
        from .tls import Certificates

        if self.tls_cert is None or self.tls_key is None:
            return None
        return Certificates(self.tls_cert, self.tls_key, self.tls_client_ca)


def loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    if host == "localhost" or host.startswith(("unix:", "unix-abstract:")):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

"""Certificates of the server, read again for the handshake after they have changed on disk."""

from __future__ import annotations

import ssl
import threading
from pathlib import Path
from typing import Any

import grpc
import structlog

from .exceptions import SettingsError

log = structlog.get_logger(__name__)

MAX_PEM_BYTES = 2**20


class Certificates:
    """Certificate chain and key, and the authority of devices' certificates where devices must show one (mTLS)."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None = None) -> None:
        """Read and check them.

        Args:
            cert: PEM, the server's certificate first, then those between it and its authority.
            key: PEM, not encrypted.
            client_ca: PEM, the authorities that sign devices' certificates.

        Raises:
            SettingsError: a file cannot be read, is no PEM, or key and certificate do not belong together.
        """
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._reading = threading.Lock()  # gRPC asks from threads of its own, one for each handshake
        self._stamp = self._stamps()
        self._configuration = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """For a listener; each handshake looks whether the files have changed."""
        changed: Any = self._changed  # the stubs do not know that None means no change
        return grpc.dynamic_ssl_server_credentials(
            self._configuration, changed, require_client_authentication=self._client_ca is not None
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new configuration, or None to go on with the old one. Called by gRPC."""
        with self._reading:
            stamp = self._stamps()
            if stamp == self._stamp:
                return None
            self._stamp = stamp  # files that do not fit are complained about once; the next change is read again
            try:
                self._configuration = self._read()
            except SettingsError as error:
                log.error("the certificate stays as it was", reason=str(error))
                return None
            log.info("certificate read again", file=str(self._cert))
            return self._configuration

    def _read(self) -> grpc.ServerCertificateConfiguration:
        cert, key = _pem(self._cert, "--tls-cert"), _pem(self._key, "--tls-key")
        ca = _pem(self._client_ca, "--tls-client-ca") if self._client_ca is not None else None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # gRPC would say no more than that it cannot listen.
            context.load_cert_chain(self._cert, self._key, password=lambda: "")
        except (ssl.SSLError, OSError, ValueError) as error:
            raise SettingsError(
                f"the certificate {self._cert} and the key {self._key} cannot be used together: {error}; "
                "both are PEM, the key is not encrypted"
            ) from error
        if ca is not None:
            _check_authority(context, self._client_ca, ca)
        return grpc.ssl_server_certificate_configuration([(key, cert)], ca)

    def _stamps(self) -> tuple[tuple[int, ...], ...]:
        return tuple(_stamp(path) for path in (self._cert, self._key, self._client_ca) if path is not None)


def _check_authority(context: ssl.SSLContext, path: Path | None, pem: bytes) -> None:
    try:
        context.load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise SettingsError(f"--tls-client-ca: {path} holds no certificates in PEM: {error}") from error


def _pem(path: Path, flag: str) -> bytes:
    try:
        if path.stat().st_size > MAX_PEM_BYTES:
            raise SettingsError(f"{flag}: {path} is larger than {MAX_PEM_BYTES} bytes; it should be a PEM file")
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{flag}: {path} cannot be read: {error.strerror}") from error


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return (0,)
    return (status.st_mtime_ns, status.st_size, status.st_ino)

"""Certificates that a test makes for itself."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
import trustme

PAST = {"not_before": datetime(2019, 1, 1, tzinfo=UTC), "not_after": datetime(2020, 1, 1, tzinfo=UTC)}


@dataclass
class Authority:
    """A certificate authority that writes what it signs into a folder."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.ca = trustme.CA()
        self.file = self.folder / "ca.pem"
        self.ca.cert_pem.write_to_path(self.file)

    def issue(self, name: str, file: str = "", **options: object) -> tuple[Path, Path]:
        """A certificate and its key, as PEM files."""
        made = self.ca.issue_cert(name, common_name=name, **options)
        cert, key = self.folder / f"{file or name}.pem", self.folder / f"{file or name}.key"
        cert.write_bytes(b"".join(part.bytes() for part in made.cert_chain_pems))
        made.private_key_pem.write_to_path(key)
        return cert, key

    def credentials(self, pair: tuple[Path, Path] | None = None) -> grpc.ChannelCredentials:
        """Of a client that trusts this authority, and shows the certificate if there is one."""
        cert, key = (path.read_bytes() for path in pair) if pair else (None, None)
        return grpc.ssl_channel_credentials(self.file.read_bytes(), key, cert)

"""Bearer tokens: what a device says to be let in, and the file of salted hashes that a server checks it by.

    hr_ID_SECRET                                      a token; only its owner has it
    ID SCOPE SALT SHA-256(SALT + SECRET) EXPIRES NAME   its line in the file; nobody can make the token from it

The secret is 256 random bits, so that nobody finds it from its hash by trying, however fast the hash; a slow one
(scrypt, Argon2) is for secrets that people think up, and would let anybody keep the server's cores busy with wrong
tokens. The salt keeps two files from showing that they hold one token.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

import structlog

from .exceptions import SettingsError

log = structlog.get_logger(__name__)

PREFIX = "hr"
"""What every token begins with, so that scanners of logs and repositories find one that was leaked."""

MAX_FILE_BYTES = 64 * 2**20
"""Largest file of tokens that is read: some 300,000 devices."""

MAX_TOKEN_CHARS = 256
_DATE = "%Y-%m-%dT%H:%M:%SZ"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@-]{0,63}")
_HEADER = (
    "# Headrace tokens: id, scope, salt, SHA-256 of salt and secret, expiry, name. `headrace token` edits this file.\n"
)


class Scope(StrEnum):
    """What a token opens: `device` the service for devices, `admin` the admin calls. Neither opens the other."""

    DEVICE = "device"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Token:
    """A line of the file.

    Attributes:
        id: 12 hex digits, public; finds the line.
        scope: what it opens.
        salt: 16 bytes.
        digest: 32 bytes.
        expires: seconds since 1970; None for never.
        name: of the device, in logs.
    """

    id: str
    scope: Scope
    salt: bytes
    digest: bytes
    expires: float | None
    name: str

    def line(self) -> str:
        """As it stands in the file."""
        expires = "-" if self.expires is None else _date(self.expires)
        return f"{self.id} {self.scope} {self.salt.hex()} {self.digest.hex()} {expires} {self.name}\n"


def make_token(name: str, scope: Scope = Scope.DEVICE, expires: float | None = None) -> tuple[str, Token]:
    """A new token and its line.

    Args:
        name: of the device: 1 to 64 of letters, digits, `_.:@-`.
        scope: what it opens.
        expires: seconds since 1970, or None.

    Raises:
        SettingsError: the name cannot be used.
    """
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"{name!r} is no name for a token: 1 to 64 letters, digits or _.:@-, a letter or digit first"
        )
    token_id, secret, salt = secrets.token_hex(6), secrets.token_urlsafe(32), secrets.token_bytes(16)
    return f"{PREFIX}_{token_id}_{secret}", Token(token_id, scope, salt, _digest(salt, secret), expires, name)


def read_tokens(path: Path) -> dict[str, Token]:
    """The tokens of a file, by id.

    Raises:
        SettingsError: it cannot be read, everybody may write it, or a line is none.
    """
    try:
        status = path.stat()
        if status.st_size > MAX_FILE_BYTES:
            raise SettingsError(f"the file of tokens {path} has {status.st_size} bytes, the limit is {MAX_FILE_BYTES}")
        if status.st_mode & stat.S_IWOTH:
            raise SettingsError(
                f"everybody may write the file of tokens {path}, and so let in whom they like; chmod 600 it"
            )
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        remedy = "`headrace token add` makes one"
        if isinstance(error, PermissionError):
            remedy = "let the server's user read it by chgrp and chmod 640, which stay when tokens are added"
        raise SettingsError(f"the file of tokens {path} cannot be read: {why}; {remedy}") from error
    found: dict[str, Token] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            token = _parse(line, f"{path}, line {number}")
            if token.id in found:
                raise SettingsError(f"{path}, line {number}: a second token with the id {token.id}")
            found[token.id] = token
    return found


def write_tokens(path: Path, tokens: Iterable[Token]) -> None:
    """Replace the file at once, so that a server never reads half of it; only its owner may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(_HEADER + "".join(t.line() for t in tokens))
            file.flush()
            os.fsync(file.fileno())
        if path.exists():  # whoever serves may be another user than whoever adds tokens
            owner = path.stat()
            partial.chmod(stat.S_IMODE(owner.st_mode))
            if os.geteuid() == 0:
                os.chown(partial, owner.st_uid, owner.st_gid)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SettingsError(f"the file of tokens {path} cannot be written: {error.strerror}") from error


class TokenFile:
    """A file of tokens, read again when it has changed. A file that cannot be read leaves the tokens as they were."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Read it.

        Args:
            path: the file.
            clock: seconds since 1970; by it tokens expire.

        Raises:
            SettingsError: see `read_tokens`.
        """
        self._path, self._clock = path, clock
        self._stamp = _stamp(path)
        self._tokens = read_tokens(path)

    def __len__(self) -> int:
        """Tokens in it, expired ones included."""
        return len(self._tokens)

    def check(self, token: str) -> Token | None:
        """The token's line, or None when it is unknown, wrong or expired.

        The time it takes does not tell which: a digest is computed and compared (in constant time) for unknown ids too.
        """
        parts = token.split("_", 2) if len(token) <= MAX_TOKEN_CHARS else []
        known = len(parts) == 3 and parts[0] == PREFIX
        line = self._tokens.get(parts[1]) if known else None
        shown = line or _NOBODY
        right = hmac.compare_digest(_digest(shown.salt, parts[2] if known else ""), shown.digest)
        return line if right and line is not None and not self._expired(line) else None

    def valid(self, token: Token) -> bool:
        """Whether a token that was let in before still would be."""
        return self._tokens.get(token.id) == token and not self._expired(token)

    def refresh(self) -> bool:
        """Read the file again if it has changed; whether it had."""
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return False
        self._stamp = stamp  # a file that cannot be read is complained about once
        try:
            self._tokens = read_tokens(self._path)
        except SettingsError as error:
            log.error("the tokens stay as they were", reason=str(error), tokens=len(self._tokens))
            return False
        log.info("tokens read again", tokens=len(self._tokens))
        return True

    def _expired(self, token: Token) -> bool:
        return token.expires is not None and token.expires <= self._clock()


def _parse(line: str, where: str) -> Token:
    parts = line.split()
    try:
        token_id, scope, salt, digest, expires, name = parts
        token = Token(
            token_id,
            Scope(scope),
            bytes.fromhex(salt),
            bytes.fromhex(digest),
            None if expires == "-" else datetime.strptime(expires, _DATE).replace(tzinfo=UTC).timestamp(),
            name,
        )
    except ValueError as error:
        raise SettingsError(f"{where}: no token's line (id, scope, salt, digest, expiry, name): {error}") from error
    if len(token.digest) != 32 or len(token.salt) < 8 or not _NAME.fullmatch(name):
        raise SettingsError(f"{where}: no token's line: salt, digest or name is not as `headrace token add` writes it")
    return token


def _digest(salt: bytes, secret: str) -> bytes:
    return hashlib.sha256(salt + secret.encode(errors="replace")).digest()


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime(_DATE)


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when the file does; all zero while it is not there."""
    try:
        status = path.stat()
    except OSError:
        return (0,)
    return (status.st_mtime_ns, status.st_size, status.st_ino)


_NOBODY = Token("", Scope.DEVICE, bytes(16), bytes(32), None, "nobody")

__all__ = ["Scope", "Token", "TokenFile", "make_token", "read_tokens", "write_tokens"]

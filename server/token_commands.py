"""What `headrace token` does: make, list and take back tokens. A running server reads the file again by itself."""

from __future__ import annotations

import time
from pathlib import Path

from .auth import Scope, Token, make_token, read_tokens, write_tokens
from .exceptions import SettingsError

DAY_S = 86_400.0
MOST_DAYS = 36_500


def add(path: Path, name: str, scope: Scope = Scope.DEVICE, days: float = 0.0) -> str:
    """Put a new token into the file, which is made if need be.

    Args:
        path: the file.
        name: of the device; a second token of one name is for changing over to it.
        scope: what it opens.
        days: until it expires; 0 for never.

    Returns:
        The token. It is nowhere else: the file holds its salted hash.

    Raises:
        SettingsError: the name, the days or the file cannot be used.
    """
    if not 0 <= days <= MOST_DAYS:
        raise SettingsError(f"--days {days:g}: a token is good for 0 (for ever) to {MOST_DAYS} days")
    tokens = list(read_tokens(path).values()) if path.exists() else []
    secret, token = make_token(name, scope, time.time() + days * DAY_S if days > 0 else None)
    write_tokens(path, [*tokens, token])
    return secret


def revoke(path: Path, name_or_id: str) -> list[Token]:
    """Take the tokens of that name or id out of the file.

    Raises:
        SettingsError: there is none.
    """
    tokens = read_tokens(path).values()
    gone = [t for t in tokens if name_or_id in (t.name, t.id)]
    if not gone:
        raise SettingsError(f"{path} has no token of the name or id {name_or_id!r}; `headrace token list` shows them")
    write_tokens(path, [t for t in tokens if t not in gone])
    return gone


def listing(path: Path) -> list[str]:
    """A line a token, for people: id, scope, state, name."""
    now = time.time()
    lines = []
    for token in read_tokens(path).values():
        left = None if token.expires is None else (token.expires - now) / DAY_S
        state = "does not expire" if left is None else "expired" if left <= 0 else f"expires in {left:.0f} days"
        lines.append(f"{token.id}  {token.scope:6}  {state:20}  {token.name}")
    return lines

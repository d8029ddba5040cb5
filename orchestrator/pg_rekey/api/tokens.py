"""Bearer tokens: only their SHA-256 is configured, under a name that the audit log shows.

Each has a role: what a token may do, and the role of the database that does it.
"""

import hashlib
import hmac
import os
import re
import secrets
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

from pg_rekey.errors import USAGE, Problem

ADMIN = "PG_REKEY_API_TOKENS"
METRICS = "PG_REKEY_METRICS_TOKENS"
_FILES = (f"{ADMIN}_FILE", f"{METRICS}_FILE")
_NAME = r"[A-Za-z0-9._-]{1,63}"
# From the one that may least to the one that may most; each may what those before it may.
Role = Literal["metrics", "read", "operate", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
# As whom the database sees a token: what it may not, the API cannot give it.
DATABASE_ROLES: dict[Role, str] = {
    "metrics": "rekey_auditor",
    "read": "rekey_auditor",
    "operate": "rekey_operator",
    "admin": "rekey_admin",
}


@dataclass(frozen=True)
class Token:
    """What is configured of a token."""

    name: str
    digest: bytes
    role: Role

    def may(self, role: Role) -> bool:
        """Tell whether it may what a token of this role may."""
        return ROLES.index(self.role) >= ROLES.index(role)


def make(name: str, role: Role = "admin") -> tuple[str, str]:
    """Make a token; return it and the entry to configure. One for metrics goes into a variable of its own."""
    if not re.fullmatch(_NAME, name):
        raise Problem("the name of a token has 1 to 63 of: letters, digits, . _ -", None, USAGE)
    token = secrets.token_urlsafe(32)
    return token, f"{name}:{_digest(token).hex()}{f':{role}' if role in ('read', 'operate') else ''}"


class Tokens:
    """The tokens that the API knows. Those of files are read again where a file has changed."""

    def __init__(self, tokens: Iterable[Token]) -> None:
        self._files: list[tuple[str, object]] = []
        self._lock = threading.Lock()
        self._set(tokens)

    def _set(self, tokens: Iterable[Token]) -> None:
        self._tokens = tuple(tokens)
        # The audit log must say who it was.
        for what, values in (
            ("name", [token.name for token in self._tokens]),
            ("hash", [token.digest.hex() for token in self._tokens]),
        ):
            [(value, count), *_] = [*Counter(values).most_common(1), ("", 0)]
            if count > 1:
                raise Problem(
                    f"two tokens have the {what} {value}", "Each person has one of their own.", USAGE
                )

    @classmethod
    def from_environment(cls) -> Self:
        """Return the tokens of the environment; without one for an administrator there is no API."""
        tokens = cls(())
        tokens._files = [(path, None) for path in map(os.environ.get, _FILES) if path]
        tokens._refresh()
        if not tokens._tokens:
            tokens._set(_configured())  # there is no file
        return tokens

    def find(self, token: str) -> Token | None:
        """Return whose token this is; how long that takes does not depend on it.

        Where the files cannot be read any more it is a Problem: nobody gets in until that is mended.
        """
        digest = _digest(token)
        self._refresh()
        found = None
        for known in self._tokens:
            if hmac.compare_digest(known.digest, digest):
                found = known
        return found

    def knows(self, token: Token) -> bool:
        """Tell whether a token that was found once is still what it was."""
        self._refresh()
        return token in self._tokens

    def _refresh(self) -> None:
        with self._lock:
            now = [(path, _look(path)) for path, _ in self._files]
            if now != self._files:
                # Looked at before they are read: what changes in between is read again.
                self._set(_configured())
                self._files = now


def _look(path: str) -> object:
    """Return what differs once a file has another content."""
    try:
        found = os.stat(path)
    except OSError as error:
        return error.errno
    return found.st_mtime_ns, found.st_ino, found.st_size


def _configured() -> list[Token]:
    tokens = [*_read(ADMIN), *(Token(one.name, one.digest, "metrics") for one in _read(METRICS, roles=False))]
    if not any(token.role == "admin" for token in tokens):
        raise Problem(
            f"no administrator token: neither {ADMIN} nor {ADMIN}_FILE gives one",
            "`pg-rekey serve --new-token NAME` makes one.",
            USAGE,
        )
    return tokens


def _digest(token: str) -> bytes:
    # Headers are bytes, which the server decodes as Latin-1; what a form has besides is in no token.
    return hashlib.sha256(token.encode("latin-1", "replace")).digest()


def _read(variable: str, *, roles: bool = True) -> list[Token]:
    """Return the tokens of a variable or of the file that it names; the error shows no entry."""
    text, path = os.environ.get(variable), os.environ.get(f"{variable}_FILE")
    if text and path:
        raise Problem(f"{variable} and {variable}_FILE are set together", "Set only one of them.", USAGE)
    if path:
        variable += "_FILE"
        try:
            text = Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise Problem(f"{variable} cannot be read: {error.strerror}", None, USAGE) from None
        text = re.sub(r"#.*", "", text)
    entries = re.split(r"[\s,]+", (text or "").strip(" \t\r\n,"))
    return [
        _parse(entry, f"entry {place} of {variable}", roles)
        for place, entry in enumerate(entries, 1)
        if entry
    ]


def _parse(entry: str, source: str, roles: bool) -> Token:
    suffix = "(?::(read|operate|admin))?" if roles else "()"
    found = re.fullmatch(rf"({_NAME}):([0-9A-Fa-f]{{64}}){suffix}", entry)
    if found is None:
        shape = "name:hash or name:hash:role" if roles else "name:hash"
        raise Problem(
            f"{source} is not {shape}, with the token's SHA-256 in hexadecimal",
            "`pg-rekey serve --new-token NAME` makes a token and its entry.",
            USAGE,
        )
    role: Role = next((known for known in ROLES if known == found[3]), "admin")
    return Token(found[1], bytes.fromhex(found[2]), role)

"""Bearer tokens: only their SHA-256 is configured, under a name that the audit log shows."""

import hashlib
import hmac
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pg_rekey.errors import USAGE, Problem

ADMIN = "PG_REKEY_API_TOKENS"
METRICS = "PG_REKEY_METRICS_TOKENS"
_NAME = r"[A-Za-z0-9._-]{1,63}"


@dataclass(frozen=True)
class Token:
    """What is configured of a token."""

    name: str
    digest: bytes
    admin: bool


def make(name: str) -> tuple[str, str]:
    """Make a token; return it and the entry to configure."""
    if not re.fullmatch(_NAME, name):
        raise Problem("the name of a token has 1 to 63 of: letters, digits, . _ -", None, USAGE)
    token = secrets.token_urlsafe(32)
    return token, f"{name}:{_digest(token).hex()}"


class Tokens:
    """The tokens that the API knows."""

    def __init__(self, tokens: Iterable[Token]) -> None:
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
        admin = [Token(name, digest, True) for name, digest in _read(ADMIN)]
        if not admin:
            raise Problem(
                f"no administrator token: neither {ADMIN} nor {ADMIN}_FILE gives one",
                "`pg-rekey serve --new-token NAME` makes one.",
                USAGE,
            )
        return cls([*admin, *(Token(name, digest, False) for name, digest in _read(METRICS))])

    def find(self, token: str) -> Token | None:
        """Return whose token this is; how long that takes does not depend on it."""
        digest = _digest(token)
        found = None
        for known in self._tokens:
            if hmac.compare_digest(known.digest, digest):
                found = known
        return found


def _digest(token: str) -> bytes:
    # Headers are bytes, which the server decodes as Latin-1.
    return hashlib.sha256(token.encode("latin-1")).digest()


def _read(variable: str) -> list[tuple[str, bytes]]:
    """Return names and digests of a variable or of the file that it names; the error shows no entry."""
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
    return [_parse(entry, f"entry {place} of {variable}") for place, entry in enumerate(entries, 1) if entry]


def _parse(entry: str, source: str) -> tuple[str, bytes]:
    found = re.fullmatch(rf"({_NAME}):([0-9A-Fa-f]{{64}})", entry)
    if found is None:
        raise Problem(
            f"{source} is not name:hash, with the token's SHA-256 in hexadecimal",
            "`pg-rekey serve --new-token NAME` makes a token and its entry.",
            USAGE,
        )
    return found[1], bytes.fromhex(found[2])

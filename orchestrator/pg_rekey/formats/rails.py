"""Active Record Encryption of Rails: JSON with AES-256-GCM, perhaps compressed."""

import codecs
import hashlib
import json
from typing import Any

from pg_rekey.formats.base import Format, inflated, open_gcm, salted, unbase64

ROUNDS = 1 << 16


class Rails(Format[bytes]):
    """Deterministic or not: the difference is in how the IV was made."""

    name = "rails"
    key_form = (
        "key_derivation_salt, white space, and a key (primary_key or deterministic_key), each one a line."
    )

    def parse(self, line: str) -> list[bytes]:
        """Derive the key, with the hashes that Rails has had as defaults."""
        salt, secret = salted(line)
        return [hashlib.pbkdf2_hmac(name, secret, salt, ROUNDS, 32) for name in ("sha256", "sha1")]

    def recognise(self, value: bytes) -> bool:
        """Tell by the first member."""
        return value.startswith(b'{"p":')

    def open_with(self, key: bytes, value: bytes) -> bytes | None:
        """Open a message, and inflate it."""
        message = json.loads(value)
        headers: dict[str, Any] = message["h"]
        plaintext = open_gcm(key, unbase64(headers["iv"]), unbase64(message["p"]), unbase64(headers["at"]))
        if headers.get("c"):
            plaintext = inflated(plaintext)
        encoding = unbase64(headers["e"]).decode() if "e" in headers else "UTF-8"
        return (
            plaintext if encoding in ("UTF-8", "ASCII-8BIT") else codecs.decode(plaintext, encoding).encode()
        )

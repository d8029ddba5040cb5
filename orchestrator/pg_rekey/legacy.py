"""What the user's values were encrypted with before, where pgcrypto cannot open it.

The keys come by the road of a KEK: PG_REKEY_FROM_FERNET, PG_REKEY_FROM_V1, PG_REKEY_FROM_AES_GCM, and for
what the server opens PG_REKEY_FROM_PGP_SYM; each also as _FILE or _COMMAND, one key a line.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pg_rekey import kek as keks
from pg_rekey.errors import LOCKED, Problem

FORMATS = ("plaintext", "pgp_sym", "fernet", "v1", "aes_gcm")
KEYED = FORMATS[1:]
NONCE, TAG, SHORTEST_PASSPHRASE = 12, 16, 32


def variable(name: str) -> str:
    """Return the environment variable of a format's keys."""
    return f"PG_REKEY_FROM_{name.upper()}"


@dataclass
class Keys:
    """The keys of the formats that are to be opened."""

    passphrases: list[bytes] = field(default_factory=list)
    fernet: MultiFernet | None = None
    v1: list[AESGCM] = field(default_factory=list)
    aes_gcm: list[AESGCM] = field(default_factory=list)

    @classmethod
    def from_environment(cls, formats: Iterable[str]) -> Self:
        """Read the keys that these formats need; errors do not show them."""
        keys = cls()
        for name in formats:
            if name == "plaintext":
                continue
            lines = _read(variable(name))
            if name == "pgp_sym":
                keys.passphrases = [line.encode() for line in lines]
            elif name == "fernet":
                keys.fernet = MultiFernet([_fernet(line) for line in lines])
            else:
                setattr(keys, name, [AESGCM(_aes_key(line, variable(name))) for line in lines])
        return keys

    def open(self, name: str, value: bytes) -> bytes | None:
        """Return the plaintext of a value in a format, or None where no key opens it."""
        if name == "fernet" and self.fernet:
            try:
                return self.fernet.decrypt(value)
            except InvalidToken:
                return None
        if name == "v1":
            return self._open_v1(value)
        if name == "aes_gcm":
            return _first(self.aes_gcm, value[:NONCE], value[NONCE:])
        return None

    def _open_v1(self, value: bytes) -> bytes | None:
        """Open `v1:<iv>:<tag>:<ciphertext>`, each in base64."""
        try:
            _, *parts = value.decode("ascii").split(":")
            iv, tag, ciphertext = (base64.b64decode(part, validate=True) for part in parts)
        except (ValueError, binascii.Error):
            return None
        return _first(self.v1, iv, ciphertext + tag) if len(tag) == TAG else None


def _first(ciphers: Iterable[AESGCM], nonce: bytes, sealed: bytes) -> bytes | None:
    for cipher in ciphers:
        try:
            return cipher.decrypt(nonce, sealed, None)
        except (InvalidTag, ValueError):  # ValueError: a nonce of a length that cannot be
            continue
    return None


def _read(name: str) -> list[str]:
    text = keks.read_text(name)
    lines = [line.strip("\r") for line in (text or "").split("\n") if line.strip()]
    if not lines:
        raise Problem(
            f"no key: none of {name}, {name}_FILE and {name}_COMMAND gives one",
            "One key a line. Keys are never arguments.",
            LOCKED,
        )
    return lines


def _fernet(line: str) -> Fernet:
    try:
        return Fernet(line.strip())
    except (ValueError, binascii.Error):
        raise Problem(
            f"a key of {variable('fernet')} is no Fernet key", "32 bytes in URL-safe base64.", LOCKED
        ) from None


def _aes_key(line: str, source: str) -> bytes:
    """Return the 32 bytes of 64 hexadecimal characters, of base64, or of the SHA-256 of a passphrase."""
    trimmed = line.strip()
    if re.fullmatch(r"[0-9A-Fa-f]{64}", trimmed):
        return bytes.fromhex(trimmed)
    try:
        key = base64.b64decode(trimmed, validate=True)
    except (ValueError, binascii.Error):
        key = b""
    if len(key) == 32:
        return key
    if len(line) >= SHORTEST_PASSPHRASE:
        return hashlib.sha256(line.encode()).digest()
    raise Problem(
        f"a key of {source} is neither 64 hexadecimal characters, nor base64 of 32 bytes, nor a passphrase",
        f"A passphrase has {SHORTEST_PASSPHRASE} characters or more, and is hashed with SHA-256.",
        LOCKED,
    )

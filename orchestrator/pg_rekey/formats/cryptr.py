"""cryptr (npm): hexadecimal or base64 of salt, IV, tag, ciphertext."""

import hashlib

from pg_rekey.formats.base import TAG, Format, decoded, open_gcm

SALT, IV, ROUNDS = 64, 16, 100_000
HEAD = SALT + IV + TAG


class Cryptr(Format[bytes]):
    """AES-256-GCM under a key that PBKDF2 makes for each value."""

    name = "cryptr"
    key_form = (
        "The secret that was given to new Cryptr(); one with other options than the defaults does not open."
    )

    def parse(self, line: str) -> list[bytes]:
        """Return the secret."""
        return [line.encode()]

    def recognise(self, value: bytes) -> bool:
        """Tell by the length."""
        raw = decoded(value)
        return raw is not value and len(raw) >= HEAD

    def open_with(self, key: bytes, value: bytes) -> bytes | None:
        """Derive the key of the value, and open it."""
        raw = decoded(value)
        salt, iv, tag = raw[:SALT], raw[SALT : SALT + IV], raw[SALT + IV : HEAD]
        return open_gcm(hashlib.pbkdf2_hmac("sha512", key, salt, ROUNDS, 32), iv, raw[HEAD:], tag)

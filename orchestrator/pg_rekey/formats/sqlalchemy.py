"""AesEngine and AesGcmEngine of SQLAlchemy-Utils: base64, under the SHA-256 of a string."""

import hashlib

from pg_rekey.formats.base import Format, decrypt_cbc, is_text, open_gcm, unbase64, unpadded

BLOCK, NONCE, TAG = 16, 12, 16


class Engine(Format[bytes]):
    """What both engines have in common."""

    key_form = "The key of the column, as it was given to EncryptedType or StringEncryptedType."

    def parse(self, line: str) -> list[bytes]:
        """Hash the key."""
        return [hashlib.sha256(line.encode()).digest()]


class SqlalchemyAes(Engine):
    """AES-256-CBC; the IV is the first half of the key, and no MAC protects it."""

    name = "sqlalchemy_aes"

    def recognise(self, value: bytes) -> bool:
        """Tell by the length, in blocks."""
        try:
            return len(unbase64(value)) % BLOCK == 0 and len(value) > 0
        except ValueError:
            return False

    def open_with(self, key: bytes, value: bytes) -> bytes | None:
        """Open it with either padding, PKCS5 or the default one, asterisks; only text counts."""
        padded = decrypt_cbc(key, key[:BLOCK], unbase64(value))
        try:
            plaintext = unpadded(padded)
        except ValueError:
            plaintext = padded.rstrip(b"*")
        return plaintext if is_text(plaintext) else None


class SqlalchemyAesGcm(Engine):
    """AES-256-GCM: nonce, tag, ciphertext."""

    name = "sqlalchemy_aes_gcm"

    def recognise(self, value: bytes) -> bool:
        """Tell by the length."""
        try:
            return len(unbase64(value)) >= NONCE + TAG
        except ValueError:
            return False

    def open_with(self, key: bytes, value: bytes) -> bytes | None:
        """Open it."""
        raw = unbase64(value)
        return open_gcm(key, raw[:NONCE], raw[NONCE + TAG :], raw[NONCE : NONCE + TAG])

"""docs/format.md implemented once more, with Python's hmac, hashlib and cryptography."""

import hashlib
import hmac
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

MAGIC = b"RK\x01"
GENESIS = hashlib.sha256(b"pg_rekey/v1/audit").digest()


def tag(key: bytes, iv: bytes, ciphertext: bytes, aad: bytes) -> bytes:
    """Return the tag of AEAD_AES_256_CBC_HMAC_SHA_512."""
    message = aad + iv + ciphertext + (8 * len(aad)).to_bytes(8, "big")
    return hmac.digest(key[:32], message, "sha512")[:32]


def encrypt(key: bytes, iv: bytes, plaintext: bytes, aad: bytes) -> bytes:
    """Return ciphertext and tag."""
    padder = PKCS7(128).padder()
    encryptor = Cipher(algorithms.AES(key[32:]), modes.CBC(iv)).encryptor()
    ciphertext = encryptor.update(padder.update(plaintext) + padder.finalize()) + encryptor.finalize()
    return ciphertext + tag(key, iv, ciphertext, aad)


def decrypt(key: bytes, iv: bytes, sealed: bytes, aad: bytes) -> bytes | None:
    """Return the plaintext, or None where the tag is wrong."""
    ciphertext = sealed[:-32]
    if not hmac.compare_digest(sealed[-32:], tag(key, iv, ciphertext, aad)):
        return None
    decryptor = Cipher(algorithms.AES(key[32:]), modes.CBC(iv)).decryptor()
    unpadder = PKCS7(128).unpadder()
    return unpadder.update(decryptor.update(ciphertext) + decryptor.finalize()) + unpadder.finalize()


def context(*parts: str | None) -> bytes:
    """Return the bytes that a context adds to the AAD."""
    encoded = (None if part is None else part.encode() for part in parts)
    return b"".join(b"\xff" * 4 if part is None else len(part).to_bytes(4, "big") + part for part in encoded)


def header(keyring: int, version: int) -> bytes:
    """Return the first 11 bytes of an envelope."""
    return MAGIC + keyring.to_bytes(4, "big") + version.to_bytes(4, "big")


def seal(key: bytes, keyring: int, version: int, iv: bytes, plaintext: bytes, *parts: str | None) -> bytes:
    """Return a whole envelope."""
    head = header(keyring, version)
    return head + iv + encrypt(key, iv, plaintext, head + context(*parts))


def unseal(key: bytes, envelope: bytes, *parts: str | None) -> bytes | None:
    """Open an envelope; None where the tag is wrong."""
    return decrypt(key, envelope[11:27], envelope[27:], envelope[:11] + context(*parts))


def fingerprint(kek: bytes) -> str:
    """Return what a KEK is recognised by."""
    return hmac.digest(kek, b"pg_rekey/v1/fingerprint", "sha256")[:16].hex()


def wrapping_key(kek: bytes) -> bytes:
    """Return the AEAD key that wraps DEKs."""
    return hmac.digest(kek, b"pg_rekey/v1/wrap", "sha512")


def unwrap(kek: bytes, kek_id: int, keyring: int, version: int, wrapped: bytes) -> bytes | None:
    """Return a DEK; None where it was wrapped under another KEK or is damaged."""
    assert wrapped[:11] == header(keyring, version)
    return unseal(wrapping_key(kek), wrapped, "dek", str(keyring), str(version), str(kek_id))


def audit_hash(entry: Mapping[str, Any]) -> bytes:
    """Return the hash of an entry of the audit log; `details` is the text of the jsonb."""
    numbers = [None if entry[name] is None else str(entry[name]) for name in ("version", "rotation_id")]
    return hashlib.sha256(
        entry["prev_hash"]
        + context(
            str(entry["id"]),
            entry["at"].strftime("%Y-%m-%dT%H:%M:%S.%f"),
            entry["actor"],
            entry["role"],
            entry["jwt_subject"],
            entry["event"],
            entry["keyring"],
            *numbers,
            entry["details"],
        )
    ).digest()

"""Better Auth's symmetricEncrypt(): `$ba$<version>$<hexadecimal>`, and hexadecimal alone, as before."""

import hashlib
import re

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from pg_rekey.formats.base import TAG, Format

SHAPE = re.compile(rb"(?:\$ba\$\d+\$)?((?:[0-9a-f]{2})+)")
NONCE = 24


class BetterAuth(Format[bytes]):
    """XChaCha20-Poly1305: nonce, ciphertext, tag."""

    name = "better_auth"
    key_form = "The secret, or each of the versioned secrets (without its number), one a line."

    def parse(self, line: str) -> list[bytes]:
        """Hash the secret."""
        return [hashlib.sha256(line.encode()).digest()]

    def recognise(self, value: bytes) -> bool:
        """Tell by the prefix, or hexadecimal of some length."""
        found = SHAPE.fullmatch(value)
        return found is not None and len(found[1]) // 2 >= NONCE + TAG

    def open_with(self, key: bytes, value: bytes) -> bytes | None:
        """Open it."""
        found = SHAPE.fullmatch(value)
        assert found is not None
        raw = bytes.fromhex(found[1].decode())
        nonce = raw[:NONCE]
        return ChaCha20Poly1305(_hchacha20(key, nonce[:16])).decrypt(bytes(4) + nonce[16:], raw[NONCE:], None)


def _hchacha20(key: bytes, nonce: bytes) -> bytes:
    """Return the key that XChaCha20 uses with a nonce (draft-irtf-cfrg-xchacha-03, 2.2).

    ChaCha20's block function, without what it adds at its end: so that is subtracted again.
    """
    block = Cipher(algorithms.ChaCha20(key, nonce), None).encryptor().update(bytes(64))
    state = b"expand 32-byte k" + key + nonce
    words = [
        (int.from_bytes(block[at : at + 4], "little") - int.from_bytes(state[at : at + 4], "little"))
        % (1 << 32)
        for at in range(0, 64, 4)
    ]
    return b"".join(word.to_bytes(4, "little") for word in (*words[:4], *words[12:]))

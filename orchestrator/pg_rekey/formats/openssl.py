"""`openssl enc -aes-256-cbc`, and CryptoJS' AES.encrypt(text, passphrase), which n8n uses."""

import hashlib

from pg_rekey.formats.base import Format, open_cbc_text

MAGIC, SALT, KEY, IV = b"Salted__", 8, 32, 16
ROUNDS = 10_000


class Openssl(Format[bytes]):
    """AES-256-CBC under a key and an IV from a passphrase. No MAC protects it, so only text opens."""

    name = "openssl"
    key_form = "The passphrase (n8n: encryptionKey of its settings)."

    def parse(self, line: str) -> list[bytes]:
        """Return the passphrase."""
        return [line.encode()]

    def recognise(self, value: bytes) -> bool:
        """Tell by the magic; base64 around it is off already."""
        return value.startswith(MAGIC)

    def open_with(self, key: bytes, value: bytes) -> bytes | None:
        """Try what CryptoJS, `openssl enc` and its -pbkdf2 derive: the value does not tell."""
        salt, ciphertext = value[len(MAGIC) : len(MAGIC) + SALT], value[len(MAGIC) + SALT :]
        for derived in (
            _bytes_to_key("md5", key, salt),
            _bytes_to_key("sha256", key, salt),
            hashlib.pbkdf2_hmac("sha256", key, salt, ROUNDS, KEY + IV),
        ):
            try:
                return open_cbc_text(derived[:KEY], derived[KEY:], ciphertext)
            except ValueError:
                continue
        return None


def _bytes_to_key(name: str, passphrase: bytes, salt: bytes) -> bytes:
    """Derive as OpenSSL's EVP_BytesToKey() does, with one round."""
    derived = block = b""
    while len(derived) < KEY + IV:
        block = hashlib.new(name, block + passphrase + salt).digest()
        derived += block
    return derived[: KEY + IV]

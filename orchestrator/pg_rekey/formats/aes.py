"""AES-256-GCM without a library's name: `v1:<iv>:<tag>:<ciphertext>`, and raw."""

from pg_rekey.formats.base import AES_KEY_FORM, TAG, Format, aes_key, is_text, open_gcm, unbase64

NONCE = 12


class V1(Format[bytes]):
    """`v1:<iv>:<tag>:<ciphertext>`, each in base64."""

    name = "v1"
    key_form = AES_KEY_FORM

    def parse(self, line: str) -> list[bytes]:
        """Return the key."""
        return [aes_key(line)]

    def recognise(self, value: bytes) -> bool:
        """Tell by the prefix."""
        return value.startswith(b"v1:")

    def open_with(self, key: bytes, value: bytes) -> bytes | None:
        """Open it."""
        _, iv, tag, ciphertext = value.split(b":")
        return open_gcm(key, unbase64(iv), unbase64(ciphertext), unbase64(tag))


class AesGcm(Format[bytes]):
    """Bytes: nonce, ciphertext, tag."""

    name = "aes_gcm"
    key_form = AES_KEY_FORM

    def parse(self, line: str) -> list[bytes]:
        """Return the key."""
        return [aes_key(line)]

    def recognise(self, value: bytes) -> bool:
        """Tell by the length; what is text is none."""
        return len(value) >= NONCE + TAG and not is_text(value)

    def open_with(self, key: bytes, value: bytes) -> bytes | None:
        """Open it."""
        return open_gcm(key, value[:NONCE], value[NONCE:-TAG], value[-TAG:])

"""prisma-field-encryption (@47ng/cloak): `v1.aesgcm256.<fingerprint>.<iv>.<ciphertext and tag>`."""

from pg_rekey.formats.base import TAG, Format, open_gcm, unbase64


class Prisma(Format[bytes]):
    """AES-256-GCM."""

    name = "prisma"
    key_form = "k1.aesgcm256.<base64>, as PRISMA_FIELD_ENCRYPTION_KEY has it; former keys too, one a line."

    def parse(self, line: str) -> list[bytes]:
        """Return the 32 bytes of a key."""
        kind, algorithm, key = line.strip().split(".")
        raw = unbase64(key)
        if (kind, algorithm, len(raw)) != ("k1", "aesgcm256", 32):
            raise ValueError
        return [raw]

    def recognise(self, value: bytes) -> bool:
        """Tell by the prefix."""
        return value.startswith(b"v1.aesgcm256.")

    def open_with(self, key: bytes, value: bytes) -> bytes | None:
        """Open it."""
        _, _, _, iv, sealed = value.split(b".")
        raw = unbase64(sealed)
        return open_gcm(key, unbase64(iv), raw[:-TAG], raw[-TAG:])

"""Laravel's Crypt and the casts that use it: JSON in base64, AES-CBC with HMAC or AES-GCM."""

import hashlib
import hmac
import json

from pg_rekey.formats.base import Format, decrypt_cbc, open_gcm, unbase64, unpadded


class Laravel(Format[bytes]):
    """What Crypt::encryptString(), the cast `encrypted`, and (with --unwrap php) Crypt::encrypt() write."""

    name = "laravel"
    key_form = "APP_KEY and each of APP_PREVIOUS_KEYS, one a line: base64:... of 16 or 32 bytes."

    def parse(self, line: str) -> list[bytes]:
        """Return the key; Laravel derives nothing from it."""
        trimmed = line.strip()
        key = unbase64(trimmed.removeprefix("base64:")) if trimmed.startswith("base64:") else trimmed.encode()
        if len(key) not in (16, 32):
            raise ValueError
        return [key]

    def recognise(self, value: bytes) -> bool:
        """Tell by the first member; the base64 around it is off already."""
        return value.startswith(b'{"iv":')

    def open_with(self, key: bytes, value: bytes) -> bytes | None:
        """Open it by GCM where there is a tag, else by CBC after the MAC, which goes over the base64."""
        payload = json.loads(value)
        iv, ciphertext = payload["iv"], payload["value"]
        if payload.get("tag"):
            return open_gcm(key, unbase64(iv), unbase64(ciphertext), unbase64(payload["tag"]))
        mac = hmac.digest(key, (iv + ciphertext).encode(), hashlib.sha256).hex()
        if not hmac.compare_digest(mac.encode(), payload["mac"].encode()):
            return None
        return unpadded(decrypt_cbc(key, unbase64(iv), unbase64(ciphertext)))

"""JWE in compact form (RFC 7516) with a shared key: "alg": "dir"."""

import hashlib
import hmac
import json
import re

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pg_rekey.formats.base import Format, decrypt_cbc, inflated, unbase64, unpadded

GCM = {"A128GCM": 16, "A192GCM": 24, "A256GCM": 32}
CBC = {
    "A128CBC-HS256": (32, hashlib.sha256),
    "A192CBC-HS384": (48, hashlib.sha384),
    "A256CBC-HS512": (64, hashlib.sha512),
}


class Jwe(Format[bytes]):
    """The header names the content encryption; where the key has another length, it does not open."""

    name = "jwe"
    key_form = 'A JWK, {"kty": "oct", "k": ...}, on one line; or the key in hexadecimal or base64.'

    def parse(self, line: str) -> list[bytes]:
        """Return the key."""
        trimmed = line.strip()
        if trimmed.startswith("{"):
            key = unbase64(json.loads(trimmed)["k"])
        elif re.fullmatch(r"(?:[0-9a-fA-F]{2})+", trimmed):
            key = bytes.fromhex(trimmed)
        else:
            key = unbase64(trimmed)
        if len(key) not in (16, 24, 32, 48, 64):
            raise ValueError
        return [key]

    def recognise(self, value: bytes) -> bool:
        """Tell by five parts, the second of them empty."""
        return value.startswith(b"eyJ") and value.count(b".") == 4 and b".." in value

    def open_with(self, key: bytes, value: bytes) -> bytes | None:
        """Open it by the algorithm of its header."""
        encoded, _, iv, ciphertext, tag = value.strip().split(b".")
        header = json.loads(unbase64(encoded))
        enc = header["enc"]
        if header["alg"] != "dir" or len(key) != (GCM[enc] if enc in GCM else CBC[enc][0]):
            return None
        sealed = unbase64(iv), unbase64(ciphertext), unbase64(tag)
        plaintext = (
            _open_gcm(key, encoded, *sealed) if enc in GCM else _open_cbc(key, CBC[enc][1], encoded, *sealed)
        )
        return inflated(plaintext, -15) if header.get("zip") == "DEF" else plaintext


def _open_gcm(key: bytes, aad: bytes, iv: bytes, ciphertext: bytes, tag: bytes) -> bytes:
    if len(tag) != 16:
        raise ValueError
    return AESGCM(key).decrypt(iv, ciphertext + tag, aad)


def _open_cbc(key: bytes, digest: object, aad: bytes, iv: bytes, ciphertext: bytes, tag: bytes) -> bytes:
    half = len(key) // 2
    authenticated = aad + iv + ciphertext + (8 * len(aad)).to_bytes(8, "big")
    expected = hmac.digest(key[:half], authenticated, digest)[:half]  # type: ignore[arg-type]
    if not hmac.compare_digest(expected, tag):
        raise ValueError
    return unpadded(decrypt_cbc(key[half:], iv, ciphertext))

"""Tink's AEAD, AES-GCM keysets: a prefix with the key's number (or none), IV, ciphertext, tag."""

import json
from dataclasses import dataclass

from pg_rekey.formats.base import TAG, Format, decoded, is_text, open_gcm, unbase64

AES_GCM = "type.googleapis.com/google.crypto.tink.AesGcmKey"
VERSIONS = {"TINK": b"\1", "LEGACY": b"\0", "CRUNCHY": b"\0", "RAW": None}
IV = 12


@dataclass
class TinkKey:
    """A key of a keyset, and what its values begin with."""

    prefix: bytes
    key: bytes


class Tink(Format[TinkKey]):
    """AES-GCM without associated data, as django-tink-fields has it."""

    name = "tink"
    key_form = "A cleartext keyset in JSON, on one line, with AesGcmKey keys."

    def parse(self, line: str) -> list[TinkKey]:
        """Return the keys of a keyset."""
        return [_key(one) for one in json.loads(line)["key"]]

    def recognise(self, value: bytes) -> bool:
        """Tell by the prefix of a key; without one, by the length."""
        raw = _raw(value)
        return any(raw.startswith(one.prefix) and len(raw) >= len(one.prefix) + IV + TAG for one in self.keys)

    def open_with(self, key: TinkKey, value: bytes) -> bytes | None:
        """Open it."""
        raw = _raw(value)
        if not raw.startswith(key.prefix):
            return None
        sealed = raw[len(key.prefix) :]
        return open_gcm(key.key, sealed[:IV], sealed[IV:-TAG], sealed[-TAG:])


def _raw(value: bytes) -> bytes:
    return decoded(value) if is_text(value) else value


def _key(entry: dict[str, object]) -> TinkKey:
    data = entry["keyData"]
    if not isinstance(data, dict) or data["typeUrl"] != AES_GCM:
        raise ValueError
    version = VERSIONS[str(entry["outputPrefixType"])]
    prefix = b"" if version is None else version + int(str(entry["keyId"])).to_bytes(4, "big")
    return TinkKey(prefix, _key_value(unbase64(data["value"])))


def _key_value(message: bytes) -> bytes:
    """Return field 3 of the protocol buffer AesGcmKey {uint32 version = 1; bytes key_value = 3}."""
    at = message.index(b"\x1a")
    key = message[at + 2 : at + 2 + message[at + 1]]
    if at not in (0, 2) or len(key) not in (16, 32):
        raise ValueError
    return key

"""What applications write with Node's crypto and no library: `iv:ciphertext`, and cal.com's keyring."""

import json
import re
from typing import NamedTuple

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pg_rekey.formats.base import AES_KEY_FORM, TAG, Format, aes_key, open_cbc_text, unbase64

KEY = 32


class AesCbc(Format[bytes]):
    """IV and AES-256-CBC in hexadecimal (cal.com: symmetricEncrypt). No MAC: so only text opens."""

    name = "aes_cbc"
    key_form = f"The 32 characters that are the key themselves, or: {AES_KEY_FORM}"

    def parse(self, line: str) -> list[bytes]:
        """Return the key: 32 characters are its bytes, of all else as in the other formats."""
        return [line.encode("latin-1") if len(line) == KEY else aes_key(line)]

    def recognise(self, value: bytes) -> bool:
        """Tell by 16 bytes, a colon, and whole blocks."""
        return re.fullmatch(rb"[0-9a-fA-F]{32}:(?:[0-9a-fA-F]{32})+", value) is not None

    def open_with(self, key: bytes, value: bytes) -> bytes | None:
        """Open it."""
        iv, ciphertext = value.decode().split(":")
        return open_cbc_text(key, bytes.fromhex(iv), bytes.fromhex(ciphertext))


class CalcomKey(NamedTuple):
    """A key, and what its values are bound to."""

    key: bytes
    associated_data: bytes


class Calcom(Format[CalcomKey]):
    """cal.com's encryptSecret(): JSON with AES-256-GCM, bound to JSON that only the application knows."""

    name = "calcom"
    key_form = (
        "A key of CALCOM_KEYRING_CREDENTIALS_..., white space, and what its values are bound to: "
        '{"type":"..."} with the type of the credential, a line for each.'
    )

    def parse(self, line: str) -> list[CalcomKey]:
        """Return the key, and the associated data as cal.com writes it: sorted, without white space."""
        key, bound = line.split(None, 1)
        associated = json.dumps(json.loads(bound), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        if len(unbase64(key)) != KEY:
            raise ValueError
        return [CalcomKey(unbase64(key), associated.encode())]

    def recognise(self, value: bytes) -> bool:
        """Tell by the first members."""
        return re.match(rb'\{"v":1,"alg":"AES-256-GCM","ring":"', value) is not None

    def open_with(self, key: CalcomKey, value: bytes) -> bytes | None:
        """Open it with this key, whichever it names."""
        nonce, ciphertext, tag = (unbase64(json.loads(value)[member]) for member in ("nonce", "ct", "tag"))
        if len(tag) != TAG:
            raise ValueError
        return AESGCM(key.key).decrypt(nonce, ciphertext + tag, key.associated_data)

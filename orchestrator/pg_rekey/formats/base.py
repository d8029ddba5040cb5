"""What every format has: a name, keys, a shape, and a way to open values."""

import base64
import binascii
import hashlib
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, Generic, TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pg_rekey.errors import LOCKED, Problem

Key = TypeVar("Key")
TAG = 16
# As in the database: no envelope has more, and nothing that is compressed may become more.
MAX_BYTES = 64 * 1024 * 1024


class Format(ABC, Generic[Key]):
    """A format, with the keys that may open its values."""

    name: ClassVar[str]
    key_form: ClassVar[str]  # what a line of its variable is, for people

    def __init__(self, lines: Iterable[str]) -> None:
        """Take its keys, one a line; errors do not show them."""
        self.keys: list[Key] = []
        for line in lines:
            try:
                self.keys += self.parse(line)
            except (ValueError, KeyError, TypeError):
                source = variable(self.name)
                raise Problem(f"a key of {source} is not as it should be", self.key_form, LOCKED) from None

    @abstractmethod
    def parse(self, line: str) -> list[Key]:
        """Return the keys that a line stands for; ValueError, KeyError or TypeError where it is none."""

    @abstractmethod
    def recognise(self, value: bytes) -> bool:
        """Tell whether a value may be one of this format."""

    @abstractmethod
    def open_with(self, key: Key, value: bytes) -> bytes | None:
        """Return the plaintext, None or ValueError or InvalidTag where this key does not open a value."""

    def open(self, values: Sequence[bytes]) -> list[bytes | None]:
        """Return the plaintext of each value, or None where no key opens it."""
        return [self._open(value) for value in values]

    def _open(self, value: bytes) -> bytes | None:
        if not self.recognise(value):
            return None
        for key in self.keys:
            try:
                plaintext = self.open_with(key, value)
            except (ValueError, KeyError, TypeError, InvalidTag):  # wrong key, or damaged
                continue
            if plaintext is not None:
                return plaintext
        return None


def variable(name: str) -> str:
    """Return the environment variable of a format's keys."""
    return f"PG_REKEY_FROM_{name.upper()}"


def unbase64(text: bytes | str) -> bytes:
    """Decode base64 of either alphabet, with or without padding and line breaks; ValueError if it is none."""
    digits = text.encode("ascii") if isinstance(text, str) else text
    digits = re.sub(rb"\s", b"", digits).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
    except binascii.Error:
        raise ValueError from None


def decoded(value: bytes) -> bytes:
    """Return the bytes of hexadecimal or base64, or what is neither as it is."""
    if re.fullmatch(rb"(?:[0-9a-fA-F]{2})+", value):
        return bytes.fromhex(value.decode())
    try:
        return unbase64(value)
    except ValueError:
        return value


def is_text(value: bytes) -> bool:
    """Tell whether bytes are UTF-8 without control characters, as far as texts have none."""
    try:
        return not re.search("[\0-\x08\x0b\x0c\x0e-\x1f\x7f]", value.decode())
    except UnicodeDecodeError:
        return False


def aes_key(line: str) -> bytes:
    """Return the 32 bytes of 64 hexadecimal characters, of base64, or of the SHA-256 of a passphrase."""
    trimmed = line.strip()
    if re.fullmatch(r"[0-9A-Fa-f]{64}", trimmed):
        return bytes.fromhex(trimmed)
    try:
        key = base64.b64decode(trimmed, validate=True)
    except (ValueError, binascii.Error):
        key = b""
    if len(key) == 32:
        return key
    if len(line) >= 32:
        return hashlib.sha256(line.encode()).digest()
    raise ValueError


AES_KEY_FORM = (
    "64 hexadecimal characters, base64 of 32 bytes, or a passphrase of 32 characters or more, which is "
    "hashed with SHA-256."
)


def open_gcm(key: bytes, nonce: bytes, ciphertext: bytes, tag: bytes) -> bytes:
    """Open AES-GCM without associated data."""
    if len(tag) != TAG:
        raise ValueError
    return AESGCM(key).decrypt(nonce, ciphertext + tag, None)


def decrypt_cbc(key: bytes, iv: bytes, ciphertext: bytes) -> bytes:
    """Decrypt AES-CBC, and leave the padding on."""
    decryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
    return decryptor.update(ciphertext) + decryptor.finalize()


def unpadded(padded: bytes) -> bytes:
    """Take PKCS#7 padding off; ValueError where there is none."""
    count = padded[-1] if padded else 0
    if not 1 <= count <= 16 or padded[-count:] != bytes([count]) * count:
        raise ValueError
    return padded[:-count]


def open_cbc_text(key: bytes, iv: bytes, ciphertext: bytes) -> bytes:
    """Open AES-CBC that no MAC protects: only text counts, since damage and wrong keys give no error."""
    plaintext = unpadded(decrypt_cbc(key, iv, ciphertext))
    if not is_text(plaintext):
        raise ValueError
    return plaintext


def inflated(compressed: bytes, window: int = 15) -> bytes:
    """Return what zlib's deflate, or with a window of -15 the bare one, has made smaller; it has a limit."""
    inflate = zlib.decompressobj(window)
    try:
        plaintext = inflate.decompress(compressed, MAX_BYTES)
    except zlib.error:
        raise ValueError from None
    if not inflate.eof:
        raise ValueError
    return plaintext


def salted(line: str) -> tuple[bytes, bytes]:
    """Return salt and secret of a line "SALT SECRET", with white space between."""
    salt, secret = line.split(None, 1)
    return salt.encode(), secret.encode()

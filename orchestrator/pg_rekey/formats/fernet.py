"""Fernet: https://github.com/fernet/spec, and two libraries that derive its key from a secret."""

import base64
import hashlib
import re

from cryptography.fernet import Fernet, InvalidToken

from pg_rekey.formats.base import Format, salted, unbase64

VERSION = 0x80


class FernetFormat(Format[Fernet]):
    """Tokens as Python's cryptography opens them, and raw ones."""

    name = "fernet"
    key_form = (
        "32 bytes in URL-safe base64, as Fernet.generate_key() makes them; several with commas between."
    )

    def parse(self, line: str) -> list[Fernet]:
        """Return the keys: Airflow's FERNET_KEY has commas between them."""
        return [Fernet(key.strip()) for key in line.split(",")]

    def recognise(self, value: bytes) -> bool:
        """Tell by the version."""
        return value[:1] == bytes([VERSION]) or value.lstrip()[:6] == b"gAAAAA"

    def open_with(self, key: Fernet, value: bytes) -> bytes | None:
        """Open a token in any of the forms that it is stored in."""
        raw = value if value[0] == VERSION else unbase64(re.sub(rb"[^A-Za-z0-9+/_-]", b"", value))
        try:
            return key.decrypt(base64.urlsafe_b64encode(raw))
        except InvalidToken:
            return None


class DjangoFernet(FernetFormat):
    """django-fernet-encrypted-fields."""

    name = "django_fernet"
    key_form = "SALT_KEY, white space, SECRET_KEY: each pair that may have been in force, one a line."

    def parse(self, line: str) -> list[Fernet]:
        """Derive the key of a pair."""
        salt, secret = salted(line)
        key = hashlib.pbkdf2_hmac("sha256", secret, salt, 100_000, 32)
        return [Fernet(base64.urlsafe_b64encode(key))]


class SqlalchemyFernet(FernetFormat):
    """FernetEngine of SQLAlchemy-Utils."""

    name = "sqlalchemy_fernet"
    key_form = "The key of the column, as it was given to EncryptedType or StringEncryptedType."

    def parse(self, line: str) -> list[Fernet]:
        """Hash the key."""
        return [Fernet(base64.urlsafe_b64encode(hashlib.sha256(line.encode()).digest()))]

"""Arguments of the Python API, checked before anything is sent: errors name types, never values."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID


def text(name: str, value: object) -> str:
    """Return a text that PostgreSQL can store."""
    if not isinstance(value, str):
        raise wrong(name, "a str", value)
    if "\0" in value:
        raise ValueError(f"{name}: text in PostgreSQL cannot hold a NUL character")
    encoded(name, value)
    return value


def optional_text(name: str, value: object) -> str | None:
    """Return a text, or None."""
    return None if value is None else text(name, value)


def encoded(name: str, value: object) -> bytes:
    """Return bytes as they are, and of a text its UTF-8."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if not isinstance(value, str):
        raise wrong(name, "bytes or a str", value)
    try:
        return value.encode()
    except UnicodeEncodeError:  # which would quote the value
        raise ValueError(f"{name} has characters that UTF-8 has not (surrogates)") from None


def sealed(name: str, value: object) -> bytes | str:
    """Return a sealed value, in bytes or in its text form."""
    return text(name, value) if isinstance(value, str) else encoded(name, value)


def sequence(name: str, value: object, of: str) -> Sequence[Any]:
    """Return a sequence of several values: a str or bytes is one."""
    if isinstance(value, str | bytes | bytearray | memoryview) or not isinstance(value, Sequence):
        raise wrong(name, f"a list of {of}", value)
    return value


def texts(name: str, value: object) -> list[str]:
    """Return several texts."""
    return [text(f"each of {name}", one) for one in sequence(name, value, "str")]


def context(name: str, value: object) -> list[str | None]:
    """Return the parts of a context."""
    return [optional_text(f"each part of {name}", part) for part in sequence(name, value, "str or None")]


def values(name: str, value: object) -> Mapping[str, str]:
    """Return texts by name."""
    if not isinstance(value, Mapping):
        raise wrong(name, "a dict of names and values", value)
    return {text(f"each name in {name}", one): text(f"each value in {name}", value[one]) for one in value}


def tenant(value: object) -> UUID:
    """Return the id of a tenant."""
    if not isinstance(value, UUID):
        raise wrong("tenant", "a uuid.UUID", value)
    return value


def flag(name: str, value: object) -> bool:
    """Return True or False; what only counts as one of them may be another argument in its place."""
    if not isinstance(value, bool):
        raise wrong(name, "True or False", value)
    return value


def wrong(name: str, wanted: str, value: object) -> TypeError:
    """Return the error that an argument has a wrong type."""
    return TypeError(f"{name} is {wanted}, not {'None' if value is None else type(value).__name__}")

"""Names that people type: those that there are, for completion, and the one that was meant."""

import difflib
from collections.abc import Sequence
from typing import Any

import psycopg

from pg_rekey import db

# What kind of name an error is about, by its action or its SQLSTATE.
_KINDS = {
    "columns": "table",
    "create_keyring": "keyring",
    "endpoints": "endpoint",
    "secrets": "secret",
    "settings": "setting",
    "42P01": "table",
    "42703": "column",
}


def kind(action: str | None, sqlstate: str | None) -> str | None:
    """Return what kind of name an error is about, if it is about one."""
    return _KINDS.get(action or "") or _KINDS.get(sqlstate or "")


def known(connection: psycopg.Connection[Any], kind: str, **given: Any) -> list[str]:
    """Return the names that there are of a kind, as the queries "names: ..." find them.

    given: what else was typed, as far as the kind depends on it: the tenant of a secret, the table of a
    column, the keyring of a version.
    """
    parameters = {name: given.get(name) for name in ("tenant", "table", "keyring")}
    return [str(row["name"]) for row in connection.execute(db.query(f"names: {kind}"), parameters).fetchall()]


def meant(given: str, names: Sequence[str]) -> str | None:
    """Return the question whether one of these names was meant, where one of them is alike."""
    by_lower = {name.lower(): name for name in names}
    alike = difflib.get_close_matches(given.lower(), by_lower, n=3)
    if not alike:
        return None
    return f"Did you mean {' or '.join(repr(by_lower[one]) for one in alike)}?"

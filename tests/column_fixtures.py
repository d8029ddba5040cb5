"""An owner of tables, and the protection of their columns. (PYTEST_DONT_REWRITE)"""

import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
from psycopg import sql

from helpers import Connection, connect, unlock

numbers = itertools.count(1)


@pytest.fixture
def owner(ready: Connection, db: str) -> Iterator[str]:
    """A login role that owns the schema `app`, and administers keys."""
    name = f"owner_{os.getpid()}_{next(numbers)}"
    ready.execute(f"create role {name} login in role rekey_admin, rekey_app".encode())
    ready.execute(f"create schema app authorization {name}".encode())
    yield name
    with connect(db) as connection:
        connection.execute(f"drop owned by {name} cascade".encode())
        connection.execute(f"drop role {name}".encode())


@pytest.fixture
def app(db: str, owner: str, kek: bytes) -> Iterator[Connection]:
    """A session of the owner of schema `app`, unlocked."""
    with connect(db, user=owner) as connection:
        unlock(connection, kek)
        connection.execute("set search_path = app")
        yield connection


def protect(connection: Connection, table: str, column: str = "v", **options: Any) -> str:
    names = {
        name: sql.SQL("{} => {}").format(sql.Identifier(name), sql.Literal(it))
        for name, it in options.items()
    }
    call = sql.SQL("select rekey.protect_column({})").format(
        sql.SQL(", ").join([sql.Literal(table), sql.Literal(column), *names.values()])
    )
    [(label,)] = connection.execute(call).fetchall()  # without parameters: names may have a %
    return str(label)

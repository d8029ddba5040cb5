"""Vacuums between the batches of a sweep."""

import os
from collections.abc import Callable, Iterator
from typing import LiteralString

import pytest
from psycopg.rows import dict_row

from column_fixtures import protect
from driving import fill, opened, rotate, rotation
from helpers import Connection, connect, unlock, value
from pg_rekey import worker

pytest_plugins = ["column_fixtures"]

ROWS = 6000
SIZE: LiteralString = "select pg_relation_size('app.notes')"
VACUUMS: LiteralString = "select coalesce(sum(vacuum_count), 0) from pg_stat_user_tables where relname = %s"


@pytest.fixture
def notes(app: Connection) -> dict[str, str]:
    """A protected table that leaves no space free; returns what it holds."""
    app.execute("create table notes (id int primary key, v text)")
    protect(app, "notes", encrypt_on_write=True)
    app.execute(
        "insert into notes select g, 'x' || g || repeat('.', 300) from generate_series(1, %s) g", [ROWS]
    )
    app.execute("vacuum (full, analyze) notes")
    return {str(n): f"x{n}" + "." * 300 for n in range(1, ROWS + 1)}


@pytest.fixture
def work(db: str, kek: bytes) -> Callable[[str], None]:
    """Return a function that takes steps as a user, until nothing is left."""

    def run(user: str) -> None:
        with connect(db, user=user) as session:
            unlock(session, kek)
            session.row_factory = dict_row
            steps = worker.Steps(session)
            while steps.take()["event"] != "idle":
                pass

    return run


@pytest.fixture
def operator(ready: Connection) -> Iterator[str]:
    name = f"operator_{os.getpid()}"
    ready.execute(f"create role {name} login in role rekey_operator".encode())
    yield name
    ready.execute(f"drop role {name}".encode())


def test_a_table_without_free_space_stays_small(
    ready: Connection, notes: dict[str, str], work: Callable[[str], None]
) -> None:
    before = value(ready, SIZE)
    number = rotate(ready)
    work(ready.info.user)
    assert rotation(ready, number, "state", "rows_done") == ("completed", ROWS)
    assert value(ready, SIZE) < 1.5 * before
    ready.execute("select pg_stat_force_next_flush()")
    assert value(ready, VACUUMS, "notes") >= 3
    assert opened(ready, "app.notes") == notes


def test_the_owner_may_vacuum(
    ready: Connection, owner: str, notes: dict[str, str], work: Callable[[str], None]
) -> None:
    before = value(ready, SIZE)
    rotate(ready)
    work(owner)
    assert value(ready, SIZE) < 1.5 * before


def test_who_may_not_vacuum_does_not_try(
    ready: Connection, operator: str, notes: dict[str, str], work: Callable[[str], None]
) -> None:
    before = value(ready, SIZE)
    number = rotate(ready)
    work(operator)
    assert rotation(ready, number, "state") == "completed"
    assert value(ready, SIZE) > 1.5 * before


def test_secrets_leave_space_free(ready: Connection, work: Callable[[str], None]) -> None:
    fill(ready, ROWS, size=300)
    ready.execute("vacuum (full, analyze) rekey.secrets")
    before = value(ready, "select pg_relation_size('rekey.secrets')")
    rotate(ready)
    work(ready.info.user)
    assert value(ready, "select pg_relation_size('rekey.secrets')") == before
    assert value(ready, VACUUMS, "secrets") == 0

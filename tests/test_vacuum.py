"""Vacuums between the batches of a sweep."""

import os
from collections.abc import Callable, Iterator
from typing import Any, LiteralString

import pytest
from psycopg import sql
from psycopg.rows import dict_row

from cli_fixtures import eventually
from column_fixtures import protect
from driving import fill, opened, rotate, rotation, step, step_until
from helpers import Connection, connect, create_database, initialize, install, unlock, value
from pg_rekey import local, release, worker

pytest_plugins = ["cli_fixtures", "column_fixtures"]

ROWS = 6000
SIZE: LiteralString = "select pg_relation_size('app.notes')"
VACUUMS: LiteralString = "select coalesce(sum(vacuum_count), 0) from pg_stat_user_tables where relname = %s"


@pytest.fixture
def notes(ready: Connection, app: Connection) -> dict[str, str]:
    """A protected table that leaves no space free; returns what it holds."""
    # However fast the machine, no batch holds so many of its rows that a vacuum behind it comes too late.
    ready.execute("select rekey.set_setting('batch_target', '10 ms')")
    # (Where autovacuum has the table in hand, a vacuum passes it by.)
    app.execute("create table notes (id int primary key, v text) with (autovacuum_enabled = off)")
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
    eventually(lambda: value(ready, VACUUMS, "notes") >= 3)  # its session tells when it ends
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


def test_a_vacuum_that_is_cancelled_ends_no_rotation(
    ready: Connection, notes: dict[str, str], kek: bytes, db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = rotate(ready)
    cancelled = 0
    with connect(db) as session:
        unlock(session, kek)
        session.row_factory = dict_row
        execute = session.execute

        def cancelling(query: Any, *arguments: Any) -> Any:
            nonlocal cancelled
            if not isinstance(query, sql.Composable):
                return execute(query, *arguments)
            cancelled += 1
            with session.transaction():
                execute("set local statement_timeout = '1 ms'")
                return execute("select pg_sleep(1)")

        monkeypatch.setattr(session, "execute", cancelling)
        steps = worker.Steps(session)
        while steps.take()["event"] != "idle":
            pass
    assert cancelled == 1
    assert rotation(ready, number, "state") == "completed"


def test_the_next_batch_tidies_up_behind_the_last_one(kek: bytes) -> None:
    """What an update leaves in a page is pruned before a checkpoint may come in between.

    On a server of its own: a transaction in another database may be old enough to keep it.
    """
    left: LiteralString = """
        select count(*) from heap_page_items(get_raw_page('rekey.secrets', 0))
        where lp_flags = 1 and t_xmax::text <> '0' and t_infomask & 128 = 0  -- not merely locked"""
    server = local.Server(settings={"autovacuum": "off"})
    with server, connect(create_database(server.dsn(), "tidy")) as connection:
        install(connection.info.dsn, release.assemble("plain"))
        initialize(connection, kek)
        connection.execute("create extension pageinspect")
        fill(connection, 80_000, size=300)  # so many that a batch is not written by reading all of them
        connection.execute("vacuum analyze rekey.secrets")
        rotate(connection)
        step_until(connection, "batch")
        assert value(connection, left) > 0
        assert step(connection)[0] == "batch"
        assert value(connection, left) == 0


def test_secrets_leave_space_free(ready: Connection, work: Callable[[str], None]) -> None:
    fill(ready, ROWS, size=300)
    ready.execute("vacuum (full, analyze) rekey.secrets")
    before = value(ready, "select pg_relation_size('rekey.secrets')")
    rotate(ready)
    work(ready.info.user)
    assert value(ready, "select pg_relation_size('rekey.secrets')") == before
    assert value(ready, VACUUMS, "secrets") == 0

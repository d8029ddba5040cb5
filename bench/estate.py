"""The server, its databases and what is in them."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, LiteralString, Self

import psycopg
from psycopg import sql

from pg_rekey import db, local, worker
from pg_rekey import kek as keks

SETUP = Path(__file__).with_name("setup.sql")
TEMPLATE = "bench_template"
FILL_ROWS = 20_000
RUN = "import sys; from pg_rekey.cli import main; main(sys.argv[1:])"


class Estate:
    """A durable throwaway server at PostgreSQL's defaults, and databases with pg_rekey and bench/setup.sql.

    The KEK and the connection string are in the environment, as they are for `pg-rekey`.
    """

    def __init__(self, server: local.Server) -> None:
        self.server = server

    @classmethod
    @contextmanager
    def started(cls) -> Iterator[Self]:
        """Start the server, and install as users do."""
        with local.Server(durable=True) as server, _environment({keks.CURRENT: keks.generate()}):
            estate = cls(server)
            estate.install(TEMPLATE)
            yield estate

    def install(self, template: str, script: str | None = None) -> None:
        """Make a template database as users do, or with an installation script that is not this one's."""
        self._in_postgres("create database {}", template)
        with _environment({"PG_REKEY_DSN": self.server.dsn(template)}):
            if script is not None:
                with psycopg.connect(self.server.dsn(template)) as connection:
                    connection.execute("create extension pgcrypto")
                    connection.execute(script.encode())
            pg_rekey("init")
            with psycopg.connect(self.server.dsn(template)) as connection:
                connection.execute(SETUP.read_bytes())

    @contextmanager
    def database(self, name: str, template: str = TEMPLATE) -> Iterator[db.Connection]:
        """Make a database, name it in the environment, and yield an unlocked session of the superuser."""
        self._in_postgres("create database {} template {}", name, template)
        with _environment({"PG_REKEY_DSN": self.server.dsn(name)}):
            with worker.connect() as connection:
                # The others that are measured find pgcrypto as applications do.
                connection.execute("select set_config('search_path', 'public', false)")
                yield connection
            self._in_postgres("drop database {} with (force)", name)

    def _in_postgres(self, statement: LiteralString, *names: str) -> None:
        with psycopg.connect(self.server.dsn(), autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    def settings(self) -> dict[str, str]:
        """Return what is not as PostgreSQL has it by default, but for places, connections and locale."""
        with psycopg.connect(self.server.dsn()) as connection:
            rows = connection.execute("""
                select name, setting from pg_settings
                where (source = 'configuration file' or name = 'data_checksums')
                  and setting <> boot_val and setting !~ '/'
                  and category !~ 'Connection Settings|Locale and Formatting'
                order by name""").fetchall()
        return dict(rows)

    def record_bytes(self, first: str, last: str, size: int) -> int | None:
        """Return how much of the WAL of this size between two places is records without full-page images.

        None where the server has removed some of it by now.
        """
        folder = self.server.data / "pg_wal"
        done = subprocess.run(
            [
                self.server.bindir / "pg_waldump",
                "--stats",
                f"--path={folder}",
                f"--start={first}",
                f"--end={last}",
            ],
            capture_output=True,
            text=True,
            check=False,  # the last record may not be on disk yet
        )
        total = re.search(r"(?m)^Total +\d+ +(\d+) .* (\d+) \[100%\]$", done.stdout)
        return int(total[1]) if total and int(total[2]) > 0.9 * size else None


def pg_rekey(*arguments: str) -> None:
    """Run a command of pg-rekey in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"pg-rekey {' '.join(arguments)} failed:\n{done.stdout}")


def value(connection: db.Connection, query: LiteralString, *parameters: Any) -> Any:
    """Return the only column of the only row of a query."""
    (row,) = connection.execute(query, parameters).fetchall()
    (only,) = row.values()
    return only


def empty_secrets(connection: db.Connection) -> None:
    """Delete all secrets, and say that they were to go: else rotations wait for somebody who does."""
    connection.execute("truncate rekey.secrets")
    connection.execute("select rekey.confirm_emptied(k.name) from rekey.keyrings k")


def fill_secrets(
    connection: db.Connection,
    last: int,
    size: int,
    *,
    first: int = 1,
    keyrings: Sequence[str] = ("default",),
) -> None:
    """Store the secrets `secret-<first>` to `secret-<last>`, and read some of them."""
    for begin in range(first, last + 1, FILL_ROWS):
        end = min(begin + FILL_ROWS - 1, last)
        connection.execute("select bench.fill_secrets(%s, %s, %s, %s)", [list(keyrings), begin, end, size])
    for n in (first, (first + last) // 2, last):
        check: LiteralString = "select rekey.get_secret('secret-' || %s::int) = bench.value(%s, %s)"
        assert value(connection, check, n, n, size), f"secret {n} is not what was stored"


def fill_columns(connection: db.Connection, rows: int, size: int) -> None:
    """Fill bench.sealed, which is encrypted on write and has a decrypted view, and bench.plain."""
    for table in ("bench.sealed", "bench.plain"):
        connection.execute(
            f"create table {table} (id int primary key, v text) with (fillfactor = 50)".encode()
        )
    connection.execute("select rekey.protect_column('bench.sealed', 'v', encrypt_on_write => true)")
    connection.execute("select rekey.create_decrypted_view('bench.sealed')")
    for table in ("bench.sealed", "bench.plain"):
        connection.execute(
            f"insert into {table} select g, bench.value(g, %s) from generate_series(1, %s) g".encode(),
            [size, rows],
        )


def settle(connection: db.Connection, *tables: str) -> None:
    """Vacuum tables and write everything to disk, so that a measurement begins with nothing left to do."""
    for table in tables:
        connection.execute(f"vacuum (analyze) {table}".encode())
    connection.execute("checkpoint")


def table_bytes(connection: db.Connection, table: str) -> int:
    """Return the size of a table, without its indexes."""
    return int(value(connection, "select pg_table_size(%s::regclass)", table))


def wal_place(connection: db.Connection) -> str:
    """Return where the next WAL record goes."""
    return str(value(connection, "select pg_current_wal_insert_lsn()"))


def wal_bytes(connection: db.Connection, first: str, last: str) -> int:
    """Return how much WAL there is between two places, full-page images included."""
    return int(value(connection, "select pg_wal_lsn_diff(%s, %s)", last, first))


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set these variables, and name no other database."""
    before = dict(os.environ)
    for name in ("PG_REKEY_DSN", "DATABASE_URL"):
        os.environ.pop(name, None)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)

"""Servers that a test may break, and a database on one of them whose every value is known."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

from column_fixtures import protect
from driving import check, fill
from helpers import Connection, connect, create_database, initialize, install, unlock
from pg_rekey import local, release

ROUNDS = int(os.environ.get("PG_REKEY_TEST_ROUNDS", "1"))  # how often faults come that come by chance


@dataclass
class Estate:
    """A database with secrets and a protected column of each type, and what is in them."""

    server: local.Server
    name: str
    kek: bytes = field(repr=False)
    secrets: dict[str, str] = field(default_factory=dict, repr=False)
    columns: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls, server: local.Server, name: str, kek: bytes, rows: int = 300, road: release.Road = "plain"
    ) -> Self:
        """Make the database."""
        estate = cls(server, name, kek)
        script = "create extension pg_rekey" if road == "extension" else release.assemble(road)
        install(create_database(server.dsn(), name), script)
        with connect(server.dsn(name)) as connection:
            initialize(connection, kek)
            estate.fill(connection, rows)
        return estate

    def fill(self, connection: Connection, rows: int) -> None:
        """Store secrets and values of the columns."""
        self.secrets = fill(connection, rows)
        connection.execute("create table notes (id int primary key, v text, n int default 0)")
        connection.execute("create table blobs (id int primary key, v bytea, n int default 0)")
        protect(connection, "public.notes", encrypt_on_write=True)
        protect(connection, "public.blobs")
        connection.execute("insert into notes select g, 'note ' || g from generate_series(1, %s) g", [rows])
        connection.execute(
            """insert into blobs
               select g, rekey.encrypt('blob ' || g, context => array['public.blobs.v', g::text])
               from generate_series(1, %s) g""",
            [rows],
        )
        self.columns = {
            f"public.{kind}s": {str(n): f"{kind} {n}" for n in range(1, rows + 1)}
            for kind in ("note", "blob")
        }

    @property
    def rows(self) -> int:
        """How many values there are."""
        return len(self.secrets) + sum(map(len, self.columns.values()))

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """Open an unlocked connection."""
        connection = connect(self.server.dsn(self.name))
        try:
            unlock(connection, self.kek)
            yield connection
        finally:
            connection.close()  # its server may be gone

    def check(self, connection: Connection) -> None:
        """Assert the invariants, and that every value is what it was."""
        check(connection, self.secrets, columns=self.columns)


def copy_data(source: local.Server, target: local.Server, *options: str) -> None:
    """Put a base backup of one server in the place of another's data, which is left stopped."""
    target.kill()
    kept = (target.data / "postmaster.opts").rename(target.directory / "opts")  # pg_ctl restarts with it
    shutil.rmtree(target.data)
    dsn = source.dsn()
    target._run(target.bindir / "pg_basebackup", "-D", target.data, "-d", dsn, "-c", "fast", *options)
    kept.rename(target.data / "postmaster.opts")
    configure(target, unix_socket_directories=str(target.directory), **{"cron.host": str(target.directory)})


def configure(server: local.Server, **settings: str) -> None:
    """Set something in the configuration of a server, for when it starts."""
    server.write("data/postgresql.conf", local.settings_text(settings), append=True)

"""A server as Supabase hosts it: its superuser is not ours, `postgres` is an ordinary role."""

import itertools
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from psycopg.conninfo import make_conninfo

from helpers import belong, connect, create_database
from pg_rekey import local

HERE = Path(__file__).parent
PROJECT = "project"  # the one database that pg_cron lives in


@dataclass
class Hosted:
    """The server, and its databases, which `postgres` owns."""

    server: local.Server
    made: list[str] = field(default_factory=list)  # since somebody last emptied it
    _numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    @classmethod
    @contextmanager
    def start(cls) -> Iterator[Self]:
        """Start a server, on a loopback port too, and make the roles."""
        settings = {"search_path": '"$user", public, extensions'}
        with local.Server(
            superuser="supabase_admin", settings=settings, cron_database=PROJECT, port=_free_port()
        ) as server:
            with connect(server.dsn("template1")) as connection:
                connection.execute((HERE / "roles.sql").read_bytes())
            yield cls(server)

    def make_database(self, name: str | None = None) -> str:
        """Make a database as a new project has it; return the DSN of `postgres`."""
        name = name or f"hosted_{next(self._numbers)}"
        admin = create_database(self.server.dsn("template1"), name, owner="postgres")
        self.made.append(admin)
        with connect(admin) as connection, connection.transaction():
            connection.execute((HERE / "database.sql").read_bytes())
            belong(connection, "supabase_vault", "vault")
        return make_conninfo(admin, user="postgres")

    def take_back(self) -> None:
        """Take back what was granted to the roles of the API."""
        with connect(self.server.dsn("template1")) as connection:
            connection.execute("""
                do $$
                declare
                  v_grant record;
                begin
                  for v_grant in
                    select m.roleid::regrole as role, m.member::regrole as member from pg_auth_members m
                    where m.member::regrole::text in ('anon', 'authenticated', 'service_role')
                  loop
                    execute format('revoke %s from %s', v_grant.role, v_grant.member);
                  end loop;
                end $$""")

    def admin(self, dsn: str) -> str:
        """Return the DSN of the real superuser for a database."""
        return make_conninfo(dsn, user=self.server.superuser)

    def url(self, database: str) -> str:
        """Return the URL of a database for programs that know no Unix sockets."""
        return f"postgresql://postgres:none@127.0.0.1:{self.server.port}/{database}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

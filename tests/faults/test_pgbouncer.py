"""A transaction pooler with one server session, which its clients use by turns."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import LiteralString

import pytest
from psycopg.conninfo import make_conninfo

import pg_rekey
from cli_fixtures import Cli
from driving import fill, refused, rotation
from helpers import Connection, connect, create_database, initialize, install, value
from pg_rekey import local, release
from pg_rekey.errors import FINDINGS, LOCKED

pytest_plugins = ["cli_fixtures"]

GET: LiteralString = "select rekey.get_secret(%s)"
SET: LiteralString = "select rekey.set_secret(%s, %s)"
PID: LiteralString = "select pg_backend_pid()"


@dataclass
class Pooled:
    """A database, and the way to it through the pooler."""

    direct: str
    through: str

    def client(self) -> Connection:
        connection = connect(self.through)
        connection.prepare_threshold = None  # prepared statements stay with the server session
        return connection


@pytest.fixture(scope="module")
def pooling() -> Iterator[Callable[[], Pooled]]:
    """PgBouncer before a server of its own; return a function that makes a database there."""
    program = shutil.which("pgbouncer")
    if program is None:
        pytest.skip("pgbouncer is not installed")
    with local.Server() as server, tempfile.TemporaryDirectory(prefix="pgrk-pgb-", dir="/tmp") as folder:
        place = Path(folder)
        users = place / "users"
        users.write_text(f'"{server.superuser}" ""\n')
        settings = place / "pgbouncer.ini"
        settings.write_text(f"""\
[databases]
* = host={server.directory} port={server.port} user={server.superuser}
[pgbouncer]
pool_mode = transaction
default_pool_size = 1
max_client_conn = 50
unix_socket_dir = {place}
listen_port = 6432
auth_type = trust
auth_file = {users}
""")
        owner = server.data.stat()
        account = (owner.st_uid, owner.st_gid) if os.geteuid() == 0 else (None, None)
        if os.geteuid() == 0:
            for path in (place, users, settings):
                os.chown(path, owner.st_uid, owner.st_gid)
        log = (place / "log").open("w")
        with (
            log,
            subprocess.Popen(
                [program, settings], stdout=log, stderr=log, user=account[0], group=account[1]
            ) as pgbouncer,
        ):
            try:
                numbers = iter(range(100))

                def make() -> Pooled:
                    direct = create_database(server.dsn(), f"pooled_{next(numbers)}")
                    return Pooled(direct, make_conninfo(direct, host=folder, port=6432))

                until = time.monotonic() + 30
                while not (place / ".s.PGSQL.6432").exists():
                    assert time.monotonic() < until, (place / "log").read_text()
                    time.sleep(0.02)
                yield make
            finally:
                pgbouncer.terminate()


@pytest.fixture
def pooled(pooling: Callable[[], Pooled], kek: bytes) -> Pooled:
    """A database that is ready, with three secrets."""
    made = pooling()
    install(made.direct, release.assemble("plain"))
    with connect(made.direct) as connection:
        initialize(connection, kek)
        fill(connection, 3)
        for setting in ("statement_timeout = '42 s'", "default_transaction_isolation = 'repeatable read'"):
            connection.execute(f"alter database {connection.info.dbname} set {setting}".encode())
    return made


@pytest.fixture
def cli_pooled(cli: Cli, pooled: Pooled, kek: bytes, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line, which reaches the database through the pooler."""
    monkeypatch.setenv("PG_REKEY_DSN", pooled.through)
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    return cli


def test_two_clients_unlock_each_their_own_transactions(pooled: Pooled, kek: bytes) -> None:
    with pooled.client() as one, pooled.client() as two:
        assert value(one, PID) == value(two, PID)  # what makes the rest worth testing
        for number in range(10):
            for client in (one, two):
                with client.transaction():
                    pg_rekey.unlock(client, kek)
                    client.execute(SET, (f"n{number}", str(number)))
                    assert value(client, GET, f"n{number}") == str(number)
                for other in (one, two):
                    with refused("RK001"):
                        other.execute(GET, ("s1",))


def test_a_value_that_is_copied_from_the_session_opens_nothing(pooled: Pooled, kek: bytes) -> None:
    with pooled.client() as one, pooled.client() as two:
        with one.transaction():
            pg_rekey.unlock(one, kek)
            copied = value(one, "select current_setting('rekey.unlocked')")
        for scope in (copied, "s" + copied[1:]):
            with refused("RK001"), two.transaction():
                two.execute("select set_config('rekey.unlocked', %s, true)", (scope,))
                two.execute(GET, ("s1",))


def test_locks_do_not_outlive_a_client(pooled: Pooled, kek: bytes) -> None:
    """The session of a client that is gone serves the next one: what it kept would never be let go."""
    writer = pooled.client()
    writer.execute("begin")
    pg_rekey.unlock(writer, kek)
    writer.execute(SET, ("s1", "never committed"))
    pid = value(writer, PID)
    writer.close()
    with connect(pooled.direct) as connection:
        pg_rekey.unlock(connection, kek, scope="session")
        until = time.monotonic() + 30
        held: LiteralString = "select count(*) from pg_locks where locktype = 'advisory' and pid = %s"
        while value(connection, held, pid):
            assert time.monotonic() < until
            time.sleep(0.02)
    with pooled.client() as one, pooled.client() as two:
        for client in (one, two):
            with client.transaction():
                pg_rekey.unlock(client, kek)
                client.execute("select rekey.rotate_keys('default', supersede => true)")
                client.execute(SET, ("s2", "s2"))
            assert value(client, "select count(*) from pg_locks where locktype = 'advisory'") == 0


def nothing_stays(pooled: Pooled) -> None:
    """Assert that the next client finds the session locked, and with the settings of its own database."""
    with pooled.client() as client:
        with refused("RK001"):
            client.execute(GET, ("s1",))
        assert value(client, "show statement_timeout") == "42s"
        assert value(client, "show default_transaction_isolation") == "repeatable read"
        assert value(client, "select count(*) from pg_prepared_statements") == 0


def test_rotate_and_wait(cli_pooled: Cli, pooled: Pooled) -> None:
    for number in (1, 2):
        [row] = cli_pooled.json("rotate", "--wait")
        assert (row["id"], row["state"], row["rows_done"]) == (number, "completed", 3)
        nothing_stays(pooled)
    cli_pooled("rotate")
    cli_pooled("rotate", "--wait", code=7)
    assert "[RK004]" in cli_pooled.err
    nothing_stays(pooled)


def test_work(cli_pooled: Cli, pooled: Pooled) -> None:
    cli_pooled("rotate")
    cli_pooled("work")
    nothing_stays(pooled)
    with connect(pooled.direct) as connection:
        assert rotation(connection, 1, "state", "rows_done") == ("completed", 3)


def test_a_wrong_kek(cli_pooled: Cli, pooled: Pooled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_REKEY_KEK", bytes(32).hex())
    for command in (("work", "--forever"), ("rotate", "--wait")):
        cli_pooled(*command, code=LOCKED)
        assert "wrong KEK" in cli_pooled.err


def test_a_column_is_adopted_and_let_go(cli_pooled: Cli, pooled: Pooled) -> None:
    with connect(pooled.direct) as connection:
        connection.execute("create table t (id integer primary key, v text)")
        connection.execute("insert into t select n, 'plain ' || n from generate_series(1, 500) n")
        cli_pooled("columns", "protect", "t", "v")
        cli_pooled("columns", "adopt", "t", "v", "--from", "plaintext")
        assert value(connection, "select count(*) from t where v like 'rk1:%%'") == 500
        nothing_stays(pooled)
        cli_pooled("columns", "unprotect", "t", "v", "--decrypt", "--yes")
        assert value(connection, "select count(*) from t where v = 'plain ' || id") == 500
        nothing_stays(pooled)


def test_init(cli: Cli, pooling: Callable[[], Pooled], kek: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pooling()
    monkeypatch.setenv("PG_REKEY_DSN", made.through)
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    for _ in range(2):
        cli("init")
    cli("secrets", "set", "a", stdin="value")
    assert cli("secrets", "get", "a") == "value"
    assert "there is a connection pooler" in cli("doctor", code=FINDINGS)


def test_uninstall(cli_pooled: Cli, pooled: Pooled, tmp_path: Path) -> None:
    with connect(pooled.direct) as connection:
        connection.execute("create table t (id integer primary key, v text)")
        connection.execute("insert into t select n, 'plain ' || n from generate_series(1, 50) n")
        cli_pooled("columns", "protect", "t", "v")
        cli_pooled("columns", "adopt", "t", "v", "--from", "plaintext")
        options = ("--export", tmp_path / "secrets", "--audit-log", tmp_path / "audit")
        cli_pooled("uninstall", *options, "--dry-run")
        cli_pooled("uninstall", *options, "--yes")
        assert value(connection, "select to_regnamespace('rekey') is null")
        assert value(connection, "select count(*) from t where v = 'plain ' || id") == 50


def test_a_client_who_unlocks_the_session_unlocks_it_for_the_next(pooled: Pooled, kek: bytes) -> None:
    """As docs/security.md warns; until somebody locks it, or the pooler lets the session go."""
    with pooled.client() as one, pooled.client() as two:
        pg_rekey.unlock(one, kek, scope="session")
        assert value(two, GET, "s1") == "s1"
        two.execute("select rekey.lock()")
        with refused("RK001"):
            one.execute(GET, ("s1",))

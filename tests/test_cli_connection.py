"""Connections: which database, what is refused, and that no error shows a password."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

import pg_rekey
from cli_fixtures import Cli
from helpers import Connection, value
from pg_rekey import db as database
from pg_rekey import errors
from pg_rekey.cli import main
from pg_rekey.errors import INTERRUPTED, USAGE

pytest_plugins = ["cli_fixtures"]
pytestmark = pytest.mark.usefixtures("environment")

COMMAND = Path(sys.executable).parent / "pg-rekey"


@pytest.mark.parametrize(
    ("dsn", "message"),
    [
        ("postgresql://u:canary@h/d?pgbouncer=true", "does not know: pgbouncer"),
        ("postgresql://u:canary@h/d?sslmode=require&connection_limit=1&schema=x", "connection_limit, schema"),
        ("postgresql://u:canary@h/d?ssl=require", r"does not know: ssl\n(?s:.*)write sslmode=require"),
        ("postgresql://u:canary@h/d?sslmode=no-verify", r"an sslmode (?s:.*)Write sslmode=require"),
        ("host=h sslmode=canary", "an sslmode that libpq does not know"),
        ("postgresql+psycopg://u:canary@h/d", r"starts with postgresql\+psycopg://"),
        ("jdbc:postgresql://u:canary@h/d", "starts with jdbc:postgresql://"),
        ("mysql://u:canary@h/d", "starts with mysql://"),
        ("postgresql://u:can/ary@h/d", "characters that a URL cannot hold"),
        ("postgresql://u:can@ary@h/d", "characters that a URL cannot hold"),
        ("postgresql://u:canary%@h/d", "not a connection string"),
        ("host=h password=can ary", "not a connection string"),
        ("user canary h", "not a connection string"),
        ('"postgresql://u:canary@h/d"', "no quotes around it"),
        (" postgresql://u:canary@h/d", "Write postgresql://USER"),
    ],
)
@pytest.mark.parametrize("variable", ["PG_REKEY_DSN", "DATABASE_URL"])
def test_what_libpq_refuses_is_said_without_the_password(
    variable: str, dsn: str, message: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, dsn)
    cli("status", code=USAGE)
    assert re.search(message, cli.err)
    assert variable in cli.err
    assert "can" not in cli.err.replace("cannot", "")
    assert "Hint: " in cli.err


def test_nobody_listens(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_REKEY_DSN", f"postgresql://u:canary@/d?host={tmp_path}")
    cli("status", code=9)
    assert "No such file" in cli.err
    assert "canary" not in cli.err


def test_a_server_that_vanished_is_noticed_soon(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by the worker, which waits as long as it takes; what the connection string says is obeyed."""
    for dsn, idle in ((empty, "10"), (make_conninfo(empty, keepalives_idle=60), "60")):
        monkeypatch.setenv("PG_REKEY_DSN", dsn)
        with database.connect() as direct, database.pool() as pool, pool.connection() as pooled:
            for connection in (direct, pooled):
                given = connection.info.get_parameters()
                assert given["keepalives_idle"] == idle
                assert given["keepalives_interval"] == "10"
                assert given["tcp_user_timeout"] == "10000"
                assert given["connect_timeout"] == "10"


def test_database_url_comes_second(cli: Cli, empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "host=/nowhere")
    assert database.dsn() == empty
    monkeypatch.delenv("PG_REKEY_DSN")
    assert database.dsn() == "host=/nowhere"
    monkeypatch.delenv("DATABASE_URL")
    assert database.dsn() == ""


@pytest.mark.usefixtures("empty")
def test_not_installed(cli: Cli) -> None:
    cli("status", code=1)
    assert "pg-rekey init" in cli.err


def test_another_version(cli_db: Cli, conn: Connection) -> None:
    conn.execute("drop function rekey.metrics()")
    cli_db("metrics", code=1)
    assert "another version" in cli_db.err


def test_hint_of_the_database_is_shown(cli_db: Cli) -> None:
    cli_db("rotations", "pause", 99, code=6)
    assert cli_db.err.splitlines() == [
        "Error: no such rotation: 99 [RK007]",
        "Hint: `pg-rekey rotations list` shows them.",
    ]


def test_role_without_the_right(
    cli_ready: Cli, conn: Connection, db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    conn.execute(
        "do $$ begin create role rekey_test_nobody login; exception when duplicate_object then end $$"
    )
    monkeypatch.setenv("PG_REKEY_DSN", make_conninfo(db, user="rekey_test_nobody"))
    cli_ready("status", code=1)
    assert "[42501]" in cli_ready.err
    assert "rekey_operator" in cli_ready.err


def test_notices_reach_the_user(cli_db: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    with database.connect() as connection:
        connection.execute("do $$ begin raise notice 'look here'; end $$")
    assert capsys.readouterr().err == "NOTICE: look here\n"


def test_where() -> None:
    class Info:
        host, hostaddr, port, dbname, user = "db.example.com", "", 5432, "app", "me"

    class Fake:
        info = Info()

    assert database.where(Fake()) == "database app on db.example.com:5432 as me"  # type: ignore[arg-type]


def test_error_without_a_state() -> None:
    problem = errors.from_database(psycopg.OperationalError("the connection\n  is lost"))
    assert (problem.message, problem.code, problem.exit_code) == ("the connection is lost", None, 9)
    assert errors.from_database(psycopg.errors.QueryCanceled("too slow")).hint


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), INTERRUPTED, "interrupted"),
        (click.Abort(), INTERRUPTED, "interrupted"),
        (UnicodeDecodeError("utf-8", b"canary", 0, 1, "why"), 1, "not UTF-8"),
        (PermissionError(13, "Permission denied", "/some/where"), 1, "/some/where: Permission denied"),
    ],
)
def test_no_traceback(
    error: BaseException, code: int, message: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(database, "connect", fail)
    cli("status", code=code)
    assert message in cli.err
    assert "canary" not in cli.err


def test_a_closed_pipe_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(database, "connect", fail)
    with pytest.raises(SystemExit):
        main.main(["status"])
    assert capsys.readouterr().err == ""


def test_as_a_process(db: str, kek: bytes) -> None:
    environment = {"PG_REKEY_DSN": db, "PG_REKEY_KEK": kek.hex(), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([COMMAND, "init"], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0
    assert "KEK 1" in done.stdout
    done = subprocess.run([COMMAND, "nonsense"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == USAGE


@pytest.mark.parametrize("road", ["plain", "extension", "supabase"])
def test_sql_prints_the_script(road: str, cli: Cli) -> None:
    assert "create schema rekey;" in cli("sql", "--road", road)
    assert cli.json("sql", "--road", road)["road"] == road


def test_help_of_every_command(cli: Cli) -> None:
    def walk(command: click.Command, *path: str) -> None:
        assert "Usage:" in cli(*path, "--help")
        assert command.help, path
        for name, child in getattr(command, "commands", {}).items():
            walk(child, *path, name)

    walk(main)
    assert cli("--version").startswith("pg-rekey, version ")


def test_queries_are_all_described() -> None:
    text = (Path(database.__file__).parent / "queries.sql").read_text()
    names = re.findall(r"^-- name: (.+)$", text, re.MULTILINE)
    assert len(names) == len(set(names))
    assert len(names) == len(re.findall(r"^-- name: .+\n-- description: .+\.$", text, re.MULTILINE))
    for name in names:
        assert database.query(name)
    with pytest.raises(KeyError):
        database.query("nonsense")


# pg_rekey.unlock(), as an application uses it


def test_unlock_a_transaction(ready: Connection, db: str, kek: bytes) -> None:
    with psycopg.connect(db) as connection:
        fingerprint = pg_rekey.unlock(connection, kek)
        assert fingerprint == value(ready, "select fingerprint from rekey.keks")
        connection.execute("select rekey.set_secret('a', 'value')")
        pg_rekey.unlock(connection, kek.hex())
        connection.commit()
        with pytest.raises(psycopg.Error) as caught:
            connection.execute("select rekey.get_secret('a')")
        assert caught.value.sqlstate == "RK001"


def test_unlock_a_transaction_in_autocommit_mode(ready: Connection, db: str, kek: bytes) -> None:
    with psycopg.connect(db, autocommit=True) as connection:
        with pytest.raises(pg_rekey.Error, match="autocommit"):
            pg_rekey.unlock(connection, kek)
        with connection.transaction():
            pg_rekey.unlock(connection, kek)
            connection.execute("select rekey.set_secret('a', 'value')")


def test_unlock_a_session(ready: Connection, db: str, kek: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    with psycopg.connect(db) as connection:
        pg_rekey.unlock(connection, scope="session")
        connection.execute("select rekey.set_secret('a', 'value')")
        connection.commit()
        assert connection.execute("select rekey.get_secret('a')").fetchone() == ("value",)


def test_a_wrong_kek_leaves_the_transaction_usable(ready: Connection, db: str) -> None:
    with psycopg.connect(db) as connection:
        with pytest.raises(pg_rekey.Locked) as caught:
            pg_rekey.unlock(connection, bytes(32))
        assert caught.value.code == "RK002"
        assert connection.execute("select 1").fetchone() == (1,)
        with pytest.raises(pg_rekey.Locked, match="a KEK has 32 bytes"):
            pg_rekey.unlock(connection, b"short")
        with pytest.raises(pg_rekey.Locked, match="hexadecimal"):
            pg_rekey.unlock(connection, "not a key")
        with pytest.raises(TypeError, match="kek is 32 bytes, or a str, not int"):
            pg_rekey.unlock(connection, 7)  # type: ignore[arg-type]


def test_the_environment_is_read_again_after_a_rotation_of_the_kek(
    ready: Connection, db: str, kek: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look finds the old KEK, the second one the new."""
    marker = tmp_path / "looked"
    script = f"if [ -e {marker} ]; then echo {kek.hex()}; else touch {marker}; echo {bytes(32).hex()}; fi"
    monkeypatch.setenv("PG_REKEY_KEK_COMMAND", f'sh -c "{script}"')
    with psycopg.connect(db) as connection:
        pg_rekey.unlock(connection)
        connection.execute("select rekey.set_secret('a', 'value')")


def test_a_command_runs_once_in_a_process(
    ready: Connection, db: str, kek: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker behind a pooler unlocks several times a second."""
    runs = tmp_path / "runs"
    monkeypatch.setenv("PG_REKEY_KEK_COMMAND", f"sh -c 'echo >> {runs}; echo {kek.hex()}'")
    for _ in range(2):
        with psycopg.connect(db) as connection:
            pg_rekey.unlock(connection)
            connection.execute("select rekey.set_secret('a', 'value')")
    assert runs.read_text() == "\n"


def test_unlock_without_a_kek(make_database: Callable[..., str]) -> None:
    with psycopg.connect(make_database()) as connection, pytest.raises(pg_rekey.Locked):
        pg_rekey.unlock(connection)

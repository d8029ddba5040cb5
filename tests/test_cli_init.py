"""`pg-rekey init`: from nothing to ready, again and again."""

import os
from typing import LiteralString

import psycopg
import pytest

from cli_fixtures import Cli
from helpers import Connection, belong, connect, install, value
from pg_rekey import db, local, release
from pg_rekey.errors import LOCKED
from test_cli_kek import VAULT

pytest_plugins = ["cli_fixtures"]


def test_without_a_kek_nothing_is_changed(cli: Cli, empty: str) -> None:
    cli("init", code=LOCKED)
    assert "nothing was changed" in cli.err
    assert "pg-rekey kek generate" in cli.err
    with connect(empty) as connection:
        assert value(connection, "select to_regnamespace('rekey') is null")


def test_from_nothing_to_ready(cli: Cli, empty: str, kek: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    first = cli("init", "--rotate-every", "90 days")
    assert first.splitlines()[0].startswith("database rekey_test_")
    assert "extension pgcrypto created in schema public" in first
    assert "keyring default created" in first
    with connect(empty) as connection:
        due = value(connection, "select next_rotation_at from rekey.keyrings")
        entries = value(connection, "select count(*) from rekey.audit_log")
    again = cli.json("init", "--rotate-every", "90 days")
    assert again["kek"] == 1
    assert again["steps"][0] == f"pg_rekey {release.version()} is installed"
    with connect(empty) as connection:
        assert value(connection, "select next_rotation_at from rekey.keyrings") == due
        assert value(connection, "select count(*) from rekey.audit_log") == entries


def test_a_wrong_kek_changes_nothing(
    cli: Cli, cli_ready: Cli, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_REKEY_KEK", bytes(32).hex())
    cli("init", "--rotate-every", "1 day", code=LOCKED)
    assert "wrong KEK" in cli.err
    assert bytes(32).hex() not in cli.err
    assert value(conn, "select rotate_every is null from rekey.keyrings")


def test_pgcrypto_goes_where_supabase_has_it(
    cli: Cli, empty: str, kek: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(empty) as connection:
        connection.execute("create schema extensions")
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    assert "pgcrypto created in schema extensions" in cli("init")


@pytest.mark.usefixtures("extension_files")
def test_as_an_extension(cli: Cli, empty: str, kek: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    assert f"extension pg_rekey {release.version()} created" in cli("init", "--extension")
    with connect(empty) as connection:
        assert value(connection, "select count(*) from pg_extension where extname = 'pg_rekey'") == 1


def test_with_the_kek_in_the_vault(cli: Cli, empty: str, kek: bytes) -> None:
    cli("init", "--provider", "vault", code=LOCKED)
    with connect(empty) as connection:
        assert value(connection, "select to_regnamespace('rekey') is null")
        connection.execute(VAULT)
        belong(connection, "supabase_vault", "vault")
        connection.execute("select vault.create_secret(%s, 'pg_rekey_kek', '', null)", [kek.hex()])
    assert "the server takes the KEK from: vault" in cli("init", "--provider", "vault")
    assert "KEK 1" in cli("init")


def test_the_server_must_have_the_same_kek(
    cli: Cli, empty: str, kek: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    cli("init", "--provider", "vault", code=LOCKED)
    assert "cannot be read" in cli.err
    with connect(empty) as connection:
        connection.execute(VAULT)
        belong(connection, "supabase_vault", "vault")
        connection.execute("select vault.create_secret(%s, 'pg_rekey_kek', '', null)", [bytes(32).hex()])
    cli("init", "--provider", "vault", code=LOCKED)
    assert "wrong KEK" in cli.err
    with connect(empty) as connection:
        connection.execute("update vault.secrets set secret = %s", [kek.hex()])
    cli("init", "--provider", "vault")


def test_interval_that_cannot_be(cli: Cli, empty: str, kek: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    for interval in ("-1 day", "often"):
        cli("init", "--rotate-every", interval, code=1)
        assert ": nothing was changed [22" in cli.err
    assert "installed" not in cli.out
    with connect(empty) as connection:
        assert value(connection, "select to_regnamespace('rekey') is null")


@pytest.fixture
def cron_elsewhere() -> bool:
    """Whether the tests' server has pg_cron, for another database than the test's."""
    with connect(os.environ["PG_REKEY_TEST_SERVER"]) as connection:
        return bool(value(connection, "select count(*) from pg_settings where name = 'cron.database_name'"))


def test_pg_cron_in_another_database(
    cli: Cli, empty: str, kek: bytes, cron_elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    document = cli.json("init")
    if cron_elsewhere:
        assert document["cron"] == "elsewhere"
    else:
        assert document["cron"] == "absent"
    assert document["steps"][-1].startswith("the server has no KEK of its own: let `pg-rekey work")


def test_pg_cron_in_this_database(cli: Cli, kek: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    if not local.ensure().has("pg_cron"):
        pytest.skip("pg_cron is not installed")
    with local.Server() as server:
        monkeypatch.setenv("PG_REKEY_DSN", server.dsn())
        monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
        assert cli.json("init")["cron"] == "not created"
        with psycopg.connect(server.dsn()) as connection:
            connection.execute("create extension pg_cron")
        assert cli.json("init")["cron"] == "scheduled"
        assert cli.json("init")["cron"] == "scheduled"
        findings = {row["finding"] for row in cli.json("doctor", code=5)}
        assert "pg_cron rotates nothing: the server itself has no KEK" in findings
        with connect(server.dsn()) as connection:
            owners: LiteralString = "select username, command from cron.job order by jobid"
            assert connection.execute(owners).fetchall() == [
                ("rekey_worker", "call rekey.tick()"),
                ("rekey_worker", "select rekey.watch()"),
            ]
            connection.execute(
                "update cron.job set active = false, username = 'postgres', command = 'call rekey.tick(), 1'"
                " where command like 'call %'"
            )
            connection.execute("delete from cron.job where command like '%watch%'")
            connection.execute("select cron.schedule('other', '* * * * *', 'call rekey.tick()')")
        text = "\n".join(row["finding"] for row in cli.json("doctor", code=5))
        assert "is not active" in text
        assert "runs as the superuser postgres" in text
        assert "is not one bare `call rekey.tick()`" in text
        assert "pg_cron has 2 jobs" in text
        assert "pg_cron has no job of one bare `select rekey.watch()`" in text

        # The same server's other database has its job in this one.
        with connect(server.dsn()) as connection:
            connection.execute("create database other")
        install(server.dsn("other"), release.assemble("plain"))
        monkeypatch.setenv("PG_REKEY_DSN", server.dsn("other"))
        cli("init")
        with connect(server.dsn("other")) as connection:
            [(call,)] = connection.execute(db.query("cron elsewhere").encode()).fetchall()
        text = "\n".join(row["finding"] for row in cli.json("doctor", code=5))
        assert "pg_cron has no job for this database" in text
        with connect(server.dsn()) as connection:
            connection.execute(call.encode())
        text = "\n".join(row["finding"] for row in cli.json("doctor", code=5))
        assert "pg_cron has no job" not in text
        with connect(server.dsn()) as connection:
            connection.execute("drop extension pg_cron")
        cli("doctor", code=5)

"""`pg-rekey upgrade`: what it says, what it refuses; tests/faults/test_new_release.py has it at work."""

from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from cli_fixtures import Cli
from helpers import Connection, connect, install, value
from pg_rekey import release
from pg_rekey.cli import upgrade
from pg_rekey.errors import FINDINGS, USAGE
from releases import FIRST, SECOND, THIRD, script

pytest_plugins = ["cli_fixtures", "releases"]

INSTALLED = "select rekey.version()"


@pytest.fixture
def first(made_up: Path, empty: str) -> str:
    """A database with the first of three releases."""
    install(empty, script(FIRST))
    return empty


def test_with_one_release_there_is_nothing_to_do(cli_db: Cli) -> None:
    assert cli_db("upgrade").splitlines()[-1] == f"pg_rekey {release.version()} (plain) is up to date"
    document = cli_db.json("upgrade")
    assert (document["version"], document["steps"]) == (release.version(), [])


@pytest.mark.parametrize("version", ["999999999.0.0", "0.0.1", "0.1.0-dev"])
def test_versions_that_it_does_not_know(cli_db: Cli, conn: Connection, version: str) -> None:
    body = (
        f"create or replace function rekey.version() returns text language sql immutable return '{version}'"
    )
    conn.execute(body.encode())
    cli_db("upgrade", code=1)
    assert f"has pg_rekey {version}, which this pg-rekey {release.version()} does not know" in cli_db.err


def test_not_installed(cli: Cli, empty: str) -> None:
    cli("upgrade", code=1)
    assert "pg-rekey init" in cli.err
    cli("upgrade", "now", code=USAGE)


def test_dry_run(cli: Cli, first: str) -> None:
    steps = [{"from": FIRST, "to": SECOND}, {"from": SECOND, "to": THIRD}]
    shown = cli.json("upgrade", "--dry-run")
    assert (shown["version"], shown["steps"]) == (FIRST, steps)
    assert cli("upgrade", "--dry-run").splitlines()[1:] == [
        f"  {FIRST} to {SECOND}, not applied",
        f"  {SECOND} to {THIRD}, not applied",
        f"pg_rekey {FIRST} (plain) can be upgraded",
    ]
    with connect(first) as connection:
        assert value(connection, INSTALLED) == FIRST


def test_others_point_at_it(cli: Cli, first: str, kek: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    assert "see `pg-rekey upgrade`" in cli("init")
    cli("doctor", code=FINDINGS)
    assert f"has pg_rekey {FIRST}, and this is pg-rekey {THIRD}" in cli.out
    cli("upgrade")
    assert "upgrade" not in cli("init")
    cli("doctor", code=FINDINGS)
    assert "this is pg-rekey" not in cli.out


def test_by_somebody_else(cli: Cli, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_REKEY_DSN", make_conninfo(first, user="rekey_worker"))
    cli("upgrade", code=1)
    assert "Hint: Connect as postgres, or as a superuser." in cli.err
    with connect(first) as connection:
        assert value(connection, INSTALLED) == FIRST


@pytest.mark.parametrize(
    "hold", ["lock table rekey.secrets in row exclusive mode", "select pg_advisory_xact_lock(0, 4)"]
)
def test_a_lock_that_nobody_gives(cli: Cli, first: str, hold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "ATTEMPTS", 2)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with psycopg.connect(first) as holder:
        holder.execute(hold.encode())
        cli("upgrade", code=1)
        assert f"stays at {FIRST}" in cli.err
        assert f"pid {holder.info.backend_pid} (postgres, since " in cli.err
        assert value(holder, INSTALLED) == FIRST
    assert "is upgraded" in cli("upgrade")


@pytest.mark.usefixtures("extension_files")
def test_a_server_without_the_files(cli: Cli, empty: str, made_up: Path) -> None:
    """The server has the extension of this checkout only; the command is of a later release."""
    install(empty, "create extension pg_rekey")
    with connect(empty) as connection:
        version = value(connection, INSTALLED)
    known = (made_up / "sql" / "dist" / "released.sha256").read_text()
    (made_up / "sql" / "dist" / "released.sha256").write_text(
        known.replace(f"{SECOND}.sql", f"{version}.sql")
    )
    cli("upgrade", code=1)
    (made_up / "sql" / "dist" / "released.sha256").write_text(known)
    assert f"no files that take the extension from {version} to {THIRD}" in cli.err
    assert "make install" in cli.err


def test_a_step_is_taken_once_and_in_order(first: str) -> None:
    """On the roads where PostgreSQL itself does not see to it."""
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match=f"the database has {FIRST}"):
        install(first, script(SECOND, THIRD))
    install(first, script(FIRST, SECOND))
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match=f"the database has {SECOND}"):
        install(first, script(FIRST, SECOND))


@pytest.mark.usefixtures("made_up")
def test_a_project_whose_migration_says_nothing(cli: Cli, tmp_path: Path) -> None:
    migrations = tmp_path / "supabase" / "migrations"
    migrations.mkdir(parents=True)
    (migrations / "20260101000000_pg_rekey.sql").write_text("-- mine now\n" + script(FIRST))
    cli("sql", "--road", "supabase", "--project", tmp_path, code=1)
    assert "leads to version unknown" in cli.err
    assert len(list(migrations.iterdir())) == 1

"""The road by pg_tle, without a superuser and without files: RDS and Aurora. Skipped where pg_tle is not."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from psycopg.conninfo import make_conninfo

import servers
from cli_fixtures import Cli
from driving import refused, rotate, rotation, run
from faults.test_new_release import begin, finish
from helpers import connect, create_database, initialize, install, unlock, value
from pg_rekey import local, release
from releases import FIRST, SECOND
from test_roads import catalog

pytest_plugins = ["cli_fixtures", "releases"]

ROLE = "rds"


@pytest.fixture(scope="module")
def server() -> Iterator[local.Server]:
    """A server with pg_tle, and a role that may make roles and databases and hand scripts to pg_tle."""
    if not local.ensure().has("pg_tle"):
        pytest.skip("pg_tle is not installed")
    with ExitStack() as stack:
        try:
            copy = stack.enter_context(servers.copied(local.ensure()))
        except servers.Unavailable as error:
            pytest.skip(str(error))
        for path in copy.extensions.glob("pg_rekey*"):
            path.unlink()  # pg_tle takes no script of an extension that has files
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(local, "ensure", lambda: copy)
        server = stack.enter_context(local.Server(settings={"shared_preload_libraries": "pg_tle"}))
        patch.undo()
        with connect(server.dsn()) as connection:
            connection.execute(f"create role {ROLE} login createrole createdb".encode())
        yield server


@pytest.fixture
def make(server: local.Server, request: pytest.FixtureRequest) -> Callable[..., str]:
    """Return a function that makes a database with pg_tle and pgcrypto, and returns the role's DSN."""

    def make_one(name: str, tle: bool = True) -> str:
        admin = create_database(
            server.dsn(), f"{request.node.name.partition('[')[0]}_{name}"[:63], owner=ROLE
        )
        with connect(admin) as connection:
            connection.execute("create extension pgcrypto")
            if tle:
                connection.execute("create extension pg_tle")
                connection.execute(f"grant pgtle_admin to {ROLE}".encode())
        return make_conninfo(admin, user=ROLE)

    return make_one


def install_tle(dsn: str) -> None:
    """Do what the script's first line says."""
    with connect(dsn) as connection:
        connection.execute(release.assemble("pgtle").encode())
        connection.execute("create extension pg_rekey schema pg_catalog")


def test_it_ends_in_the_same_catalog(make: Callable[..., str]) -> None:
    plain, tle = make("plain", tle=False), make("tle")
    install(plain, release.assemble("plain"))
    install_tle(tle)
    with connect(plain) as one, connect(tle) as other:
        assert catalog(other) == catalog(one)
        owner = value(other, "select extowner::regrole::text from pg_extension where extname = 'pg_rekey'")
        assert owner == ROLE
        assert not value(other, "select rolsuper from pg_roles where rolname = current_user")


def test_it_works_and_goes(make: Callable[..., str], kek: bytes) -> None:
    dsn = make("it")
    install_tle(dsn)
    with connect(dsn) as connection:
        initialize(connection, kek)
        connection.execute("create table notes (id int primary key, v text)")
        connection.execute("select rekey.protect_column('notes', 'v', encrypt_on_write => true)")
        connection.execute("insert into notes values (1, 'one')")
        connection.execute("select rekey.set_secret('name', 'value')")
        number = rotate(connection)
        run(connection)
        assert rotation(connection, number, "state", "rows_done") == ("completed", 2)
        assert value(connection, "select rekey.get_secret('name')") == "value"
        assert (
            value(connection, "select rekey.decrypt_text(v, array['public.notes.v', '1']) from notes")
            == "one"
        )
        while value(connection, "select rekey.unprotect_column('notes', 'v', decrypt => true)"):
            pass
        connection.execute("drop extension pg_rekey")
        connection.execute("select pgtle.uninstall_extension('pg_rekey')")
        assert value(connection, "select to_regnamespace('rekey') is null")


def test_the_command_finds_it(
    make: Callable[..., str], kek: bytes, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    dsn = make("it")
    install_tle(dsn)
    monkeypatch.setenv("PG_REKEY_DSN", dsn)
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    cli("init")
    cli("secrets", "set", "name", stdin="value")
    cli("rotate", "--wait")
    assert cli("secrets", "get", "name") == "value"
    cli("upgrade")
    assert "(extension) is up to date" in cli.out


@pytest.mark.usefixtures("made_up")
def test_from_release_to_release(
    make: Callable[..., str], kek: bytes, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a rotation; the way is taught to pg_tle first."""
    dsn = make("it")
    first = (release.DIST / f"pg_rekey--{FIRST}.sql").read_text()
    with connect(dsn) as connection:
        connection.execute(
            release._for_road("pgtle", first).replace(f"'{release.version()}'", f"'{FIRST}'").encode()
        )
        connection.execute("create extension pg_rekey schema pg_catalog")
        number, secrets = begin(connection, kek)
    monkeypatch.setenv("PG_REKEY_DSN", dsn)
    cli("upgrade", code=1)
    assert f"pg_tle does not know the way from {FIRST} to {SECOND}" in cli.err
    assert f"pg-rekey sql --road pgtle --since {FIRST}" in cli.err
    script = cli("sql", "--road", "pgtle", "--since", FIRST)
    with connect(dsn) as connection:
        connection.execute(script.encode())
    cli("upgrade")
    assert f"pg_rekey {release.version()} (extension) is upgraded" in cli.out
    finish(dsn, kek, number, secrets)


def test_dump_and_restore(make: Callable[..., str], server: local.Server, kek: bytes) -> None:
    """The dump brings the scripts along, and makes the extension of them before it fills its tables."""
    dsn, copy = make("it"), make("copy")
    install_tle(dsn)
    with connect(dsn) as connection:
        initialize(connection, kek)
        connection.execute("select rekey.set_secret('name', 'value')")
        connection.execute("create table notes (id int primary key, v text)")
        connection.execute("select rekey.protect_column('notes', 'v', encrypt_on_write => true)")
        connection.execute("insert into notes values (1, 'one')")
        number = rotate(connection)
    done = subprocess.run([server.bindir / "pg_dump", "--dbname", dsn], capture_output=True, check=True)
    restored = subprocess.run(
        [server.bindir / "psql", "--quiet", "--no-psqlrc", "--dbname", copy],
        input=done.stdout,
        capture_output=True,
        check=True,
    )
    errors = [line for line in restored.stderr.decode().splitlines() if "ERROR" in line]
    # Of what was there before: pg_tle and its schema, and pgcrypto.
    assert [
        line for line in errors if "extension pg" not in line and '"pgtle" already exists' not in line
    ] == []
    with connect(copy) as connection:
        unlock(connection, kek)
        assert value(connection, "select rekey.get_secret('name')") == "value"
        run(connection)
        assert rotation(connection, number, "state", "rows_done") == ("completed", 2)
        assert (
            value(connection, "select rekey.decrypt_text(v, array['public.notes.v', '1']) from notes")
            == "one"
        )
        assert value(connection, "select (rekey.verify_audit_log()).valid")


def test_who_may_not_hand_scripts_to_it(make: Callable[..., str]) -> None:
    dsn = make("it")
    with connect(dsn) as connection:
        connection.execute("create role other login")
    with connect(dsn, user="other") as connection, refused("42501"):
        connection.execute(release.assemble("pgtle").encode())

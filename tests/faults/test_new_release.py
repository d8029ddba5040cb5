"""A new release in the middle of a rotation, on each road; what ends the update leaves a whole release."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from cli_fixtures import Cli, eventually
from column_fixtures import protect
from driving import check, events, fill, in_background, on_versions, rotate, rotation, run, step
from helpers import Connection, connect, initialize, install, unlock, value
from hosted import Hosted
from pg_rekey import release
from releases import FIRST, SECOND, THIRD, script
from test_roads import catalog

pytest_plugins = ["cli_fixtures", "releases"]

SECRETS = 300
NOTES = {str(n): f"note {n}" for n in range(1, 301)}
INSTALLED = "select rekey.version()"
# As the Supabase CLI notes what it has applied.
MIGRATIONS = """
create schema supabase_migrations;
create table supabase_migrations.schema_migrations (version text primary key, statements text[], name text);
insert into supabase_migrations.schema_migrations values ('20260101000000', '{}', 'pg_rekey');
"""


def set_up(connection: Connection, kek: bytes) -> None:
    initialize(connection, kek)
    connection.execute("create table public.notes (id int primary key, v text)")
    protect(connection, "public.notes", encrypt_on_write=True)


def begin(connection: Connection, kek: bytes) -> tuple[int, dict[str, str]]:
    """Fill a database of the first release, and stop in the middle of a sweep."""
    set_up(connection, kek)
    secrets = fill(connection, SECRETS)
    connection.execute("insert into public.notes select g, 'note ' || g from generate_series(1, 300) g")
    number = rotate(connection)
    while not rotation(connection, number, "rows_done"):
        step(connection)
    assert rotation(connection, number, "state") == "running"
    return number, secrets


def finish(dsn: str, kek: bytes, number: int, secrets: dict[str, str]) -> None:
    """Let the rotation end under the third release, and use what is new."""
    with connect(dsn) as connection:
        assert value(connection, INSTALLED) == THIRD
        unlock(connection, kek)
        check(connection, secrets, columns={"public.notes": NOTES})
        assert rotation(connection, number, "state") == "running"
        run(connection)
        assert rotation(connection, number, "state", "rows_failed") == ("completed", 0)
        assert on_versions(connection) == {2: SECRETS}
        connection.execute("select rekey.set_secret('new', 'value', owner => 'ops')")
        assert value(connection, "select owner from rekey.secrets where name = 'new'") == "ops"
        assert value(connection, "select rekey.note('kept')") == 1
        check(connection, secrets | {"new": "value"}, columns={"public.notes": NOTES})
        # The functions of a column that was there are those of the new release.
        assert value(connection, "select problem from rekey.column_status") is None
        assert "/* bytes */" in value(
            connection, "select prosrc from pg_proc where proname = 'column_1_trigger'"
        )
        connection.execute("insert into public.notes values (1000, 'sealed')")
        assert value(connection, "select v from public.notes where id = 1000").startswith("rk1:")


def schema(connection: Connection) -> set[str]:
    """Return the catalog without the function that names a keyring's random id."""
    return {entry for entry in catalog(connection) if "rekey_targets.column_1_trigger()'" not in entry}


def members(connection: Connection) -> set[tuple[str, bool]]:
    """Return what belongs to the extension, and whether pg_dump brings its rows along."""
    found = connection.execute("""
        select pg_describe_object(d.classid, d.objid, 0),
          d.classid = 'pg_class'::regclass and d.objid = any (e.extconfig)
        from pg_depend d join pg_extension e on d.refclassid = 'pg_extension'::regclass and d.refobjid = e.oid
        where e.extname = 'pg_rekey' and d.deptype = 'e'""")
    return set(found)


@pytest.mark.usefixtures("made_up_files")
def test_as_an_extension(
    cli: Cli, make_database: Callable[..., str], kek: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, fresh = make_database(), make_database()
    for dsn, version in ((old, FIRST), (fresh, THIRD)):
        with connect(dsn) as connection:
            connection.execute(f"create extension pg_rekey version '{version}' cascade".encode())
    with connect(old) as connection:
        number, secrets = begin(connection, kek)
    monkeypatch.setenv("PG_REKEY_DSN", old)
    cli("upgrade")
    finish(old, kek, number, secrets)
    with connect(old) as upgraded, connect(fresh) as other:
        set_up(other, kek)
        assert schema(upgraded) == schema(other)
        assert members(upgraded) == members(other)
        assert ("sequence rekey.notes_id_seq", True) in members(upgraded)


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize("road", ["plain", "supabase"])
def test_in_plain_sql(
    cli: Cli, hosted: Hosted, kek: bytes, road: release.Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a role that is no superuser."""
    old, fresh = hosted.make_database(), hosted.make_database()
    install(old, script(FIRST))
    install(fresh, script(THIRD))
    with connect(old) as connection:
        number, secrets = begin(connection, kek)
    monkeypatch.setenv("PG_REKEY_DSN", old)
    if road == "supabase":
        migrations = tmp_path / "supabase" / "migrations"
        migrations.mkdir(parents=True)
        (migrations / "20260101000000_pg_rekey.sql").write_text(script(FIRST))
        with connect(old) as connection:
            connection.execute(MIGRATIONS)
        cli("upgrade", code=1)
        assert "supabase db push" in cli.err
        written = cli.json("sql", "--road", "supabase", "--project", tmp_path)["paths"]
        scripts = [Path(path).read_text() for path in written]
        assert scripts == [script(FIRST, SECOND), script(SECOND, THIRD)]
        for text in scripts:
            install(old, text)
        cli("sql", "--road", "supabase", "--project", tmp_path, code=1)
        assert "has it already" in cli.err
    else:
        assert f"pg_rekey {THIRD} (plain) is upgraded" in cli("upgrade")
    finish(old, kek, number, secrets)
    with connect(old) as upgraded, connect(fresh) as other:
        set_up(other, kek)
        assert schema(upgraded) == schema(other)


@pytest.mark.usefixtures("made_up")
def test_a_column_of_somebody_else(hosted: Hosted, kek: bytes) -> None:
    """Whoever updates is no member of its owner, and may not make functions in his name."""
    dsn, name = hosted.make_database(), f"stranger_{os.getpid()}"
    install(dsn, script(FIRST))
    with connect(dsn) as connection:
        initialize(connection, kek)
        connection.execute(f"create role {name} login in role rekey_admin, rekey_app".encode())
        connection.execute(f"grant create on database {connection.info.dbname} to {name}".encode())
        with connect(dsn, user=name) as stranger:
            stranger.execute("create schema mine")
            stranger.execute("create table mine.notes (id int primary key, v text)")
            protect(stranger, "mine.notes", encrypt_on_write=True)
            install(dsn, script(FIRST, SECOND))
            problem = "select problem from rekey.column_status"
            assert "repeat rekey.protect_column(..., encrypt_on_write => true)" in value(connection, problem)
            protect(stranger, "mine.notes", encrypt_on_write=True)
            assert value(connection, problem) is None
        connection.execute(f"grant {name} to current_user".encode())
        connection.execute(f"drop owned by {name} cascade".encode())
        connection.execute(f"drop role {name}".encode())


@pytest.fixture
def installed(
    cli: Cli, made_up: Path, make_database: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> str:
    """A database with the first release, which the command line then uses."""
    dsn = make_database()
    install(dsn, script(FIRST))
    monkeypatch.setenv("PG_REKEY_DSN", dsn)
    return dsn


@contextmanager
def started(made_up: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `pg-rekey upgrade` of the made-up release as a process."""
    command = [sys.executable, "-c", "from pg_rekey.cli import main; main()", "upgrade"]
    environment = os.environ | {"PYTHONPATH": str(made_up / "orchestrator")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as running:
        try:
            yield running
        finally:
            running.kill()


def at_work(connection: Connection) -> int:
    """Return how many sessions pg-rekey has in this database."""
    sessions = "select count(*) from pg_stat_activity where application_name = 'pg-rekey' and datname = %s"
    return int(value(connection, sessions, connection.info.dbname))


def test_killed_between_two_steps(cli: Cli, installed: str, made_up: Path, kek: bytes) -> None:
    """The second step finds a table that somebody else is just making under its name."""
    with connect(installed) as connection, psycopg.connect(installed) as blocker:
        number, secrets = begin(connection, kek)
        blocker.execute("create table rekey.notes ()")
        with started(made_up) as command:
            eventually(lambda: value(connection, INSTALLED) == SECOND)
            command.kill()
        eventually(lambda: at_work(connection) == 0)
        assert value(connection, INSTALLED) == SECOND
        step(connection)
        check(connection, secrets, columns={"public.notes": NOTES})

        # And now it is there.
        blocker.commit()
        cli("upgrade", code=1)
        assert "[42P07]" in cli.err
        assert value(connection, INSTALLED) == SECOND
        connection.execute("drop table rekey.notes")
        assert cli("upgrade").splitlines()[1:] == [
            f"  {SECOND} to {THIRD}",
            f"pg_rekey {THIRD} (plain) is upgraded",
        ]
    finish(installed, kek, number, secrets)


def test_everybody_goes_on_meanwhile(cli: Cli, installed: str, kek: bytes) -> None:
    """No error reaches a worker, a writer or a reader, nor a rotation."""
    written: list[str] = []

    def session(call: Callable[[Connection], None]) -> Callable[[threading.Event], None]:
        def until(stop: threading.Event) -> None:
            with connect(installed) as own:
                unlock(own, kek)
                while not stop.is_set():
                    call(own)

        return until

    def work(own: Connection) -> None:
        own.execute("select rekey.rotate_keys()")
        run(own, "1 s")

    def write(own: Connection) -> None:
        own.execute("select rekey.set_secret('written', %s)", [text := str(len(written))])
        written.append(text)

    def read(own: Connection) -> None:
        assert value(own, "select rekey.get_secret('s1')") == "s1"

    with connect(installed) as connection:
        number, secrets = begin(connection, kek)
        secrets |= fill(connection, 10000, prefix="more ")
        with in_background(*map(session, (work, work, write, read))):
            eventually(lambda: len(written) > 2)
            cli("upgrade")
            before = len(written)
            eventually(lambda: len(written) > before + 2)
    with connect(installed) as connection:
        unlock(connection, kek)
        run(connection)
        assert rotation(connection, number, "state") == "completed"
        assert "rotation.error" not in events(connection)
        check(connection, secrets | {"written": written[-1]}, columns={"public.notes": NOTES})


def test_two_at_once(installed: str, made_up: Path) -> None:
    """A step that was taken already would fail."""
    with connect(installed) as connection, psycopg.connect(installed) as blocker:
        blocker.execute("lock table rekey.secrets in row exclusive mode")
        with started(made_up) as one, started(made_up) as other:
            eventually(lambda: at_work(connection) == 2)
            blocker.commit()
            assert (one.wait(60), other.wait(60)) == (0, 0)
        assert value(connection, INSTALLED) == THIRD

"""`pg-rekey upgrade`, with made-up releases: a database that is in use goes from one to the next."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner

from cli_fixtures import Cli, eventually
from driving import check, fill, read, rotate, rotation, run, step
from helpers import connect, initialize, install, unlock, value
from pg_rekey import local, release
from pg_rekey.cli import upgrade
from pg_rekey.errors import FINDINGS, USAGE
from test_roads import catalog

pytest_plugins = ["cli_fixtures"]

FIRST = release.version()
SECOND, THIRD = "98.0.0", "99.0.0"
COLUMN = "owner text"
TABLE = """
create table rekey.made_up (id bigint generated always as identity constraint made_up_pkey primary key);
comment on table rekey.made_up is 'A table that a later release has.';"""
ONE = """
create or replace function rekey.made_up(a text) returns text language sql immutable return a;
comment on function rekey.made_up is 'A function.';
"""
TWO = """
create or replace function rekey.made_up(a text, b text) returns text language sql immutable return a || b;
comment on function rekey.made_up is 'A function.';
"""


@dataclass
class Releases:
    """A copy of the sources in which releases can be made."""

    sql: Path
    changelog: Path

    def release(self, version: str, update: str, *, schema: str = "", code: str = "") -> None:
        """Make the next release: what changes in an installation, and what the sources say then."""
        control = self.sql / "pg_rekey.control"
        since = release.version()
        release.freeze()
        control.write_text(control.read_text().replace(f"'{since}'", f"'{version}'"))
        (self.sql / "updates").mkdir(exist_ok=True)
        (self.sql / "updates" / f"{since}--{version}.sql").write_text(update)
        secrets = self.sql / "schema" / "40_secrets.sql"
        if "column" in update:
            column = "  updated_at timestamptz not null default now()"
            secrets.write_text(secrets.read_text().replace(column, f"{column},\n  {COLUMN}"))
        secrets.write_text(secrets.read_text() + schema)
        (self.sql / "code" / "85_made_up.sql").write_text(code)
        heading = f"## Unreleased\n\n## {since} - 2026-01-01\n"
        self.changelog.write_text(self.changelog.read_text().replace("## Unreleased\n", heading, 1))
        release.write()


@pytest.fixture
def releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Releases:
    """Sources of two releases more than there are, the second of which is being worked on."""
    root = tmp_path / "checkout"
    shutil.copytree(release.SOURCES, root / "sql")
    shutil.copy(release.ROOT / "CHANGELOG.md", root)
    monkeypatch.setattr(release, "ROOT", root)
    monkeypatch.setattr(release, "SOURCES", root / "sql")
    monkeypatch.setattr(release, "DIST", root / "sql" / "dist")
    monkeypatch.setattr(release, "MIGRATIONS", root / "supabase" / "migrations")
    release.write()
    made = Releases(root / "sql", root / "CHANGELOG.md")
    made.release(SECOND, f"alter table rekey.secrets add column {COLUMN};\n", code=ONE)
    made.release(THIRD, f"drop function rekey.made_up(text);\n{TABLE}\n", schema=TABLE, code=TWO)
    assert release.problems() == []
    return made


@pytest.fixture
def placed(extension_files: None, releases: Releases) -> Iterator[None]:
    """The server has the scripts of all releases; which one is the default there stays as it is."""
    files = [path for path in sorted(release.DIST.glob("*.sql")) if path.name != f"pg_rekey--{FIRST}.sql"]
    if command := os.environ.get("PG_REKEY_TEST_PUT_EXTENSION"):
        subprocess.run([*shlex.split(command), *files], check=True, capture_output=True)
        yield
        return
    folder = local.ensure().extensions
    for path in files:
        shutil.copyfile(path, folder / path.name)
    yield
    for path in files:
        (folder / path.name).unlink()


def installed(dsn: str, road: str, version: str, kek: bytes) -> dict[str, str]:
    """Install a release and store secrets, some of them swept by a rotation that is under way."""
    if road == "extension":
        install(dsn, f"create extension pg_rekey version '{version}'")
    else:
        script = (release.DIST / f"pg_rekey--{version}.sql").read_text()
        install(dsn, script.removeprefix(release.EXTENSION_GUARD))
    with connect(dsn) as connection:
        initialize(connection, kek)
        secrets = fill(connection, 300)
        connection.execute("select rekey.set_setting('max_rows_per_second', '500')")
        number = rotate(connection)
        while rotation(connection, number, "rows_done") == 0:
            step(connection)
        connection.execute("select rekey.set_setting('max_rows_per_second', null)")
        assert rotation(connection, number, "state") == "running"
    return secrets


def test_in_the_middle_of_a_rotation(
    cli: Cli, empty: str, releases: Releases, kek: bytes, make_database: Callable[..., str]
) -> None:
    """Two steps, one after the other; the rotation goes on, and everything is as if newly installed."""
    secrets = installed(empty, "plain", FIRST, kek)
    cli("doctor", code=FINDINGS)
    assert f"has pg_rekey {FIRST}, and this is pg-rekey {THIRD}" in cli.out
    shown = cli.json("upgrade", "--dry-run")
    steps = [{"from": FIRST, "to": SECOND}, {"from": SECOND, "to": THIRD}]
    assert (shown["version"], shown["steps"]) == (FIRST, steps)
    done = cli("upgrade")
    assert done.splitlines()[1:] == [
        f"  {FIRST} to {SECOND}",
        f"  {SECOND} to {THIRD}",
        f"pg_rekey {THIRD} (plain) is upgraded",
    ]
    assert "is up to date" in cli("upgrade")
    cli("doctor", code=FINDINGS)
    assert "this is pg-rekey" not in cli.out
    fresh = make_database()
    install(fresh, release.assemble("plain"))
    with connect(empty) as connection, connect(fresh) as other:
        assert catalog(connection) == catalog(other)
        unlock(connection, kek)
        assert value(connection, "select rekey.made_up('a', 'b')") == "ab"
        run(connection)
        assert value(connection, "select state from rekey.rotation_status") == "completed"
        check(connection, secrets)


@pytest.mark.usefixtures("placed")
def test_an_extension(cli: Cli, empty: str, kek: bytes, plain_catalog: set[str]) -> None:
    secrets = installed(empty, "extension", FIRST, kek)
    assert cli("upgrade").splitlines()[-1] == f"pg_rekey {THIRD} (extension) is upgraded"
    with connect(empty) as connection:
        assert value(connection, "select extversion from pg_extension where extname = 'pg_rekey'") == THIRD
        assert catalog(connection) == plain_catalog
        unnamed = """
            select c.relname from pg_class c, pg_extension e
            where c.relnamespace = 'rekey'::regnamespace and c.relkind in ('r', 'S')
              and e.extname = 'pg_rekey' and c.oid <> all (e.extconfig)"""
        assert connection.execute(unnamed).fetchall() == []
        unlock(connection, kek)
        run(connection)
        check(connection, secrets)


@pytest.fixture
def plain_catalog(releases: Releases, make_database: Callable[..., str]) -> set[str]:
    """The catalog of a new installation of the last release."""
    dsn = make_database()
    install(dsn, release.assemble("plain"))
    with connect(dsn) as connection:
        return catalog(connection)


@pytest.mark.usefixtures("extension_files")
def test_an_extension_whose_files_are_missing(cli: Cli, empty: str, releases: Releases) -> None:
    install(empty, f"create extension pg_rekey version '{FIRST}'")
    cli("upgrade", code=1)
    assert f"no files that take the extension from {FIRST} to {SECOND}" in cli.err
    assert "make install" in cli.err


def test_a_supabase_project_gets_migrations(cli: Cli, empty: str, releases: Releases, tmp_path: Path) -> None:
    migrations = tmp_path / "project" / "supabase" / "migrations"
    migrations.mkdir(parents=True)
    own = sorted(release.MIGRATIONS.glob("*.sql"))
    assert [release.script_version(path.read_text()) for path in own] == [FIRST, SECOND, THIRD]
    shutil.copy(own[0], migrations)
    written = cli.json("sql", "--road", "supabase", "--project", tmp_path / "project")["paths"]
    assert [Path(path).read_text() for path in written] == [path.read_text() for path in own[1:]]
    cli("sql", "--road", "supabase", "--project", tmp_path / "project", code=1)
    assert "has it already" in cli.err
    install(empty, own[0].read_text())
    with connect(empty) as connection:
        connection.execute("create schema supabase_migrations")
        connection.execute("create table supabase_migrations.schema_migrations (version text, name text)")
        connection.execute("insert into supabase_migrations.schema_migrations values ('1', 'pg_rekey')")
    cli("upgrade", code=1)
    assert "supabase db push" in cli.err
    for path in own[1:]:
        install(empty, path.read_text())
    assert f"{THIRD} (supabase) is up to date" in cli("upgrade")
    own[1].write_text("-- mine")
    shutil.copy(own[1], migrations / "20990101000000_pg_rekey.sql")
    cli("sql", "--road", "supabase", "--project", tmp_path / "project", code=1)
    assert "leads to version unknown" in cli.err


def test_with_one_release_there_is_nothing_to_do(cli: Cli, cli_ready: Cli) -> None:
    assert cli("upgrade").splitlines()[-1] == f"pg_rekey {FIRST} (plain) is up to date"


def test_what_is_refused(cli: Cli, empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("upgrade", code=1)
    assert "not installed" in cli.err
    script = release.assemble("plain")
    install(empty, script.replace(f"'{FIRST}'", f"'{THIRD}'"))
    cli("upgrade", code=1)
    assert f"has pg_rekey {THIRD}, which this pg-rekey {FIRST} does not know" in cli.err
    cli("upgrade", "now", code=USAGE)


def test_a_step_that_fails_leaves_the_one_before(
    cli: Cli, empty: str, releases: Releases, kek: bytes
) -> None:
    secrets = installed(empty, "plain", FIRST, kek)
    with connect(empty) as connection:
        connection.execute("create view public.mine as select rekey.version() as version")
    path = release.DIST / f"pg_rekey--{SECOND}--{THIRD}.sql"
    good = path.read_text()
    path.write_text(
        good.replace(
            "drop function rekey.made_up", "drop function rekey.version(); drop function rekey.made_up"
        )
    )
    cli("upgrade", code=1)
    with connect(empty) as connection:
        assert value(connection, "select rekey.version()") == SECOND
        unlock(connection, kek)
        assert read(connection) == secrets
    path.write_text(good)
    assert f"{THIRD} (plain) is upgraded" in cli("upgrade")


def test_locks_are_waited_for_but_not_long(
    cli: Cli, empty: str, releases: Releases, kek: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody holds the table, or upgrades himself: nothing is changed, and the next attempt does it."""
    installed(empty, "plain", FIRST, kek)
    monkeypatch.setattr(upgrade, "LOCK_TIMEOUT", "50ms")
    monkeypatch.setattr(upgrade, "ATTEMPTS", 2)
    for hold in ("lock table rekey.secrets in access share mode", "select pg_advisory_xact_lock(0, 4)"):
        with psycopg.connect(empty) as other:
            other.execute(hold.encode())
            cli("upgrade", code=1)
            assert "[55P03]" in cli.err
            assert value(other, "select rekey.version()") == FIRST
    assert "is upgraded" in cli("upgrade")


def test_two_at_once(empty: str, releases: Releases, kek: bytes) -> None:
    """Each step is applied once, whoever does it; one is killed in the middle of it."""
    secrets = installed(empty, "plain", FIRST, kek)
    code = (
        "import sys; from pathlib import Path; from pg_rekey import release; root = Path(sys.argv[1]);"
        "release.ROOT, release.SOURCES, release.DIST = root, root / 'sql', root / 'sql' / 'dist';"
        "from pg_rekey.cli import main; main(['upgrade'])"
    )
    command = [sys.executable, "-c", code, str(release.ROOT)]
    with psycopg.connect(empty) as holder, connect(empty) as watcher:
        holder.execute("lock table rekey.secrets in access share mode")
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as killed:
            waiting = (
                "select count(*) > 0 from pg_locks where relation = 'rekey.secrets'::regclass and not granted"
            )
            eventually(lambda: value(watcher, waiting))
            killed.send_signal(signal.SIGKILL)
        others = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) for _ in "ab"]
        eventually(lambda: value(watcher, waiting))
        holder.rollback()
        for one in others:
            _, err = one.communicate(timeout=60)
            assert (one.returncode, err) == (0, b"")
        assert value(watcher, "select rekey.version()") == THIRD
        unlock(watcher, kek)
        run(watcher)
        check(watcher, secrets)


def test_what_was_released_is_frozen(releases: Releases) -> None:
    def problems() -> list[str]:
        result = CliRunner().invoke(release.main, ["--check"])
        assert result.exit_code == (1 if result.output else 0)
        return result.output.splitlines()

    assert problems() == []
    first = release.DIST / f"pg_rekey--{FIRST}.sql"
    good = first.read_text()
    first.write_text(good + "-- better\n")
    assert problems() == [f"sql/dist/{first.name} was released and may not change: restore it"]
    release.write()
    assert first.read_text() != good, "it is not for `make sql` to decide"
    first.unlink()
    assert problems() == [f"sql/dist/{first.name} was released and may not change: restore it"]
    first.write_text(good)
    (releases.sql / "updates" / f"{FIRST}--{THIRD}.sql").touch()
    assert problems() == [f"sql/updates/{FIRST}--{THIRD}.sql belongs to no step from one release to the next"]
    (releases.sql / "updates" / f"{FIRST}--{THIRD}.sql").unlink()
    releases.changelog.write_text(f"## {THIRD} - today\n")
    assert "not frozen" in problems()[0]
    assert CliRunner().invoke(release.main, ["--freeze"]).exit_code == 0
    assert release.released() == [FIRST, SECOND, THIRD]
    assert CliRunner().invoke(release.main, ["--freeze"]).exit_code == 0, "a second time does nothing"
    assert problems() == []
    (releases.sql / "code" / "85_made_up.sql").write_text(ONE)
    assert problems() == [
        f"{THIRD} was released: raise default_version in sql/pg_rekey.control to change its SQL"
    ]
    release.write()
    assert problems() != [], "what was released stays"

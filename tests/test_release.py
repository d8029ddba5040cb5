"""The assembler: what it makes of the sources, and that what is committed is fresh."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import generate
from helpers import Connection, connect, value
from pg_rekey import local, release
from releases import begin, copy, edit, finish, invoke, use


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources that a test may change, with nothing released."""
    copy(tmp_path, "1.0.0")
    use(tmp_path, monkeypatch)
    invoke()
    return tmp_path


@pytest.fixture
def released(checkout: Path) -> Path:
    """That copy, with a release 1.0.0."""
    finish(checkout, "1.0.0")
    return checkout


def test_committed_files_are_fresh() -> None:
    assert release.problems() == []


def test_extension_script_refuses_psql() -> None:
    script = release.assemble("extension")
    assert script.startswith("\\echo Use")
    assert (
        script.removeprefix(release.EXTENSION_GUARD)
        == release.assemble("plain")
        == release.assemble("supabase")
    )


def test_version_is_written_once(conn: Connection) -> None:
    assert "__VERSION__" not in release.assemble("extension")
    assert value(conn, "select rekey.version()") == release.version()


def test_control_without_version(checkout: Path) -> None:
    (checkout / "sql" / "pg_rekey.control").write_text("comment = 'x'\n")
    with pytest.raises(ValueError, match="default_version"):
        release.version()


def test_code_can_be_loaded_again(conn: Connection) -> None:
    snapshot = (
        "select md5(string_agg(pg_get_functiondef(oid), '' order by oid)) from pg_proc where prokind <> 'a'"
    )
    before = value(conn, snapshot + " and pronamespace = 'rekey'::regnamespace")
    with conn.transaction():
        conn.execute(release.assemble_code().encode())
    conn.execute("reset search_path")
    assert value(conn, snapshot + " and pronamespace = 'rekey'::regnamespace") == before


def test_check_names_stale_files_and_write_mends_them(checkout: Path) -> None:
    dist = checkout / "sql" / "dist"
    invoke("--check")
    (dist / "pg_rekey--1.0.0.sql").write_text("select 1;\n")
    (dist / "pg_rekey--0.0.1.sql").touch()
    assert invoke("--check", code=1) == [
        "sql/dist/pg_rekey--1.0.0.sql is stale: run `make sql`",
        "sql/dist/pg_rekey--0.0.1.sql is stale: run `make sql`",
    ]
    invoke()
    invoke("--check")
    assert sorted(path.name for path in dist.iterdir()) == ["pg_rekey--1.0.0.sql"]


def test_a_release_is_frozen(released: Path) -> None:
    """As sha256sum reads it, too; it is not for `make sql` to decide."""
    if sha256sum := shutil.which("sha256sum"):
        command = [sha256sum, "--check", "--strict", "sql/dist/released.sha256"]
        subprocess.run(command, cwd=released, check=True, capture_output=True)
    for name in ("sql/dist/pg_rekey--1.0.0.sql", "supabase/migrations/20260101000000_pg_rekey.sql"):
        text = (released / name).read_text()
        complaint = f"{name} was released and may not change: restore it"
        (released / name).write_text(text + "-- a word more\n")
        assert invoke("--check", code=1) == [complaint]
        invoke()
        assert (released / name).read_text() != text
        (released / name).unlink()
        invoke()
        assert invoke("--check", code=1) == [complaint]
        assert invoke("--freeze", code=1) == [complaint]
        (released / name).write_text(text)
    invoke("--freeze")
    invoke("--check")
    assert release.released() == ["1.0.0"]


def test_sources_of_a_release_take_a_new_version(released: Path) -> None:
    edit(released / "sql" / "code" / "80_metrics.sql", "Version of pg_rekey in", "The version of pg_rekey in")
    before = (released / "sql" / "dist" / "pg_rekey--1.0.0.sql").read_text()
    complaint = "1.0.0 was released: raise default_version in sql/pg_rekey.control to change its SQL"
    assert invoke("--check", code=1) == [complaint]
    invoke()
    assert invoke("--check", code=1) == [complaint]
    assert (released / "sql" / "dist" / "pg_rekey--1.0.0.sql").read_text() == before


def test_each_release_leads_to_the_next(released: Path) -> None:
    begin(released, "1.0.10")
    invoke()
    invoke("--check")
    assert sorted(path.name for path in release.DIST.iterdir()) == [
        "pg_rekey--1.0.0--1.0.10.sql",
        "pg_rekey--1.0.0.sql",
        "pg_rekey--1.0.10.sql",
        "released.sha256",
    ]
    finish(released, "1.0.10")
    begin(released, "1.1.0", "select;")
    invoke()
    invoke("--check")
    assert release.steps("1.0.0") == [("1.0.0", "1.0.10"), ("1.0.10", "1.1.0")]
    migrations = [path.read_text() for path in sorted(release.MIGRATIONS.iterdir())]
    assert [release.script_version(text) for text in migrations] == ["1.0.0", "1.0.10", "1.1.0"]
    stray = released / "sql" / "updates" / "1.0.0--1.1.0.sql"
    stray.touch()
    assert invoke("--check", code=1) == [
        "sql/updates/1.0.0--1.1.0.sql belongs to no step from one release to the next"
    ]


def test_the_changelog_releases_only_what_is_frozen(released: Path) -> None:
    edit(released / "CHANGELOG.md", "## [1.0.0]", "## [1.0.1] - 2026-12-02\n\n## [1.0.0]")
    assert invoke("--check", code=1) == [
        "CHANGELOG.md has 1.0.1, which is not frozen: run `make sql ARGS=--freeze`"
    ]


def test_installed_package_reads_assembled_scripts(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(released, "1.1.0", "select;")
    invoke()
    step = ("1.0.0", "1.1.0")
    roads: tuple[release.Road, ...] = ("extension", "plain", "supabase")
    expected = {road: (release.assemble(road), release.assemble_step(road, step)) for road in roads}
    packaged = released / "packaged"
    shutil.copytree(released / "sql" / "dist", packaged)
    shutil.copy(released / "sql" / "pg_rekey.control", packaged)
    shutil.rmtree(released / "sql")
    monkeypatch.setattr(release, "PACKAGED", packaged)
    assert release.steps("1.0.0") == [step]
    assert {road: (release.sql_script(road), release.step_script(road, step)) for road in roads} == expected


def test_reference_is_fresh(conn: Connection) -> None:
    conn.execute("set search_path = pg_catalog")
    assert generate.reference(conn) == generate.REFERENCE.read_text()


def test_schema_is_fresh(db: str) -> None:
    with connect(db) as connection:
        major = connection.info.server_version // 10000
    if major != generate.SCHEMA_MAJOR:
        pytest.skip(f"docs/schema.sql is made on PostgreSQL {generate.SCHEMA_MAJOR}")
    assert generate.schema(local.ensure().bindir, db) == generate.SCHEMA.read_text()


def test_every_table_is_dumped_with_the_extension(
    extension_files: None, make_database: Callable[..., str]
) -> None:
    unnamed = """
        select c.relname from pg_class c, pg_extension e
        where c.relnamespace = 'rekey'::regnamespace and c.relkind in ('r', 'p', 'S')
          and e.extname = 'pg_rekey' and c.oid <> all (e.extconfig)"""
    with connect(make_database()) as extended:
        extended.execute("create extension pg_rekey cascade")
        assert extended.execute(unnamed).fetchall() == []


def test_every_update_and_delete_has_a_condition() -> None:
    """Supabase loads pg_safeupdate for its API roles, which refuses those without, in functions too."""
    code = re.sub(r"--.*", "", release.assemble("plain"))
    statements = re.findall(r"\b(?:update|delete from) (?:rekey|%I)\.[^;]*", code)
    assert len(statements) > 40
    assert [text for text in statements if not re.search(r"\bwhere\b", text)] == []

"""The assembler: what it makes of the sources, and that what is committed is fresh."""

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import generate
from helpers import Connection, connect, value
from pg_rekey import local, release


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources that a test may change."""
    shutil.copytree(release.SOURCES, tmp_path / "sql")
    monkeypatch.setattr(release, "ROOT", tmp_path)
    monkeypatch.setattr(release, "SOURCES", tmp_path / "sql")
    monkeypatch.setattr(release, "DIST", tmp_path / "sql" / "dist")
    monkeypatch.setattr(release, "MIGRATION", tmp_path / "supabase" / "migration.sql")
    release.write()
    return tmp_path


def test_committed_files_are_fresh() -> None:
    assert release.stale() == []


def test_extension_script_refuses_psql() -> None:
    script = release.assemble("extension")
    assert script.startswith("\\echo Use")
    assert "pg_extension_config_dump" in script
    assert "pg_extension_config_dump" not in release.assemble("plain")


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
    assert CliRunner().invoke(release.main, ["--check"]).exit_code == 0
    (dist / "pg_rekey-plain.sql").write_text("select 1;\n")
    (dist / "pg_rekey--0.0.1.sql").touch()
    result = CliRunner().invoke(release.main, ["--check"])
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        "sql/dist/pg_rekey-plain.sql is stale: run `make sql`",
        "sql/dist/pg_rekey--0.0.1.sql is stale: run `make sql`",
    ]
    assert CliRunner().invoke(release.main, []).exit_code == 0
    assert release.stale() == []


def test_installed_package_reads_assembled_scripts(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roads: tuple[release.Road, ...] = ("extension", "plain", "supabase")
    expected = {road: release.assemble(road) for road in roads}
    packaged = checkout / "packaged"
    shutil.copytree(checkout / "sql" / "dist", packaged)
    shutil.copy(checkout / "sql" / "pg_rekey.control", packaged)
    shutil.rmtree(checkout / "sql")
    monkeypatch.setattr(release, "PACKAGED", packaged)
    assert {road: release.sql_script(road) for road in roads} == expected


def test_wheel_holds_the_sql(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path)]
    subprocess.run([*build, str(release.ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        script = archive.read("pg_rekey/sql/pg_rekey-plain.sql").decode()
    assert {"pg_rekey/sql/pg_rekey.control", f"pg_rekey/sql/pg_rekey--{release.version()}.sql"} <= names
    assert script == release.assemble("plain")


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

"""The assembler: what it makes of the sources, and that what is committed is fresh."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
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
    shutil.copy(release.ROOT / "CHANGELOG.md", tmp_path)
    monkeypatch.setattr(release, "ROOT", tmp_path)
    monkeypatch.setattr(release, "SOURCES", tmp_path / "sql")
    monkeypatch.setattr(release, "DIST", tmp_path / "sql" / "dist")
    monkeypatch.setattr(release, "MIGRATIONS", tmp_path / "supabase" / "migrations")
    release.write()
    return tmp_path


def test_committed_files_are_fresh() -> None:
    assert release.stale() == []


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
    assert CliRunner().invoke(release.main, ["--check"]).exit_code == 0
    (dist / f"pg_rekey--{release.version()}.sql").write_text("select 1;\n")
    (dist / "pg_rekey--0.0.1.sql").touch()
    result = CliRunner().invoke(release.main, ["--check"])
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        f"sql/dist/pg_rekey--{release.version()}.sql is stale: run `make sql`",
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


SQL = {f"pg_rekey--{release.version()}.sql", "pg_rekey.control"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of this checkout, and the wheel that was made of the sdist."""
    folder = tmp_path_factory.mktemp("built")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, release.ROOT],
        check=True,
        capture_output=True,
    )
    return folder


def test_wheel_holds_the_sql_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        script = archive.read(f"pg_rekey/sql/pg_rekey--{release.version()}.sql").decode()
    assert {name for name in names if name.startswith("pg_rekey/sql/")} == {
        f"pg_rekey/sql/{name}" for name in SQL
    }
    package = {
        str(path.relative_to(release.PACKAGED.parents[1])) for path in release.PACKAGED.parent.rglob("*")
    }
    extra = names - package - {f"pg_rekey/sql/{name}" for name in SQL}
    assert all(re.match(r"pg_rekey-[\d.]+\.dist-info/", name) for name in extra), extra
    assert "pg_rekey/queries.sql" in names
    assert "pg_rekey/py.typed" in names
    assert script == release.assemble("extension")


def test_sdist_holds_what_make_needs(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=release.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if tracked.returncode == 0:
        assert names - {"PKG-INFO"} <= set(tracked.stdout.splitlines())
    needed = {
        "Makefile",
        "sql/Makefile",
        "sql/pg_rekey.control",
        f"sql/dist/pg_rekey--{release.version()}.sql",
        "LICENSE",
    }
    assert needed <= names
    assert {f"sql/{path.relative_to(release.SOURCES)}" for path in release.SOURCES.rglob("*.sql")} <= names


def test_the_index_would_take_both(built: Path) -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *built.iterdir()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout
    assert checked.stdout.count("PASSED") == 2


def test_wheel_works_from_an_empty_directory(
    built: Path, tmp_path: Path, make_database: Callable[..., str], kek: bytes
) -> None:
    """In an environment of its own, with the packages that this one has, but without this checkout."""
    venv.create(tmp_path / "venv")
    (packages,) = tmp_path.glob("venv/lib/python*/site-packages")
    ours = sysconfig.get_path("purelib")
    (packages / "ours.pth").write_text(ours)
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    here = tmp_path / "empty"
    here.mkdir()
    python = str(tmp_path / "venv" / "bin" / "python")

    def run(*arguments: str) -> str:
        command = [python, "-c", "from pg_rekey.cli import main; main()", *arguments]
        environment = {"PG_REKEY_DSN": make_database(), "PG_REKEY_KEK": kek.hex(), "PATH": os.environ["PATH"]}
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=True)
        return str(done.stdout)

    assert run("init").splitlines()[-1] == "ready"
    roads: tuple[release.Road, ...] = ("extension", "plain", "supabase")
    for road in roads:
        assert run("sql", "--road", road) == release.assemble(road)
    assert list(here.iterdir()) == []


def test_make_install_needs_no_python(tmp_path: Path) -> None:
    """With PGXS, and with a pg_config that names none."""
    local_config = local.ensure().bindir / "pg_config"
    without = tmp_path / "pg_config"
    without.write_text(f'#!/bin/sh\ncase $1 in --pgxs) echo /nowhere;; *) exec {local_config} "$1";; esac\n')
    without.chmod(0o755)
    for number, config in enumerate((local_config, without)):
        target = tmp_path / str(number)
        command = ["make", "install", f"PG_CONFIG={config}", f"DESTDIR={target}"]
        done = subprocess.run(
            command,
            cwd=release.ROOT,
            env={"PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "create extension pg_rekey" in done.stdout
        assert {path.name for path in target.rglob("*") if path.is_file()} == SQL
        assert list(target.rglob("*.control")) == [
            target / str(local.ensure().extensions).lstrip("/") / "pg_rekey.control"
        ]


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

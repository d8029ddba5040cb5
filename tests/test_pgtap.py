"""Runs the pgTAP files of supabase/tests with pg_prove, as `supabase test db` does."""

import os
import shutil
import subprocess

import pytest
from psycopg.conninfo import conninfo_to_dict

from helpers import Connection, connect, install, value
from hosted import Hosted
from pg_rekey import release

TESTS = release.ROOT / "supabase" / "tests"
FILES = sorted(TESTS.glob("*.sql"))


def test_contract(conn: Connection) -> None:
    """Without Supabase, without pg_prove: what psycopg gets must be TAP without a `not ok`."""
    if not value(conn, "select count(*) from pg_available_extensions where name = 'pgtap'"):
        pytest.skip("the server does not have pgTAP")
    cursor = conn.execute((TESTS / "contract.sql").read_bytes())
    lines = [str(row[0]) for result in cursor.results() if result.description for row in result]
    assert [line for line in lines[1:] if not line.startswith("ok ")] == []
    assert len(lines) - 1 == int(lines[0].removeprefix("1.."))


def test_pg_prove(hosted: Hosted) -> None:
    pg_prove = shutil.which("pg_prove")
    if pg_prove is None or not hosted.server.installation.has("pgtap"):
        pytest.skip("pg_prove or pgTAP is not installed")
    dsn = hosted.make_database()
    install(dsn, release.assemble("supabase"))
    with connect(hosted.admin(dsn)) as admin:
        admin.execute("create extension pgtap schema extensions")  # supautils lets postgres do it
    where = conninfo_to_dict(dsn)
    environment = os.environ | {
        "PATH": f"{hosted.server.bindir}{os.pathsep}{os.environ['PATH']}",
        "PGHOST": str(where["host"]),
        "PGPORT": str(where["port"]),
        "PGUSER": "postgres",
        "PGDATABASE": str(where["dbname"]),
    }
    done = subprocess.run(
        [pg_prove, "--ext", ".sql", "--recurse", "."],
        cwd=TESTS,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Files={len(FILES)}, " in done.stdout
    assert "Result: PASS" in done.stdout

"""Dumps from the middle of a rotation and an adoption, restored on another server: both go on there."""

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest

from column_fixtures import protect
from driving import FLIP, in_background, on_versions, rotate, rotation, run, step
from estate import Estate
from helpers import connect, create_database, value
from pg_rekey import local, release


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[local.Server, local.Server]]:
    """A server, and one where its dumps are restored."""
    with local.Server() as first, local.Server() as second:
        yield first, second


@pytest.mark.usefixtures("extension_files")
@pytest.mark.parametrize("road", ["extension", "plain", "supabase"])
def test_a_dump_from_the_middle_goes_on_elsewhere(
    servers: tuple[local.Server, local.Server], kek: bytes, tmp_path: Path, road: release.Road
) -> None:
    """A worker sweeps meanwhile: a rotation and an adoption are half-way, and a row is in quarantine."""
    server, second = servers
    name = f"dumped_{road}"
    estate = Estate.build(server, name, kek, road=road)
    with estate.connect() as connection:
        connection.execute("select rekey.create_keyring('plain')")
        connection.execute("create table olds (id int primary key, v text)")
        connection.execute("insert into olds select g, 'old ' || g from generate_series(1, 1000) g")
        protect(connection, "public.olds", keyring="plain")
        number = rotate(connection)
        connection.execute(FLIP)
        adoption = int(value(connection, "select id from rekey.adopt_column('olds', 'v')"))
        connection.execute("select rekey.set_setting('max_rows_per_second', '500')")
        while 0 in (rotation(connection, number, "rows_failed"), rotation(connection, adoption, "rows_done")):
            step(connection)

        def work(stop: threading.Event) -> None:
            with estate.connect() as worker:
                while not stop.wait(0.01):
                    step(worker)

        with in_background(work):
            tool(server, "pg_dump", "-d", server.dsn(name), "-Fc", "-f", str(tmp_path / "dump"))
        roles = tool(server, "pg_dumpall", "-d", server.dsn(), "--roles-only")

    with connect(second.dsn()) as connection:
        for line in roles.splitlines():
            if line.startswith(("CREATE ROLE", "ALTER ROLE", "GRANT")):
                with contextlib.suppress(psycopg.errors.DuplicateObject):
                    connection.execute(line.encode())
    tool(
        second,
        "pg_restore",
        "-d",
        create_database(second.dsn(), name),
        "--exit-on-error",
        str(tmp_path / "dump"),
    )
    copy = replace(estate, server=second)
    with copy.connect() as connection:
        for which, failed in ((number, 1), (adoption, 0)):
            assert rotation(connection, which, "state", "rows_failed") == ("running", failed)
            failures: LiteralString = "select count(*) from rekey.rotation_failures where rotation_id = %s"
            assert value(connection, failures, which) == failed
        connection.execute("select rekey.set_setting('max_rows_per_second', null)")
        run(connection)
        assert rotation(connection, number, "state", "rows_failed") == ("completed_with_failures", 1)
        assert rotation(connection, adoption, "state", "rows_failed") == ("completed", 0)
        connection.execute(FLIP)
        connection.execute("select rekey.retry_rotation(%s)", [number])
        run(connection)
        assert rotation(connection, number, "state", "rows_failed") == ("completed", 0)
        copy.columns["public.olds"] = {str(n): f"old {n}" for n in range(1, 1001)}
        copy.check(connection)
        assert set(on_versions(connection)) == {2}


def tool(server: local.Server, program: str, *arguments: str) -> str:
    """Run a program of PostgreSQL, and return what it prints."""
    done = subprocess.run(
        [server.bindir / program, *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

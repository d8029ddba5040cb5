"""The package manager replaces the server's files while it runs; the server is restarted later."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

import servers
from cli_fixtures import COMMAND, Cli, eventually
from column_fixtures import protect
from driving import events, rotate, rotation, run, step
from estate import Estate
from helpers import Connection
from pg_rekey import local

pytest_plugins = ["cli_fixtures", "column_fixtures"]

OLD = "15.19"  # the libraries of 15.20 want what it does not have


@pytest.fixture
def installations() -> Iterator[tuple[local.Installation, local.Installation]]:
    """The release that runs, in a folder of its own, and the one that takes its place."""
    new = local.ensure()
    with ExitStack() as stack:
        try:
            old = stack.enter_context(servers.unpacked(OLD))
        except servers.Unavailable as error:
            pytest.skip(str(error))
        told = subprocess.run(
            [new.bindir / "postgres", "--version"], capture_output=True, text=True, check=True
        )
        major, minor = told.stdout.split()[2].split(".")[:2]
        if int(major) != old.major or int(minor) < 20:
            pytest.skip(f"needs PostgreSQL 15.20 or later, to take the place of {OLD}")
        yield old, new


def replace(old: local.Installation, new: local.Installation) -> None:
    """Put libraries of the new release where the running one finds them, as dpkg does, by renaming."""
    folder = Path(
        subprocess.run(
            [new.bindir / "pg_config", "--pkglibdir"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    for path in (old.bindir.parent / "lib").glob("*.so"):
        if (folder / path.name).exists():
            fresh = path.with_suffix(".dpkg-new")
            shutil.copy(folder / path.name, fresh)
            os.replace(fresh, path)


@pytest.mark.pypi
def test_a_worker_and_a_rotation_live_through_it(
    installations: tuple[local.Installation, local.Installation],
    kek: bytes,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    old, new = installations
    monkeypatch.setattr(local, "ensure", lambda: old)
    with local.Server(settings={"shared_preload_libraries": ""}, durable=True) as server:
        estate = Estate.build(server, "upgraded", kek, rows=400)
        environment = {"PG_REKEY_DSN": server.dsn("upgraded"), "PG_REKEY_KEK": kek.hex()}
        for name, text in environment.items():
            monkeypatch.setenv(name, text)
        with ExitStack() as stack:

            def work(name: str) -> Path:
                log = stack.enter_context((tmp_path / name).open("w"))
                process = subprocess.Popen([COMMAND, "work", "--forever"], stdout=log, stderr=log)
                stack.callback(process.wait)
                stack.callback(process.terminate)
                return tmp_path / name

            with estate.connect() as connection:
                connection.execute("select rekey.set_setting('max_attempts', '2')")
                connection.execute("select rekey.set_setting('max_rows_per_second', '100')")
                number = rotate(connection)
                first = work("first")
                eventually(lambda: rotation(connection, number, "rows_done") > 0)
                replace(old, new)
                done = rotation(connection, number, "rows_done")
                second = work("second")
                cli("secrets", "get", "s1", code=1)
                assert "[58P01]" in cli.err
                assert "restart it" in cli.err
                assert len(cli.err.strip().splitlines()) == 2
                # Whoever was connected goes on; who comes tries again.
                eventually(lambda: rotation(connection, number, "rows_done") > done)
                eventually(lambda: "could not load library" in second.read_text())
            server._pg_ctl("stop", "-m", "fast")
            server.bindir = new.bindir
            server._pg_ctl("start")
            with estate.connect() as connection:
                assert connection.info.server_version >= 150020
                connection.execute("select rekey.set_setting('max_rows_per_second', null)")
                eventually(lambda: rotation(connection, number, "state") == "completed")
                assert rotation(connection, number, "rows_failed") == 0
                assert "rotation.failed" not in events(connection)
                estate.check(connection)
            for log in (first, second):
                assert '"connected"' in log.read_text()


# What a session meets whose table calls a function in a library that it had not loaded yet.
GONE = """
create function app.gone() returns trigger language plpgsql as $$
begin
  raise exception 'could not load library "hstore.so": undefined symbol: x' using errcode = '58P01';
end $$
"""


@pytest.mark.parametrize("attempts", [1, 3])
def test_no_rotation_fails_where_a_library_cannot_be_loaded(
    ready: Connection, app: Connection, attempts: int
) -> None:
    """It is waited for, as a lock is; others go on."""
    ready.execute("select rekey.set_setting('max_attempts', %s)", [str(attempts)])
    ready.execute("select rekey.set_secret('other', 'value')")
    app.execute("create table t (id int primary key, v text)")
    protect(app, "t", encrypt_on_write=True)
    app.execute("insert into t select g, 'v' || g from generate_series(1, 20) g")
    app.execute(GONE)
    app.execute("create trigger gone before update on t for each row execute function gone()")
    number = rotate(ready)
    for _ in range(12):
        # Its time has come, each time.
        ready.execute("update rekey._chunks set next_attempt_at = now()")
        ready.execute("update rekey.rotations set next_attempt_at = null")
        step(ready)
    state, last_error, tried = rotation(ready, number, "state", "last_error", "attempts")
    assert (state, tried) == ("running", 1)
    assert "could not load library" in last_error
    app.execute("drop trigger gone on t")
    ready.execute("update rekey._chunks set next_attempt_at = now()")
    ready.execute("update rekey.rotations set next_attempt_at = null")
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed", 21)
    assert "rotation.failed" not in events(ready)


def test_what_http_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    from pg_rekey.errors import http_status

    assert http_status(psycopg.errors.UndefinedFile()) == 503

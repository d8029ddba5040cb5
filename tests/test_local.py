"""The throwaway server: it works, it can be lost and come back, and nothing of it stays."""

import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import psycopg
import pytest
from click.testing import CliRunner

from helpers import Connection, connect, value
from pg_rekey import local, places, release


@pytest.fixture(scope="module")
def throwaway() -> Iterator[local.Server]:
    with local.Server(durable=True, settings={"work_mem": "5MB", "cluster_name": "it's"}) as server:
        yield server


def test_settings(throwaway: local.Server) -> None:
    with connect(throwaway.dsn()) as connection:
        assert value(connection, "show fsync") == "on"
        assert value(connection, "show work_mem") == "5MB"
        assert value(connection, "show cluster_name") == "it's"
        assert value(connection, "show listen_addresses") == ""
        preloaded = value(connection, "show shared_preload_libraries")
    assert (preloaded == "pg_cron") is throwaway.installation.has("pg_cron")


def test_nobody_else_reaches_the_socket(throwaway: local.Server) -> None:
    assert throwaway.directory.stat().st_mode & 0o077 == 0
    assert len(str(throwaway.directory / ".s.PGSQL.5432")) < 100


def test_restart_keeps_what_was_committed(throwaway: local.Server) -> None:
    with connect(throwaway.dsn()) as connection:
        connection.execute("create table kept as select 1 as one")
    throwaway.restart()
    throwaway.kill()
    throwaway.restart()
    with connect(throwaway.dsn()) as connection:
        assert value(connection, "select one from kept") == 1


def test_failed_start_leaves_nothing_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    local.ensure()  # else there is nothing to start, which is another error
    directory = tempfile.mkdtemp(prefix="pgrk-", dir="/tmp")
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: directory)
    with pytest.raises(click.ClickException, match="no_such_setting"):
        local.Server(settings={"no_such_setting": "x"})
    assert not Path(directory).exists()


@dataclass
class Trap:
    """A file that only root may read and write, and links to it where the server's account may make them."""

    target: Path

    def set(self, server: local.Server, name: str) -> None:
        path = server.directory / name
        server._run("/bin/sh", "-c", 'rm -f "$0" && ln -s "$1" "$0"', path, self.target)


@pytest.fixture
def trap(installation: local.Installation, tmp_path: Path) -> Trap:
    if os.geteuid() != 0:
        pytest.skip("only root has what the account of the server has not")
    target = tmp_path / "target"
    target.write_text("canary\n")
    target.chmod(0o600)
    return Trap(target)


def test_root_writes_through_no_link(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the link comes between initdb and what was root's writing; a race would do it at any time."""
    run = local.Server._run

    def raced(server: local.Server, *command: str | Path, **options: str) -> str:
        said = run(server, *command, **options)
        if command[0] == server.bindir / "initdb":
            monkeypatch.setattr(local.Server, "_run", run)
            trap.set(server, "data/postgresql.conf")
        return said

    monkeypatch.setattr(local.Server, "_run", raced)
    with pytest.raises(click.ClickException):
        local.Server()
    assert trap.target.read_text() == "canary\n"


def test_root_reads_through_no_link(trap: Trap) -> None:
    with local.Server() as server:
        server._pg_ctl("stop")
        server.write("data/postgresql.conf", "no_such_setting = 1\n", append=True)
        trap.set(server, "log")
        with pytest.raises(click.ClickException) as caught:
            server.restart()
    assert "canary" not in caught.value.message


def test_root_kills_nothing_that_a_file_names(trap: Trap) -> None:
    """The number in postmaster.pid is that of a process of root's."""
    with local.Server() as server, subprocess.Popen(["sleep", "600"]) as process:
        kept = server._run("/usr/bin/env", "cat", server.data / "postmaster.pid")
        server.write("data/postmaster.pid", f"{process.pid}\n")
        with pytest.raises(click.ClickException):
            server.kill()
        assert process.poll() is None
        server.write("data/postmaster.pid", kept)
        process.terminate()
        assert process.wait() == -signal.SIGTERM  # it was not stopped either


def test_the_files_of_the_extension_take_the_place_of_links(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("canary\n")
    extensions = tmp_path / "extension"
    extensions.mkdir()
    for path in local.extension_files():
        (extensions / path.name).symlink_to(target)
    local.install_extension(local.Installation(15, tmp_path, extensions))
    assert target.read_text() == "canary\n"
    for path in local.extension_files():
        placed = extensions / path.name
        assert not placed.is_symlink()
        assert placed.read_text() == path.read_text()
        assert placed.stat().st_mode & 0o777 == 0o644
    assert len(list(extensions.iterdir())) == len(local.extension_files())


@pytest.mark.usefixtures("installation")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_stays_when_the_owner_dies(end: signal.Signals) -> None:
    script = (
        "from pg_rekey.local import Server; import time\n"
        "s = Server(); print(s.directory, s.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as owner:
        assert owner.stdout
        directory, pid = owner.stdout.readline().split()
        owner.send_signal(end)
        owner.wait()
    eventually(lambda: not Path(directory).exists())
    assert int(pid) not in {running for running, _ in local._processes()}


def test_what_need_not_be_durable_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "MEMORY", str(tmp_path))
    monkeypatch.setattr(local, "ROOM", 1)
    assert local._parent(durable=False) == str(tmp_path)
    assert local._parent(durable=True) == "/tmp"
    monkeypatch.setattr(local, "ROOM", 2**60)
    assert local._parent(durable=False) == "/tmp"
    monkeypatch.setattr(local, "MEMORY", str(tmp_path / "none"))
    assert local._parent(durable=False) == "/tmp"


@pytest.mark.usefixtures("installation")
def test_run_passes_dsn_and_exit_code() -> None:
    script = "import os, psycopg, sys; psycopg.connect(os.environ['PG_REKEY_DSN']).close(); sys.exit(7)"
    command = [sys.executable, "-m", "pg_rekey.local", "run", "--", sys.executable, "-c", script]
    assert subprocess.run(command, check=False).returncode == 7


@pytest.mark.usefixtures("installation")
def test_dev_reloads_changed_code(tmp_path: Path) -> None:
    target = next(release.SOURCES.glob("code/*.sql"))
    with subprocess.Popen(
        [sys.executable, "-m", "pg_rekey.local", "dev"], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout
        lines = iter(server.stdout.readline, "")
        assert next(lines).startswith("ready: postgresql://")
        os.utime(target)
        name = target.relative_to(release.ROOT)
        assert re.fullmatch(rf"\d\d:\d\d:\d\d loaded in \d+\.\d s: {name}\n", next(lines))
        server.send_signal(signal.SIGINT)
        assert next(lines) == "stopping\n"
    assert server.returncode == 0


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("\nselec 2;\n", ":{}: syntax error at or near"),
        (
            "\ncreate function rekey.f() returns int language sql return nosuch(1);\n",
            ":{}: function nosuch(integer)",
        ),
        (
            "\ncreate function rekey.f() returns int language plpgsql as $$begin\n retur 1; end$$;\n",
            ":{}: syntax",
        ),
        ("\ndrop table rekey.nosuch;\n", ': table "nosuch" does not exist'),
    ],
)
def test_an_error_is_said_with_its_file_and_line(
    broken: str,
    said: str,
    conn: Connection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And nothing of the reload stays."""
    shutil.copytree(release.SOURCES, tmp_path / "sql")
    path = tmp_path / "sql" / "code" / "31_kek.sql"
    text = path.read_text()
    path.write_text(text + broken)
    monkeypatch.setattr(release, "ROOT", tmp_path)
    monkeypatch.setattr(release, "SOURCES", tmp_path / "sql")
    local._reload(conn, [path])
    line = text.count("\n") + 2 + ("retur 1" in broken)
    assert capsys.readouterr().err.startswith("sql/code/31_kek.sql" + said.format(line))
    assert value(conn, "select to_regproc('rekey.f') is null")
    path.write_text(text)
    local._reload(conn, [path])
    assert " loaded in " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        ("v := 1 + ;", 1),
        ("v := 1;\nselect count(* from pg_class;\nv := 2;", 2),
        ("v := 1;\nfor i in 1..3 loop\n  null;", 2),
        ("v := 1;\nfor i in 1..case when true then 1 end loop\n  null;\nend loop;\nif true then\n  null;", 5),
        ("-- if, (\nif v = 1 then\n  v := case when true then (2) end;", 2),
        ("while true loop\n  if v = 1 then\n    null;\n  end if;", 1),
        ("v := 1;\nraise exception 'a %';", 2),
    ],
)
@pytest.mark.parametrize("end", ["end", "end;"])
def test_an_error_in_a_body_is_said_with_its_own_line(
    lines: str, line: int, end: str, conn: Connection
) -> None:
    """PL/pgSQL says at the end of a function what is left open in it, of others nearly where they are."""
    head = (
        "select 1;\n\ncreate function public.f() returns int language plpgsql as $$\ndeclare v int;\nbegin\n"
    )
    text = f"{head}{lines}\nreturn 1;\n{end}\n$$;\nselect 2;\n"
    with pytest.raises(psycopg.Error) as raised:
        conn.execute(text.encode())
    assert places.line(text, raised.value.diag) == head.count("\n") + line


def test_nothing_is_left_open_in_our_own_functions() -> None:
    bodies = [
        found[2]
        for _, text in release.code()
        for found in re.finditer(r"(?s)language plpgsql.*?as (\$\w*\$)(.*?)\1", text)
    ]
    assert len(bodies) > 200
    assert [body for body in bodies if places._left_open(body) is not None] == []


def test_no_postgresql_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "PLACES", ())
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(click.ClickException, match="brew install postgresql"):
        local.ensure()


def test_unusable_installations_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_installation(tmp_path / "14", "14.9")
    fake_installation(tmp_path / "17", "17.2")
    fake_installation(tmp_path / "18", "18beta1")
    fake_installation(tmp_path / "19", "19.0").joinpath("initdb").unlink()
    monkeypatch.setattr(local, "PLACES", (f"{tmp_path}/*/bin",))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    newest = local.find()
    assert newest
    assert newest.major == 18
    (tmp_path / "17" / "extension" / "pg_cron.control").touch()
    with_cron = local.find()
    assert with_cron
    assert with_cron.major == 17


def test_what_is_on_the_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("15.9", "16.1", "17.2"):
        fake_installation(tmp_path / version[:2], version)
    (tmp_path / "17" / "extension" / "pg_cron.control").touch()
    monkeypatch.setattr(local, "PLACES", (f"{tmp_path}/*/bin",))
    link = tmp_path / "postgres"
    link.symlink_to(tmp_path / "15" / "bin" / "postgres")
    monkeypatch.setattr(shutil, "which", {"postgres": link}.get)
    assert [one.major for one in local.installations()] == [15, 16, 17]
    chosen = local.find()
    assert chosen
    assert chosen.major == 15


def test_nothing_is_installed_where_the_tests_run_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/apt-get")
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.delenv("PG_REKEY_TEST_DSN", raising=False)
    assert local._can_apt()
    monkeypatch.setenv("PG_REKEY_TEST_DSN", "host=elsewhere")
    assert not local._can_apt()


def test_apt_installs_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt-get is replaced: what it is asked for is what counts."""
    asked: list[tuple[str, ...]] = []
    marker = tmp_path / "createcluster.d" / "pg_rekey.conf"

    def apt(*packages: str) -> None:
        asked.append(packages)
        if packages == ("postgresql",):
            assert marker.read_text() == "create_main_cluster = false\n"
            fake_installation(tmp_path / "16", "16.1")

    monkeypatch.setattr(local, "DEBIAN_PLACE", tmp_path)
    monkeypatch.setattr(local, "PLACES", (f"{tmp_path}/*/bin",))
    monkeypatch.setattr(local, "NO_CLUSTER", marker)
    monkeypatch.setattr(local, "_apt", apt)
    monkeypatch.setattr(local, "_can_apt", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert local.ensure().major == 16
    assert asked == [
        ("postgresql",),
        tuple(f"postgresql-16-{package}" for package in ("cron", "pgtap", "plpgsql-check", "pgaudit")),
    ]
    local.ensure_test_tools()
    assert asked[2:] == [("libtap-parser-sourcehandler-pgtap-perl", "pgbouncer", "faketime")]
    assert not marker.exists()


def test_failing_apt_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = tmp_path / "apt-get"
    fake.write_text("#!/bin/sh\necho no network\nexit 100\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    local._apt("postgresql")
    assert "apt-get install failed:\nno network" in capsys.readouterr().err


def test_root_needs_an_account_for_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert local._server_account() is None
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    found = pwd.getpwuid(os.getuid())
    monkeypatch.setattr(pwd, "getpwnam", lambda name: {"postgres": found}[name])
    assert local._server_account() is found
    monkeypatch.setattr(pwd, "getpwnam", lambda name: {}[name])
    with pytest.raises(click.ClickException, match="no user `postgres`"):
        local._server_account()


def test_commands_are_described() -> None:
    assert "throwaway" in CliRunner().invoke(local.main, ["--help"]).output


def fake_installation(folder: Path, version: str) -> Path:
    """Make programs that answer as those of a PostgreSQL installation do; return their directory."""
    (folder / "extension").mkdir(parents=True)
    (folder / "bin").mkdir()
    answers = {"postgres": f"postgres (PostgreSQL) {version}", "pg_config": folder, "initdb": "initdb"}
    for name, answer in answers.items():
        program = folder / "bin" / name
        program.write_text(f"#!/bin/sh\necho '{answer}'\n")
        program.chmod(0o755)
    return folder / "bin"


def eventually(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)

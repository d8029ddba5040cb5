"""The demo, with small numbers: what it promises is checked in its own figures."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from cli_fixtures import Cli
from helpers import Connection, connect, install, value
from pg_rekey import demo, local, release
from pg_rekey.demo import Demo, Record, Sizes
from pg_rekey.errors import Problem

pytest_plugins = ["cli_fixtures"]

COMMAND = str(Path(sys.executable).parent / "pg-rekey")
SMALL = ("--secrets", "120", "--tenants", "2", "--readers", "1", "--writers", "1", "--seconds", "0.3")


@pytest.fixture
def superuser(server: str) -> Iterator[str]:
    """DSN of a superuser who owns no database: what he leaves behind keeps him from being dropped."""
    name = f"demonstrator_{os.getpid()}"
    with connect(server) as connection:
        connection.execute(f"create role {name} login superuser".encode())
        yield make_conninfo(server, user=name)
        connection.execute(f"drop role {name}".encode())


def test_on_the_server_of_the_environment(cli: Cli, superuser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_REKEY_DSN", superuser)
    result = cli.json("demo", *SMALL)
    assert (result["wrong"], result["failed"], result["errors"]) == ([], 0, [])
    assert result["secrets"] == 124
    assert result["reads"] > 0
    assert result["writes"] > 0
    assert {row["phase"] for row in result["phases"]} == {"before", "during", "after"}
    assert os.environ["PG_REKEY_DSN"] == superuser


def test_roles_that_others_make_meanwhile_stay(superuser: str) -> None:
    with connect(superuser) as connection:
        with demo._own_database(superuser):
            connection.execute("create role rekey_somebody")
        connection.execute("drop role rekey_somebody")


@pytest.mark.usefixtures("installation")
def test_roles_that_came_with_it_go() -> None:
    roles: LiteralString = "select count(*) from pg_roles where rolname like 'rekey\\_%%'"
    with local.Server() as server, connect(server.dsn()) as connection:
        with demo._own_database(server.dsn()) as dsn:
            install(dsn, release.assemble("plain"))
            assert value(connection, roles) == 7
        assert value(connection, roles) == 0


@pytest.mark.usefixtures("installation")
def test_on_a_server_of_its_own() -> None:
    """The whole of it as a person sees it, pg_cron included where it is installed."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("PG_REKEY", "PG"))}
    done = subprocess.run(
        [COMMAND, "demo", *SMALL], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for text in (
        "$ pg-rekey rotate --all --wait",
        "completed_with_failures",
        "rolled_back",
        "the audit log is whole",
        "writes went on meanwhile, 0 failed.",
        "All 124 secrets compared with what was last stored: 0 differ.",
    ):
        assert text in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing_behind(number: int, superuser: str) -> None:
    environment = os.environ | {"PG_REKEY_DSN": superuser}
    arguments = [COMMAND, "demo", *SMALL, "--seconds", "60"]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, env=environment, stdout=pipe, stderr=pipe, text=True) as running:
        assert running.stdout
        for line in running.stdout:
            if "go on from here" in line:
                break
        time.sleep(0.5)
        running.send_signal(number)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 128 + number
    assert "Traceback" not in err


def test_it_ends_with_the_console(superuser: str) -> None:
    environment = os.environ | {"PG_REKEY_DSN": superuser}
    arguments = [COMMAND, "demo", *SMALL, "--console"]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, env=environment, stdout=pipe, stderr=pipe, text=True) as running:
        assert running.stdout
        lines = iter(running.stdout.readline, "")
        [address] = itertools.islice((line for line in lines if line.startswith("http://")), 1)
        token = next(lines).removeprefix("token: ").strip()
        headers = {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(f"{address.strip()}api/keyrings", headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            names = [one["name"] for one in json.load(answer)["keyrings"]]
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert names == ["default", "tenant-1", "tenant-2"]
    assert running.returncode == 0
    assert "Traceback" not in err
    assert out == "Nothing is left running.\n"
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address, timeout=60)


def test_it_finds_what_is_wrong(
    ready: Connection, db: str, kek: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison at the end would notice a lost secret and a lost update."""
    sizes = Sizes(secrets=3, tenants=1, readers=0, writers=0, seconds=0)
    monkeypatch.setenv("PG_REKEY_DSN", db)
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    for index in (0, 1):
        tenant, _, name = sizes.place(index)
        ready.execute("select rekey.set_secret(%s, %s, %s)", [name, demo.value(name, 0), tenant])
    written = Record("write", written={1: 1})
    wrong = Demo(sizes, lambda *_: 0, lambda _: None)._compare([written])
    assert [one.rpartition("/")[2] for one in wrong][-2:] == ["secret-1", "secret-2"]


def test_the_exit_code_says_that_something_was_wrong(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"wrong": ["a"], "failed": 0, "errors": [], "phases": [], "reads": 0, "writes": 0}
    result |= {"secrets": 1, "seconds": 1.0}

    def run(_: Demo, tell: Callable[[dict[str, Any]], None], *, console: bool) -> dict[str, Any]:
        assert not console
        tell(result)
        return result

    monkeypatch.setattr(Demo, "run", run)
    cli("demo", code=1)
    assert "the demo found errors" in cli.err
    assert json.loads(cli("demo", "--json", code=1))["wrong"] == ["a"]


def test_a_client_that_dies_is_noticed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_REKEY_DSN", "host=/nowhere")
    with pytest.raises(Problem, match="ended before its time"):
        demo.Clients(Sizes(1, 1, 1, 0, 0))


def test_reads_that_are_wrong_are_noticed(
    ready: Connection, db: str, kek: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = Sizes(secrets=1, tenants=1, readers=1, writers=0, seconds=0)
    tenant, _, name = sizes.place(0)
    ready.execute("select rekey.set_secret(%s, '0:nonsense', %s)", [name, tenant])
    with psycopg.connect(db, row_factory=psycopg.rows.dict_row) as connection:
        import pg_rekey

        pg_rekey.unlock(connection, kek)
        with pytest.raises(ValueError, match="never stored"):
            demo._read(connection, sizes, 0)

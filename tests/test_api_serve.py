"""`pg-rekey serve` as a process: its configuration, its end, and a database that goes and comes back."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

from api_fixtures import ALICE, BOB, PROMETHEUS, digest
from cli_fixtures import Cli
from helpers import Connection, connect, create_database, initialize, install
from pg_rekey import local, release
from pg_rekey.api import server as serving
from pg_rekey.api import tokens
from pg_rekey.errors import FINDINGS, LOCKED, USAGE

pytest_plugins = ["api_fixtures"]

COMMAND = Path(sys.executable).parent / "pg-rekey"


class Serving:
    """A running `pg-rekey serve` and what it printed."""

    def __init__(self) -> None:
        environment = os.environ | {
            tokens.ADMIN: f"alice:{digest(ALICE)} bob:{digest(BOB)}",
            tokens.METRICS: f"prom:{digest(PROMETHEUS)}",
            "PYTHONWARNINGS": "error",
        }
        self.process = subprocess.Popen(
            [COMMAND, "serve", "--port", "0"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line)
            listening = json.loads(line)
            if listening["event"] == "listening":
                break
        assert listening["host"] == "127.0.0.1"
        self.port = int(listening["port"])

    def request(
        self, method: str, path: str, token: str | None = ALICE, body: Any = None
    ) -> tuple[int, dict[str, Any]]:
        """Send a request; return status and document."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def stop(self, number: int = signal.SIGTERM) -> str:
        """End it with a signal; return what it had printed on standard error."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        self.lines += out.splitlines()
        assert self.process.returncode == 0, err
        assert json.loads(self.lines[-1])["event"] == "stopped"
        return err


@pytest.fixture
def serve(api_env: str) -> Iterator[Callable[[], Serving]]:
    """Return a function that starts the server."""
    started: list[Serving] = []

    def start() -> Serving:
        started.append(Serving())
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_from_start_to_end(number: int, serve: Callable[[], Serving], ready: Connection, kek: bytes) -> None:
    api = serve()
    assert api.request("GET", "/healthz", token=None) == (200, {"status": "ok"})
    status, document = api.request("POST", "/api/keys/rotate")
    assert (status, len(document["rotations"])) == (202, 1)
    assert api.request("GET", "/api/keys", token="canary")[0] == 401
    assert api.request("GET", "/api/keys", token=PROMETHEUS)[0] == 403
    assert api.stop(number) == ""
    lines = [json.loads(line) for line in api.lines]
    assert [line["event"] for line in lines] == ["listening", *["request"] * 4, "stopped"]
    assert {line["client"] for line in lines[1:-1]} == {"127.0.0.1"}
    for secret in (ALICE, BOB, PROMETHEUS, digest(ALICE), kek.hex(), "canary"):
        assert secret not in "".join(api.lines)


def test_a_login_that_is_a_superuser_is_warned_of(
    serve: Callable[[], Serving], cli: Cli, ready: Connection, db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warned(api: Serving) -> list[dict[str, Any]]:
        api.stop()
        return [line for line in map(json.loads, api.lines) if line["event"] == "superuser"]

    def findings() -> list[str]:
        found = [one["finding"] for one in cli.json("doctor", code=FINDINGS)]
        return [one for one in found if "pg-rekey serve" in one]

    api = serve()
    assert api.request("GET", "/healthz")[0] == 200
    assert findings() == []
    assert warned(api) == []
    monkeypatch.setenv("PG_REKEY_DSN", db)
    api = serve()
    assert api.request("GET", "/healthz")[0] == 200
    assert findings() == ["pg-rekey serve is connected as the superuser postgres"]
    [line] = warned(api)
    assert "create role rekey_api" in line["warning"]


def test_a_stop_ends_streams(serve: Callable[[], Serving], ready: Connection) -> None:
    api = serve()
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/api/events", headers={"Authorization": f"Bearer {ALICE}"})
        response = connection.getresponse()
        assert response.status == 200
        # uvicorn would say that it cut them off.
        assert api.stop() == ""
        assert response.read() == b""
    assert {json.loads(line)["event"] for line in api.lines} == {"listening", "request", "stopped"}


def listens(api: Serving) -> bool:
    with contextlib.suppress(ConnectionResetError):  # it ceases to, this very moment
        try:
            socket.create_connection(("127.0.0.1", api.port)).close()
        except ConnectionRefusedError:
            return False
    return True


def test_requests_in_hand_are_ended(serve: Callable[[], Serving], ready: Connection, db: str) -> None:
    api = serve()
    answers: list[Any] = []
    with ready.transaction():
        ready.execute("lock table rekey.rotations")
        client = threading.Thread(target=lambda: answers.append(api.request("GET", "/api/rotations")))
        client.start()
        waiting = """
            select from pg_stat_activity
            where datname = current_database() and usename ~ '^rekey_api_' and wait_event_type = 'Lock'"""
        until = time.monotonic() + 60
        with connect(db) as observer:
            while not observer.execute(waiting).fetchall() and time.monotonic() < until:
                time.sleep(0.02)
        api.process.send_signal(signal.SIGTERM)
        while listens(api):
            assert time.monotonic() < until
            time.sleep(0.02)
        assert answers == []
    client.join()
    assert answers == [(200, {"rotations": [], "next": None})]
    api.process.wait(60)
    assert api.stop() == ""


def test_large_bodies(serve: Callable[[], Serving], ready: Connection) -> None:
    """A server that refuses a body must not wait for it, nor keep it."""
    api = serve()
    for body in (b" " * 100_000, iter([b" " * 20_000] * 3)):
        status, document = api.request("POST", "/api/keys/rotate", body=body)
        assert (status, document["code"]) == (413, "too_large")
    with socket.create_connection(("127.0.0.1", api.port), timeout=60) as connection:
        connection.sendall(
            b"POST /api/keys/rotate HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection(("127.0.0.1", api.port), timeout=60) as connection:
        connection.sendall(b"canary\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
    assert api.request("GET", "/healthz")[0] == 200
    api.stop()
    assert "canary" not in "".join(api.lines)


def test_a_database_that_goes_and_comes_back(
    serve: Callable[[], Serving], kek: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local.Server() as server:
        dsn = create_database(server.dsn(), "app")
        install(dsn, release.assemble("plain"))
        with connect(dsn) as connection:
            initialize(connection, kek)
            connection.execute("create role api login in role rekey_admin")
        server.kill()
        monkeypatch.setenv("PG_REKEY_DSN", make_conninfo(dsn, user="api"))
        for variable in ("PG_REKEY_OPERATE_DSN", "PG_REKEY_READ_DSN"):
            monkeypatch.delenv(variable)
        # It starts without its database.
        api = serve()
        assert everything(api) == [503] * 5
        # A refusal is one without an audit log too.
        assert api.request("GET", "/api/keys", token=None)[0] == 401
        server.restart()
        recovers(api)
        assert everything(api) == [200, 202, 200, 200, 200]
        server.kill()
        assert everything(api) == [503] * 5
        server.restart()
        recovers(api)
        server.restart()
        # Connections that broke meanwhile are replaced, without an error.
        assert everything(api) == [200, 202, 200, 200, 200]
        assert api.stop() == ""
    events = {json.loads(line)["event"] for line in api.lines}
    assert events == {"listening", "request", "log", "refusal not audited", "stopped", "watch"}
    assert kek.hex() not in "".join(api.lines)


def everything(api: Serving) -> list[int]:
    """Return the status of every route."""
    requests = [
        ("GET", "/healthz"),
        ("POST", "/api/keys/rotate"),
        ("GET", "/api/keys"),
        ("GET", "/api/rotations"),
        ("GET", "/api/audit"),
    ]
    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(lambda request: api.request(*request), requests))
    for status, document in answers:
        if status == 503:
            assert document["code"] == "unavailable"
            assert document["message"] == "the database is not available"
    return [status for status, _ in answers]


def recovers(api: Serving) -> None:
    """Wait until the API is well again, which it is within seconds."""
    until = time.monotonic() + 60
    while api.request("GET", "/healthz", token=None)[0] != 200:
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.fixture
def no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token is configured."""
    for name in (tokens.ADMIN, tokens.METRICS):
        for kind in ("", "_FILE"):
            monkeypatch.delenv(name + kind, raising=False)


@pytest.mark.usefixtures("no_tokens")
class TestConfiguration:
    """What is wrong is said before anything listens."""

    def test_without_tokens(self, cli: Cli) -> None:
        cli("serve", code=USAGE)
        assert "no administrator token" in cli.err
        assert "--new-token" in cli.err

    def test_with_a_kek_that_is_none(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(tokens.ADMIN, f"alice:{digest(ALICE)}")
        for variable in ("PG_REKEY_KEK", "PG_REKEY_NEW_KEK"):
            monkeypatch.setenv(variable, "canary")
            cli("serve", code=LOCKED)
            assert f"{variable} is neither" in cli.err
            assert "canary" not in cli.err
            monkeypatch.delenv(variable)

    def test_with_a_dsn_that_is_none(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(tokens.ADMIN, f"alice:{digest(ALICE)}")
        monkeypatch.setenv("PG_REKEY_DSN", "mysql://u:canary@h/d")
        cli("serve", code=USAGE)
        assert "canary" not in cli.err

    def test_with_an_address_that_is_taken_or_none(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(tokens.ADMIN, f"alice:{digest(ALICE)}")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            cli("serve", "--port", port, code=1)
        assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in cli.err
        cli("serve", "--host", "not an address", code=1)
        assert "cannot listen on not an address" in cli.err

    def test_new_token(self, cli: Cli) -> None:
        token, entry = cli("serve", "--new-token", "alice").split()
        assert entry == f"alice:{digest(token)}"
        assert "not shown again" in cli.err
        document = cli.json("serve", "--new-token", "a.b-c_1")
        assert document["entry"] == f"a.b-c_1:{digest(document['token'])}"
        for name in ("", "a b", "a:b", "ä", "a" * 64):
            cli("serve", "--new-token", name, code=USAGE)

    def test_without_the_extra(self, cli: Cli) -> None:
        program = "import sys; sys.modules['fastapi'] = None; from pg_rekey.cli import main; main(['serve'])"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr == "Error: fastapi is not installed\nHint: Install pg-rekey[api].\n"

    @pytest.mark.parametrize(
        ("address", "warns"), [("127.0.0.1", False), ("::1", False), ("192.0.2.1", True)]
    )
    def test_an_address_that_others_reach(
        self, address: str, warns: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        serving._warn_if_reachable(address)
        assert ("put TLS in front" in capsys.readouterr().err) == warns

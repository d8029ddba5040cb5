"""examples/pglite: its tests pass in PGlite; and what the command says to PGlite's socket."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

import npm
from cli_fixtures import Cli
from packages import build
from pg_rekey import Error, release, unlock

pytest_plugins = ["cli_fixtures"]
pytestmark = pytest.mark.npm

EXAMPLE = release.ROOT / "examples" / "pglite"
SERVER = """
import { PGlite } from '@electric-sql/pglite'
import { PGLiteSocketServer } from '@electric-sql/pglite-socket'
const server = new PGLiteSocketServer({ db: await PGlite.create(), port: 0, host: '127.0.0.1',
  maxConnections: 10 })
await server.start()
console.log(server.getServerConn())
"""
REFUSED = "this is PGlite, or another server in single-user mode: no KEK was sent"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example, with the package that we make."""
    folder = tmp_path_factory.mktemp("pglite")
    package = build.npm(folder / "package")
    [name] = re.findall(r"\S+\.tgz", npm.npm(package, "pack", "--silent"))
    copy = folder / "example"
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns("node_modules"))
    npm.install(copy, package / name)
    return copy


def test_its_tests_pass(example: Path) -> None:
    said = npm.npm(example, "test")
    assert re.search(r"pass 5\b", said), said
    assert re.search(r"fail 0\b", said), said


@pytest.fixture(scope="module")
def socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """PGlite behind its socket, which wants a release of PGlite of its own: the connection string."""
    folder = tmp_path_factory.mktemp("socket")
    (folder / "package.json").write_text("{}")
    npm.install(folder, "@electric-sql/pglite@0.5.14", "@electric-sql/pglite-socket@0.2.17")
    (folder / "server.mjs").write_text(SERVER)
    with subprocess.Popen(["node", "server.mjs"], cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            address = process.stdout.readline().strip()
            yield f"postgresql://postgres@{address}/postgres?sslmode=disable"
        finally:
            process.terminate()


@pytest.mark.parametrize(
    "command", [("init",), ("status",), ("secrets", "list"), ("rotate", "--wait"), ("doctor",)]
)
def test_the_command_says_what_is_wrong(
    cli: Cli, socket: str, kek: bytes, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_REKEY_DSN", socket)
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    cli(*command, code=1)
    assert cli.err.splitlines()[0] == f"Error: {REFUSED}"
    assert "docs/testing.md" in cli.err
    assert kek.hex() not in cli.out + cli.err


def test_python_sends_no_key(socket: str, kek: bytes) -> None:
    with psycopg.connect(socket) as connection, pytest.raises(Error, match=REFUSED):
        unlock(connection, kek)

"""The command line, run in this process against the database of a test. (PYTEST_DONT_REWRITE)"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from helpers import Connection
from pg_rekey import kek as keks
from pg_rekey.cli import main

COMMAND = str(Path(sys.executable).parent / "pg-rekey")
# With a worker that does not wait ten seconds for the next tick.
HURRIED = (sys.executable, str(Path(__file__).with_name("hurried.py")))


class Cli:
    """Runs commands; what is printed is in `out` and `err` afterwards."""

    def __init__(self) -> None:
        self.out = ""
        self.err = ""

    def __call__(self, *arguments: str | Path | int, code: int = 0, stdin: str | None = None) -> str:
        """Run a command that should end with this exit code, and return its standard output."""
        runner = CliRunner()
        result = runner.invoke(main, [str(one) for one in arguments], input=stdin, catch_exceptions=False)
        self.out, self.err = result.stdout, result.stderr
        assert result.exit_code == code, result.output
        return self.out

    def json(self, *arguments: str | Path | int, code: int = 0, stdin: str | None = None) -> Any:
        """Run a command with --json and return the document."""
        return json.loads(self(*arguments, "--json", code=code, stdin=stdin))


@contextmanager
def process(
    *arguments: str, command: Sequence[str] = (COMMAND,), **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """Run the command line as a process, in a group of its own."""
    pipe = subprocess.PIPE
    environ = os.environ | environment
    with subprocess.Popen(
        [*command, *arguments], env=environ, stdout=pipe, stderr=pipe, text=True, process_group=0
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def eventually(condition: Callable[[], Any]) -> None:
    """Wait until something is so."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "it never came to be"
        time.sleep(0.02)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the developer's own environment reaches a test."""
    for name in ("PG_REKEY_DSN", "DATABASE_URL", "PGSERVICE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("PG_REKEY_KEK", "PG_REKEY_NEW_KEK"):
        for kind in ("", "_FILE", "_COMMAND"):
            monkeypatch.delenv(name + kind, raising=False)
    keks.forget()


@pytest.fixture
def cli(environment: None) -> Cli:
    """The command line without a database or a KEK."""
    return Cli()


@pytest.fixture
def cli_db(environment: None, db: str, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line with a database where pg_rekey is installed, but nothing set up."""
    monkeypatch.setenv("PG_REKEY_DSN", db)
    return Cli()


@pytest.fixture
def cli_ready(ready: Connection, cli_db: Cli, kek: bytes, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line with a database that is ready, and its KEK."""
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    return cli_db


@pytest.fixture
def empty(environment: None, make_database: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A database without pg_rekey, which the command line then uses."""
    dsn = make_database()
    monkeypatch.setenv("PG_REKEY_DSN", dsn)
    return dsn

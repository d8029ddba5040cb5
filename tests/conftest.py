"""The server, the databases and the keys that tests get.

container.py says what the server is. A given one, or a container, is one for the whole run; otherwise each
process that runs tests has one of its own, and with it roles of its own. There, pg_rekey is installed in a
template database; each test works on a clone. When a clone is dropped, the functions that were called in it
are noted, so that the run ends with a list of those that no test calls.
"""

import contextlib
import hashlib
import itertools
import os
import shlex
import signal
import subprocess
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import psycopg
import pytest
from hypothesis import HealthCheck, settings

import container
from helpers import (
    Connection,
    all_functions,
    called_functions,
    connect,
    create_database,
    disconnect_others,
    drop_database,
    initialize,
    install,
    unlock,
    value,
)
from hosted import Hosted
from pg_rekey import local, release

# What the controlling process tells its xdist workers; a server of their own, they tell themselves.
SERVER = "PG_REKEY_TEST_SERVER"
TEMPLATE = "PG_REKEY_TEST_TEMPLATE"
CALLS = "PG_REKEY_TEST_CALLS"
EXTENSION = "PG_REKEY_TEST_EXTENSION"
EXCEPTIONS = Path(__file__).parent / "lint" / "exceptions.toml"

# How long an example takes says nothing on a shared machine.
settings.register_profile(
    "pg_rekey",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("pg_rekey")

cleanup = pytest.StashKey[contextlib.ExitStack]()
uncalled = pytest.StashKey[list[str]]()
counter = itertools.count(1)


def is_controller(config: pytest.Config) -> bool:
    return not hasattr(config, "workerinput")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Make ready what all processes need: a server too, where it is one for all of them."""
    # A shell that runs us in the background has it ignored, and what we start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config = session.config
    if config.option.collectonly:
        return
    stack = config.stash[cleanup] = contextlib.ExitStack()
    try:
        if is_controller(config):
            os.environ[CALLS] = stack.enter_context(tempfile.TemporaryDirectory(prefix="pgrk-calls-"))
            if container.is_shared():
                start_server(stack)
            else:
                local.ensure()
                local.ensure_test_tools()
            os.environ[EXTENSION] = place_extension(stack)
    except (click.ClickException, psycopg.Error, OSError) as error:
        pytest.exit(f"no database to test on: {error}", returncode=1)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the server of this process, where it has one of its own and a test to run."""
    config = session.config
    if config.option.collectonly or SERVER in os.environ or not session.items:
        return
    try:
        start_server(config.stash[cleanup])
    except (click.ClickException, psycopg.Error, OSError) as error:
        pytest.exit(f"no database to test on: {error}", returncode=1)


def start_server(stack: contextlib.ExitStack) -> None:
    server = os.environ[SERVER] = stack.enter_context(container.server())
    name = os.environ[TEMPLATE] = f"rekey_template_{os.getpid()}"
    template = create_database(server, name)
    stack.callback(drop_database, server, name)
    install(template, release.assemble("plain"))
    with connect(template) as connection:
        note("functions", all_functions(connection))


def note(kind: str, functions: set[str]) -> None:
    """Append to this process's notes of that kind."""
    with (Path(os.environ[CALLS]) / f"{os.getpid()}.{kind}").open("a") as notes:
        notes.writelines(f"{name}\n" for name in functions)


def noted(kind: str) -> set[str]:
    """Return what the processes of this run have noted of a kind."""
    paths = Path(os.environ[CALLS]).glob(f"*.{kind}")
    return {name for path in paths for name in path.read_text().splitlines()}


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say which server it is."""
    if cleanup not in config.stash:
        return None
    if SERVER not in os.environ:
        return f"server: PostgreSQL {local.ensure().major}, one for each process"
    with connect(os.environ[SERVER]) as connection:
        return f"server: PostgreSQL {value(connection, 'show server_version')} at {connection.info.host}"


def place_extension(stack: contextlib.ExitStack) -> str:
    """Put the extension's files where the servers find them; return 'yes', or why that cannot be."""
    release_files = local.extension_files()
    command = os.environ.get(container.PUT_EXTENSION)
    if command:
        subprocess.run([*shlex.split(command), *release_files], check=True, capture_output=True)
    elif os.environ.get(container.DSN):
        return "PG_REKEY_TEST_PUT_EXTENSION names no command that copies files to the server"
    installation = local.find()
    if not installation or not os.access(installation.extensions, os.W_OK):
        return "yes" if command else f"{installation and installation.extensions} is not writable"
    for path in release_files:
        target = installation.extensions / path.name
        stack.callback(restore, target, target.read_bytes() if target.exists() else None)
    local.install_extension(installation)
    return "yes"


def restore(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(content)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[None]:
    """Skip tests whose fixtures start a server of their own where no PostgreSQL is installed."""
    with skipping():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip tests that start a server of their own where no PostgreSQL is installed."""
    with skipping():
        return (yield)


@contextlib.contextmanager
def skipping() -> Iterator[None]:
    try:
        yield
    except local.NotInstalled:
        pytest.skip("no PostgreSQL is installed here that a server of its own could be made of")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let a complete and successful run fail where it left functions uncalled."""
    config = session.config
    if not is_controller(config):
        return
    whole = (
        config.args_source is pytest.Config.ArgsSource.TESTPATHS
        and not config.option.keyword
        and not config.option.markexpr
        and session.exitstatus == pytest.ExitCode.OK
    )
    if cleanup not in config.stash or not whole:
        return
    missing = noted("functions") - noted("called") - set(not_counted())
    config.stash[uncalled] = sorted(missing)
    if missing:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def not_counted() -> dict[str, str]:
    """Return the functions that PostgreSQL does not count, with the reason."""
    exceptions: dict[str, dict[str, str]] = tomllib.loads(EXCEPTIONS.read_text())
    return exceptions["not_counted"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the functions that no test calls."""
    if uncalled not in config.stash:
        return
    names = config.stash[uncalled]
    terminalreporter.write_sep("=", "SQL functions that no test calls")
    terminalreporter.write_line("\n".join(names) or "none: every function of schema rekey was called")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Drop the template, stop the server."""
    if cleanup in config.stash:
        config.stash[cleanup].close()


@pytest.fixture(scope="session")
def server() -> str:
    """DSN of the server's maintenance database, as a superuser."""
    return os.environ[SERVER]


@pytest.fixture
def make_database(server: str, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Return a function that makes a database, empty or a clone of a template, and returns its DSN."""
    names: list[str] = []

    def make(template: str | None = None, owner: str | None = None) -> str:
        name = f"rekey_test_{os.getpid()}_{next(counter)}"
        dsn = create_database(server, name, template, owner)
        names.append(name)
        return dsn

    yield make
    for name in names:
        with connect(server, dbname=name) as connection:
            disconnect_others(connection)
            note_calls(connection)
        drop_database(server, name)


def note_calls(connection: Connection) -> None:
    """Note the functions that were called in this database."""
    note("called", called_functions(connection))


@pytest.fixture
def db(make_database: Callable[..., str]) -> str:
    """DSN of a fresh database with pg_rekey installed: no KEK, no keyring."""
    return make_database(os.environ[TEMPLATE])


@pytest.fixture
def conn(db: str) -> Iterator[Connection]:
    """An autocommit superuser connection to `db`."""
    with connect(db) as connection:
        yield connection


@pytest.fixture(scope="session")
def kek() -> bytes:
    """A key-encryption key, the same in every process of a run."""
    return hashlib.sha256(b"pg_rekey: the tests' KEK").digest()


@pytest.fixture
def ready(conn: Connection, kek: bytes) -> Connection:
    """`conn`, unlocked for the session, its KEK registered and the keyring `default` made."""
    initialize(conn, kek)
    return conn


@pytest.fixture
def session(db: str, ready: Connection, kek: bytes) -> Iterator[Callable[[], Connection]]:
    """Return a function that opens another unlocked connection."""
    opened: list[Connection] = []

    def open_one() -> Connection:
        opened.append(connect(db))
        unlock(opened[-1], kek)
        return opened[-1]

    yield open_one
    for connection in opened:
        connection.close()


@pytest.fixture(scope="session")
def installation() -> local.Installation:
    """The machine's own PostgreSQL, for tests that have other processes start servers of it, or skipped."""
    return local.ensure()


@pytest.fixture
def extension_files() -> None:
    """The extension's files are where CREATE EXTENSION looks for them."""
    if (answer := os.environ[EXTENSION]) != "yes":
        pytest.skip(answer)


@pytest.fixture(scope="session")
def icu(server: str) -> None:
    """The server was built with ICU."""
    with connect(server) as connection:
        if not value(connection, "select exists (select from pg_collation where collname = 'und-x-icu')"):
            pytest.skip("this PostgreSQL has no ICU")


@pytest.fixture(scope="session")
def hosting() -> Iterator[Hosted]:
    """A server of its own, where the installer has the rights of hosted Supabase's `postgres`."""
    with Hosted.start() as server:
        yield server


@pytest.fixture
def hosted(hosting: Hosted) -> Iterator[Hosted]:
    """That server; memberships, which all its databases share, do not outlive a test."""
    yield hosting
    hosting.take_back()
    while hosting.made:
        with connect(hosting.made.pop()) as connection:
            disconnect_others(connection)
            note_calls(connection)

"""A throwaway PostgreSQL server from the machine's own binaries, for the demo, the tests and development.

It listens on a Unix socket in a private directory only, so that no port collides and nobody else can connect.
A small guard process holds the other end of a pipe: when this process ends, in whatever way, the guard stops
the server and removes its directory.

Run by root, the server belongs to another account, and so does its directory: whatever is written, read or
signalled by what is found there is done by processes of that account, never by root.
"""

import atexit
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import click
import psycopg

from pg_rekey import places, release

OLDEST = 15
COMPANIONS = {"pg_cron": "cron", "pgtap": "pgtap", "plpgsql_check": "plpgsql-check", "pgaudit": "pgaudit"}
TEST_TOOLS = {
    "pg_prove": "libtap-parser-sourcehandler-pgtap-perl",
    "pgbouncer": "pgbouncer",
    "faketime": "faketime",
}
DEBIAN_PLACE = Path("/usr/lib/postgresql")
PLACES = (
    f"{DEBIAN_PLACE}/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
)
NO_CLUSTER = Path("/etc/postgresql-common/createcluster.d/pg_rekey.conf")
INSTALL_HELP = f"""no PostgreSQL {OLDEST} or later found. Install one:
  Debian 12, Ubuntu 24.04 or later, as root: apt-get install postgresql postgresql-NN-cron postgresql-NN-pgtap
  (older ones: add the packages of https://apt.postgresql.org first)
  macOS: brew install postgresql@17, or Postgres.app
  Fedora, RHEL: dnf install postgresql-server postgresql-contrib
or set PG_REKEY_DSN (the tests: PG_REKEY_TEST_DSN, a superuser) to a server of your own."""

# How the servers that we start are made, those of the tests in containers too. PostgreSQL 18 has checksums
# unless told otherwise, and pg_upgrade wants the same of both servers.
INITDB = ("--encoding=UTF8", "--no-locale", "--no-sync", "--data-checksums")
SETTINGS = {
    # Files in the data directory, so that nothing stays behind after a SIGKILL.
    "dynamic_shared_memory_type": "mmap",
    "max_connections": "100",
    "max_worker_processes": "32",
    "max_prepared_transactions": "10",
    "timezone": "UTC",
}
CRON = {"shared_preload_libraries": "pg_cron", "cron.use_background_workers": "on"}

# What need not outlive a power failure needs no disk: databases are made ten times as fast in memory, where
# there is room for a few servers that have a gigabyte of WAL and a table or two of some size.
MEMORY = "/dev/shm"
ROOM = 6 * 2**30

# Runs as the server's user, in a session of its own so that Ctrl-C in a terminal does not reach it.
GUARD = 'cat; "$0/pg_ctl" -D "$1/data" -m immediate stop; rm -rf "$1"'


class NotInstalled(click.ClickException):
    """This machine has no PostgreSQL that a throwaway server could be made of."""


@dataclass(frozen=True)
class Installation:
    """The binaries of one PostgreSQL version and where its extensions are."""

    major: int
    bindir: Path
    extensions: Path

    def has(self, extension: str) -> bool:
        """Tell whether the files of an extension are there."""
        return (self.extensions / f"{extension}.control").exists()

    @classmethod
    def at(cls, bindir: Path) -> Self | None:
        """Return the installation in a directory, or None where there is none that works."""
        try:
            found = re.search(r"\) (\d+)", _output(bindir / "postgres", "--version"))
            config = bindir / "pg_config"
            # What npm brings has none, and one place for its files.
            share = Path(
                _output(config, "--sharedir") if config.exists() else bindir.parent / "share/postgresql"
            )
            _output(bindir / "initdb", "--version")
        except (OSError, subprocess.CalledProcessError):
            return None
        return cls(int(found[1]), bindir, share / "extension") if found else None


def installations() -> list[Installation]:
    """Return every PostgreSQL that is new enough: what is on PATH, then what is in the usual places."""
    folders = [Path(path) for place in PLACES for path in sorted(Path("/").glob(place[1:]))]
    if on_path := shutil.which("pg_config"):
        folders.insert(0, Path(_output(on_path, "--bindir")))
    if on_path := shutil.which("postgres"):
        folders.insert(0, Path(on_path).resolve().parent)
    found = (Installation.at(folder) for folder in dict.fromkeys(folders))
    return [one for one in found if one and one.major >= OLDEST]


def find() -> Installation | None:
    """Return the PostgreSQL whose server is on PATH, else the newest, with pg_cron if there is one."""
    chosen = shutil.which("postgres")
    bindir = chosen and Path(chosen).resolve().parent
    return max(
        installations(), key=lambda one: (one.bindir == bindir, one.has("pg_cron"), one.major), default=None
    )


def ensure() -> Installation:
    """Return a usable PostgreSQL; on Debian and Ubuntu, root gets what is missing with apt."""
    installation = find()
    if _can_apt():
        if installation is None:
            installation = _apt_install_server()
        _apt_install_companions(installation)
    if installation is None:
        raise NotInstalled(INSTALL_HELP)
    return installation


def ensure_test_tools() -> None:
    """Get the programs that only the tests use, with apt where that can be; tests say what they skip."""
    missing = [package for program, package in TEST_TOOLS.items() if not shutil.which(program)]
    if missing and _can_apt():
        _apt(*missing)


def install_extension(installation: Installation) -> None:
    """Copy the files of the pg_rekey extension to where CREATE EXTENSION looks for them.

    Each takes the place of what has its name there, and follows no link.
    """
    for path in extension_files():
        with tempfile.NamedTemporaryFile("wb", dir=installation.extensions, delete=False) as draft:
            draft.write(path.read_bytes())
            os.fchmod(draft.fileno(), 0o644)
        os.replace(draft.name, installation.extensions / path.name)


def _parent(durable: bool) -> str:
    """Return where a server's directory is made: its name has to be short enough for that of a socket."""
    with suppress(OSError):
        if not durable and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM:
            return MEMORY
    return "/tmp"


def extension_files() -> list[Path]:
    """Return the files that CREATE EXTENSION needs."""
    return [release.SOURCES / "pg_rekey.control", *sorted(release.DIST.glob("pg_rekey--*.sql"))]


class Server:
    """A PostgreSQL server that lives as long as this object or this process, whichever ends first."""

    def __init__(
        self,
        *,
        settings: Mapping[str, str] | None = None,
        durable: bool = False,
        superuser: str = "postgres",
        cron_database: str = "postgres",
        port: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Create the cluster and start it.

        Durable means that commits wait for the disk. With a port, it listens there on 127.0.0.1 too, for
        clients that know no Unix sockets, and for everybody on this machine. The environment is what its
        processes get beside a search path.
        """
        self.installation = ensure()
        self.bindir = self.installation.bindir
        self.superuser = superuser
        self.port = port or 5432
        self._account = _server_account()
        self.directory = Path(tempfile.mkdtemp(prefix="pgrk-", dir=_parent(durable)))
        self.data = self.directory / "data"
        self.log = self.directory / "log"
        # What the server gets besides PATH and LC_ALL, from its next start on.
        self.environment = dict(environment or {})
        if self._account:
            os.chown(self.directory, self._account.pw_uid, self._account.pw_gid)
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, self.bindir, self.directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            env={"PATH": f"{self.bindir}:/usr/bin:/bin", "LC_ALL": "C"},
            user=self._account and self._account.pw_uid,
            group=self._account and self._account.pw_gid,
            extra_groups=self._account and [],
        )
        atexit.register(self.stop)
        try:
            network = {"listen_addresses": "127.0.0.1"} if port else {}
            self._initialize({**network, **(settings or {})}, durable, cron_database)
            self._pg_ctl("start")
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def dsn(self, dbname: str = "postgres", user: str | None = None) -> str:
        """Return a connection string for a database, for the superuser unless told otherwise."""
        return f"postgresql://{user or self.superuser}@/{dbname}?host={self.directory}&port={self.port}"

    @property
    def pid(self) -> int:
        """The process id of the postmaster, as its account says."""
        return int(self._run("/usr/bin/env", "head", "-n", "1", self.data / "postmaster.pid"))

    def restart(self, mode: str = "fast") -> None:
        """Stop the server if it runs, in pg_ctl's mode fast, smart or immediate, and start it."""
        self._pg_ctl("restart", "-m", mode)

    def kill(self) -> None:
        """End the server as a power failure would: SIGKILL to the postmaster and all that it started."""
        postmaster = self.pid
        self._signal("STOP", postmaster)
        # The postmaster last: when it is gone, the others end in good order, and clear up.
        doomed = [*(pid for pid, parent in _processes() if parent == postmaster), postmaster]
        self._signal("KILL", *doomed)
        while set(doomed) & {pid for pid, _ in _processes()}:
            time.sleep(0.01)
        # Where nobody reaps the dead postmaster, its lock files would make it seem alive.
        lock = self.directory / f".s.PGSQL.{self.port}.lock"
        self._run("/usr/bin/env", "rm", "-f", self.data / "postmaster.pid", lock)

    def write(self, name: str, text: str, *, append: bool = False) -> None:
        """Write or append to a file of the server's, by its name in the server's directory."""
        redirection = ">>" if append else ">"
        self._run("/bin/sh", "-c", f'cat {redirection}"$0"', self.directory / name, given=text)

    def stop(self) -> None:
        """Stop the server and remove all of it; harmless when repeated."""
        atexit.unregister(self.stop)
        if self._guard.stdin:
            self._guard.stdin.close()
        self._guard.wait()

    def _initialize(self, settings: Mapping[str, str], durable: bool, cron_database: str) -> None:
        self._run(self.bindir / "initdb", "-D", self.data, "-U", self.superuser, "--auth=trust", *INITDB)
        switch = "on" if durable else "off"
        merged = SETTINGS | {
            "listen_addresses": "",
            "unix_socket_directories": str(self.directory),
            "port": str(self.port),
            "unix_socket_permissions": "0700",
            "fsync": switch,
            "full_page_writes": switch,
        }
        if self.installation.has("pg_cron"):
            merged |= CRON | {"cron.database_name": cron_database, "cron.host": str(self.directory)}
        self.write("data/postgresql.conf", settings_text(merged | dict(settings)), append=True)

    def _signal(self, name: str, *pids: int) -> None:
        self._run("/bin/sh", "-c", 'kill -s "$0" "$@"', name, *map(str, pids))

    def _pg_ctl(self, *arguments: str) -> None:
        command = self.bindir / "pg_ctl"
        try:
            self._run(command, "-D", self.data, "-l", self.log, "-w", "-t", "60", *arguments)
        except click.ClickException as error:
            log = self._run("/bin/sh", "-c", 'test ! -e "$0" || tail -n 20 "$0"', self.log)
            raise click.ClickException(f"{error.message}\n{log}") from None

    def _run(self, *command: str | Path, given: str = "") -> str:
        """Run a command as the server's account, with some standard input, and return what it prints."""
        done = subprocess.run(
            command,
            input=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            check=False,
            cwd="/",
            env={"PATH": f"{self.bindir}:/usr/bin:/bin", "LC_ALL": "C", **self.environment},
            user=self._account and self._account.pw_uid,
            group=self._account and self._account.pw_gid,
            extra_groups=self._account and [],
        )
        if done.returncode != 0:
            raise click.ClickException(f"{command[0]} failed:\n{done.stdout.rstrip()}")
        return done.stdout


def settings_text(settings: Mapping[str, str]) -> str:
    """Return settings as they stand in a configuration file."""
    quoted = {name: value.replace("'", "''") for name, value in settings.items()}
    return "".join(f"{name} = '{value}'\n" for name, value in quoted.items())


def _server_account() -> pwd.struct_passwd | None:
    """Return the account that the server must run as, since it refuses root, or None for our own."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        raise click.ClickException(
            "PostgreSQL does not run as root, and there is no user `postgres`: create it, or do not be root"
        ) from None


def _can_apt() -> bool:
    # Whoever has the tests run on another server wants none here.
    return (
        os.geteuid() == 0
        and shutil.which("apt-get") is not None
        and Path("/etc/debian_version").exists()
        and "PG_REKEY_TEST_DSN" not in os.environ
    )


def _apt_install_server() -> Installation | None:
    """Install Debian's PostgreSQL, without the cluster that its package makes and starts by default."""
    NO_CLUSTER.parent.mkdir(parents=True, exist_ok=True)
    NO_CLUSTER.write_text("create_main_cluster = false\n")
    try:
        _apt("postgresql")
    finally:
        NO_CLUSTER.unlink()
    return find()


def _apt_install_companions(installation: Installation | None) -> None:
    """Install the extensions that the tests use; without them they say what they skip."""
    if installation is None or not installation.bindir.is_relative_to(DEBIAN_PLACE):
        return
    missing = [
        f"postgresql-{installation.major}-{package}"
        for name, package in COMPANIONS.items()
        if not installation.has(name)
    ]
    if missing:
        _apt(*missing)


def _apt(*packages: str) -> None:
    click.echo(f"installing {', '.join(packages)} with apt", err=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        done = subprocess.run(
            ["apt-get", "-qq", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env=environment,
        )
        if done.returncode != 0:
            click.echo(f"apt-get {command[0]} failed:\n{done.stdout}", err=True)


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout.strip()


def _processes() -> Iterator[tuple[int, int]]:
    """Yield process id and parent of all that run, zombies left out."""
    for line in _output("ps", "-A", "-o", "pid=", "-o", "ppid=", "-o", "stat=").splitlines():
        pid, parent, state = line.split()[:3]
        if not state.startswith("Z"):
            yield int(pid), int(parent)


@click.group()
def main() -> None:
    """Start a throwaway PostgreSQL server."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(command: Sequence[str]) -> None:
    """Run COMMAND with PG_REKEY_DSN set to a fresh server, and pass on its exit code."""
    with Server() as server:
        code = subprocess.run(
            command, check=False, env=os.environ | {"PG_REKEY_DSN": server.dsn()}
        ).returncode
    sys.exit(code if code >= 0 else 128 - code)


@main.command()
def dev() -> None:
    """Keep a server with pg_rekey installed until Ctrl-C; reload sql/code whenever a file changes."""
    with Server() as server, psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute("create extension if not exists pgcrypto")
        seen = _modified()
        connection.execute(release.assemble("plain").encode())
        click.echo(f"ready: {server.dsn()}")
        try:
            while True:
                time.sleep(0.5)
                now = _modified()
                if changed := [path for path in now if now[path] != seen.get(path)]:
                    seen = now
                    _reload(connection, changed)
        except KeyboardInterrupt:
            click.echo("stopping")


def _reload(connection: psycopg.Connection[tuple[object, ...]], changed: Sequence[Path]) -> None:
    """Load all code anew, in one transaction, and say of what is wrong in which file and line it is."""
    begun = time.monotonic()
    try:
        with connection.transaction():
            for path, text in release.code():
                _load(connection, path, text)
    except click.ClickException as error:
        click.echo(error.message, err=True)
        return
    names = ", ".join(str(path.relative_to(release.ROOT)) for path in changed)
    click.echo(f"{datetime.now():%H:%M:%S} loaded in {time.monotonic() - begun:.1f} s: {names}")


def _load(connection: psycopg.Connection[tuple[object, ...]], path: Path, text: str) -> None:
    try:
        connection.execute(text.encode())
    except psycopg.Error as error:
        line = places.line(text, error.diag)
        place = f"{path.relative_to(release.ROOT)}{f':{line}' if line else ''}"
        raise click.ClickException(f"{place}: {error.diag.message_primary}") from error


def _modified() -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in (release.SOURCES / "code").glob("*.sql")}


if __name__ == "__main__":
    main()

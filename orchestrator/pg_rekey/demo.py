"""The demo: rotations of real secrets in a real server while readers and writers go on."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pg_rekey import db, envfile, local, worker
from pg_rekey import kek as keks
from pg_rekey.api import tokens
from pg_rekey.errors import Problem

Shell = Callable[..., int]
CRON_PATIENCE = 180.0
PAUSE = 0.001
NIL = UUID(int=0)
ENV_FILE = """\
# what an application keeps in its .env file
export STRIPE_KEY='sk_live_51H8x2'   # quotes, export, a comment
DATABASE_PASSWORD="p#ss word"
WEBHOOK_URL=https://example.com/hook?a=1&b=2
TLS_KEY="-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEIDemo
-----END PRIVATE KEY-----"
"""


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    secrets: int
    tenants: int
    readers: int
    writers: int
    seconds: float

    def place(self, index: int) -> tuple[UUID, str, str]:
        """Return tenant, keyring and name of a secret by its number."""
        tenant = index % self.tenants + 1
        return UUID(int=tenant), f"tenant-{tenant}", f"secret-{index // self.tenants}"


def value(name: str, generation: int) -> str:
    """Return the value of a secret in its nth generation; every value tells which one it is."""
    digest = hashlib.sha256(f"{name}/{generation}".encode()).hexdigest()
    return f"{generation}:{digest}"


@dataclass
class Record:
    """What one reader or writer did: when each call began, how long it took, and what went wrong."""

    kind: str
    began: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    written: dict[int, int] = field(default_factory=dict)


def client(sizes: Sizes, kind: str, number: int, stop: Event, pipe: Pipe) -> None:
    """Read or write secrets, one after the other, until told to stop; runs in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the demo itself decides when to end
    record = Record(kind)
    dice = random.Random(number)
    mine = range(number, sizes.secrets, sizes.writers) if kind == "write" else range(sizes.secrets)
    parent = multiprocessing.parent_process()
    with worker.connect() as connection:
        pipe.send("ready")
        while not stop.is_set() and parent is not None and parent.is_alive():
            index = dice.choice(mine)
            record.began.append(time.time())
            begun = time.perf_counter()
            try:
                if kind == "write":
                    _write(connection, sizes, index, record)
                else:
                    _read(connection, sizes, index)
            except (psycopg.Error, ValueError) as error:
                record.errors.append(" ".join(str(error).split()))
                if connection.closed:
                    break
            record.seconds.append(time.perf_counter() - begun)
            stop.wait(PAUSE)
    pipe.send(record)


def _write(connection: db.Connection, sizes: Sizes, index: int, record: Record) -> None:
    tenant, keyring, name = sizes.place(index)
    generation = record.written.get(index, 0) + 1
    connection.execute(db.query("set secret"), [name, value(name, generation), tenant, keyring, None])
    record.written[index] = generation


def _read(connection: db.Connection, sizes: Sizes, index: int) -> None:
    tenant, _, name = sizes.place(index)
    [row] = connection.execute("select rekey.get_secret(%s, %s) as value", [name, tenant]).fetchall()
    generation = str(row["value"]).partition(":")[0]
    if row["value"] != value(name, int(generation)):
        raise ValueError(f"{name} has a value that was never stored")


class Clients:
    """The readers and writers, each a process."""

    def __init__(self, sizes: Sizes) -> None:
        context = multiprocessing.get_context("spawn")
        self._stop = context.Event()
        self._running: list[tuple[BaseProcess, Pipe]] = []
        for kind, count in (("read", sizes.readers), ("write", sizes.writers)):
            for number in range(count):
                ours, theirs = context.Pipe()
                arguments = (sizes, kind, number, self._stop, theirs)
                process = context.Process(target=client, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self._running.append((process, ours))
        for _, pipe in self._running:
            _receive(pipe)

    def stop(self) -> list[Record]:
        """End them all and return what they did."""
        self._stop.set()
        records = [_receive(pipe) for _, pipe in self._running]
        for process, _ in self._running:
            process.join()
        self._running = []
        return records

    def kill(self) -> None:
        """End those that still run, whatever they are doing."""
        for process, pipe in self._running:
            process.kill()
            process.join()
            pipe.close()


@contextmanager
def _command(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run pg-rekey beside this process, which alone has Ctrl-C."""
    command = [sys.executable, "-c", "from pg_rekey.cli import main; main()", *arguments]
    output = subprocess.PIPE if "serve" in arguments else subprocess.DEVNULL
    with subprocess.Popen(
        command, env=os.environ | environment, stdout=output, text=True, process_group=0
    ) as running:
        try:
            yield running
        finally:
            running.terminate()


def _receive(pipe: Pipe) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise Problem("a reader or writer of the demo ended before its time") from None


class Demo:
    """One run of the demo, told step by step."""

    def __init__(self, sizes: Sizes, shell: Shell, say: Callable[[str], None]) -> None:
        self._sizes = sizes
        self._shell = shell
        self._say = say
        self._phases: dict[str, list[tuple[float, float]]] = {"before": [], "during": [], "after": []}

    def run(self, tell: Callable[[dict[str, Any]], None], *, console: bool = False) -> dict[str, Any]:
        """Run it all, and tell and return the figures. console: then serve it until Ctrl-C."""
        begun = time.monotonic()
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgrk-demo-")))
            unattended = self._prepare(stack, folder)
            self._store(folder)
            clients = Clients(self._sizes)
            stack.callback(clients.kill)
            self._title(
                f"{self._sizes.readers} readers and {self._sizes.writers} writers go on from here to the end"
            )
            self._watch("before")
            self._rotate_all()
            self._scheduled(unattended)
            self._damaged()
            self._rolled_back()
            self._title("A new KEK: every key is wrapped anew, no row is touched, no client cut off")
            self._shell("kek", "rotate")
            self._watch("after")
            records = clients.stop()
            self._title("What an operator sees")
            self._shell("status")
            self._shell("audit", "list", "--limit", "12")
            self._shell("audit", "verify")
            self._shell("verify")
            wrong = self._compare(records)
            report = self._report(records, wrong, time.monotonic() - begun)
            tell(report)
            if console:
                self._serve_console(unattended)
            return report

    def _serve_console(self, unattended: bool) -> None:
        """Serve the console, and let a worker do what is asked for there, until Ctrl-C."""
        token, entry = tokens.make("demo")
        with ExitStack() as stack:
            if not unattended:
                stack.enter_context(_command("work", "--forever"))
            server = stack.enter_context(_command("serve", "--port", "0", **{tokens.ADMIN: entry}))
            assert server.stdout is not None
            told = json.loads(server.stdout.readline() or "{}")
            if told.get("event") != "listening":
                raise Problem("the console did not start", "Install pg-rekey[api].")
            threading.Thread(target=server.stdout.read, daemon=True).start()
            self._title("The console, until Ctrl-C")
            self._say(f"http://127.0.0.1:{told['port']}/\ntoken: {token}")
            with suppress(KeyboardInterrupt):
                server.wait()

    def _prepare(self, stack: ExitStack, folder: Path) -> bool:
        """Start a server or use the given one, and install; tell whether pg_cron will do the work there."""
        if db.dsn():
            self._title("A database of its own on the server of the environment")
            dsn = stack.enter_context(_own_database(db.dsn()))
            place, cron = folder, False
        else:
            self._title("A PostgreSQL server of its own, durable, thrown away at the end")
            server = stack.enter_context(local.Server(durable=True))
            dsn, place, cron = server.dsn(), server.data, server.installation.has("pg_cron")
            self._say(f"PostgreSQL {server.installation.major}, pg_cron {'is' if cron else 'is not'} there")
        environment = {"PG_REKEY_DSN": dsn}
        # The next KEK is given to everybody before it becomes the active one.
        for name, file in ((keks.CURRENT, "pg_rekey.kek"), (keks.NEXT, "pg_rekey.kek_new")):
            self._shell("kek", "generate", "--out", str(place / file))
            owner = place.stat()
            os.chown(place / file, owner.st_uid, owner.st_gid)
            environment[f"{name}_FILE"] = str(place / file)
        stack.enter_context(_environment(environment))
        if cron:
            with psycopg.connect(dsn) as connection:
                connection.execute("create extension pg_cron")
        self._shell("init", *(("--provider", "file") if cron else ()))
        return cron

    def _store(self, folder: Path) -> None:
        sizes = self._sizes
        path = folder / ".env"
        path.write_text(ENV_FILE, encoding="utf-8")
        self._title(f"A .env file, and {sizes.secrets:,} secrets for {sizes.tenants} tenants")
        self._shell("secrets", "import", str(path))
        begun = time.monotonic()
        with worker.connect() as connection:
            for tenant in range(1, sizes.tenants + 1):
                identity = UUID(int=tenant)
                connection.execute("select rekey.create_keyring(%s, %s)", [f"tenant-{tenant}", identity])
                names = [sizes.place(index)[2] for index in range(tenant - 1, sizes.secrets, sizes.tenants)]
                values = [value(name, 0) for name in names]
                connection.execute(db.query("set secrets"), [names, values, identity, f"tenant-{tenant}"])
        seconds = time.monotonic() - begun
        self._say(f"{sizes.secrets:,} secrets encrypted and stored in {seconds:.1f} s")

    def _rotate_all(self) -> None:
        self._title("Rotate every keyring, and re-encrypt every row under load")
        with self._phase("during"):
            self._shell("rotate", "--all", "--wait", "--reason", "demo")
        self._shell("verify")

    def _scheduled(self, unattended: bool) -> None:
        self._title("A second rotation, by schedule" + (": pg_cron does it alone" if unattended else ""))
        self._shell("schedule", "set", "tenant-1", "90 days", "--first-at", "now")
        if not unattended:
            with self._phase("during"):
                self._shell("work")
        else:
            self._await_cron()
        self._shell("rotations", "list", "--keyring", "tenant-1", "--limit", "1")

    def _await_cron(self) -> None:
        """Wait until pg_cron has begun the rotation that is due, and until it is done."""
        patience = time.monotonic() + CRON_PATIENCE
        statement = (
            "select state from rekey.rotation_status where keyring = 'tenant-1' and trigger = 'schedule'"
        )
        begun = None
        self._say("waiting for pg_cron, which looks every minute (every 10 seconds from pg_cron 1.5 on)")
        with db.connect(autocommit=True) as connection:
            while time.monotonic() < patience:
                rows = connection.execute(statement).fetchall()
                if rows and begun is None:
                    begun = time.time()
                if rows and begun and rows[0]["state"] == "completed":
                    self._phases["during"].append((begun, time.time()))
                    return
                time.sleep(0.1)
            runs = connection.execute(
                "select concat_ws(', ', start_time, status, return_message) as told"
                " from cron.job_run_details order by runid desc limit 1"
            ).fetchall()
        raise Problem(
            f"pg_cron did not rotate within {CRON_PATIENCE:.0f} s",
            f"Its last run: {runs[0]['told']}." if runs else "It has run nothing yet.",
        )

    def _damaged(self) -> None:
        self._title("A row that does not open is named and kept, and the rotation goes on")
        with psycopg.connect(db.dsn(), autocommit=True) as connection:
            # What a failing disk could do: one byte is another one.
            saved = connection.execute(db.query("demo damage"), ["STRIPE_KEY"]).fetchone()
            with self._phase("during"):
                self._shell("rotate", "--keyring", "default", "--wait")
            self._shell("rotations", "failures")
            self._say("restored from a copy, as from a backup:")
            connection.execute("update rekey.secrets set ciphertext = %s where id = %s", saved)
            failures = connection.execute("select id from rekey.failure_status where resolved_at is null")
            for (failure,) in failures.fetchall():
                self._shell("rotations", "resolve", str(failure), "retry", "--reason", "restored")
        with self._phase("during"):
            self._shell("work")

    def _rolled_back(self) -> None:
        keyring = self._sizes.place(self._sizes.tenants - 1)[1]
        self._title(f"A rotation of {keyring} that is taken back half-way")
        with worker.connect() as connection, self._phase("during"):
            self._shell("rotate", "--keyring", keyring)
            statement = "select max(id) as id from rekey.rotation_status where keyring = %s"
            [row] = connection.execute(statement, [keyring]).fetchall()
            swept, steps = 0, worker.Steps(connection)
            while swept < self._sizes.secrets // self._sizes.tenants // 2:
                done = steps.take()
                swept += done["rows"]
                if done["event"] in ("completed", "idle"):
                    break
            self._shell("rotations", "rollback", str(row["id"]), "--reason", "demo")
            self._shell("work")
        self._shell("rotations", "list", "--keyring", keyring, "--limit", "2")

    def _compare(self, records: Sequence[Record]) -> list[str]:
        """Return the secrets that are not what was last stored."""
        sizes = self._sizes
        generations = {index: n for record in records for index, n in record.written.items()}
        due = {(NIL, name): text for name, text in envfile.parse(ENV_FILE).items()}
        for index in range(sizes.secrets):
            tenant, _, name = sizes.place(index)
            due[tenant, name] = value(name, generations.get(index, 0))
        found: dict[tuple[UUID, str], str] = {}
        with worker.connect() as connection:
            for tenant in {tenant for tenant, _ in due}:
                rows = connection.execute("select * from rekey.read_secrets(tenant_id => %s)", [tenant])
                found |= {(tenant, row["name"]): row["value"] for row in rows}
        return [f"{tenant}/{name}" for tenant, name in due if found.get((tenant, name)) != due[tenant, name]]

    def _report(self, records: Sequence[Record], wrong: list[str], seconds: float) -> dict[str, Any]:
        phases = [
            {"phase": phase, **_figures(records, kind, spans)}
            for phase, spans in self._phases.items()
            for kind in ("read", "write")
        ]
        return {
            "secrets": self._sizes.secrets + len(envfile.parse(ENV_FILE)),
            "wrong": wrong,
            "reads": sum(len(record.seconds) for record in records if record.kind == "read"),
            "writes": sum(len(record.seconds) for record in records if record.kind == "write"),
            "failed": sum(len(record.errors) for record in records),
            "errors": sorted({error for record in records for error in record.errors})[:5],
            "phases": phases,
            "seconds": seconds,
        }

    def _title(self, text: str) -> None:
        self._say(f"\n== {text}")

    def _watch(self, phase: str) -> None:
        with self._phase(phase):
            time.sleep(self._sizes.seconds)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begun = time.time()
        yield
        self._phases[name].append((begun, time.time()))


def _figures(records: Sequence[Record], kind: str, spans: list[tuple[float, float]]) -> dict[str, Any]:
    """Return count, median and 99th percentile, in milliseconds, of the calls that began in these spans."""
    calls = [
        took * 1000
        for record in records
        if record.kind == kind
        for began, took in zip(record.began, record.seconds, strict=False)
        if any(first <= began <= last for first, last in spans)
    ]
    cuts = statistics.quantiles(calls, n=100, method="inclusive") if len(calls) > 1 else []
    return {
        "kind": kind,
        "calls": len(calls),
        "median_ms": round(cuts[49], 2) if cuts else None,
        "p99_ms": round(cuts[98], 2) if cuts else None,
    }


@contextmanager
def _own_database(dsn: str) -> Iterator[str]:
    """Create a database for the demo, and drop it, with the roles that came with it."""
    name = f"pg_rekey_demo_{uuid4().hex[:8]}"
    with psycopg.connect(dsn, autocommit=True) as connection:
        before = _roles(connection)
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        try:
            yield make_conninfo(dsn, dbname=name)
        finally:
            connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))
            for role in _roles(connection) - before:
                # Another database may have come to use it meanwhile.
                with suppress(psycopg.errors.DependentObjectsStillExist):
                    connection.execute(sql.SQL("drop role {}").format(sql.Identifier(role)))


def _roles(connection: psycopg.Connection) -> set[str]:
    """Return the roles of pg_rekey that are there, and nobody else's."""
    return {name for name, _ in connection.execute(db.query("uninstall roles"))}


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set these variables, and none of their kind besides."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith("PG_REKEY_") or name == "DATABASE_URL":
            del os.environ[name]
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)

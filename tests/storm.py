"""The kill storm: writers, readers, workers and administrators at work while processes die at random points.

Every writer owns its values and remembers what it committed; where the answer to a COMMIT was lost, either
outcome is right, and the next look decides. Readers compare what they see with what can be there. A seed
gives the order of actions back, as far as processes that run at once allow it.
"""

import contextlib
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, LiteralString

import psycopg

from cli_fixtures import COMMAND
from helpers import Connection, connect, destroy_due, initialize, install, value
from pg_rekey import kek as keks
from pg_rekey import local, release

WRITERS, READERS = 3, 2
NAMES = 120  # of each writer, half of them secrets, half of them rows of a protected table
KEYRINGS = ("default", "other")
CHECK_EVERY = 10  # kills
PATIENCE = 120.0
LEVELS = ("read committed",) * 3 + ("repeatable read", "serializable")
DAMAGED = ("RK003", "RK006")
# What a session may meet here, and tries again after: conflicts, time-outs, refusals.
PASSING = ("40001", "40P01", "55P03", "57014")
REFUSALS = ("RK004", "RK005", "RK006", "RK007")

SET_UP: LiteralString = """
    select rekey.create_keyring('other');
    create table tokens (id integer primary key, v text);
    select rekey.protect_column('tokens', 'v', encrypt_on_write => true);
    select rekey.set_setting('batch_target', '10 ms');
    update rekey._worker set last_tick_at = now();
"""
UNFINISHED: LiteralString = """
    select id, state, last_error, blocked_by from rekey.rotation_status
    where state in ('queued', 'running', 'paused', 'verifying', 'failed')"""
UNUSED: LiteralString = """
    select keyring, version, state from rekey.key_status where state not in ('active', 'destroyed')"""
ACTIVE: LiteralString = """
    select keyring, count(*) from rekey.key_status where state = 'active' group by 1 order by 1"""
TWICE: LiteralString = """
    select count(*) from (
      select from rekey.audit_log where event in ('rotation.requested', 'rotation.rolled_back')
      group by event, rotation_id having count(*) > 1) t"""
STALE: LiteralString = """
    select count(*) from rekey.secrets s
    join rekey.encryption_keys k on k.keyring_id = s.keyring_id and k.version = s.key_version
    where k.state <> 'active' and not exists (
      select from rekey.rotations r where r.keyring_id = s.keyring_id and rekey._is_under_way(r.state))"""
TOKENS: LiteralString = """
    select id, rekey.decrypt_text(v, array['public.tokens.v', id::text]) from tokens where id = any (%s)"""
PLAIN: LiteralString = (
    "insert into tokens values (%(id)s, %(v)s) on conflict (id) do update set v = excluded.v"
)
SEALED: LiteralString = """
    insert into tokens
    values (%(id)s, rekey.encrypt_text(%(v)s, 'default', array['public.tokens.v', %(id)s::integer::text]))
    on conflict (id) do update set v = excluded.v"""
VICTIMS: LiteralString = """
    select pid, case when application_name like 'storm %%' then substr(application_name, 7) else 'worker' end
    from pg_stat_activity
    where datname = current_database() and pid <> pg_backend_pid()
      and (application_name like any ('{storm %%,pg-rekey}')
        or backend_type like 'pg_cron%%' and query like '%%tick%%')
    order by 2, 1"""

Report = Callable[[int, str], None]  # how many kills there were, and the last of them
Key = tuple[Literal["secret", "token"], int]
Values = dict[Key, str | None]


@dataclass(frozen=True)
class Figures:
    """What a storm did and found."""

    seed: int
    kills: int
    killed: dict[str, int]
    rotations: int
    completed: int
    kek_rotations: int
    versions_destroyed: int
    rows_written: int
    rows_checked: int
    answers_lost: int
    lost: int
    undecryptable: int
    broken: tuple[str, ...]
    seconds: float

    @property
    def fine(self) -> bool:
        """Whether nothing was lost and every invariant held."""
        return not (self.lost or self.undecryptable or self.broken)


@dataclass
class Attempt:
    """A value that was sent to be committed; None deletes."""

    value: str | None
    state: Literal["open", "committed", "undone"] = "open"


class History:
    """What was attempted with one value, in order."""

    def __init__(self) -> None:
        self._attempts = [Attempt(None, "committed")]
        self._last = 0

    def begin(self, new: str | None) -> Attempt:
        self._attempts.append(Attempt(new))
        return self._attempts[-1]

    def settle(self, committed: bool) -> None:
        self._attempts[-1].state = "committed" if committed else "undone"
        if committed:
            self._last = len(self._attempts) - 1

    @property
    def last(self) -> int:
        """Where the last value stands that is known to be committed."""
        return self._last

    @property
    def committed(self) -> str | None:
        return self._attempts[self._last].value

    def possible(self, since: int) -> set[str | None]:
        """What can have been seen by who began to look when `since` was the last one."""
        return {one.value for one in self._attempts[since:] if one.state != "undone"}


@dataclass
class Counts:
    """What all threads count together."""

    rows_written: int = 0
    rows_checked: int = 0
    answers_lost: int = 0
    lost: int = 0
    undecryptable: int = 0
    killed: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **counts: int) -> None:
        with self.lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def complain(self, problem: str) -> None:
        with self.lock:
            if problem not in self.broken and len(self.broken) < 50:
                self.broken.append(problem)


class Storm:
    """A server, its KEKs, and everybody who works on it."""

    def __init__(self, server: local.Server, seed: int, report: Report, output: IO[str]) -> None:
        self.server, self.seed, self.report = server, seed, report
        self.dsn = server.dsn()
        self.histories: dict[Key, History] = {}
        self.counts = Counts()
        self.stop = threading.Event()
        self.calm = threading.Event()  # the administrator begins nothing more
        self.kek = self.next_kek = bytes.fromhex(keks.generate())
        self._put_kek(self.kek)
        install(self.dsn, release.assemble("plain"))
        with connect(self.dsn) as connection:
            initialize(connection, self.kek)
            connection.execute("select rekey.set_setting('kek_provider', 'file')")
            connection.execute(SET_UP)
            if server.installation.has("pg_cron"):
                connection.execute("create extension pg_cron")
                connection.execute("select rekey.schedule_worker()")
        self.writers = [Writer(self, slot) for slot in range(WRITERS)]
        readers = [Reader(self, slot) for slot in range(READERS)]
        self.administrator = Administrator(self)
        self.actors: list[Actor] = [*self.writers, *readers, self.administrator, Hand(self)]
        self.output = output
        self.workers = [Worker(self, "provider"), Worker(self, "environment")]

    def choices(self, name: str) -> random.Random:
        return random.Random(f"{self.seed} {name}")

    def kek_file(self, suffix: str = "") -> Path:
        return self.server.data / f"pg_rekey.kek{suffix}"

    def _put_kek(self, kek: bytes, suffix: str = "") -> None:
        """Replace a KEK file of the server, at once and whole."""
        place = self.kek_file(suffix)
        draft = place.with_name(f"{place.name}.draft")
        self.server.write(f"data/{draft.name}", kek.hex())
        self.server._run("/usr/bin/env", "mv", draft, place)

    def hand_out_next_kek(self, connection: Connection) -> None:
        """Let the server find the active KEK first and a fresh one second, and never miss the active one."""
        active = value(connection, "select fingerprint from rekey.keks where state = 'active'")
        if keks.fingerprint(self.next_kek) == active:
            self.kek = self.next_kek
        self._put_kek(self.kek)
        time.sleep(1)
        self.next_kek = bytes.fromhex(keks.generate())
        self._put_kek(self.next_kek, "_new")

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Hold the writers between two transactions."""
        with contextlib.ExitStack() as stack:
            for writer in self.writers:
                stack.enter_context(writer.turn)
            yield

    def check(self) -> None:
        """Compare every value with what was committed, and look at every invariant."""
        with self.still():
            seen = retried(self.dsn, self._look_at_all)
        self.counts.add(rows_checked=len(seen))
        for key, found in seen.items():
            if found != (expected := self.histories[key].committed):
                self.counts.add(lost=1)
                self.counts.complain(f"{key} is {found!r}, not {expected!r}")

    def _look_at_all(self, connection: Connection) -> Values:
        for writer in self.writers:
            writer.settle(connection)
        self._invariants(connection)
        return self.look(connection, self.histories)

    def _invariants(self, connection: Connection) -> None:
        complain = self.counts.complain
        failed = value(connection, "select coalesce(sum(failed), 0) from rekey.verify_ciphertexts()")
        if failed:
            self.counts.add(undecryptable=int(failed))
            complain(f"verify_ciphertexts: {failed} rows do not open")
        quarantined = value(
            connection, "select count(*) from rekey.rotation_failures where resolved_at is null"
        )
        if quarantined:
            complain(f"{quarantined} rows in quarantine")
        dead: LiteralString = """
            select count(*) from rekey.key_usage()
            where rows > 0 and state in ('destroyed', 'destroy_scheduled')"""
        if number := value(connection, dead):
            complain(f"{number} versions in use are destroyed, or about to be")
        found = connection.execute(ACTIVE).fetchall()
        if found != [(name, 1) for name in KEYRINGS]:
            complain(f"active versions: {found}")
        if number := value(connection, STALE):
            complain(f"{number} rows were left behind by rotations that ended")
        audit = connection.execute("select valid, reason from rekey.verify_audit_log()").fetchone()
        if audit != (True, None):
            complain(f"audit log: {audit}")
        if number := value(connection, TWICE):
            complain(f"{number} audit entries are there twice")

    def look(self, connection: Connection, keys: Iterable[Key]) -> Values:
        """Open values, all at once; one by one where one of them does not open, which is counted."""
        try:
            return look(connection, keys)
        except psycopg.Error as error:
            if error.sqlstate not in DAMAGED:
                raise
        seen: Values = {}
        for key in keys:
            try:
                seen |= look(connection, [key])
            except psycopg.Error as error:
                if error.sqlstate not in DAMAGED:
                    raise
                self.counts.add(undecryptable=1)
                self.counts.complain(f"{key} does not open: {error.sqlstate} {error.diag.message_primary}")
        return seen

    def finish(self) -> None:
        """Let every rotation end, destroy every version that is not active, and read everything once more."""
        self.calm.set()
        # The last kill may have taken the server with it: it is noticed a moment later.
        retried(self.dsn, lambda c: self._await(c, UNFINISHED, self.administrator.retry))
        self.check()
        retried(self.dsn, lambda c: self._await(c, UNUSED, self.administrator.destroy))
        self.check()

    def _await(self, connection: Connection, left: LiteralString, urge: Callable[[Connection], None]) -> None:
        until = time.monotonic() + PATIENCE
        while found := connection.execute(left).fetchall():
            if time.monotonic() > until:
                self.counts.complain(f"still there after {PATIENCE:.0f} s: {found}")
                return
            with contextlib.suppress(psycopg.Error):
                urge(connection)
            time.sleep(0.2)


def look(connection: Connection, keys: Iterable[Key]) -> Values:
    """Read values in one statement of each kind; None is what is not there."""
    keys = list(keys)
    seen: Values = dict.fromkeys(keys)
    names = [f"s{number}" for kind, number in keys if kind == "secret"]
    if names:
        for name, found in connection.execute("select * from rekey.read_secrets(%s)", (names,)):
            seen["secret", int(name[1:])] = found
    numbers = [number for kind, number in keys if kind == "token"]
    if numbers:
        for number, found in connection.execute(TOKENS, (numbers,)):
            seen["token", number] = found
    return seen


def patient(dsn: str, **parameters: str) -> Connection:
    """Connect as soon as the server takes connections."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return connect(dsn, **parameters)
        except psycopg.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(0.03)


def retried(dsn: str, action: Callable[[Connection], Any]) -> Any:
    """Do this on a connection; on another one where the server takes that away."""
    until = time.monotonic() + PATIENCE
    while True:
        connection = patient(dsn)
        try:
            with connection:
                return action(connection)
        except psycopg.OperationalError:
            if not connection.closed or time.monotonic() > until:
                raise


class Actor(threading.Thread):
    """Somebody with a session who goes on when it is lost."""

    role = ""
    pause = 0.01

    def __init__(self, storm: Storm, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.storm = storm
        self.choice = storm.choices(name)
        self._connection: Connection | None = None

    @property
    def connection(self) -> Connection:
        if self._connection is None or self._connection.closed:
            self._connection = patient(self.storm.dsn, application_name=f"storm {self.role}")
        return self._connection

    def run(self) -> None:
        try:
            while not self.storm.stop.wait(self.choice.random() * self.pause):
                try:
                    self.act()
                except psycopg.Error as error:
                    self.met(error)
                    self.rest()
        except BaseException as error:
            self.storm.counts.complain(f"{self.name} ended: {error!r}")
            raise
        finally:
            if self._connection:
                self._connection.close()

    def act(self) -> None:
        raise NotImplementedError

    def met(self, error: psycopg.Error) -> None:
        """Pass over what was to be expected; everything else is a finding."""
        if self.connection_lost() or error.sqlstate in PASSING:
            return
        self.storm.counts.complain(f"{self.role}: {error.sqlstate} {error.diag.message_primary or error}")

    def connection_lost(self) -> bool:
        return self._connection is None or self._connection.closed

    def rest(self) -> None:
        """Leave a transaction that failed."""
        if not self.connection_lost():
            with contextlib.suppress(psycopg.Error):
                self.connection.execute("rollback")

    def impatient(self) -> None:
        """Now and then, let the transaction give up soon."""
        if self.choice.random() < 0.1:
            setting = self.choice.choice(("statement_timeout", "lock_timeout"))
            milliseconds = self.choice.choice((2, 20, 100))
            self.connection.execute(f"set local {setting} = {milliseconds}".encode())


class Writer(Actor):
    """Writes secrets and rows of a protected table, in transactions of all kinds."""

    role = "writer"

    def __init__(self, storm: Storm, slot: int) -> None:
        super().__init__(storm, f"writer {slot}")
        numbers = [slot * NAMES + n for n in range(NAMES // 2)]
        self.keys: list[Key] = [("secret", n) for n in numbers] + [("token", n) for n in numbers]
        for key in self.keys:
            storm.histories[key] = History()
        self.turn = threading.Lock()
        self.count = 0
        self.unsettled: Values = {}

    def act(self) -> None:
        with self.turn:
            if self.unsettled:
                self.settle(self.connection)
            self.write()

    def write(self) -> None:
        connection, histories = self.connection, self.storm.histories
        connection.execute(f"begin isolation level {self.choice.choice(LEVELS)}".encode())
        self.impatient()
        new: Values = {}
        for _ in range(self.choice.choice((1, 1, 2, 5, 20))):
            self.count += 1
            key = self.choice.choice(self.keys)
            new[key] = None if self.choice.random() < 0.25 else f"{key[0]} {key[1]}: {self.count}"
            self.store(key, new[key])
            if self.choice.random() < 0.03:
                time.sleep(self.choice.random() * 0.5)
        if all(histories[key].committed is None for key in new) and self.choice.random() < 0.25:
            # Rows that nobody can see or lock yet, for as long as a rotation and a destruction would take.
            time.sleep(3)
        if self.choice.random() < 0.1:
            connection.execute("rollback")
            return
        for key, it in new.items():
            histories[key].begin(it)
        try:
            connection.execute("commit")
        except psycopg.Error:
            if self.connection_lost():
                self.unsettled = new
                self.storm.counts.add(answers_lost=1)
            else:
                self.end(new, committed=False)
            raise
        self.end(new, committed=True)

    def store(self, key: Key, new: str | None) -> None:
        kind, number = key
        run = self.connection.execute
        match kind, new:
            case "secret", None:
                run("select rekey.delete_secret(%s)", (f"s{number}",))
            case "secret", _:
                keyring = KEYRINGS[number % 2]
                run("select rekey.set_secret(%s, %s, keyring => %s)", (f"s{number}", new, keyring))
            case "token", None:
                run("delete from tokens where id = %s", (number,))
            case "token", _ if self.choice.random() < 0.3:
                run(SEALED, {"id": number, "v": new})
            case _:
                run(PLAIN, {"id": number, "v": new})

    def end(self, new: Values, *, committed: bool) -> None:
        for key in new:
            self.storm.histories[key].settle(committed)
        if committed:
            self.storm.counts.add(rows_written=len(new))

    def settle(self, connection: Connection) -> None:
        """Find out what became of a COMMIT whose answer was lost: all of it, or nothing."""
        if not self.unsettled:
            return
        new, histories = self.unsettled, self.storm.histories
        seen = self.storm.look(connection, new)
        # A value that was deleted, and was not there before, tells nothing.
        telling = [key for key in seen if new[key] != histories[key].committed]
        outcomes = {seen[key] == new[key] for key in telling}
        if len(outcomes) == 2:
            self.storm.counts.add(lost=1)
            self.storm.counts.complain(f"a transaction was half committed: {sorted(new)}")
        self.end(new, committed=outcomes == {True})
        self.unsettled = {}


class Reader(Actor):
    """Opens values while everything moves, in one statement or twice in one snapshot."""

    role = "reader"

    def __init__(self, storm: Storm, slot: int) -> None:
        super().__init__(storm, f"reader {slot}")

    def act(self) -> None:
        storm, connection = self.storm, self.connection
        histories = storm.histories
        keys = self.choice.sample(sorted(histories), 20)
        level = self.choice.choice(LEVELS)
        connection.execute(f"begin isolation level {level}".encode())
        self.impatient()
        since = {key: histories[key].last for key in keys}
        seen = look(connection, keys)
        possible = {key: histories[key].possible(since[key]) for key in keys}
        if level != "read committed":
            time.sleep(self.choice.random() * 0.3)
            again = look(connection, keys)
            if again != seen:
                storm.counts.add(lost=1)
                storm.counts.complain("one snapshot showed two values")
        connection.execute("commit")
        storm.counts.add(rows_checked=len(keys))
        for key in keys:
            if seen[key] not in possible[key]:
                storm.counts.add(lost=1)
                storm.counts.complain(f"{key} was {seen[key]!r}, not one of {possible[key]}")

    def met(self, error: psycopg.Error) -> None:
        if error.sqlstate in DAMAGED:
            self.storm.counts.add(undecryptable=1)
        super().met(error)


class Hand(Actor):
    """Works on rotations by hand, beside the workers and pg_cron."""

    role = "worker"
    pause = 0.2

    def __init__(self, storm: Storm) -> None:
        super().__init__(storm, "hand")

    def act(self) -> None:
        self.connection.execute("call rekey.run_rotations('2 s')")


class Administrator(Actor):
    """Begins rotations all the time, and orders everything else that can be ordered."""

    role = "administrator"
    pause = 0.3

    def __init__(self, storm: Storm) -> None:
        super().__init__(storm, "administrator")

    def act(self) -> None:
        if self.storm.calm.is_set():
            return
        orders: dict[Callable[[], None], int] = {
            self.rotate: 30,
            self.supersede: 8,
            self.rollback: 8,
            self.compromise: 5,
            self.hold: 5,
            self.kek: 3,
            lambda: self.retry(self.connection): 5,
            lambda: self.destroy(self.connection): 30,
        }
        [order] = self.choice.choices([*orders], [*orders.values()])
        order()

    def met(self, error: psycopg.Error) -> None:
        if error.sqlstate not in REFUSALS:
            super().met(error)

    def rotate(self) -> None:
        self.connection.execute("select rekey.rotate_keys(%s)", (self.choice.choice((*KEYRINGS, None)),))

    def supersede(self) -> None:
        keyring = self.choice.choice(KEYRINGS)
        self.connection.execute("select rekey.rotate_keys(%s, supersede => true)", (keyring,))

    def rollback(self) -> None:
        self.connection.execute("select rekey.rollback_rotation(%s)", (self.last(),))

    def compromise(self) -> None:
        usable: LiteralString = """
            select keyring, version from rekey.key_status
            where state in ('active', 'decrypt_only') order by 1, 2"""
        keys = self.connection.execute(usable).fetchall()
        self.connection.execute("select rekey.mark_key_compromised(%s, %s)", self.choice.choice(keys))

    def hold(self) -> None:
        number = self.last()
        self.connection.execute("select rekey.pause_rotation(%s)", (number,))
        time.sleep(self.choice.random() * 0.2)
        self.connection.execute("select rekey.resume_rotation(%s)", (number,))

    def last(self) -> Any:
        keyring = self.choice.choice(KEYRINGS)
        return value(self.connection, "select max(id) from rekey.rotation_status where keyring = %s", keyring)

    def retry(self, connection: Connection) -> None:
        connection.execute("select rekey.resume_rotation(id) from rekey.rotations where state = 'paused'")
        connection.execute("select rekey.retry_rotation(id) from rekey.rotations where state = 'failed'")

    def kek(self) -> None:
        self.storm.hand_out_next_kek(self.connection)
        self.connection.execute("select rekey.rotate_kek()")

    def destroy(self, connection: Connection) -> None:
        """Destroy every version that nothing uses, without waiting for the days of grace."""
        postponed: LiteralString = """
            select rekey.cancel_key_destruction(keyring, version) from rekey.key_status
            where state = 'destroy_scheduled' and destroy_after > now() + interval '1 hour'"""
        unused: LiteralString = """
            select keyring, version from rekey.key_status
            where state in ('decrypt_only', 'compromised', 'disabled') order by 1, 2"""
        connection.execute(postponed)
        for key in connection.execute(unused).fetchall():
            try:
                connection.execute("select rekey.schedule_key_destruction(%s, %s, '0 s')", key)
            except psycopg.Error as error:
                if error.sqlstate not in REFUSALS:
                    raise
        destroy_due(connection)


class Worker(threading.Thread):
    """Keeps a `pg-rekey work --forever` running."""

    def __init__(self, storm: Storm, kek: Literal["provider", "environment"]) -> None:
        super().__init__(name=f"worker with its KEK from the {kek}", daemon=True)
        self.storm = storm
        self.choice = storm.choices(self.name)
        self.process: subprocess.Popen[str] | None = None
        unset = ("PG_REKEY_", "PG", "DATABASE_URL")
        self.environment = {name: it for name, it in os.environ.items() if not name.startswith(unset)}
        self.environment["PG_REKEY_DSN"] = storm.dsn
        if kek == "environment":
            self.environment["PG_REKEY_KEK_FILE"] = str(storm.kek_file())
            self.environment["PG_REKEY_NEW_KEK_FILE"] = str(storm.kek_file("_new"))

    def run(self) -> None:
        while not self.storm.stop.wait(0.1):
            output: IO[str] = self.storm.output
            options = {"PGOPTIONS": f"-c lock_timeout={self.choice.choice((0, 0, 5, 100))}"}
            command = [COMMAND, "work", "--forever"]
            self.process = subprocess.Popen(
                command,
                env=self.environment | options,
                stdout=output,
                stderr=output,
                text=True,
                process_group=0,
            )
            self.process.wait()

    def kill(self) -> bool:
        """Kill the process as it stands, and tell whether there was one."""
        if self.process is None or self.process.poll() is not None:
            return False
        self.process.kill()
        return True


class Killer:
    """Ends processes at random points."""

    def __init__(self, storm: Storm) -> None:
        self.storm = storm
        self.choice = storm.choices("killer")

    def kill(self) -> str:
        """Kill something, and say what."""
        while True:
            ways = (self.backend, self.session, self.worker, self.postmaster, self.at_once)
            way = self.choice.choices(ways, (25, 40, 20, 8, 7))[0]
            if victim := way():
                return victim

    def disturb(self) -> None:
        """Stop a backend for a moment, or cancel what it does."""
        pid, _ = self.victim()
        if self.choice.random() < 0.5:
            self.tell("select pg_cancel_backend(%s)", pid)
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(self.choice.random() * 0.3)
            os.kill(pid, signal.SIGCONT)

    def victim(self) -> tuple[int, str]:
        """Choose a session, each role as often as the others."""
        while not (found := self.tell(VICTIMS)):
            time.sleep(0.05)
        role = self.choice.choice(sorted({role for _, role in found}))
        return self.choice.choice([pid for pid, it in found if it == role]), role

    def tell(self, query: LiteralString, *parameters: Any) -> list[Any]:
        found: list[Any] = retried(self.storm.dsn, lambda c: c.execute(query, parameters).fetchall())
        return found

    def backend(self) -> str:
        pid, role = self.victim()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return f"kill -9: {role}'s backend"

    def session(self) -> str:
        pid, role = self.victim()
        self.tell("select pg_terminate_backend(%s)", pid)
        return f"terminate: {role}'s backend"

    def worker(self) -> str:
        return "kill -9: pg-rekey work" if self.choice.choice(self.storm.workers).kill() else ""

    def postmaster(self) -> str:
        patient(self.storm.dsn).close()
        self.storm.server.kill()
        self.storm.server.restart()
        return "kill -9: the whole server"

    def at_once(self) -> str:
        patient(self.storm.dsn).close()
        self.storm.server.restart("immediate")
        return "stop -m immediate"


def storm(kills: int, seed: int, report: Report, sabotage: str = "") -> Figures:
    """Raise a storm of so many kills on a server of its own, and return what was found.

    sabotage: SQL that breaks the product first, to see that the storm finds it out.
    """
    begun = time.monotonic()
    with local.Server(durable=True) as server, tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        here = Storm(server, seed, report, output)
        with connect(here.dsn) as connection:
            connection.execute(sabotage.encode())
        try:
            for thread in (*here.actors, *here.workers):
                thread.start()
            killer = Killer(here)
            for number in range(1, kills + 1):
                time.sleep(0.2 + killer.choice.random() * 0.9)
                if killer.choice.random() < 0.3:
                    killer.disturb()
                victim = killer.kill()
                here.counts.killed[victim] += 1
                if number % CHECK_EVERY == 0:
                    here.check()
                report(number, victim)
                if here.counts.broken:
                    break
            here.finish()
        finally:
            here.stop.set()
            for worker in here.workers:
                worker.kill()
            for thread in (*here.actors, *here.workers):
                thread.join(PATIENCE)
        return figures(here, time.monotonic() - begun)


def figures(here: Storm, seconds: float) -> Figures:
    """Count what there was."""
    counts = here.counts
    here.output.seek(0)
    if "Traceback" in (printed := here.output.read()):
        counts.complain("a worker printed a traceback: " + printed[printed.index("Traceback") :][:2000])
    query: LiteralString = """
        select (select count(*) from rekey.rotations),
          (select count(*) from rekey.rotations where state = 'completed'),
          (select count(*) - 1 from rekey.keks),
          (select count(*) from rekey.encryption_keys where state = 'destroyed')"""
    with patient(here.dsn) as connection:
        row = connection.execute(query).fetchone()
    assert row is not None
    return Figures(
        seed=here.seed,
        kills=counts.killed.total(),
        killed=dict(sorted(counts.killed.items())),
        rotations=row[0],
        completed=row[1],
        kek_rotations=row[2],
        versions_destroyed=row[3],
        rows_written=counts.rows_written,
        rows_checked=counts.rows_checked,
        answers_lost=counts.answers_lost,
        lost=counts.lost,
        undecryptable=counts.undecryptable,
        broken=tuple(counts.broken),
        seconds=seconds,
    )

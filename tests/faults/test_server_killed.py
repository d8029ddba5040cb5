"""The server is lost in the middle: what was committed is there, nothing else is, and the work goes on."""

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import LiteralString

import psycopg
import pytest

from driving import in_background, on_versions, rotate, rotation, run, states, step_until, waits
from estate import ROUNDS, Estate
from helpers import Connection, connect, unlock, value
from pg_rekey import local

numbers = itertools.count(1)


@pytest.fixture(scope="module")
def server() -> Iterator[local.Server]:
    with local.Server(durable=True) as server:
        yield server


@pytest.fixture
def estate(server: local.Server, kek: bytes) -> Estate:
    return Estate.build(server, f"killed_{next(numbers)}", kek)


def kill(server: local.Server) -> None:
    """End all its processes with SIGKILL."""
    server.kill()
    server.restart()


def stop_immediately(server: local.Server) -> None:
    """Stop it without a checkpoint; it has to recover."""
    server.restart("immediate")


@dataclass
class Writer:
    """Writes one secret again and again until its server is lost; the last value may or may not be there."""

    estate: Estate
    name: str
    known: list[str] = field(default_factory=list)
    begun: bool = False

    def __call__(self, stop: threading.Event) -> None:
        try:
            with self.estate.connect() as connection:
                for n in itertools.count():
                    self.known = [*self.known[-1:], f"{self.name} {n}"]
                    connection.execute("select rekey.set_secret(%s, %s)", (self.name, self.known[-1]))
                    self.known, self.begun = self.known[-1:], True
                    if stop.is_set():
                        break
        except psycopg.OperationalError:
            pass

    def settle(self, connection: Connection) -> None:
        """Take what is there for its value, if it can be."""
        found = value(connection, "select rekey.get_secret(%s)", self.name)
        assert found in self.known
        self.known = [found]
        self.estate.secrets[self.name] = found


NEXT_KEK = bytes(range(32))


def to_a_batch(connection: Connection, _: Estate) -> None:
    rotate(connection)
    step_until(connection, "planned")


def to_the_end_of_the_sweep(connection: Connection, _: Estate) -> None:
    rotate(connection)
    step_until(connection, "swept")
    step_until(connection, "swept")  # the barrier


def to_a_destruction(connection: Connection, _: Estate) -> None:
    rotate(connection)
    connection.execute("call rekey.tick()")
    connection.execute("select rekey.schedule_key_destruction('default', 1, '0 s')")
    # Up to the count, which the writers of the test would have to end for.
    while value(connection, "select rekey._tick_duty('destructions', now())") == "search":
        connection.execute("select rekey.search_step()")


def to_a_table(connection: Connection, _: Estate) -> None:
    connection.execute("create table late (id int primary key, v text)")


def to_the_next_kek(connection: Connection, estate: Estate) -> None:
    unlock(connection, estate.kek, NEXT_KEK)


# What is in hand when the server goes: what comes before it, the statement, and a row it has to wait for.
# When it waits, all is written and nothing committed: the audit log comes last in each transaction.
HEAD: LiteralString = "select from rekey._audit_head for update"
ROTATIONS: LiteralString = "select from rekey.rotations for update"
IN_HAND: dict[str, tuple[Callable[[Connection, Estate], None], LiteralString, LiteralString]] = {
    "request": (lambda *_: None, "select rekey.rotate_keys('default')", HEAD),
    "batch": (to_a_batch, "call rekey.run_rotations()", ROTATIONS),
    "completion": (to_the_end_of_the_sweep, "call rekey.run_rotations()", HEAD),
    "destruction": (to_a_destruction, "call rekey.tick()", HEAD),
    "protection": (to_a_table, "select rekey.protect_column('public.late', 'v')", HEAD),
    "next KEK": (to_the_next_kek, "select rekey.rotate_kek()", HEAD),
}
# In each, what tells that it was done, and so often after it was done again.
DONE: dict[str, LiteralString] = {
    "request": "select count(*) from rekey.audit_log where event = 'rotation.requested'",
    "batch": "select rows_done from rekey.rotation_status",
    "completion": "select count(*) from rekey.audit_log where event = 'rotation.completed'",
    "destruction": "select count(*) from rekey.audit_log where event = 'key.destroyed'",
    "protection": "select count(*) from rekey.protected_columns where label = 'public.late.v'",
    "next KEK": "select count(*) from rekey.audit_log where event = 'kek.rotated'",
}


@pytest.mark.parametrize(
    ("in_hand", "lose"), [*((name, kill) for name in IN_HAND), ("batch", stop_immediately)]
)
def test_the_server_is_lost_with_work_in_hand(
    server: local.Server, estate: Estate, in_hand: str, lose: Callable[[local.Server], None]
) -> None:
    prepare, statement, row = IN_HAND[in_hand]
    done = DONE[in_hand]
    writers = [Writer(estate, f"written {n}") for n in range(2)]
    with estate.connect() as worker, estate.connect() as holder, ThreadPoolExecutor(1) as pool:
        prepare(worker, estate)
        assert value(worker, done) == 0
        with in_background(*writers):
            holder.execute("begin")
            holder.execute(row)
            hanging = pool.submit(worker.execute, statement)
            waits(holder, worker.info.backend_pid)
            while not all(writer.begun for writer in writers):
                time.sleep(0.01)
            lose(server)
            with pytest.raises(psycopg.OperationalError):
                hanging.result(30)
    with estate.connect() as connection:
        for writer in writers:
            writer.settle(connection)
        estate.check(connection)
        assert value(connection, done) == 0
        if in_hand == "next KEK":
            to_the_next_kek(connection, estate)
        connection.execute(statement)
        run(connection)
        assert value(connection, done) == (estate.rows - len(writers) if in_hand == "batch" else 1)
        estate.check(connection)
        rotate(connection)
        run(connection)
        assert set(on_versions(connection)) == {max(states(connection))}
        estate.check(connection)


def test_the_server_is_lost_at_any_moment(server: local.Server, estate: Estate) -> None:
    """Kills come by chance, while two workers and two writers are busy."""
    chance = random.Random(7)
    writers = [Writer(estate, f"written {n}") for n in range(2)]

    def work(_: threading.Event) -> None:
        with contextlib.suppress(psycopg.OperationalError), estate.connect() as worker:
            worker.execute("set client_min_messages = error")
            worker.execute("call rekey.run_rotations('1 hour')")

    with estate.connect() as connection:
        connection.execute("select rekey.set_setting('max_rows_per_second', '2000')")
    for _ in range(3 * ROUNDS):
        with estate.connect() as connection:
            connection.execute("select rekey.rotate_keys()")
        with in_background(work, work, *writers):
            time.sleep(chance.uniform(0.02, 0.4))
            chance.choice([kill, stop_immediately])(server)
        with estate.connect() as connection:
            for writer in writers:
                writer.settle(connection)
            estate.check(connection)
    with estate.connect() as connection:
        connection.execute("select rekey.set_setting('max_rows_per_second', null)")
        run(connection)
        last = value(connection, "select max(id) from rekey.rotations")
        assert rotation(connection, last, "state", "rows_failed", "last_error") == ("completed", 0, None)
        assert set(on_versions(connection)) == {max(states(connection))}
        estate.check(connection)


@contextlib.contextmanager
def forgetful(server: local.Server, estate: Estate) -> Iterator[None]:
    """Lose the server at the end; meanwhile, what does not wait for the disk does not get there."""
    with connect(server.dsn()) as connection:
        connection.execute(f"alter database {estate.name} set synchronous_commit = off".encode())
        walwriter = value(connection, "select pid from pg_stat_activity where backend_type = 'walwriter'")
        # Nor do others bring it there.
        connection.execute("alter system set autovacuum = off")
        connection.execute("select pg_reload_conf()")
        connection.execute("checkpoint")
    server._signal("STOP", walwriter)
    try:
        yield
    finally:
        kill(server)


def envelope(connection: Connection, keyring: str = "default") -> bytes:
    """What an application is given, and stores elsewhere."""
    return bytes(value(connection, "select rekey.encrypt('handed out', %s)", keyring))


def opens(connection: Connection, handed_out: object) -> bool:
    return bool(
        value(connection, "select convert_from(rekey.decrypt(%s), 'UTF8')", handed_out) == "handed out"
    )


def of_a_rotation(connection: Connection, _: Estate) -> bytes:
    rotate(connection)
    return envelope(connection)


def of_a_new_keyring(connection: Connection, _: Estate) -> bytes:
    connection.execute("select rekey.create_keyring('new')")
    return envelope(connection, "new")


def of_a_compromise(connection: Connection, _: Estate) -> bytes:
    connection.execute("select rekey.mark_key_compromised('default', 1)")
    return envelope(connection)


def of_a_rollback(connection: Connection, _: Estate) -> bytes:
    connection.execute("select rekey.rollback_rotation(%s)", [rotate(connection)])
    return envelope(connection)


def under_the_next_kek(connection: Connection, estate: Estate) -> bytes:
    to_the_next_kek(connection, estate)
    connection.execute("select rekey.rotate_kek()")
    estate.kek = NEXT_KEK  # the operator forgets the other one
    unlock(connection, NEXT_KEK)
    return envelope(connection)


@pytest.mark.parametrize(
    "make", [of_a_rotation, of_a_new_keyring, of_a_compromise, of_a_rollback, under_the_next_kek]
)
def test_the_key_of_what_was_handed_out_is_on_disk(
    server: local.Server, estate: Estate, make: Callable[[Connection, Estate], bytes]
) -> None:
    with forgetful(server, estate), estate.connect() as connection:
        handed_out = make(connection, estate)
        connection.execute("select rekey.set_secret('too late', 'lost')")
    with estate.connect() as connection:
        too_late = value(connection, "select count(*) from rekey.secrets where name = 'too late'")
        assert too_late == 0, "nothing is ever lost here"
        assert opens(connection, handed_out)
        estate.check(connection)


def test_an_end_that_was_told_is_on_disk(server: local.Server, estate: Estate) -> None:
    with estate.connect() as connection:
        to_a_destruction(connection, estate)
    with forgetful(server, estate), estate.connect() as connection:
        connection.execute("call rekey.tick()")
        number = rotate(connection)
        run(connection)
        assert rotation(connection, number, "state") == "completed"
    with estate.connect() as connection:
        assert states(connection) == {1: "destroyed", 2: "decrypt_only", 3: "active"}
        assert rotation(connection, number, "state", "rows_done") == ("completed", estate.rows)
        estate.check(connection)


def test_batches_that_are_lost_are_done_again(server: local.Server, estate: Estate) -> None:
    with estate.connect() as connection:
        number = rotate(connection)
        step_until(connection, "planned")
    with forgetful(server, estate), estate.connect() as connection:
        step_until(connection, "batch")
        assert rotation(connection, number, "rows_done") > 0
    with estate.connect() as connection:
        assert rotation(connection, number, "state", "rows_done") == ("running", 0)
        run(connection)
        assert rotation(connection, number, "state", "rows_done") == ("completed", estate.rows)
        estate.check(connection)

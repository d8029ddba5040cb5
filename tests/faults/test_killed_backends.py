"""A backend is killed in the middle, with -9 the whole server: nothing is half done, and it goes on."""

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import LiteralString

import psycopg
import pytest

from column_fixtures import protect
from driving import check, fill, rotate, rotation, run, states, waits
from helpers import Connection, connect, create_database, initialize, install, unlock, value
from pg_rekey import local, release

NEXT = bytes(range(32))
numbers = itertools.count(1)


@dataclass(frozen=True)
class Point:
    """Something under way: the row whose update hangs, how far it comes before, the call, and how it ends."""

    table: LiteralString
    when: LiteralString
    prepare: Callable[[Connection], object]
    call: LiteralString
    done: Callable[[Connection], bool]


def rotated(connection: Connection) -> None:
    rotate(connection)
    run(connection)


def destroying(connection: Connection) -> None:
    rotated(connection)
    connection.execute("update rekey._worker set last_tick_at = now()")
    connection.execute("select rekey.schedule_key_destruction('default', 1, '0 s')")


def completed(connection: Connection) -> bool:
    return bool(rotation(connection, 1, "state") == "completed")


RUN: LiteralString = "call rekey.run_rotations('20 s')"
POINTS = {
    "a batch of secrets": Point("rekey.secrets", "new.name = 's15'", rotate, RUN, completed),
    "a batch of a protected table": Point("t", "new.id = 15", rotate, RUN, completed),
    "a batch of an adoption": Point(
        "u", "new.id = 15", lambda c: c.execute("select from rekey.adopt_column('u', 'v')"), RUN, completed
    ),
    "a verification": Point("rekey.rotations", "new.state = 'completed'", rotate, RUN, completed),
    "a destruction": Point(
        "rekey.encryption_keys",
        "new.state = 'destroyed'",
        destroying,
        "call rekey.tick()",
        lambda c: states(c) == {1: "destroyed", 2: "active"},
    ),
    "a rotation of the KEK": Point(
        "rekey.encryption_keys",
        "new.kek_id <> old.kek_id and new.version = 2",
        rotated,
        "select rekey.rotate_kek()",
        lambda c: value(c, "select count(*) from rekey.keks") == 2,
    ),
}
FAILPOINT = """
    create function public.hold() returns trigger language plpgsql as $$
    begin perform pg_advisory_xact_lock(4711); return new; end $$;
    create trigger hold before update on {table} for each row when ({when}) execute function public.hold();
"""
STATE: LiteralString = """
    select (select jsonb_agg(to_jsonb(s) order by s.id) from rekey.secrets s),
      (select jsonb_agg(to_jsonb(t) order by t.id) from t),
      (select jsonb_agg(to_jsonb(u) order by u.id) from u),
      (select jsonb_agg(to_jsonb(k) order by k.id) from rekey.encryption_keys k),
      (select jsonb_agg(to_jsonb(k) order by k.id) from rekey.keks k),
      (select jsonb_agg(to_jsonb(r) order by r.id) from rekey.rotations r),
      (select count(*) from rekey.audit_log)"""
PLAIN: LiteralString = """
    select count(*) from (
      select id, rekey.decrypt_text(v, array['public.t.v', id::text]) as plain from t
      union all
      select id, case when v like 'plain%%' then v
                      else rekey.decrypt_text(v, array['public.u.v', id::text]) end
      from u) o
    where plain = 'plain ' || id"""


@pytest.fixture(scope="module")
def own() -> Iterator[local.Server]:
    """A server that may die."""
    with local.Server() as server:
        yield server


@pytest.fixture
def dsn(own: local.Server, kek: bytes) -> str:
    """A database there with secrets, a protected table, and another that is not adopted yet."""
    made = create_database(own.dsn(), f"killed_{next(numbers)}")
    install(made, release.assemble("plain"))
    with connect(made) as connection:
        initialize(connection, kek)
        fill(connection, 20)
        for table in ("t", "u"):
            connection.execute(f"create table {table} (id integer primary key, v text)".encode())
            protect(connection, table, encrypt_on_write=table == "t")
            connection.execute(
                f"insert into {table} select n, 'plain ' || n from generate_series(1, 20) n".encode()
            )
    return made


def reconnect(dsn: str, kek: bytes) -> Connection:
    """Connect as soon as the server is back, and unlock the session with the KEK that is active."""
    until = time.monotonic() + 60
    while True:
        try:
            connection = connect(dsn)
            unlock(connection, kek, NEXT)
            return connection
        except psycopg.OperationalError:
            assert time.monotonic() < until
            time.sleep(0.05)


def is_lost(connection: Connection) -> bool:
    try:
        connection.execute("select 1")
    except psycopg.OperationalError:
        return True
    return False


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGTERM], ids=lambda it: it.name)
@pytest.mark.parametrize("name", POINTS)
def test_killed_in_the_middle_of(dsn: str, kek: bytes, name: str, signal_: signal.Signals) -> None:
    point = POINTS[name]
    victim, gate = reconnect(dsn, kek), connect(dsn)
    point.prepare(victim)
    gate.execute(FAILPOINT.format(table=point.table, when=point.when).encode())
    with ThreadPoolExecutor(1) as pool:
        gate.execute("select pg_advisory_lock(4711)")
        running = pool.submit(victim.execute, point.call)
        waits(gate, victim.info.backend_pid)
        gate.execute("create table flushed ()")  # what was committed before it is on disk, too
        before = gate.execute(STATE).fetchone()
        os.kill(victim.info.backend_pid, signal_)
        with pytest.raises(psycopg.OperationalError):
            running.result(60)
    if signal_ == signal.SIGKILL:  # the server ends all other sessions, and may take its time
        until = time.monotonic() + 60
        while not is_lost(gate):
            assert time.monotonic() < until
            time.sleep(0.01)
    gate.close()
    with reconnect(dsn, kek) as connection:
        assert connection.execute(STATE).fetchone() == before
        assert not point.done(connection)
        connection.execute(f"drop trigger hold on {point.table}".encode())
        assert value(connection, PLAIN) == 40
        connection.execute(point.call)
        assert point.done(connection)
        assert value(connection, PLAIN) == 40
        assert value(connection, "select sum(failed) from rekey.verify_ciphertexts()") == 0
        check(connection, {f"s{n}": f"s{n}" for n in range(1, 21)})

"""Rotation among sessions that write, read, lock, move and die: nothing is lost, nobody is stopped."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import LiteralString

import psycopg
import pytest
from psycopg import IsolationLevel

from driving import (
    check,
    events,
    fill,
    in_background,
    on_versions,
    refused,
    rotate,
    rotation,
    run,
    states,
    step,
    step_until,
    waits,
)
from helpers import Connection, connect, destroy_due, unlock, value

LEVELS = [IsolationLevel.READ_COMMITTED, IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE]
SET: LiteralString = "select rekey.set_secret(%s, %s)"
SECRETS = 200_000


def test_200_000_secrets_under_load(ready: Connection, session: Callable[[], Connection]) -> None:
    begun = time.monotonic()
    model = fill(ready, SECRETS)
    ready.execute("analyze rekey.secrets")
    filled = time.monotonic() - begun
    done: dict[str, int] = {"reads": 0, "writes": 0}

    def write(slot: int) -> Callable[[threading.Event], None]:
        connection = session()
        choice = random.Random(slot)

        def task(stop: threading.Event) -> None:
            count = 0
            while not stop.wait(0.002):
                count += 1
                name = f"s{choice.randrange(SECRETS // 3) * 3 + slot + 1}"
                if name not in model:
                    continue
                new = f"{name}:{count}"
                match choice.randrange(8):
                    case 0:
                        with connection.transaction(force_rollback=True):
                            connection.execute(SET, (name, "never"))
                        new = model[name]
                    case 1:
                        name = f"new{slot}-{count}"
                        connection.execute(SET, (name, new))
                    case 2:
                        connection.execute("select rekey.delete_secret(%s)", (name,))
                        connection.execute(SET, (name, new))
                    case _:
                        connection.execute(SET, (name, new))
                model[name] = new
                assert value(connection, "select rekey.get_secret(%s)", name) == new
            done["writes"] += count

        return task

    def peruse(seed: int) -> Callable[[threading.Event], None]:
        connection = session()
        choice = random.Random(seed)

        def task(stop: threading.Event) -> None:
            count = 0
            while not stop.wait(0.005):
                names = [f"s{choice.randrange(SECRETS) + 1}" for _ in range(20)]
                found = dict(connection.execute("select * from rekey.read_secrets(%s)", (names,)))
                assert all(v.split(":")[0] == name for name, v in found.items())
                assert len(found) >= len(set(names)) - 3  # a writer may have deleted one to make it anew
                count += 1
            done["reads"] += count

        return task

    def work() -> Callable[[threading.Event], None]:
        connection = session()
        return lambda _: run(connection, "60 s")

    with in_background(write(0), write(1), write(2), peruse(7), peruse(8)):
        begun = time.monotonic()
        number = rotate(ready)
        instant = time.monotonic() - begun
        with in_background(work(), work()):
            pass
        rotated = time.monotonic() - begun
        assert rotation(ready, number, "state", "rows_failed", "attempts") == ("completed", 0, 0)
        time.sleep(0.2)
    print(
        f"\nfilled in {filled:.1f} s, rotate_keys {instant * 1000:.0f} ms, rotated in {rotated:.1f} s: {done}"
    )
    assert min(done.values()) > 20
    assert set(on_versions(ready)) == {2}
    log = events(ready, number)
    assert log[-2:] == ["rotation.started", "rotation.completed"]
    assert len(log) == 6
    check(ready, model)


def destroy(connection: Connection, version: int) -> None:
    """Schedule the destruction of a version for now, and let a tick do it."""
    connection.execute("select rekey.schedule_key_destruction('default', %s, '0 s')", (version,))
    connection.execute("update rekey._worker set last_tick_at = now()")
    destroy_due(connection)


def destroy_patiently(connection: Connection, version: int) -> None:
    """Repeat it where a writer with an older snapshot has the version in hand, until that one is refused."""
    until = time.monotonic() + 60
    while True:
        try:
            destroy(connection, version)
        except psycopg.DatabaseError as error:
            if error.sqlstate != "RK005" or time.monotonic() > until:
                raise
        else:
            return


@pytest.mark.parametrize(
    ("level", "passed"),
    [
        *(
            (IsolationLevel.REPEATABLE_READ, passed)
            for passed in ("requested", "swept", "completed", "destroyed")
        ),
        *((level, passed) for level in LEVELS[::2] for passed in ("requested", "destroyed")),
    ],
    ids=str,
)
def test_a_snapshot_older_than_the_rotation(
    ready: Connection, session: Callable[[], Connection], level: IsolationLevel, passed: str
) -> None:
    model = fill(ready, 10)
    writer, encrypter = session(), session()
    for connection in (writer, encrypter):
        connection.isolation_level = level
        connection.autocommit = False
        assert value(connection, "select count(*) from rekey.secrets") == 10
    rotate(ready)
    if passed == "swept":
        step_until(ready, "swept")
    elif passed in ("completed", "destroyed"):
        run(ready)
    if passed == "destroyed":
        destroy(ready, 1)
        # Its snapshot shows what stood on it, and could store it again.
        waited_for = level is not IsolationLevel.READ_COMMITTED
        assert states(ready)[1] == ("destroy_scheduled" if waited_for else "destroyed")
    if level is IsolationLevel.READ_COMMITTED:
        writer.execute(SET, ("new", "x"))
        sealed = value(encrypter, "select rekey.encrypt('x'::text)")
        assert value(ready, "select rekey.decrypt_text(%s::bytea)", sealed) == "x"
        model["new"] = "x"
    else:
        with refused("40001"):
            writer.execute(SET, ("new", "x"))
        with refused("40001"):
            encrypter.execute("select rekey.encrypt('x'::text)")
    for connection in (writer, encrypter):
        connection.commit()
    if passed == "destroyed":
        destroy_due(ready)
        assert states(ready)[1] == "destroyed"
    run(ready)
    assert set(on_versions(ready)) == {2}
    check(ready, model)


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_a_writer_meets_a_rotation_that_is_not_committed(
    ready: Connection, session: Callable[[], Connection], level: IsolationLevel
) -> None:
    model = fill(ready, 10)
    writer, other = session(), session()
    writer.isolation_level = level
    writer.execute("set lock_timeout = '20 s'")
    with writer.transaction():
        with other.transaction():
            number = rotate(other)
            writer.execute(SET, ("s1", "changed"))
            writer.execute(SET, ("new", "x"))  # it is not kept waiting
        assert "blocked" in step_until(ready, "blocked")
        with refused("RK005"):
            ready.execute("select rekey.schedule_key_destruction('default', 1)")
    run(ready)
    assert rotation(ready, number, "state", "blocked_by") == ("completed", None)
    assert set(on_versions(ready)) == {2}
    check(ready, model | {"s1": "changed", "new": "x"})


@pytest.mark.parametrize("level", LEVELS[1:], ids=lambda level: level.name)
def test_a_snapshot_older_than_the_rotation_meets_a_destruction_that_is_not_committed(
    ready: Connection, session: Callable[[], Connection], level: IsolationLevel
) -> None:
    model = fill(ready, 10)
    writer = session()
    writer.isolation_level = level

    def write() -> None:
        writer.execute("select rekey.encrypt('x'::text)")

    with ThreadPoolExecutor(1) as pool, refused("40001"), writer.transaction():
        assert value(writer, "select count(*) from rekey.secrets") == 10
        rotate(ready)
        run(ready)
        with ready.transaction():
            destroy(ready, 1)
            written = pool.submit(write)
            time.sleep(0.2)
        assert states(ready)[1] == "destroy_scheduled"
        written.result(60)
    destroy_due(ready)
    assert states(ready)[1] == "destroyed"
    check(ready, model)


def test_old_snapshots_read_over_completion_and_destruction(
    ready: Connection, session: Callable[[], Connection]
) -> None:
    fill(ready, 10)
    reader = session()
    reader.isolation_level = IsolationLevel.REPEATABLE_READ
    with reader.transaction():
        assert value(reader, "select count(*) from rekey.read_secrets()") == 10
        rotate(ready)
        run(ready)
        destroy(ready, 1)
        assert value(reader, "select rekey.get_secret('s7')") == "s7"
        assert states(ready)[1] == "destroy_scheduled"
    destroy_due(ready)
    assert states(ready)[1] == "destroyed"


def test_writers_at_every_level_over_many_rotations(
    ready: Connection, session: Callable[[], Connection]
) -> None:
    model = fill(ready, 60)
    retried = dict.fromkeys(LEVELS, 0)

    def write(slot: int, level: IsolationLevel) -> Callable[[threading.Event], None]:
        connection = session()
        connection.isolation_level = level
        choice = random.Random(slot)

        def task(stop: threading.Event) -> None:
            count = 0
            while not stop.is_set():
                count += 1
                name, new = f"s{choice.randrange(20) * 3 + slot + 1}", f"{level.name}:{count}"
                try:
                    with connection.transaction():
                        connection.execute("select 1 from rekey.settings")
                        time.sleep(choice.random() / 50)
                        connection.execute(SET, (name, new))
                        time.sleep(choice.random() / 50)
                except psycopg.errors.SerializationFailure:
                    retried[level] += 1
                else:
                    model[name] = new

        return task

    destroyed = 0
    with in_background(*(write(slot, level) for slot, level in enumerate(LEVELS))):
        until = time.monotonic() + 5
        while time.monotonic() < until or destroyed < 4:
            assert time.monotonic() < until + 60
            number = rotate(ready)
            run(ready)
            assert rotation(ready, number, "state") == "completed"
            before = max(version for version, state in states(ready).items() if state == "decrypt_only")
            destroy_patiently(ready, before)
            destroyed += states(ready)[before] == "destroyed"
    print(f"\n{destroyed} versions destroyed, serialization failures {retried}")
    assert retried[IsolationLevel.READ_COMMITTED] == 0
    assert set(states(ready).values()) <= {"active", "destroyed"}
    check(ready, model)


def test_a_version_outlives_the_rows_written_while_it_is_destroyed(
    ready: Connection, session: Callable[[], Connection]
) -> None:
    fill(ready, 3)
    writer = session()
    with writer.transaction():
        writer.execute(SET, ("late", "x"))
        rotate(ready)
        assert "blocked" in step_until(ready, "blocked")
        # As if the rotation had been forgotten.
        ready.execute("update rekey.rotations set state = 'superseded'")
        with refused("RK005"):
            ready.execute("select rekey.schedule_key_destruction('default', 1)")
        ready.execute("delete from rekey.secrets")
        with refused("RK005"):
            ready.execute("select rekey.schedule_key_destruction('default', 1)")
    with refused("RK005"):
        ready.execute("select rekey.schedule_key_destruction('default', 1)")


def test_an_open_writer_is_named_and_nobody_else_is_stopped(
    ready: Connection, session: Callable[[], Connection], db: str, kek: bytes
) -> None:
    ready.execute("select rekey.create_keyring('other')")
    model = fill(ready, 20)
    # A role of its own, without any right to see who else is connected.
    ready.execute("grant execute on function rekey.encrypt(bytea, text, text[]) to rekey_worker")
    with connect(db, user="rekey_worker") as writer:
        claims = '{"app_metadata": {"tenant_id": "00000000-0000-0000-0000-000000000000"}}'
        writer.execute("select set_config('request.jwt.claims', %s, false)", (claims,))
        with writer.transaction():
            unlock(writer, kek, scope="transaction")
            writer.execute("select rekey.encrypt('\\x00'::bytea)")
            time.sleep(1.1)
            number = rotate(ready)
            assert "blocked" in step_until(ready, "blocked")
            assert rotation(ready, number, "state") == "verifying"
            (holder,) = rotation(ready, number, "blocked_by")
            assert holder["pid"] == writer.info.backend_pid
            assert holder["role"] == "rekey_worker"
            # Of its transaction, which the engine may not see, but whoever reads this.
            assert holder["age_seconds"] >= 1
            # Who may not see it is told no other age, such as that of the wait.
            with ready.transaction():
                ready.execute("set local role rekey_auditor")
                (seen,) = rotation(ready, number, "blocked_by")
            assert seen == {"pid": holder["pid"], "role": "rekey_worker"}

            bystander = session()
            bystander.execute("set lock_timeout = '20 s'; set statement_timeout = '60 s'")
            other = rotate(ready, "other")
            for n in range(20):
                step(ready)
                bystander.execute(SET, (f"s{n + 1}", "changed"))
                bystander.execute(SET, (f"new{n}", "made"))
                time.sleep(0.03)
            assert rotation(ready, other, "state") == "completed"
            assert rotation(ready, number, "state") == "verifying"
    run(ready)
    assert rotation(ready, number, "state", "blocked_by", "next_attempt_at") == ("completed", None, None)
    check(ready, dict.fromkeys(model, "changed") | {f"new{n}": "made" for n in range(20)})


def test_a_prepared_transaction_is_named(ready: Connection, session: Callable[[], Connection]) -> None:
    if int(value(ready, "show max_prepared_transactions")) == 0:
        pytest.skip("max_prepared_transactions is 0")
    name = f"pg_rekey {ready.info.dbname}"
    session().execute(
        f"begin; select rekey.set_secret('prepared', 'kept'); prepare transaction '{name}'".encode()
    )
    try:
        number = rotate(ready)
        assert "blocked" in step_until(ready, "blocked")
        (holder,) = rotation(ready, number, "blocked_by")
        assert holder["prepared"] == name
        assert holder["age_seconds"] >= 0
        ready.execute("set lock_timeout = '20 s'")
        ready.execute(SET, ("more", "x"))
        with refused("RK005"):
            ready.execute("select rekey.schedule_key_destruction('default', 1)")
    finally:
        ready.execute(f"commit prepared '{name}'".encode())
    run(ready)
    assert rotation(ready, number, "state") == "completed"
    assert on_versions(ready) == {2: 2}
    check(ready, {"prepared": "kept", "more": "x"})


@pytest.mark.parametrize("lock", ["for update", "for key share"])
def test_a_locked_row_is_waited_for(
    ready: Connection, session: Callable[[], Connection], lock: LiteralString
) -> None:
    model = fill(ready, 20)
    other = session()
    with other.transaction():
        other.execute("select from rekey.secrets where name = 's7' " + lock)
        number = rotate(ready)
        run(ready, "1 s")
        if lock == "for key share":  # what a foreign key to a secret takes is in nobody's way
            assert rotation(ready, number, "state") == "completed"
        else:
            assert rotation(ready, number, "state") in ("running", "verifying")
            assert on_versions(ready) == {1: 1, 2: 19}
            assert rotation(ready, number, "blocked_by") == [{"rows": 1, "why": "locked or moved"}]
            with refused("RK005"):
                ready.execute("select rekey.schedule_key_destruction('default', 1)")
    run(ready)
    assert rotation(ready, number, "state", "rows_done", "blocked_by") == ("completed", 20, None)
    assert events(ready, number).count("rotation.started") == 1
    check(ready, model)


def test_rows_that_move_behind_the_sweep(ready: Connection, session: Callable[[], Connection]) -> None:
    ready.execute("select rekey.set_setting('batch_target', '10 ms')")
    model = fill(ready, 6000)
    ready.execute("alter table rekey.secrets set (fillfactor = 100)")
    ready.execute("vacuum full rekey.secrets")  # no room: each update moves its row to another block

    def move(stop: threading.Event) -> None:
        connection = session()
        choice = random.Random(1)
        while not stop.is_set():
            connection.execute(
                "update rekey.secrets set description = 'moved' where name = any (%s)",
                ([f"s{choice.randrange(6000) + 1}" for _ in range(100)],),
            )

    with in_background(move, move):
        number = rotate(ready)
        run(ready, "20 s")
    assert rotation(ready, number, "state") == "completed"
    assert on_versions(ready) == {2: 6000}
    check(ready, model)


HOLD: LiteralString = """
    create function public.hold() returns trigger language plpgsql as $$
    begin
      if current_setting('rekey.sweeping', true) = 'on' then perform pg_advisory_xact_lock(4711); end if;
      return new;
    end $$;
    grant execute on function public.hold() to rekey_owner;
    grant usage on schema public to rekey_owner;
    create trigger hold before update on rekey.secrets
      for each row when (new.name = 's500') execute function public.hold();
"""


def test_a_worker_killed_mid_batch(ready: Connection, session: Callable[[], Connection]) -> None:
    model = fill(ready, 2000)
    ready.execute(HOLD)
    number = rotate(ready)
    worker, gate = session(), session()
    with ThreadPoolExecutor(1) as pool, gate.transaction():
        gate.execute("select pg_advisory_xact_lock(4711)")
        running: Future[None] = pool.submit(run, worker)
        waits(ready, worker.info.backend_pid)
        # While it hangs: the rest of the table goes on, and its own rows can be read.
        assert value(ready, "select rekey.get_secret('s500')") == "s500"
        assert value(ready, "select pg_terminate_backend(%s, 5000)", worker.info.backend_pid)
        with pytest.raises(psycopg.errors.AdminShutdown):
            running.result(60)
    assert 1 in on_versions(ready)
    check(ready, model)
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed", 2000)
    log = events(ready, number)
    assert log.count("rotation.completed") == log.count("rotation.started") == 1
    check(ready, model)


def test_a_worker_that_hangs_does_not_stop_the_others(
    ready: Connection, session: Callable[[], Connection]
) -> None:
    ready.execute("select rekey.create_keyring('other')")
    model = fill(ready, 2000)
    model |= fill(ready, 50, keyring="other", prefix="o")
    ready.execute(HOLD)
    number = rotate(ready)
    worker, gate = session(), session()
    with ThreadPoolExecutor(1) as pool:
        with gate.transaction():
            gate.execute("select pg_advisory_xact_lock(4711)")
            running: Future[None] = pool.submit(run, worker)
            waits(ready, worker.info.backend_pid)
            other = rotate(ready, "other")
            ready.execute("set lock_timeout = '20 s'")
            step_until(ready, "completed")
            assert rotation(ready, other, "state") == "completed"
            assert rotation(ready, number, "state") == "running"
        running.result(60)
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed", 2000)
    check(ready, model)


@pytest.mark.parametrize("action", ["pause", "supersede", "rollback", "compromise"])
def test_an_order_while_a_batch_is_in_hand(
    ready: Connection, session: Callable[[], Connection], action: str
) -> None:
    model = fill(ready, 600)
    ready.execute(HOLD)
    number = rotate(ready)
    step(ready)
    worker, gate = session(), session()
    ready.execute("set lock_timeout = '20 s'")
    with ThreadPoolExecutor(1) as pool:
        with gate.transaction():
            gate.execute("select pg_advisory_xact_lock(4711)")
            running = pool.submit(step, worker)
            waits(ready, worker.info.backend_pid)
            if action == "pause":
                ready.execute("select rekey.pause_rotation(%s)", (number,))
            elif action == "supersede":
                rotate(ready, supersede=True)
            elif action == "compromise":
                ready.execute("select rekey.mark_key_compromised('default', 1)")
            else:
                ready.execute("select rekey.rollback_rotation(%s)", (number,))
        running.result(60)
    if action == "pause":
        assert rotation(ready, number, "state") == "paused"
        ready.execute("select rekey.resume_rotation(%s)", (number,))
    run(ready)
    assert on_versions(ready) == {{"pause": 2, "supersede": 3, "rollback": 1, "compromise": 2}[action]: 600}
    check(ready, model)


def test_two_requests_at_once(ready: Connection, session: Callable[[], Connection]) -> None:
    fill(ready, 3)
    first, second = session(), session()
    with ThreadPoolExecutor(1) as pool:
        with first.transaction():
            number = rotate(first)
            other = pool.submit(rotate, second)
            waits(ready, second.info.backend_pid)
        with refused("RK004"):
            other.result(60)
    assert value(ready, "select array_agg(id) from rekey.rotations") == [number]
    assert states(ready) == {1: "decrypt_only", 2: "active"}


def test_two_requests_for_every_keyring_at_once(ready: Connection, session: Callable[[], Connection]) -> None:
    for n in range(20):
        ready.execute("select rekey.create_keyring(%s)", (f"k{n}",))
    everything: LiteralString = "select keyring, id from rekey.rotate_keys()"
    gate = threading.Barrier(4)
    connections = [session() for _ in range(4)]

    def ask(connection: Connection) -> dict[str, int]:
        gate.wait()
        return dict(connection.execute(everything))

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, connections))
    assert all(answer == answers[0] and len(answer) == 21 for answer in answers)
    assert value(ready, "select count(*) from rekey.encryption_keys") == 42
    run(ready)
    check(ready, {})


def test_a_request_with_an_old_snapshot(ready: Connection, session: Callable[[], Connection]) -> None:
    other = session()
    other.isolation_level = IsolationLevel.REPEATABLE_READ
    with refused("40001"), other.transaction():
        other.execute("select count(*) from rekey.rotations")
        rotate(ready)
        run(ready)
        rotate(other)
    assert states(ready) == {1: "decrypt_only", 2: "active"}


def test_audit_appenders_neither_fork_nor_deadlock(
    ready: Connection, session: Callable[[], Connection]
) -> None:
    before = len(events(ready))
    connections = [session() for _ in range(4)]

    def append(slot: int) -> None:
        for n in range(25):
            with connections[slot].transaction():
                # A value that nobody has just set: only changes are audited.
                attempts = str(1 + slot * 25 + n)
                connections[slot].execute("select rekey.set_setting('max_attempts', %s)", (attempts,))
                connections[slot].execute("select rekey.create_keyring(%s)", (f"a{slot}-{n}",))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(append, range(4)))
    assert len(events(ready)) == before + 100 * 4
    check(ready, {})


def test_a_ciphertext_that_was_held_back(ready: Connection) -> None:
    model = fill(ready, 5)
    ready.execute(
        "create temporary table held as select id, ciphertext from rekey.secrets where name in ('s1', 's2')"
    )
    rotate(ready)
    run(ready)
    ready.execute("update rekey.secrets s set ciphertext = h.ciphertext from held h where h.id = s.id")
    check(ready, model)  # it opens meanwhile
    with refused("RK005"):
        ready.execute("select rekey.schedule_key_destruction('default', 1)")
    census: LiteralString = "select rekey._tick_duty('census', now())"
    ready.execute("update rekey._worker set last_census_at = null")
    for _ in range(3):
        ready.execute(census)
    query: LiteralString = "select rotation_id, details from rekey.audit_log where details ? 'census_rows'"
    ((number, details),) = ready.execute(query).fetchall()
    assert details == {"trigger": "schedule", "census_rows": 2}
    run(ready)
    assert rotation(ready, number, "state", "from_versions", "to_version", "rows_done") == (
        "completed",
        [1],
        2,
        2,
    )
    assert events(ready, number) == ["rotation.requested", "rotation.started", "rotation.completed"]
    assert on_versions(ready) == {2: 5}
    destroy(ready, 1)
    assert states(ready) == {1: "destroyed", 2: "active"}
    check(ready, model)


def test_a_ciphertext_held_back_until_destruction_is_due(ready: Connection) -> None:
    model = fill(ready, 1)
    ready.execute("create temporary table held as select id, ciphertext from rekey.secrets")
    rotate(ready)
    run(ready)
    ready.execute("select rekey.schedule_key_destruction('default', 1, '0 s')")
    ready.execute("update rekey.secrets s set ciphertext = h.ciphertext from held h where h.id = s.id")
    ready.execute("update rekey._worker set last_tick_at = now()")
    destroy_due(ready)
    assert states(ready)[1] == "destroy_scheduled"
    postponed = value(
        ready, "select details ->> 'postponed' from rekey.audit_log where details ? 'postponed'"
    )
    assert "in use: 1 rows" in postponed
    # Not for callers, but for the sweep it opens.
    with refused("RK006"):
        ready.execute("select rekey.get_secret('s1')")
    ready.execute("select rekey._tick_duty('census', now())")
    run(ready)
    check(ready, model)

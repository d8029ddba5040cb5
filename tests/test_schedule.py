"""What happens unattended: schedules, the tick, and pg_cron for real."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

from driving import check, events, fill, on_versions, refused, rotate, rotation, states
from helpers import Connection, belong, connect, initialize, install, unlock, value
from pg_rekey import doctor, release
from pg_rekey.cli import status

DUE: LiteralString = "select rekey.set_schedule(%s, %s, now() - interval '1 minute')"
TICK: LiteralString = "call rekey.tick()"


def rotations(connection: Connection) -> list[tuple[str, str, str]]:
    """Return keyring, trigger and state of every rotation."""
    query: LiteralString = "select keyring, trigger, state from rekey.rotation_status order by id"
    return list(connection.execute(query))


def test_set_and_clear(ready: Connection) -> None:
    first = value(ready, "select rekey.set_schedule('default', '90 days')")
    assert value(ready, "select %s - now() between '89 days 23:59' and '90 days'", first)
    fixed = value(ready, "select rekey.set_schedule('default', '1 minute', '2031-02-03 04:05Z')")
    status: LiteralString = "select rotate_every, next_rotation_at, overdue from rekey.schedule_status"
    assert ready.execute(status).fetchone() == (timedelta(minutes=1), fixed, False)
    assert fixed.isoformat() == "2031-02-03T04:05:00+00:00"
    for _ in range(2):
        ready.execute("select rekey.clear_schedule('default')")
    assert ready.execute(status).fetchone() == (None, None, False)
    changes: LiteralString = (
        "select details from rekey.audit_log where event = 'schedule.changed' order by id"
    )
    assert [list(details) for (details,) in ready.execute(changes)] == [
        ["rotate_every", "next_rotation_at"],
        ["rotate_every", "next_rotation_at"],
        ["cleared"],
    ]
    check(ready, {})


def test_refused(ready: Connection) -> None:
    ready.execute("select rekey.create_keyring('gone')")
    ready.execute("select rekey.retire_keyring('gone')")
    ready.execute("select rekey.set_schedule('default', '1 day', '2031-01-01')")
    before = events(ready), ready.execute("select * from rekey.keyrings").fetchall()
    bad: list[tuple[str | None, str | None, str | None, str]] = [
        ("default", None, None, "22023"),
        ("default", "0 s", None, "22023"),
        ("default", "59 s", None, "22023"),
        ("default", "-1 day", None, "22023"),
        ("default", "36501 days", None, "22023"),
        ("default", "170000000 years", None, "22023"),
        ("default", "1 day", "infinity", "22023"),
        ("default", "1 day", "-infinity", "22023"),
        ("nowhere", "1 day", None, "RK007"),
        (None, "1 day", None, "RK007"),
        ("gone", "1 day", None, "RK006"),
    ]
    for keyring, every, first, code in bad:
        with refused(code):
            ready.execute("select rekey.set_schedule(%s, %s, %s)", (keyring, every, first))
    with refused("RK007"):
        ready.execute("select rekey.clear_schedule('nowhere')")
    assert (events(ready), ready.execute("select * from rekey.keyrings").fetchall()) == before


def test_tick_rotates_what_is_due_and_only_once(ready: Connection) -> None:
    ready.execute(
        "select rekey.create_keyring('later', rotate_every => '1 day'), rekey.create_keyring('never')"
    )
    model = fill(ready, 20)
    ready.execute(DUE, ("default", "30 days"))
    for _ in range(3):
        ready.execute(TICK)
    assert rotations(ready) == [("default", "schedule", "completed")]
    # Many periods late is late once.
    ready.execute("select rekey.set_schedule('default', '1 minute', '2020-01-01')")
    for _ in range(3):
        ready.execute(TICK)
    assert rotations(ready) == [("default", "schedule", "completed")] * 2
    next_time: LiteralString = (
        "select next_rotation_at - now() between '50 s' and '60 s' from"
        " rekey.schedule_status where keyring = 'default'"
    )
    assert value(ready, next_time)
    assert on_versions(ready) == {3: 20}
    assert events(ready).count("rotation.requested") == 2
    check(ready, model)


def test_a_keyring_under_way_stays_due(ready: Connection) -> None:
    number = rotate(ready)
    ready.execute("select rekey.pause_rotation(%s)", (number,))
    ready.execute(DUE, ("default", "1 day"))
    ready.execute(TICK)
    assert rotations(ready) == [("default", "manual", "paused")]
    assert value(ready, "select next_rotation_at < now() from rekey.schedule_status")
    ready.execute("select rekey.resume_rotation(%s)", (number,))
    for _ in range(2):
        ready.execute(TICK)
    assert rotations(ready) == [("default", "manual", "completed"), ("default", "schedule", "completed")]


def test_ticks_at_once(ready: Connection, db: str, kek: bytes) -> None:
    model = fill(ready, 3000)
    for n in range(10):
        ready.execute("select rekey.create_keyring(%s)", (f"k{n}",))
        ready.execute(DUE, (f"k{n}", "1 day"))
    ready.execute(DUE, ("default", "1 day"))
    gate = threading.Barrier(3)

    def tick(_: int) -> None:
        with connect(db) as connection:
            unlock(connection, kek)
            gate.wait()
            connection.execute(TICK)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(tick, range(3)))
    assert sorted(rotations(ready)) == [
        (name, "schedule", "completed") for name in sorted(["default", *(f"k{n}" for n in range(10))])
    ]
    assert "rotation.error" not in events(ready)
    check(ready, model)


def test_without_the_kek_it_is_noted_once(ready: Connection, db: str) -> None:
    model = fill(ready, 3)
    ready.execute(DUE, ("default", "1 day"))
    locked: LiteralString = "select locked_since is not null from rekey.worker_status"
    with connect(db) as stranger:
        for _ in range(3):
            stranger.execute(TICK)
        assert value(ready, locked)
        assert rotations(ready) == []
        ((details,),) = ready.execute(
            "select details from rekey.audit_log where event = 'rotation.error'"
        ).fetchall()
        assert (details["duty"], details["sqlstate"]) == ("schedules", "RK001")
        assert value(ready, "select last_tick_at is not null from rekey.worker_status")
        ready.execute(TICK)
        assert not value(ready, locked)
        assert rotations(ready) == [("default", "schedule", "completed")]

        # Work that somebody asked for waits for the KEK too. Where one ticker has it and another has not, the
        # log does not fill up: an entry a day.
        number = rotate(ready)
        for _ in range(2):
            stranger.execute(TICK)
        assert value(ready, locked)
        assert events(ready).count("rotation.error") == 1
        ready.execute("update rekey._worker set locked_noted_at = now() - interval '25 hours'")
        stranger.execute(TICK)
        assert events(ready).count("rotation.error") == 2
        ready.execute(TICK)
        assert not value(ready, locked)
        assert rotation(ready, number, "state") == "completed"
        stranger.execute(TICK)
        assert not value(ready, locked)
    check(ready, model)


def test_a_census_that_finds_nothing_needs_no_kek(ready: Connection, db: str) -> None:
    fill(ready, 3)
    with connect(db) as stranger:
        stranger.execute(TICK)
    done: LiteralString = (
        "select last_census_at is not null and locked_since is null from rekey.worker_status"
    )
    assert value(ready, done)


def test_nothing_due_touches_nothing(ready: Connection) -> None:
    fill(ready, 3)
    ready.execute("select rekey.set_schedule('default', '1 day')")
    ready.execute(TICK)
    touched: LiteralString = """
        select array_agg(relid::regclass::text order by 1) from pg_stat_user_tables
        where schemaname = 'rekey' and n_tup_ins + n_tup_upd + n_tup_del > 0"""
    ready.execute("select pg_stat_force_next_flush()")
    ready.execute("select pg_stat_reset()")
    ready.execute(TICK)
    ready.execute("select pg_stat_force_next_flush()")
    assert value(ready, touched) == ["rekey._worker"]


def test_before_it_is_set_up(conn: Connection) -> None:
    conn.execute(TICK)
    assert conn.execute("select * from rekey.worker_status").fetchall() == []


def test_a_tick_cannot_run_in_a_transaction(ready: Connection) -> None:
    with refused("2D000"), ready.transaction():
        ready.execute(TICK)


@pytest.mark.parametrize("jump", ["60 days", None])
def test_after_a_jump_of_the_clock_a_destruction_waits_a_day(ready: Connection, jump: str | None) -> None:
    rotate(ready)
    ready.execute(TICK)
    ready.execute("select rekey.schedule_key_destruction('default', 1, '1 day')")
    ready.execute("update rekey.encryption_keys set destroy_after = now() where version = 1")
    ready.execute("update rekey._worker set last_tick_at = now() - %s::interval", (jump,))
    for _ in range(2):
        ready.execute(TICK)
    assert states(ready)[1] == "destroy_scheduled"
    assert value(
        ready,
        "select destroy_after - now() between '23:59' and '24:00' from rekey.key_status where version = 1",
    )
    assert value(ready, "select count(*) from rekey.audit_log where details ? 'postponed'") == 1
    ready.execute("update rekey.encryption_keys set destroy_after = now() where version = 1")
    ready.execute(TICK)
    assert states(ready)[1] == "destroyed"
    assert events(ready).count("key.destroyed") == 1


def test_a_clock_that_goes_back(ready: Connection) -> None:
    ready.execute(DUE, ("default", "1 day"))
    ready.execute(TICK)
    # As after two days back: everything that was noted lies in the future.
    ready.execute(
        "update rekey._worker set last_tick_at = now() + interval '2 days', last_census_at = last_tick_at"
    )
    ready.execute("update rekey.keyrings set next_rotation_at = next_rotation_at + interval '2 days'")
    for _ in range(2):
        ready.execute(TICK)
    assert rotations(ready) == [("default", "schedule", "completed")]


def test_an_error_in_one_duty_does_not_stop_the_others(ready: Connection) -> None:
    ready.execute(DUE, ("default", "1 day"))
    ready.execute(
        "create function public.no() returns trigger language plpgsql as $$ begin raise 'no'; end $$"
    )
    ready.execute(
        "grant usage on schema public to rekey_owner; grant execute on function public.no to rekey_owner"
    )
    ready.execute(
        "create trigger no before insert on rekey.rotations for each row execute function public.no()"
    )
    ready.execute(TICK)
    query: LiteralString = (
        "select details ->> 'duty', details ->> 'error' from rekey.audit_log where event = 'rotation.error'"
    )
    assert ready.execute(query).fetchall() == [("schedules", "no")]
    assert value(
        ready, "select last_tick_at is not null and last_census_at is not null from rekey.worker_status"
    )
    assert states(ready) == {1: "active"}
    ready.execute("drop trigger no on rekey.rotations")
    ready.execute(TICK)
    assert rotations(ready) == [("default", "schedule", "completed")]


def test_who_may_tick(ready: Connection) -> None:
    with refused("42501"):
        ready.execute("set role rekey_app")
        ready.execute(TICK)
    for role in ("rekey_operator", "rekey_admin", "rekey_worker"):
        ready.execute(f"set session authorization {role}".encode())
        ready.execute(TICK)
        with refused("42501"):
            ready.execute("select rekey._rotate_due()")
        ready.execute("reset session authorization")


@pytest.fixture
def kek_file(conn: Connection, kek: bytes) -> Iterator[str]:
    """The KEK in a file of the data directory; return its name."""
    name = f"pg_rekey_test_{os.getpid()}.kek"
    conn.execute(f"copy (select '{kek.hex()}') to program 'umask 077; cat > {name}'".encode())
    yield name
    conn.execute(f"copy (select 1) to program 'cat > /dev/null; rm {name}'".encode())


def in_vault(connection: Connection, kek: bytes) -> None:
    """Make what Supabase Vault shows, with the KEK in it."""
    connection.execute("""
        create schema vault;
        create table vault.secrets (name text, secret text);
        create view vault.decrypted_secrets as select name, secret as decrypted_secret from vault.secrets;
    """)
    belong(connection, "supabase_vault", "vault")
    connection.execute("insert into vault.secrets values ('pg_rekey_kek', %s)", (kek.hex(),))


@pytest.mark.parametrize("provider", ["vault", "file"])
def test_unattended_as_the_worker(
    conn: Connection, db: str, kek: bytes, kek_file: str, provider: str
) -> None:
    initialize(conn, kek)
    if provider == "vault":
        in_vault(conn, kek)
    else:
        conn.execute("select rekey.set_setting('kek_file', %s)", (kek_file,))
    conn.execute("select rekey.set_setting('kek_provider', %s)", (provider,))
    model = fill(conn, 50)
    conn.execute(DUE, ("default", "1 day"))
    with connect(db, user="rekey_worker") as worker:
        worker.execute(TICK)
        secrets: list[LiteralString] = [
            "select * from vault.decrypted_secrets",
            "select pg_read_binary_file('x', 0, 1, true)",
            "select rekey._keks()",
            "select * from rekey.secrets",
            "select * from rekey.encryption_keys",
        ]
        for query in secrets:
            with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedTable)):
                worker.execute(query)
    assert rotations(conn) == [("default", "schedule", "completed")]
    assert on_versions(conn) == {2: 50}
    who: LiteralString = "select distinct actor, role from rekey.audit_log where rotation_id is not null"
    assert conn.execute(who).fetchall() == [("rekey_worker", "none")]
    check(conn, model)

    # The Vault or file without the key, or with another one.
    conn.execute(DUE, ("default", "1 day"))
    if provider == "vault":
        conn.execute("update vault.secrets set secret = 'abc'")
    else:
        conn.execute("select rekey.set_setting('kek_file', 'no such file')")
    with connect(db, user="rekey_worker") as worker:
        worker.execute(TICK)
    assert value(conn, "select locked_since is not null from rekey.worker_status")
    assert len(rotations(conn)) == 1


def test_no_pg_cron_here(ready: Connection) -> None:
    with pytest.raises(psycopg.errors.UndefinedObject) as caught:
        ready.execute("select rekey.schedule_worker()")
    assert f"'{ready.info.dbname}', 'rekey_worker')" in (caught.value.diag.message_hint or "")
    assert value(ready, "select rekey.unschedule_worker()") is False


@pytest.fixture
def cron(server: str) -> Iterator[Connection]:
    """A connection to the database where pg_cron runs, with pg_rekey in it for as long."""
    with connect(server) as admin:
        if value(admin, "select current_setting('cron.database_name', true)") is None:
            pytest.skip("pg_cron is not preloaded on this server")
        name = value(admin, "show cron.database_name")
    with connect(server, dbname=name) as connection:
        if value(connection, "select to_regnamespace('rekey') is not null"):
            pytest.skip(f"the database {name} has pg_rekey already")
        had: LiteralString = "select array_agg(extname::text) from pg_extension"
        before = value(connection, had)
        try:
            install(make_conninfo(server, dbname=name), release.assemble("plain"))
            connection.execute("create extension if not exists pg_cron")
            yield connection
        finally:
            connection.execute(
                "revoke all on function pg_read_binary_file(text, bigint, bigint, boolean) from rekey_owner"
            )
            connection.execute("select rekey.unschedule_worker()")
            connection.execute("drop schema rekey, rekey_targets cascade")
            for extension in ("pg_cron", "pgcrypto"):
                if extension not in before:
                    connection.execute(f"drop extension {extension}".encode())


TICK_JOB = ("pg_rekey", "rekey_worker", "call rekey.tick()", True)
WATCH_JOB = ("pg_rekey_watch", "rekey_worker", "select rekey.watch()", True)


def helper(number: int) -> tuple[str, str, str, bool]:
    return f"pg_rekey_{number}", "rekey_worker", "call rekey.run_rotations()", True


def jobs(connection: Connection) -> list[Any]:
    """Return the jobs of pg_cron: name, role, command, whether they are for this database."""
    statement: LiteralString = (
        "select jobname, username, command, database = current_database() from cron.job order by jobid"
    )
    return connection.execute(statement).fetchall()


def test_pg_cron_alone(cron: Connection, server: str, kek: bytes, kek_file: str) -> None:
    conn = cron
    initialize(conn, kek)
    conn.execute(
        "select rekey.set_setting('kek_file', %s), rekey.set_setting('kek_provider', 'file')", (kek_file,)
    )
    model = fill(conn, 3000)
    bad: LiteralString = "select rekey.schedule_worker('61 * * * *')"
    with refused("22023"):
        conn.execute(bad)
    assert value(conn, "select rekey.unschedule_worker()") is False
    job = value(conn, "select rekey.schedule_worker('0 0 1 1 *')")
    assert value(conn, "select rekey.schedule_worker()") == job
    with refused("22023"):
        conn.execute(bad)
    assert jobs(conn) == [TICK_JOB, WATCH_JOB]
    assert value(conn, "select rekey.schedule_worker(workers => 3)") == job
    assert value(conn, "select rekey.schedule_worker()") == job
    for workers in (0, 65):
        with refused("22023"):
            conn.execute("select rekey.schedule_worker(workers => %s)", [workers])
    assert jobs(conn) == [TICK_JOB, WATCH_JOB, helper(2), helper(3)]
    conn.execute("select rekey.schedule_worker('0 0 1 1 *')")
    assert value(conn, "select count(distinct schedule) from cron.job where jobname <> 'pg_rekey_watch'") == 1
    conn.execute("select rekey.schedule_worker(workers => 2)")
    assert jobs(conn) == [TICK_JOB, WATCH_JOB, helper(2)]
    with psycopg.connect(conn.info.dsn, row_factory=dict_row) as rows:
        assert status._workers(rows) == 2
        assert not [one.finding for one in doctor._cron(rows) if one.severity != "info"]
        conn.execute("select rekey.schedule_worker(workers => 64)")
        assert "pg_cron has 64 workers" in str(list(doctor._cron(rows)))
        conn.execute("select rekey.schedule_worker(workers => 2)")
    conn.execute(DUE, ("default", "1 day"))
    until = time.monotonic() + 180
    while rotations(conn) != [("default", "schedule", "completed")]:
        assert time.monotonic() < until, conn.execute("select * from cron.job_run_details").fetchall()
        time.sleep(0.1)
    assert on_versions(conn) == {2: 3000}
    who: LiteralString = "select distinct actor from rekey.audit_log where rotation_id is not null"
    assert conn.execute(who).fetchall() == [("rekey_worker",)]
    assert value(conn, "select rolsuper from pg_roles where rolname = 'rekey_worker'") is False
    ended: LiteralString = (
        "select count(*) from cron.job_run_details where jobid = %s and status = 'succeeded'"
    )
    second = value(conn, "select jobid from cron.job where jobname = 'pg_rekey_2'")
    while not (value(conn, ended, job) and value(conn, ended, second)):
        assert time.monotonic() < until, conn.execute("select * from cron.job_run_details").fetchall()
        time.sleep(0.1)
    check(conn, model)

    # What it notes of its own runs is pruned.
    conn.execute(
        "update cron.job_run_details set end_time = now() - interval '8 days' where jobid = %s", (job,)
    )
    with connect(server, dbname=conn.info.dbname, user="rekey_worker") as worker:
        worker.execute(TICK)
    assert (
        value(
            conn,
            "select count(*) from cron.job_run_details where jobid = %s"
            " and end_time < now() - interval '7 days'",
            job,
        )
        == 0
    )
    assert value(conn, "select rekey.unschedule_worker()") is True
    assert value(conn, "select rekey.unschedule_worker()") is False
    assert value(conn, "select count(*) from cron.job") == 0

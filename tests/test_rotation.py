"""Rotations from request to end: states, batches, quarantine, errors, and what each leaves in the log."""

import itertools
import threading
import time
from collections.abc import Callable
from typing import LiteralString

import psycopg
import pytest

from driving import (
    FLIP,
    NIL,
    check,
    events,
    fill,
    on_versions,
    read,
    refused,
    rotate,
    rotation,
    run,
    states,
    step,
    step_until,
    waits,
)
from helpers import Connection, connect, unlock, value

ACME = "11111111-1111-1111-1111-111111111111"
UNDER_WAY = {"queued", "running", "paused", "verifying", "failed"}
STATES = [*sorted(UNDER_WAY), "completed", "completed_with_failures", "rolled_back", "superseded"]
COMPLETE = [
    "rotation.requested",
    "key.created",
    "key.deactivated",
    "key.activated",
    "rotation.started",
    "rotation.completed",
]


def test_rotate_keys_touches_no_row_and_is_durable_at_once(ready: Connection) -> None:
    model = fill(ready, 500)
    with ready.transaction():
        rows = ready.execute(
            "select state, trigger, reason, requested_by, from_versions,"
            " to_version, rows_total, rows_done, rows_failed,"
            " started_at, finished_at from rekey.rotate_keys('default', 'because')"
        ).fetchall()
        read_rows: LiteralString = (
            "select seq_scan + idx_scan from pg_stat_xact_user_tables where relid = 'rekey.secrets'::regclass"
        )
        assert value(ready, read_rows) == 0
    assert rows == [("queued", "manual", "because", "postgres", [1], 2, None, 0, 0, None, None)]
    assert states(ready) == {1: "decrypt_only", 2: "active"}
    assert on_versions(ready) == {1: 500}
    ready.execute("select rekey.set_secret('s1', 'new')")
    assert on_versions(ready) == {1: 499, 2: 1}
    check(ready, model | {"s1": "new"})


def test_a_rotation_by_its_steps(ready: Connection) -> None:
    model = fill(ready, 300)
    ready.execute("create table before as select id, updated_at, name, description from rekey.secrets")
    number = rotate(ready)
    assert step_until(ready, "idle") == ["planned", "batch", "swept", "swept", "completed", "idle"]
    assert rotation(ready, number, "state", "rows_total", "rows_done", "rows_failed", "attempts") == (
        "completed",
        300,
        300,
        0,
        0,
    )
    created, started, finished = rotation(ready, number, "created_at", "started_at", "finished_at")
    assert created <= started <= finished
    assert events(ready, number) == COMPLETE
    assert on_versions(ready) == {2: 300}
    unchanged: LiteralString = "select count(*) from rekey.secrets join before using (id, updated_at, name)"
    assert value(ready, unchanged) == 300
    check(ready, model)


def test_audit_entries_name_keyring_version_and_reason(ready: Connection) -> None:
    number = rotate(ready, reason="yearly")
    run(ready)
    entries = ready.execute(
        "select event, keyring, version, details from rekey.audit_log where rotation_id = %s order by id",
        (number,),
    ).fetchall()
    assert [(event, keyring, version) for event, keyring, version, _ in entries] == [
        (event, "default", 1 if event == "key.deactivated" else 2) for event in COMPLETE
    ]
    assert entries[0][3] == {"trigger": "manual", "reason": "yearly", "from_versions": [1]}
    assert entries[-1][3] == {"state": "completed", "rows": 0, "failures": 0}


def test_rotate_keys_takes_every_keyring_but_those_under_way(ready: Connection) -> None:
    for name in ("a", "b", "gone"):
        ready.execute("select rekey.create_keyring(%s)", (name,))
    ready.execute("select rekey.retire_keyring('gone')")
    running = rotate(ready, "b")
    query: LiteralString = "select keyring, id from rekey.rotate_keys()"
    first = dict(ready.execute(query))
    assert set(first) == {"default", "a", "b"}
    assert first["b"] == running
    assert dict(ready.execute(query)) == first
    assert value(ready, "select count(*) from rekey.encryption_keys") == 4 + 3
    run(ready)
    again = dict(ready.execute(query))
    assert set(again) == set(first)
    assert not set(again.values()) & set(first.values())


def test_a_keyring_under_way_is_not_passed_by_in_silence(ready: Connection) -> None:
    for n in range(12):
        ready.execute("select rekey.create_keyring(%s)", (f"k{n:02}",))
        if n:
            rotate(ready, f"k{n:02}", reason="yearly")
    said: list[tuple[str | None, ...]] = []
    ready.add_notice_handler(lambda it: said.append((it.sqlstate, it.constraint_name, it.message_primary)))
    rows = ready.execute(
        "select id, keyring, reason, created_at < now() from rekey.rotate_keys(reason => 'KEK leaked')"
    ).fetchall()
    passed_by = [(n, f"k{n:02}") for n in range(1, 12)]
    assert [row[:2] for row in rows if row[3]] == passed_by
    assert {row[1:] for row in rows if not row[3]} == {
        ("default", "KEK leaked", False),
        ("k00", "KEK leaked", False),
    }
    [(sqlstate, action, message)] = said
    assert (sqlstate, action) == ("RK004", "supersede")
    assert message
    assert "'k01' (rotation 1), 'k02' (rotation 2)," in message
    assert message.endswith("'k10' (rotation 10) and 1 more")
    noted = """
        select rotation_id, keyring, version, details from rekey.audit_log
        where event = 'rotation.passed_by' order by id"""
    assert ready.execute(noted).fetchall() == [(*it, 2, {"reason": "KEK leaked"}) for it in passed_by]
    assert rotation(ready, 1, "reason") == "yearly"
    said.clear()
    rows = ready.execute(
        "select created_at < now() from rekey.rotate_keys(reason => 'KEK leaked', supersede => true)"
    ).fetchall()
    assert rows == [(False,)] * 13
    assert not said
    assert value(ready, "select min(version) from rekey.key_status where state = 'active'") == 3
    assert value(ready, "select count(*) from rekey.audit_log where event = 'rotation.passed_by'") == 11


def test_schedules_pass_by_what_is_under_way_as_ever(ready: Connection) -> None:
    ready.execute("select rekey.set_schedule('default', '1 day', '2020-01-01')")
    number = rotate(ready)
    ready.execute("call rekey.tick()")
    assert value(ready, "select count(*) from rekey.audit_log where event = 'rotation.passed_by'") == 0
    assert value(ready, "select max(id) from rekey.rotations") == number


def test_rotate_keys_refuses(ready: Connection) -> None:
    ready.execute("select rekey.create_keyring('gone'), rekey.create_keyring('busy')")
    ready.execute("select rekey.retire_keyring('gone')")
    rotate(ready, "busy")
    before = events(ready)
    names = {"nowhere": "RK007", "": "RK007", "Default": "RK007", "gone": "RK006", "busy": "RK004"}
    for keyring, code in names.items():
        with refused(code):
            rotate(ready, keyring)
    assert events(ready) == before


def test_without_the_kek(ready: Connection, db: str) -> None:
    number = rotate(ready)
    with connect(db) as stranger:
        with refused("RK001"):
            rotate(stranger, supersede=True)
        assert step(stranger)[0] == "locked"
        stranger.execute("call rekey.run_rotations('5 s')")
        with refused("RK002"):
            unlock(stranger, bytes(32))
    assert rotation(ready, number, "state", "attempts") == ("queued", 0)


def test_supersede_takes_the_rows_of_every_older_version(ready: Connection) -> None:
    ready.execute("select rekey.set_setting('batch_target', '10 ms')")
    model = fill(ready, 2500)
    first = rotate(ready)
    assert step(ready)[0] == "planned"
    assert step(ready)[0] == "batch"
    assert set(on_versions(ready)) == {1, 2}
    with refused("RK004"):
        rotate(ready)
    second = rotate(ready, reason="in a hurry", supersede=True)
    assert rotation(ready, first, "state") == "superseded"
    assert rotation(ready, second, "from_versions", "to_version") == ([1, 2], 3)
    check(ready, model)
    run(ready)
    assert on_versions(ready) == {3: 2500}
    assert rotation(ready, second, "state", "rows_total", "rows_done") == ("completed", 2500, 2500)
    assert rotation(ready, first, "rows_done") < 2500
    assert events(ready, first) == COMPLETE[:-1]
    assert events(ready, second) == COMPLETE
    check(ready, model)


ALLOWED = {
    "pause": {"queued", "running", "verifying"},
    "resume": {"paused"},
    "retry": {"failed", "completed_with_failures"},
    "rollback": set(STATES) - {"rolled_back", "superseded"},
}


CALLS: dict[str, LiteralString] = {
    "pause": "select rekey.pause_rotation(%s)",
    "resume": "select rekey.resume_rotation(%s)",
    "retry": "select rekey.retry_rotation(%s)",
    "rollback": "select rekey.rollback_rotation(%s)",
}


def test_edges(ready: Connection) -> None:
    number = rotate(ready)
    before = events(ready)
    for action, state in itertools.product(CALLS, STATES):
        with ready.transaction(force_rollback=True):
            ready.execute("update rekey.rotations set state = %s where id = %s", (state, number))
            if state in ALLOWED[action]:
                ready.execute(CALLS[action], (number,))
                after = {"pause": "paused", "rollback": "rolled_back"}.get(action, "queued")
                assert rotation(ready, number, "state") == after
                assert len(events(ready)) > len(before)
            else:
                with refused("RK006"), ready.transaction():
                    ready.execute(CALLS[action], (number,))
                assert rotation(ready, number, "state") == state
                assert events(ready) == before
    for action, missing in itertools.product(CALLS, (0, -1, 2**62, None)):
        with refused("RK007"):
            ready.execute(CALLS[action], (missing,))


def test_pause_and_resume_mid_sweep(ready: Connection) -> None:
    model = fill(ready, 2500)
    number = rotate(ready)
    step(ready)
    assert step(ready)[0] == "batch"
    ready.execute("select rekey.pause_rotation(%s)", (number,))
    left = on_versions(ready)
    assert set(left) == {1, 2}
    assert step(ready)[0] == "idle"
    ready.execute("select rekey.set_secret('s2500', 'new')")
    ready.execute("select rekey.resume_rotation(%s)", (number,))
    run(ready)
    assert rotation(ready, number, "state") == "completed"
    assert events(ready, number) == [*COMPLETE[:-1], "rotation.paused", "rotation.resumed", COMPLETE[-1]]
    assert on_versions(ready) == {2: 2500}
    check(ready, model | {"s2500": "new"})


@pytest.mark.parametrize("completed", [False, True])
def test_rollback(ready: Connection, completed: bool) -> None:
    model = fill(ready, 2500)
    number = rotate(ready)
    if completed:
        run(ready)
    else:
        step(ready)
        step(ready)
    (row,) = ready.execute(
        "select id, trigger, from_versions, to_version, state, reason"
        " from rekey.rollback_rotation(%s, 'mistake')",
        (number,),
    ).fetchall()
    assert row[1:] == ("rollback", [2], 1, "queued", "mistake")
    assert rotation(ready, number, "state") == "rolled_back"
    assert states(ready) == {1: "active", 2: "decrypt_only"}
    ready.execute("select rekey.set_secret('s1', 'new')")
    check(ready, model | {"s1": "new"})
    run(ready)
    assert on_versions(ready) == {1: 2500}
    assert events(ready, number)[-1] == "rotation.rolled_back"
    assert events(ready, row[0]) == [
        "key.deactivated",
        "key.activated",
        "rotation.requested",
        "rotation.started",
        "rotation.completed",
    ]
    # The way back is not rolled back; the next rotation makes a version that never was.
    with refused("RK006"):
        ready.execute("select rekey.rollback_rotation(%s)", (row[0],))
    assert rotation(ready, rotate(ready), "to_version") == 3
    run(ready)
    check(ready, model | {"s1": "new"})


def test_rollback_refused(ready: Connection) -> None:
    fill(ready, 3)
    older = rotate(ready)
    run(ready)
    newer = rotate(ready)
    run(ready)
    rollback: LiteralString = "select rekey.rollback_rotation(%s)"
    with refused("RK006"):
        ready.execute(rollback, (older,))
    ready.execute("select rekey.disable_key('default', 2)")
    with refused("RK006"):
        ready.execute(rollback, (newer,))
    ready.execute("select rekey.enable_key('default', 2)")
    compromise = value(ready, "select id from rekey.mark_key_compromised('default', 3, 'leaked')")
    assert rotation(ready, compromise, "trigger", "to_version") == ("compromise", 4)
    with refused("RK006"):
        ready.execute(rollback, (compromise,))
    run(ready)
    with refused("RK006"):
        ready.execute(rollback, (compromise,))
    assert states(ready) == {1: "decrypt_only", 2: "decrypt_only", 3: "compromised", 4: "active"}


# Each makes some of the rows s1 .. s3, and s4 of another tenant, unreadable where they stand, and names them.
DAMAGE: dict[str, tuple[LiteralString, set[str]]] = {
    "a bit flipped": (FLIP, {"s1"}),
    "cut by a block": (
        "update rekey.secrets set ciphertext = substr(ciphertext, 1,"
        " octet_length(ciphertext) - 16) where name = 's1'",
        {"s1"},
    ),
    "cut by a byte": (
        "update rekey.secrets set ciphertext = substr(ciphertext, 1,"
        " octet_length(ciphertext) - 1) where name = 's1'",
        {"s1"},
    ),
    "of a version that never was": (
        "update rekey.secrets set ciphertext = overlay(ciphertext placing"
        " int4send(77) from 8) where name = 's1'",
        {"s1"},
    ),
    "of a negative version": (
        "update rekey.secrets set ciphertext = overlay(ciphertext placing"
        " int4send(-1) from 8) where name = 's1'",
        {"s1"},
    ),
    "relabelled to the new version": (
        "update rekey.secrets set ciphertext = overlay(ciphertext placing"
        " int4send(2) from 8) where name = 's1'",
        {"s1"},
    ),
    "rows swapped": (
        "update rekey.secrets s set ciphertext = o.ciphertext from rekey.secrets o"
        " where (s.name, o.name) in (('s1', 's2'), ('s2', 's1')) and o.tenant_id = s.tenant_id",
        {"s1", "s2"},
    ),
    "tenants swapped": (
        "update rekey.secrets s set ciphertext = o.ciphertext from rekey.secrets o"
        " where (s.name, o.name) in (('s1', 's4'), ('s4', 's1'))",
        {"s1", "s4"},
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_quarantine(ready: Connection, kind: str) -> None:
    statement, damaged = DAMAGE[kind]
    model = fill(ready, 3, size=40)
    ready.execute("select rekey.set_secret('s4', 'theirs', %s)", (ACME,))
    ready.execute("create table good as select * from rekey.secrets")
    ready.execute(statement)
    ready.execute("create table bad as select * from rekey.secrets")
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state", "rows_failed", "rows_total") == (
        "completed_with_failures",
        len(damaged),
        4,
    )
    failures = ready.execute(
        "select f.keyring, f.target, s.name, f.resolution, f.version ="
        " s.key_version from rekey.failure_status f"
        " left join rekey.secrets s on s.tenant_id || '/' || s.id = f.row_key where f.rotation_id = %s",
        (number,),
    ).fetchall()
    assert sorted(failures) == [("default", "rekey.secrets", name, None, True) for name in sorted(damaged)]
    log = events(ready, number)
    noted: LiteralString = (
        "select sum((details ->> 'rows')::int) from rekey.audit_log where event = 'rotation.row_failed'"
    )
    assert value(ready, noted) == len(damaged)
    assert log.count("rotation.completed") == 1
    kept: LiteralString = "select count(*) from rekey.secrets s join bad b using (id, ciphertext)"
    assert value(ready, kept) == len(damaged)
    if 1 in on_versions(ready):
        with refused("RK005"):
            ready.execute("select rekey.schedule_key_destruction('default', 1)")

    # Nothing was repaired: the same again. Then it was.
    ready.execute("select rekey.retry_rotation(%s)", (number,))
    run(ready)
    assert rotation(ready, number, "state", "rows_failed") == ("completed_with_failures", len(damaged))
    assert value(ready, "select count(*) from rekey.rotation_failures where resolved_at is null") == len(
        damaged
    )
    ready.execute(
        "update rekey.secrets s set ciphertext = g.ciphertext from good g join bad b using (id)"
        " where s.id = b.id and s.ciphertext = b.ciphertext and b.ciphertext <> g.ciphertext"
    )
    ready.execute("select rekey.retry_rotation(%s)", (number,))
    run(ready)
    assert rotation(ready, number, "state", "rows_failed") == ("completed", 0)
    assert on_versions(ready) == {2: 4}
    check(ready, model, {"s4": "theirs"}, tenants=(NIL, ACME))


def broken(ready: Connection) -> tuple[int, int]:
    """Rotate three secrets of which one is damaged; return the rotation and the failure."""
    fill(ready, 3)
    ready.execute(FLIP)
    number = rotate(ready)
    run(ready)
    return number, value(ready, "select id from rekey.failure_status where resolution is null")


def test_resolve_by_retry(ready: Connection) -> None:
    number, failure = broken(ready)
    ready.execute(FLIP)  # flipped back
    ready.execute("select rekey.resolve_failure(%s, 'retry', 'restored')", (failure,))
    assert rotation(ready, number, "state") == "queued"
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed", 3)
    resolved = ready.execute(
        "select resolution, resolved_by, resolve_reason from rekey.failure_status"
    ).fetchone()
    assert resolved == ("retry", "postgres", "restored")
    assert "rotation.failure_resolved" in events(ready, number)
    check(ready, {"s1": "s1", "s2": "s2", "s3": "s3"})


def test_resolve_by_discard(ready: Connection) -> None:
    number, failure = broken(ready)
    ready.execute("select rekey.resolve_failure(%s, 'discard', 'worthless')", (failure,))
    assert rotation(ready, number, "state", "rows_failed") == ("completed_with_failures", 0)
    # Given up, but still there: it keeps its key, and the census leaves it alone.
    with refused("RK005"):
        ready.execute("select rekey.schedule_key_destruction('default', 1)")
    ready.execute("select rekey._census()")
    assert value(ready, "select count(*) from rekey.rotations") == 1
    # It does not make the census blind for another row either.
    ready.execute("create table held as select id, ciphertext from rekey.secrets where name = 's2'")
    rotate(ready)
    run(ready)
    (stale,) = ready.execute("select id from rekey.rotation_failures where resolved_at is null").fetchall()
    ready.execute("select rekey.resolve_failure(%s, 'discard')", stale)
    ready.execute("delete from rekey.secrets where name = 's1'")
    ready.execute("update rekey.secrets s set ciphertext = h.ciphertext from held h where h.id = s.id")
    ready.execute("select rekey._census()")
    assert value(ready, "select count(*) from rekey.rotations where trigger = 'schedule'") == 1
    run(ready)
    ready.execute("select rekey.schedule_key_destruction('default', 1)")
    assert states(ready)[1] == "destroy_scheduled"


def test_resolve_refuses(ready: Connection) -> None:
    bad = {(0, "retry"): "RK007", (None, "retry"): "RK007", (1, "forget"): "22023", (1, None): "22023"}
    for arguments, code in bad.items():
        with refused(code):
            ready.execute("select rekey.resolve_failure(%s, %s)", arguments)


def test_resolve_only_once_and_in_the_last_rotation(ready: Connection) -> None:
    number, failure = broken(ready)
    later = rotate(ready)
    run(ready)
    assert rotation(ready, later, "state", "rows_failed") == ("completed_with_failures", 1)
    with refused("RK006"):
        ready.execute("select rekey.retry_rotation(%s)", (number,))
    # One row, one open entry: it went over to the later rotation.
    assert value(
        ready, "select array_agg(rotation_id) from rekey.failure_status where resolution is null"
    ) == [later]
    ready.execute("select rekey.resolve_failure(%s, 'discard')", (failure,))
    with refused("RK006"):
        ready.execute("select rekey.resolve_failure(%s, 'discard')", (failure,))
    assert events(ready).count("rotation.failure_resolved") == 1


def test_a_failure_is_cleared_when_its_row_is_gone(ready: Connection) -> None:
    _, failure = broken(ready)
    ready.execute("select rekey.delete_secret('s1')")
    later = rotate(ready)
    run(ready)
    assert rotation(ready, later, "state") == "completed"
    resolution: LiteralString = "select resolution from rekey.failure_status where id = %s"
    assert value(ready, resolution, failure) == "cleared"
    ready.execute("select rekey.schedule_key_destruction('default', 1)")


def test_rows_of_a_disabled_version_wait_in_quarantine(ready: Connection) -> None:
    model = fill(ready, 3)
    ready.execute("create table old as select id, ciphertext from rekey.secrets where name = 's1'")
    rotate(ready)
    run(ready)
    ready.execute("update rekey.secrets s set ciphertext = o.ciphertext from old o where o.id = s.id")
    ready.execute("select rekey.disable_key('default', 1)")
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state") == "completed_with_failures"
    assert value(ready, "select reason from rekey.failure_status") == "key version 1 is disabled"
    ready.execute("select rekey.enable_key('default', 1)")
    ready.execute("select rekey.retry_rotation(%s)", (number,))
    run(ready)
    assert rotation(ready, number, "state") == "completed"
    check(ready, model)


def test_keys_that_a_rotation_needs_are_kept(ready: Connection) -> None:
    fill(ready, 3)
    rotate(ready)
    with refused("RK005"):
        ready.execute("select rekey.disable_key('default', 1)")
    with refused("RK005"):
        ready.execute("select rekey.schedule_key_destruction('default', 1)")
    with refused("RK004"):
        ready.execute("select rekey.retire_keyring('default')")
    run(ready)
    ready.execute("select rekey.disable_key('default', 1)")


def test_compromise_of_an_old_version_sweeps_its_rows(ready: Connection) -> None:
    model = fill(ready, 3)
    rotate(ready)
    number = value(ready, "select id from rekey.mark_key_compromised('default', 1)")
    assert rotation(ready, number, "trigger") == "compromise"  # the one under way takes its rows along
    run(ready)
    rotate(ready)
    run(ready)
    number = value(ready, "select id from rekey.mark_key_compromised('default', 2)")
    assert rotation(ready, number, "trigger", "to_version") == ("compromise", 3)
    run(ready)
    assert states(ready) == {1: "compromised", 2: "compromised", 3: "active"}
    check(ready, model)


def test_a_compromised_key_does_not_wait_for_a_long_sweep(ready: Connection) -> None:
    model = fill(ready, 3000)
    ready.execute("select rekey.create_keyring('small')")
    model |= fill(ready, 3, keyring="small", prefix="few")
    long = rotate(ready)
    step_until(ready, "batch")
    ready.execute("select rekey.mark_key_compromised('small', 1)")
    step_until(ready, "completed")
    assert rotation(ready, long, "state") == "running"
    assert on_versions(ready, "small") == {2: 3}
    run(ready)
    check(ready, model)


@pytest.mark.parametrize("state", ["paused", "failed"])
def test_a_compromise_sets_a_halted_rotation_going(ready: Connection, state: str) -> None:
    model = fill(ready, 3)
    number = rotate(ready)
    ready.execute("update rekey.rotations set state = %s", (state,))
    assert value(ready, "select id from rekey.mark_key_compromised('default', 1)") == number
    run(ready)
    assert rotation(ready, number, "state", "trigger") == ("completed", "compromise")
    check(ready, model)


def test_nothing_revives_a_retired_keyring(ready: Connection) -> None:
    number, failure = broken(ready)
    ready.execute("delete from rekey.secrets")
    ready.execute("select rekey.retire_keyring('default')")
    for statement in ("rollback_rotation(%(rotation)s)", "retry_rotation(%(rotation)s)"):
        with refused("RK006"):
            ready.execute(f"select rekey.{statement}".encode(), {"rotation": number})
    with refused("RK006"):
        ready.execute("select rekey.resolve_failure(%s, 'retry')", (failure,))
    assert set(states(ready).values()) == {"decrypt_only"}


def test_a_clock_that_was_wrong_stops_nothing(ready: Connection) -> None:
    model = fill(ready, 5)
    number = rotate(ready)
    ready.execute("select rekey.set_setting('max_rows_per_second', '1000')")
    ready.execute("update rekey._worker set next_batch_at = now() + interval '60 days'")
    ready.execute("update rekey.rotations set next_attempt_at = now() + interval '60 days'")
    run(ready)
    assert rotation(ready, number, "state") == "completed"
    check(ready, model)


def test_many_unreadable_rows_are_cleared_together(ready: Connection) -> None:
    fill(ready, 3000)
    ready.execute(
        "update rekey.secrets set ciphertext = set_byte(ciphertext, 40, get_byte(ciphertext, 40) # 1)"
    )
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state", "rows_failed") == ("completed_with_failures", 3000)
    ready.execute("delete from rekey.secrets where right(name, 1) <> '1'")
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state", "rows_failed") == ("completed_with_failures", 300)
    counted: LiteralString = "select count(*) from rekey.failure_status where resolution = 'cleared'"
    assert value(ready, counted) == 2700


def test_whatever_the_default_isolation(ready: Connection, db: str) -> None:
    """A role or database may have another default: the procedures that commit set their own."""
    model = fill(ready, 3)
    number = rotate(ready)
    ready.execute("set default_transaction_isolation = 'repeatable read'")
    ready.execute("call rekey.tick()")
    assert rotation(ready, number, "state") == "completed"
    assert value(ready, "select last_error is null and last_tick_at is not null from rekey.worker_status")
    ready.execute("reset default_transaction_isolation")
    check(ready, model)


def break_sweep(connection: Connection, body: str) -> None:
    """Have every update of a secret by a sweep do this first."""
    connection.execute(
        "create or replace function public.break_sweep() returns trigger language plpgsql as"
        f" $$ begin if current_setting('rekey.sweeping', true) = 'on'"
        f" then {body} end if; return new; end $$".encode()
    )
    connection.execute("grant execute on function public.break_sweep() to rekey_owner")
    connection.execute("grant usage on schema public to rekey_owner")
    connection.execute(
        "create or replace trigger break_sweep before update on rekey.secrets"
        " for each row execute function public.break_sweep()"
    )


def mend_sweep(connection: Connection) -> None:
    connection.execute("drop trigger break_sweep on rekey.secrets")


def due_now(connection: Connection) -> None:
    """Let the pause after an error be over."""
    for table in ("rekey.rotations", "rekey._chunks"):
        connection.execute(
            f"update {table} set next_attempt_at = now() where next_attempt_at is not null".encode()
        )


BROKEN = "rekey.secrets: broken here (trigger break_sweep), in public.break_sweep()"


@pytest.mark.parametrize("code", ["40P01", "57014", "53100"])
def test_errors_leave_their_entry_and_change_no_row(ready: Connection, code: str) -> None:
    model = fill(ready, 20)
    ready.execute("select rekey.set_setting('max_attempts', '3')")
    body = "if new.name = 's13' then raise exception 'broken here' using errcode = '{}'; end if;"
    break_sweep(ready, body.format(code))
    number = rotate(ready)
    step(ready)
    pauses = []
    for attempt in (1, 2):
        event, _, rows, detail = step(ready)
        assert (event, rows) == ("canceled" if code == "57014" else "error", 0)
        assert (detail["sqlstate"], detail["error"]) == (code, BROKEN)
        assert rotation(ready, number, "state", "attempts", "last_error") == (
            "running",
            attempt,
            BROKEN,
        )
        query: LiteralString = (
            "select extract(epoch from next_attempt_at - now())::float"
            " from rekey.rotation_status where id = %s"
        )
        pauses.append(value(ready, query, number))
        assert step(ready)[0] == "waiting"
        due_now(ready)
    assert 0 < pauses[0] <= 1 < pauses[1] <= 2
    assert on_versions(ready) == {1: 20}
    step(ready)
    assert rotation(ready, number, "state", "attempts", "rows_done", "next_attempt_at") == (
        "failed",
        3,
        0,
        None,
    )
    assert step(ready)[0] == "idle"
    assert events(ready, number)[4:] == ["rotation.started", *["rotation.error"] * 3, "rotation.failed"]
    with refused("RK004"):
        rotate(ready)
    mend_sweep(ready)
    ready.execute("select rekey.retry_rotation(%s)", (number,))
    run(ready)
    assert rotation(ready, number, "state", "attempts", "rows_done") == ("completed", 0, 20)
    assert events(ready, number)[-2:] == ["rotation.retried", "rotation.completed"]
    check(ready, model)


def test_one_success_ends_the_count_of_attempts(ready: Connection) -> None:
    fill(ready, 20)
    break_sweep(ready, "raise exception 'no' using errcode = '40P01';")
    number = rotate(ready)
    step(ready)
    assert step(ready)[0] == "error"
    mend_sweep(ready)
    due_now(ready)
    assert step(ready)[0] == "batch"
    assert rotation(ready, number, "attempts", "rows_done") == (0, 20)


def test_two_workers_fail_a_rotation_once(ready: Connection) -> None:
    number = rotate(ready)
    ready.execute("select rekey.set_setting('max_attempts', '1')")
    for _ in range(2):
        ready.execute("select rekey._record_error(array[%s]::bigint[], 'no', '40P01')", (number,))
    assert rotation(ready, number, "state", "attempts") == ("failed", 1)
    assert events(ready, number)[4:] == ["rotation.error", "rotation.failed"]


def test_statement_timeout(ready: Connection) -> None:
    model = fill(ready, 20)
    break_sweep(ready, "perform pg_sleep(0.1);")
    number = rotate(ready)
    step(ready)
    ready.execute("set statement_timeout = '300 ms'")
    assert step(ready)[0] == "canceled"
    ready.execute("set statement_timeout = 0")
    assert rotation(ready, number, "state", "attempts") == ("running", 1)
    assert on_versions(ready) == {1: 20}
    mend_sweep(ready)
    run(ready)
    assert rotation(ready, number, "state") == "completed"
    check(ready, model)


def test_lock_timeout(ready: Connection, db: str) -> None:
    model = fill(ready, 20)
    ready.execute("create table public.locked ()")
    ready.execute("grant all on public.locked to rekey_owner")
    break_sweep(ready, "perform from public.locked;")
    number = rotate(ready)
    step(ready)
    ready.execute("set lock_timeout = '50 ms'")
    with connect(db) as other, other.transaction():
        other.execute("lock table public.locked")
        event, _, _, detail = step(ready)
        assert (event, detail["sqlstate"]) == ("error", "55P03")
    ready.execute("set lock_timeout = 0")
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed", 20)
    check(ready, model)


def test_deadlock(ready: Connection, db: str) -> None:
    model = fill(ready, 20)
    break_sweep(ready, "perform pg_advisory_xact_lock(42);")
    number = rotate(ready)
    step(ready)
    ready.execute("set deadlock_timeout = '1 s'")
    seen: list[tuple[str, str]] = []

    def sweep() -> None:
        event, _, _, detail = step(ready)
        seen.append((event, detail["sqlstate"]))

    with connect(db, options="-c deadlock_timeout=30s") as other:
        pid = ready.info.backend_pid
        with other.transaction():
            other.execute("select pg_advisory_xact_lock(42)")
            worker = threading.Thread(target=sweep)
            worker.start()
            waits(other, pid)
            other.execute("update rekey.secrets set description = 'mine'")
        worker.join()
    assert seen == [("error", "40P01")]
    assert rotation(ready, number, "state", "attempts") == ("running", 1)
    run(ready)
    assert rotation(ready, number, "state") == "completed"
    assert value(ready, "select count(*) from rekey.secrets where description = 'mine'") == 20
    check(ready, model)


def test_throttle_keeps_the_rate(ready: Connection) -> None:
    fill(ready, 600)
    ready.execute("select rekey.set_setting('max_rows_per_second', '600')")
    rotate(ready)
    begun = time.monotonic()
    run(ready)
    # The last batch owes nothing any more: 480 rows at 600 a second.
    assert time.monotonic() - begun >= 0.75
    assert on_versions(ready) == {2: 600}


def test_batches_are_bounded_in_rows(ready: Connection) -> None:
    fill(ready, 9000)
    rotate(ready)
    step(ready)
    sizes = []
    while (row := step(ready))[0] == "batch":
        sizes.append(row[2])
    assert sum(sizes) == 9000
    assert sizes[0] <= 2000
    assert max(sizes) <= 4000


def test_batches_are_bounded_in_bytes(ready: Connection) -> None:
    model = fill(ready, 36, size=1_000_000)
    number = rotate(ready)
    step(ready)
    sizes = []
    while (row := step(ready))[0] == "batch":
        sizes.append(row[2])
    assert sum(sizes) == 36
    assert max(sizes) == 3  # the one that crosses 2 MiB is still taken
    run(ready)
    assert rotation(ready, number, "state") == "completed"
    check(ready, model)


def test_refused_outside_read_committed(ready: Connection) -> None:
    fill(ready, 3)
    rotate(ready)
    run(ready)
    calls: list[LiteralString] = [
        "select rekey.rotation_step()",
        "select rekey.key_usage()",
        "select rekey.schedule_key_destruction('default', 1)",
        "select rekey._tick_duty('census', now())",
        "select rekey.retire_keyring('default')",
    ]
    levels: list[LiteralString] = ["repeatable read", "serializable"]
    for level, call in itertools.product(levels, calls):
        with refused("25001"), ready.transaction():
            ready.execute("set transaction isolation level " + level)
            ready.execute(call)


def test_any_duration_will_do(ready: Connection) -> None:
    fill(ready, 3)
    for duration in ("0 s", "-1 day", "10000 years"):
        number = rotate(ready)
        for _ in range(6):  # one step each, where there is no time
            run(ready, duration)
        assert rotation(ready, number, "state") == "completed"


def test_run_rotations_refuses(ready: Connection) -> None:
    with refused("22023"):
        ready.execute("call rekey.run_rotations(null)")
    with refused("2D000"), ready.transaction():
        ready.execute("call rekey.run_rotations('1 s')")


def test_many_keyrings_share_one_pass(ready: Connection) -> None:
    for n in range(300):
        ready.execute("select rekey.create_keyring(%s)", (f"k{n}",))
        ready.execute("select rekey.set_secret(%s, 'v', keyring => %s)", (f"k{n}", f"k{n}"))
    assert len(ready.execute("select rekey.rotate_keys()").fetchall()) == 301
    assert step(ready)[:2] == ("planned", 301)
    assert value(ready, "select count(*) from rekey._chunks") == 1
    seen = step_until(ready, "idle")
    assert seen.count("batch") <= 3
    assert "planned" not in seen
    assert value(ready, "select count(*) from rekey.rotation_status where state = 'completed'") == 301
    for event in COMPLETE:
        assert events(ready).count(event) == 301 + (301 if event in ("key.created", "key.activated") else 0)
    check(ready, {f"k{n}": "v" for n in range(300)})


def test_a_small_keyring_is_found_by_the_index(ready: Connection) -> None:
    model = fill(ready, 20_000)
    ready.execute("select rekey.create_keyring('small')")
    model |= fill(ready, 3, keyring="small", prefix="few")
    ready.execute("vacuum analyze rekey.secrets")
    scanned: LiteralString = (
        "select seq_tup_read from pg_stat_xact_user_tables where relid = 'rekey.secrets'::regclass"
    )
    for _ in range(7):  # from the sixth time on, a statement may have a generic plan
        number = rotate(ready, "small")
        seen: list[str] = []
        while not seen or seen[-1] != "idle":
            with ready.transaction():
                seen.append(step(ready)[0])
                assert value(ready, scanned) in (0, None), seen
        assert seen == ["planned", "batch", "swept", "swept", "completed", "idle"]
        assert rotation(ready, number, "rows_total", "rows_done") == (3, 3)
    assert on_versions(ready) == {1: 20_000}
    check(ready, model)


def test_a_late_keyring_joins_while_others_are_swept(ready: Connection) -> None:
    model = fill(ready, 2500)
    ready.execute("select rekey.create_keyring('late')")
    model |= fill(ready, 50, keyring="late", prefix="late")
    first = rotate(ready)
    step(ready)
    step(ready)
    late = rotate(ready, "late")
    run(ready)
    assert rotation(ready, first, "state", "rows_done") == ("completed", 2500)
    assert rotation(ready, late, "state", "rows_done") == ("completed", 50)
    check(ready, model)


def test_a_table_rewritten_mid_sweep(ready: Connection) -> None:
    model = fill(ready, 2500)
    number = rotate(ready)
    step(ready)
    step(ready)
    ready.execute("delete from rekey.secrets where name like 's1%'")
    ready.execute("vacuum full rekey.secrets")
    run(ready)
    assert rotation(ready, number, "state") == "completed"
    assert set(on_versions(ready)) == {2}
    check(ready, {name: v for name, v in model.items() if not name.startswith("s1")})


def test_no_rows_at_all(ready: Connection, make_database: Callable[..., str]) -> None:
    number = rotate(ready)
    assert step_until(ready, "idle") == ["planned", "swept", "swept", "completed", "idle"]
    assert rotation(ready, number, "rows_total", "rows_done") == (0, 0)
    assert read(ready) == {}


def test_before_it_is_set_up(conn: Connection) -> None:
    assert step(conn)[0] == "idle"
    conn.execute("call rekey.run_rotations('1 s')")
    assert conn.execute("select * from rekey.rotate_keys()").fetchall() == []
    with pytest.raises(psycopg.Error):
        rotate(conn)

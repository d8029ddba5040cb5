"""Keyrings, the states of their keys, and destruction."""

import itertools
from datetime import timedelta
from typing import Any, LiteralString

import psycopg
import pytest

from driving import FLIP, check, events, fill, refused, rotate, run, states, step_until
from helpers import Connection, connect, unlock, value

GOOD_NAMES = [
    "a",
    'o\'clock "q"',
    "100%s %I %%",
    "$$ $body$",
    "back\\slash",
    "\u202eright to left\u200f",
    "\u00e9",
    "e\u0301",
    "DEFAULT",
    " ",
    "a" * 63,
    "\u00e9" * 31 + "a",
]
BAD_NAMES = [None, "", "a" * 64, "\u00e9" * 32, "tab\t", "line\n", "\x01", "\x7f"]


def footprint(connection: Connection) -> Any:
    """What a refused call must leave as it was."""
    query: LiteralString = """
        select (select jsonb_agg(to_jsonb(k) order by id) from rekey.keyrings k),
          (select jsonb_agg(to_jsonb(k) order by id) from rekey.encryption_keys k),
          (select jsonb_agg(to_jsonb(k) order by id) from rekey.keks k),
          (select jsonb_agg(to_jsonb(r) order by id) from rekey.rotations r),
          (select count(*) from rekey.audit_log)"""
    return connection.execute(query).fetchone()


def test_names(ready: Connection) -> None:
    for name in GOOD_NAMES:
        assert value(ready, "select (rekey.create_keyring(%s)).name", name) == name
        ready.execute("select rekey.set_secret(%s, 'x', keyring => %s)", [name, name])
        rotate(ready, name, supersede=True)
    run(ready)
    check(ready, dict.fromkeys(GOOD_NAMES, "x"))
    assert set(value(ready, "select array_agg(keyring) from rekey.key_usage()")) == {"default", *GOOD_NAMES}
    before = footprint(ready)
    for bad in BAD_NAMES:
        with refused("22023"):
            ready.execute("select rekey.create_keyring(%s)", [bad])
    with refused("23505"):
        ready.execute("select rekey.create_keyring(%s)", [GOOD_NAMES[0]])
    with refused("22023"):
        ready.execute("select rekey.create_keyring('no tenant', null)")
    assert footprint(ready) == before


def test_intervals(ready: Connection) -> None:
    before = footprint(ready)
    for bad in ("-1 day", "0", "59.9 s", "36500 days 1 us", "178000000 years", "1 month -40 days"):
        with refused("22023"):
            ready.execute("select rekey.create_keyring('r', rotate_every => %s)", [bad])
    assert footprint(ready) == before
    for number, good in enumerate((None, "1 minute", "1 month", "36500 days")):
        row = ready.execute(
            "select rotate_every = %s, next_rotation_at = now() + %s"
            " from rekey.create_keyring(%s, rotate_every => %s)",
            [good, good, f"r{number}", good],
        ).fetchone()
        assert row == ((True, True) if good else (None, None))


ALLOWED = {
    ("active", "decrypt_only"),
    ("active", "compromised"),
    ("decrypt_only", "active"),
    ("decrypt_only", "disabled"),
    ("decrypt_only", "compromised"),
    ("decrypt_only", "destroy_scheduled"),
    ("disabled", "decrypt_only"),
    ("disabled", "destroy_scheduled"),
    ("compromised", "destroy_scheduled"),
    ("destroy_scheduled", "destroyed"),
}
STATES = ["active", "decrypt_only", "disabled", "compromised", "destroy_scheduled", "destroyed"]
MOVE: LiteralString = """
    update rekey.encryption_keys set state = %(to)s,
      wrapped_key = case when %(to)s <> 'destroyed' then coalesce(wrapped_key, '') end,
      destroyed_at = case when %(to)s = 'destroyed' then now() end,
      destroy_after = case when %(to)s = 'destroy_scheduled' then now() end,
      scheduled_from = case when %(to)s = 'destroy_scheduled' then %(origin)s end
    where version = %(version)s"""


def place(connection: Connection, state: str, origin: str = "decrypt_only", version: int = 1) -> None:
    """Put a key into a state, past the trigger."""
    connection.execute("set local session_replication_role = replica")
    connection.execute(MOVE, {"to": state, "origin": origin, "version": version})
    connection.execute("set local session_replication_role = origin")


def test_graph_holds_for_a_superuser(ready: Connection) -> None:
    origins = ("decrypt_only", "disabled", "compromised")
    for origin, old, new in itertools.product(origins, STATES, STATES):
        with ready.transaction(force_rollback=True):
            place(ready, old, origin)
            allowed = old == new or (old, new) in ALLOWED or (old, new) == ("destroy_scheduled", origin)
            if allowed:
                ready.execute(MOVE, {"to": new, "origin": origin, "version": 1})
            else:
                with refused("RK006"):
                    ready.execute(MOVE, {"to": new, "origin": origin, "version": 1})


def test_no_key_is_ever_taken_out_or_renumbered(ready: Connection) -> None:
    for change in ("version = 7", "keyring_id = 1"):
        with refused("RK006"):
            ready.execute("update rekey.encryption_keys set " + change)
    for statement in (
        "delete from rekey.encryption_keys",
        "delete from rekey.encryption_keys where false",
        "truncate rekey.encryption_keys cascade",
        "truncate rekey.keyrings cascade",
    ):
        with refused("42501"):
            ready.execute(statement)


CALLS: dict[LiteralString, tuple[str, ...]] = {
    "select rekey.disable_key('default', %s)": ("decrypt_only",),
    "select rekey.enable_key('default', %s)": ("disabled",),
    "select rekey.mark_key_compromised('default', %s)": ("active", "decrypt_only"),
    "select rekey.schedule_key_destruction('default', %s)": ("decrypt_only", "disabled", "compromised"),
    "select rekey.cancel_key_destruction('default', %s)": ("destroy_scheduled",),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_follow_the_graph(ready: Connection, call: LiteralString) -> None:
    rotate(ready)
    run(ready)
    for state in STATES:
        version = 2 if state == "active" else 1
        with ready.transaction(force_rollback=True):
            if state != "active":
                place(ready, state)
            if state in CALLS[call]:
                ready.execute(call, [version])
                assert states(ready)[version] != state
            else:
                before = footprint(ready)
                with ready.transaction(), refused("RK006"), ready.transaction():
                    ready.execute(call, [version])
                assert footprint(ready) == before
    for missing in (0, -1, 99, None):
        with refused("RK007"):
            ready.execute(call, [missing])
    with refused("RK007"):
        ready.execute(call.replace("'default'", "null"), [1])


def test_compromise_of_the_active_version(ready: Connection) -> None:
    model = fill(ready, 5)
    under_way = rotate(ready)
    compromise: LiteralString = (
        "select id, trigger, state, to_version, reason"
        " from rekey.mark_key_compromised('default', 2, 'left on a bus')"
    )
    ((number, *found),) = ready.execute(compromise).fetchall()
    assert found == ["compromise", "queued", 3, "left on a bus"]
    assert states(ready) == {1: "decrypt_only", 2: "compromised", 3: "active"}
    assert value(ready, "select state from rekey.rotations where id = %s", under_way) == "superseded"
    check(ready, model)
    assert value(ready, "select get_byte(rekey.encrypt('x'::text), 10)") == 3
    run(ready)
    check(ready, model)
    assert value(ready, "select count(*) from rekey.secrets where key_version <> 3") == 0
    assert "key.compromised" in events(ready)
    with refused("RK006"):
        ready.execute("select rekey.rollback_rotation(%s)", [number])


def test_compromise_of_an_older_version_joins_what_is_under_way(ready: Connection) -> None:
    under_way = rotate(ready)
    found = ready.execute("select id, trigger from rekey.mark_key_compromised('default', 1)").fetchall()
    assert found == [(under_way, "compromise")]
    run(ready)
    assert states(ready) == {1: "compromised", 2: "active"}


def test_disabled_version_does_not_open(ready: Connection) -> None:
    held = value(ready, "select rekey.encrypt('held'::text)")
    rotate(ready)
    with refused("RK005"):
        ready.execute("select rekey.disable_key('default', 1)")
    run(ready)
    ready.execute("select rekey.disable_key('default', 1, 'suspicion')")
    with refused("RK006"):
        ready.execute("select rekey.decrypt(%s::bytea)", [held])
    ready.execute("select rekey.enable_key('default', 1)")
    assert value(ready, "select rekey.decrypt_text(%s::bytea)", held) == "held"
    assert events(ready)[-2:] == ["key.disabled", "key.enabled"]


@pytest.mark.parametrize("origin", ["decrypt_only", "disabled", "compromised"])
def test_cancelled_destruction_returns_to_where_it_came_from(ready: Connection, origin: str) -> None:
    rotate(ready)
    run(ready)
    with ready.transaction():
        place(ready, origin)
    assert value(ready, "select rekey.schedule_key_destruction('default', 1) - now()") == timedelta(days=45)
    assert states(ready)[1] == "destroy_scheduled"
    ready.execute("select rekey.cancel_key_destruction('default', 1)")
    assert states(ready)[1] == origin
    assert value(ready, "select destroy_after is null from rekey.key_status where version = 1")


def test_destruction_refuses_a_wait_that_cannot_be(ready: Connection) -> None:
    rotate(ready)
    run(ready)
    for wait in ("-1 us", "3650 days 1 us", "178000000 years"):
        with refused("22023"):
            ready.execute("select rekey.schedule_key_destruction('default', 1, %s)", [wait])


def test_destruction(ready: Connection) -> None:
    held = value(ready, "select rekey.encrypt('held'::text)")
    rotate(ready)
    run(ready)
    ready.execute("call rekey.tick()")
    ready.execute("select rekey.schedule_key_destruction('default', 1, '1 hour')")
    ready.execute("call rekey.tick()")
    assert states(ready)[1] == "destroy_scheduled"
    ready.execute("select rekey.cancel_key_destruction('default', 1)")
    ready.execute("select rekey.schedule_key_destruction('default', 1, '0 s')")
    with refused("RK006"):
        ready.execute("select rekey.decrypt(%s::bytea)", [held])
    ready.execute("call rekey.tick()")
    assert states(ready) == {1: "destroyed", 2: "active"}
    gone: LiteralString = (
        "select wrapped_key is null and destroyed_at is not null from rekey.encryption_keys where version = 1"
    )
    assert value(ready, gone)
    assert events(ready).count("key.destroyed") == 1
    with refused("RK006"):
        ready.execute("select rekey.decrypt(%s::bytea)", [held])
    ready.execute("call rekey.tick()")
    assert events(ready).count("key.destroyed") == 1


def test_destruction_waits_a_day_after_a_jump_of_the_clock(ready: Connection) -> None:
    rotate(ready)
    run(ready)
    ready.execute("select rekey.schedule_key_destruction('default', 1, '0 s')")
    ready.execute("update rekey._worker set last_tick_at = now() - interval '25 hours'")
    ready.execute("call rekey.tick()")
    assert states(ready)[1] == "destroy_scheduled"
    postponed: LiteralString = "select destroy_after - now() from rekey.key_status where version = 1"
    assert timedelta(hours=23) < value(ready, postponed) <= timedelta(days=1)
    assert value(ready, "select details ? 'postponed' from rekey.audit_log order by id desc limit 1")
    ready.execute("update rekey.encryption_keys set destroy_after = now() where version = 1")
    ready.execute("call rekey.tick()")
    assert states(ready)[1] == "destroyed"


def test_destruction_refused_for_rows(ready: Connection, db: str, kek: bytes) -> None:
    """Under way; uncommitted in another session; committed; and last, on the day itself."""
    ready.execute("call rekey.tick()")
    with connect(db) as writer:
        unlock(writer, kek)
        schedule: LiteralString = "select rekey.schedule_key_destruction('default', 1, '0 s')"
        with writer.transaction():
            writer.execute("select rekey.set_secret('late', 'value')")
            rotate(ready)
            with refused("RK005"):
                ready.execute(schedule)
            # As if the rotation had been told that nothing is left: destruction looks for itself.
            ready.execute("update rekey.rotations set state = 'completed', finished_at = now()")
            with refused("RK005"):
                ready.execute(schedule)
        with refused("RK005"):
            ready.execute(schedule)
    old = value(ready, "select ciphertext from rekey.secrets")
    rotate(ready)
    run(ready)
    ready.execute(schedule)
    # A ciphertext that was held back all the time.
    ready.execute("update rekey.secrets set ciphertext = %s", [old])
    with refused("RK006"):
        ready.execute("select rekey.get_secret('late')")
    ready.execute("update rekey._worker set last_census_at = now() - interval '2 days'")
    ready.execute("call rekey.tick()")
    assert states(ready)[1] == "destroy_scheduled"
    assert value(ready, "select rekey.get_secret('late')") == "value"
    assert value(ready, "select key_version from rekey.secrets") == 3
    check(ready, {"late": "value"})


def test_destruction_refused_for_the_quarantine(ready: Connection) -> None:
    fill(ready, 2)
    ready.execute(FLIP)
    number = rotate(ready)
    step_until(ready, "completed")
    assert (
        value(ready, "select state from rekey.rotations where id = %s", number) == "completed_with_failures"
    )
    ready.execute("delete from rekey.secrets where name = 's1'")
    with refused("RK005"):
        ready.execute("select rekey.schedule_key_destruction('default', 1)")
    ready.execute("select rekey.resolve_failure(id, 'discard') from rekey.failure_status")
    ready.execute("select rekey.schedule_key_destruction('default', 1)")


def test_retire(ready: Connection, db: str, kek: bytes) -> None:
    retire: LiteralString = "select rekey.retire_keyring('tenant')"
    ready.execute("select rekey.create_keyring('tenant', rotate_every => '1 day')")
    ready.execute("select rekey.set_secret('n', 'x', keyring => 'tenant')")
    with refused("RK005"):
        ready.execute(retire)
    ready.execute("select rekey.delete_secret('n')")
    with connect(db) as writer:
        unlock(writer, kek)
        with writer.transaction(force_rollback=True):
            writer.execute("select rekey.encrypt('x'::text, 'tenant')")
            with refused("RK005"):
                ready.execute(retire)
    rotate(ready, "tenant")
    with refused("RK004"):
        ready.execute(retire)
    run(ready)
    with ready.transaction(), refused("25001"), ready.transaction():
        ready.execute("set transaction isolation level repeatable read")
        ready.execute(retire)
    ready.execute(retire)
    assert states(ready, "tenant") == {1: "decrypt_only", 2: "decrypt_only"}
    for call in (
        retire,
        "select rekey.encrypt('x'::text, 'tenant')",
        "select rekey.set_secret('n', 'x', keyring => 'tenant')",
        "select rekey.rotate_keys('tenant')",
        "select rekey.set_schedule('tenant', '1 day')",
    ):
        with refused("RK006"):
            ready.execute(call)
    assert value(ready, "select array_agg(keyring) from rekey.rotate_keys()") == ["default"]
    with refused("RK007"):
        ready.execute("select rekey.retire_keyring('nobody')")
    ready.execute("call rekey.tick()")
    for version in (1, 2):
        ready.execute("select rekey.schedule_key_destruction('tenant', %s, '0 s')", [version])
    ready.execute("call rekey.tick()")
    assert states(ready, "tenant") == {1: "destroyed", 2: "destroyed"}
    assert "keyring.retired" in events(ready)


def test_only_administrators(ready: Connection) -> None:
    for role in ("rekey_app", "rekey_operator", "rekey_auditor"):
        ready.execute("set role " + role)
        for call in (
            "select rekey.create_keyring('x')",
            "select rekey.retire_keyring('default')",
            "select rekey.disable_key('default', 1)",
            "select rekey.mark_key_compromised('default', 1)",
            "select rekey.schedule_key_destruction('default', 1)",
            "select wrapped_key from rekey.encryption_keys",
            "select key from rekey._session_key",
            "select * from rekey._kek()",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                ready.execute(call)
        ready.execute("reset role")

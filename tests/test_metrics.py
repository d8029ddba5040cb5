"""Figures and views for monitoring."""

from typing import LiteralString

from driving import FLIP, fill, refused, rotate, run, step, step_until
from helpers import Connection, connect, unlock, value

ALWAYS = {
    "pg_rekey_rotations",
    "pg_rekey_rotation_rows_total",
    "pg_rekey_rotation_failures_open",
    "pg_rekey_census_rows",
    "pg_rekey_last_census_timestamp_seconds",
    "pg_rekey_oldest_unfinished_rotation_seconds",
    "pg_rekey_rotation_blocked_seconds",
    "pg_rekey_last_tick_timestamp_seconds",
    "pg_rekey_last_tick_duration_seconds",
    "pg_rekey_keyrings",
    "pg_rekey_keyrings_overdue",
    "pg_rekey_keyrings_unscheduled",
    "pg_rekey_keys",
    "pg_rekey_locked",
    "pg_rekey_messages",
    "pg_rekey_audit_entries",
    "pg_rekey_kek_age_seconds",
}
SOMETIMES = {
    "pg_rekey_findings",
    "pg_rekey_rotations_total",
    "pg_rekey_last_rotation_duration_seconds",
    "pg_rekey_keyring_unhealthy",
}


def metrics(connection: Connection) -> dict[tuple[str, ...], float]:
    """Return every figure by its name (without prefix) and the values of its labels."""
    query: LiteralString = "select name, labels, value from rekey.metrics()"
    found = [
        ((name.removeprefix("pg_rekey_"), *(labels[key] for key in sorted(labels))), value)
        for name, labels, value in connection.execute(query)
    ]
    assert len(dict(found)) == len(found), "one sample for each set of labels"
    return dict(found)


def names(connection: Connection) -> set[str]:
    query: LiteralString = "select distinct name from rekey.metrics()"
    return {name for (name,) in connection.execute(query)}


def test_names_are_the_documented_ones(ready: Connection) -> None:
    assert names(ready) == ALWAYS
    fill(ready, 2)
    ready.execute(FLIP)
    rotate(ready)
    run(ready)
    ready.execute("select rekey._census()")
    assert names(ready) == ALWAYS | SOMETIMES


def test_messages_that_wait_or_were_given_up(ready: Connection) -> None:
    ready.execute("select rekey.add_endpoint('web', 'https://hooks.example.com/')")
    ready.execute("select rekey.test_endpoint('web') from generate_series(1, 3)")
    ready.execute("update rekey._notifications set state = 'dead', ended_at = now() where id = 1")
    figures = metrics(ready)
    assert (figures["messages", "waiting"], figures["messages", "dead"]) == (2, 1)


def test_before_it_is_set_up(conn: Connection) -> None:
    assert metrics(conn)["keyrings",] == 0


def test_figures_follow_a_rotation(ready: Connection) -> None:
    fill(ready, 100)
    figures = metrics(ready)
    for state in ("queued", "running", "paused", "verifying", "failed"):
        assert figures["rotations", state] == 0
    assert figures["keyrings",] == figures["keyrings_unscheduled",] == 1
    assert figures["keys", "active"] == 1
    assert figures["oldest_unfinished_rotation_seconds",] == 0
    entries = figures["audit_entries",]
    assert entries == value(ready, "select count(*) from rekey.audit_log")

    number = rotate(ready)
    ready.execute("update rekey.rotations set created_at = now() - interval '1 hour'")
    figures = metrics(ready)
    assert figures["rotations", "queued"] == 1
    assert figures["keys", "active"] == figures["keys", "decrypt_only"] == 1
    assert 3600 <= figures["oldest_unfinished_rotation_seconds",] < 3660
    assert figures["audit_entries",] == entries + 4

    step(ready)
    assert metrics(ready)["rotations", "running"] == 1
    step_until(ready, "swept")
    assert metrics(ready)["rotations", "verifying"] == 1
    assert metrics(ready)["rotation_rows_total",] == 100
    ready.execute("select rekey.pause_rotation(%s)", (number,))
    assert metrics(ready)["rotations", "paused"] == 1
    ready.execute("update rekey.rotations set state = 'failed'")
    figures = metrics(ready)
    assert figures["rotations", "failed"] == 1
    assert figures["keyring_unhealthy", "default", "failed"] == 1
    ready.execute("select rekey.retry_rotation(%s)", (number,))
    run(ready)
    figures = metrics(ready)
    assert figures["rotations", "queued"] == figures["rotations", "failed"] == 0
    assert figures["rotations_total", "completed", "manual"] == 1
    assert figures["oldest_unfinished_rotation_seconds",] == 0
    assert 3600 <= figures["last_rotation_duration_seconds",] < 3660
    assert not [key for key in figures if key[0] == "keyring_unhealthy"]


def test_blocked_seconds(ready: Connection, db: str, kek: bytes) -> None:
    with connect(db) as writer:
        unlock(writer, kek)
        with writer.transaction():
            writer.execute("select rekey.set_secret('a', 'b')")
            rotate(ready)
            step_until(ready, "blocked")
            ready.execute("update rekey.rotations set blocked_since = blocked_since - interval '1 hour'")
            step_until(ready, "blocked")
            assert 3600 <= metrics(ready)["rotation_blocked_seconds",] < 3660
    run(ready)
    assert metrics(ready)["rotation_blocked_seconds",] == 0


def test_quarantine_schedules_and_the_worker(ready: Connection) -> None:
    fill(ready, 2)
    ready.execute(FLIP)
    rotate(ready)
    run(ready)
    figures = metrics(ready)
    assert figures["rotation_failures_open",] == 1
    assert figures["keyring_unhealthy", "default", "failures"] == 1
    assert figures["rotations_total", "completed_with_failures", "manual"] == 1
    ready.execute("select rekey.resolve_failure(id, 'discard') from rekey.failure_status")
    assert metrics(ready)["rotation_failures_open",] == 0

    ready.execute("select rekey.set_schedule('default', '1 day', now() - interval '11 minutes')")
    figures = metrics(ready)
    assert figures["keyrings_unscheduled",] == 0
    assert figures["keyrings_overdue",] == 1
    assert figures["keyring_unhealthy", "default", "overdue"] == 1
    assert value(ready, "select overdue from rekey.schedule_status")

    ready.execute("update rekey._worker set locked_since = now()")
    assert metrics(ready)["locked",] == 1
    begun = value(ready, "select extract(epoch from now())::float")
    ready.execute("call rekey.tick()")
    figures = metrics(ready)
    assert figures["locked",] == figures["keyrings_overdue",] == 0
    assert begun <= figures["last_tick_timestamp_seconds",] < begun + 60
    assert 0 < figures["last_tick_duration_seconds",] < 60
    seconds, locked, census = ready.execute(
        "select last_tick_seconds, locked_since, last_census_at from rekey.worker_status"
    ).fetchone() or (None, None, None)
    assert seconds == figures["last_tick_duration_seconds",]
    assert locked is None
    assert census is not None


def test_who_may_look(ready: Connection) -> None:
    views: list[LiteralString] = [
        "rekey.metrics()",
        "rekey.key_status",
        "rekey.rotation_status",
        "rekey.failure_status",
        "rekey.schedule_status",
        "rekey.worker_status",
        "rekey.setting_status",
    ]
    roles: list[LiteralString] = ["rekey_admin", "rekey_operator", "rekey_auditor", "rekey_app"]
    for role in roles:
        ready.execute("set role " + role)
        for view in views:
            query: LiteralString = "select count(*) from " + view
            if role == "rekey_app":
                with refused("42501"):
                    ready.execute(query)
            else:
                ready.execute(query)
        ready.execute("reset role")

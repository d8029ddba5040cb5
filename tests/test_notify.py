"""Somebody is told: what is told of, to whom, how often, and what it costs."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.json import Jsonb
from standardwebhooks import Webhook

from cli_fixtures import Cli, eventually, process
from driving import run
from helpers import Connection, belong, connect, unlock, value
from pg_rekey import kek as keks
from pg_rekey import worker as workers
from pg_rekey.notify import deliver
from pg_rekey.notify.deliver import Courier
from receivers import Receiver

pytest_plugins = ["cli_fixtures", "receivers"]

CHANNEL = "notify:rekey_test"


def tick(connection: Connection) -> str | None:
    """Do the duty of a tick that makes messages; return whether somebody is to deliver some."""
    answer: str | None = value(connection, "select rekey._tick_duty('notifications', now())")
    return answer


def add(connection: Connection, name: str, address: str, **options: Any) -> str | None:
    """Add an endpoint, as SQL does it; return its signing secret."""
    given = ", ".join(f"{option} => %s" for option in options)
    statement = f"select rekey.add_endpoint(%s, %s{', ' if given else ''}{given})"
    [(secret,)] = connection.execute(statement.encode(), [name, address, *options.values()]).fetchall()
    return None if secret is None else str(secret)


def told(connection: Connection) -> list[tuple[str, str]]:
    """Return event and sentence of every message, in order."""
    return connection.execute("select event, text from rekey.message_status order by id").fetchall()


def heard(connection: Connection) -> list[Any]:
    """Return what came by NOTIFY until now."""
    return [json.loads(one.payload) for one in connection.notifies(timeout=0.1)]


@pytest.fixture
def listening(ready: Connection) -> Connection:
    """`ready`, with an endpoint that NOTIFY serves."""
    ready.execute("select rekey.add_endpoint('here', 'notify:rekey_test')")
    return ready


# Of what, and how often


def test_a_rotation_that_completes_is_told_of_once(listening: Connection) -> None:
    listening.execute("select rekey.set_secret('s' || n, 'v') from generate_series(1, 3) n")
    listening.execute("listen rekey_test")
    listening.execute("select rekey.rotate_keys()")
    assert tick(listening) is None
    assert told(listening) == []
    run(listening)
    assert tick(listening) is None
    tick(listening)
    assert told(listening) == [("rotation.completed", "Rotation 1 of keyring default completed (rows: 3)")]
    [message] = heard(listening)
    assert message["type"] == "rotation.completed"
    [subject] = message["data"]["subjects"]
    assert subject == {"rotation": 1, "keyring": "default", "version": 2, "rows": 3, "failures": 0}


def test_many_of_a_kind_are_one_message(listening: Connection) -> None:
    listening.execute("select rekey.create_keyring('k' || n) from generate_series(1, 30) n")
    listening.execute("select rekey.rotate_keys()")
    run(listening)
    tick(listening)
    [(event, text)] = told(listening)
    assert event == "rotation.completed"
    assert text.endswith("; and 30 more like this")
    [(subjects, count)] = listening.execute(
        "select jsonb_array_length(body::jsonb #> '{data,subjects}'), body::jsonb #> '{data,count}'"
        " from rekey._notifications"
    ).fetchall()
    assert (subjects, count) == (10, 31)


def test_rows_in_quarantine_are_told_of_once_while_they_are_there(listening: Connection) -> None:
    listening.execute("select rekey.set_secret('s' || n, 'v') from generate_series(1, 3) n")
    listening.execute(
        "update rekey.secrets set ciphertext = set_byte(ciphertext, 40, get_byte(ciphertext, 40) # 1)"
        " where name <> 's1'"
    )
    listening.execute("select rekey.rotate_keys()")
    run(listening)
    tick(listening)
    tick(listening)
    assert told(listening) == [
        (
            "rotation.completed",
            "Rotation 1 of keyring default completed (rows: 1, in quarantine: 2)",
        ),
        (
            "rotation.row_failed",
            "Keyring default has rows in quarantine, which do not open, or which their table refused"
            " (rows: 2)",
        ),
    ]
    listening.execute("select rekey.resolve_failure(id, 'discard', 'lost') from rekey.failure_status")
    tick(listening)
    assert value(listening, "select count(*) from rekey._told") == 0


def test_what_becomes_of_keys_is_told_of(listening: Connection) -> None:
    listening.execute("select rekey.rotate_keys()")
    run(listening)
    listening.execute("select rekey.mark_key_compromised('default', 1, 'canary in a reason')")
    run(listening)
    listening.execute("select rekey.schedule_key_destruction('default', 1, '8 days')")
    tick(listening)
    events = [event for event, _ in told(listening)]
    assert events[:2] == ["rotation.completed", "key.compromised"]
    assert "key.destruction_due" not in events
    listening.execute("select rekey.set_setting('notify_destruction', '9 days')")
    tick(listening)
    [(event, text)] = told(listening)[-1:]
    assert event == "key.destruction_due"
    assert text.startswith("Version 1 of keyring default is to be destroyed after 20")
    assert "canary" not in str(listening.execute("select body from rekey._notifications").fetchall())


def test_who_is_held_up_or_overdue_is_told_of(listening: Connection) -> None:
    listening.execute("select rekey.set_schedule('default', '90 days')")
    listening.execute("update rekey.keyrings set next_rotation_at = now() - interval '11 minutes'")
    listening.execute("select rekey.create_keyring('other')")
    listening.execute("select rekey.rotate_keys('other')")
    listening.execute(
        "update rekey.rotations set blocked_by = %s, blocked_since = now() - interval '14 minutes'",
        [Jsonb([{"pid": 1}])],
    )
    tick(listening)
    assert [event for event, _ in told(listening)] == ["keyring.overdue"]
    listening.execute("update rekey.rotations set blocked_since = now() - interval '16 minutes'")
    tick(listening)
    tick(listening)
    [_, (event, text)] = told(listening)
    assert event == "rotation.blocked"
    assert text.startswith("Rotation 1 of keyring other has been held up since 20")
    # What ends and comes again is told of again.
    listening.execute("update rekey.rotations set blocked_by = null, blocked_since = null")
    tick(listening)
    listening.execute("update rekey.rotations set blocked_since = now() - interval '16 minutes'")
    tick(listening)
    assert [event for event, _ in told(listening)][2:] == ["rotation.blocked"]


def test_a_rotation_that_fails_is_told_of_without_the_error(listening: Connection) -> None:
    listening.execute("select rekey.rotate_keys()")
    listening.execute(
        "select rekey._audit('rotation.failed', 'default', 2, 1, jsonb_build_object('error', 'canary'))"
    )
    tick(listening)
    assert told(listening) == [("rotation.failed", "Rotation 1 of keyring default failed")]
    assert "canary" not in str(listening.execute("select body from rekey._notifications").fetchall())


def test_a_missing_kek_is_told_of_and_that_it_is_back(listening: Connection, kek: bytes) -> None:
    listening.execute("select rekey.rotate_keys()")
    listening.execute("select rekey.lock()")
    listening.execute("select rekey._tick_duty('schedules', now())")
    # A worker that has it may come: pg_cron beside it has none.
    tick(listening)
    assert told(listening) == []
    listening.execute("update rekey._worker set locked_since = locked_since - interval '6 minutes'")
    tick(listening)
    tick(listening)
    [(event, text)] = told(listening)
    assert event == "kek.missing"
    assert text.startswith("The worker has been without the KEK since 20")
    unlock(listening, kek)
    listening.execute("select rekey._tick_duty('schedules', now())")
    tick(listening)
    assert told(listening)[1:] == [("kek.back", "The worker has the KEK again")]


def test_a_silent_worker_is_told_of_and_that_it_is_back(listening: Connection, session: Any, db: str) -> None:
    tick(listening)
    assert told(listening) == []
    listening.execute("update rekey._notifier set since = now() - interval '6 minutes'")
    listening.execute("update rekey._worker set last_tick_at = now() - interval '4 minutes'")
    tick(listening)
    assert told(listening) == []
    listening.execute("update rekey._worker set last_tick_at = now() - interval '6 minutes'")
    # Who reads a large table, in a step or a census, does not tick.
    with connect(db) as busy:
        for lock in ("pg_advisory_xact_lock(0, 2)", "pg_advisory_xact_lock_shared(0, 6)"):
            with busy.transaction():
                busy.execute(f"select {lock}".encode())
                tick(listening)
                assert told(listening) == []
    tick(listening)
    tick(listening)
    listening.execute("select rekey._tick_duty('end', now())")
    tick(listening)
    assert [event for event, _ in told(listening)] == ["worker.silent", "worker.back"]


def test_a_clock_that_was_ahead_hides_nothing(listening: Connection) -> None:
    listening.execute("select rekey.rotate_keys()")
    listening.execute(
        "update rekey._worker set last_tick_at = now() + interval '4 minutes', locked_since = now()"
    )
    listening.execute("update rekey.rotations set blocked_since = now() + interval '14 minutes'")
    tick(listening)
    assert told(listening) == []
    listening.execute(
        "update rekey._worker set last_tick_at = now() + interval '1 day',"
        " locked_since = now() + interval '1 day'"
    )
    listening.execute("update rekey.rotations set blocked_since = now() + interval '1 day'")
    tick(listening)
    assert [event for event, _ in told(listening)] == ["kek.missing", "rotation.blocked", "worker.silent"]


def test_a_tick_of_pg_cron_tells_without_a_worker(ready: Connection, db: str) -> None:
    ready.execute("select rekey.add_endpoint('here', 'notify:rekey_test')")
    ready.execute("select rekey.add_endpoint('web', 'https://hooks.example.com/x')")
    ready.execute("select rekey.rotate_keys()")
    ready.execute("call rekey.tick()")
    states = ready.execute("select endpoint, state from rekey.message_status order by 1").fetchall()
    assert states == [("here", "delivered"), ("web", "waiting")]


def test_the_past_is_not_told_of_and_a_filter_filters(ready: Connection) -> None:
    ready.execute("select rekey.rotate_keys()")
    run(ready)
    add(ready, "all", CHANNEL)
    add(ready, "some", CHANNEL, events=["rotation.failed", "key.compromised"])
    tick(ready)
    assert told(ready) == []
    ready.execute("select rekey.rotate_keys()")
    run(ready)
    ready.execute("select rekey.mark_key_compromised('default', 1)")
    tick(ready)
    rows = ready.execute("select endpoint, event from rekey.message_status order by id").fetchall()
    assert ("some", "rotation.completed") not in rows
    assert {("all", "rotation.completed"), ("all", "key.compromised"), ("some", "key.compromised")} <= {*rows}


def test_what_is_rolled_back_is_not_told_of(listening: Connection) -> None:
    with listening.transaction(force_rollback=True):
        listening.execute("select rekey.mark_key_compromised('default', 1)")
    tick(listening)
    assert told(listening) == []


def test_a_message_is_made_with_its_place_in_the_log_or_not_at_all(listening: Connection) -> None:
    listening.execute("select rekey.rotate_keys()")
    listening.execute("select rekey.mark_key_compromised('default', 1)")
    with listening.transaction(force_rollback=True):
        tick(listening)
        assert told(listening) != []
    assert told(listening) == []
    tick(listening)
    assert [event for event, _ in told(listening)] == ["key.compromised"]


def test_two_ticks_at_once_make_one_message(listening: Connection, db: str) -> None:
    listening.execute("select rekey.rotate_keys()")
    listening.execute("select rekey.mark_key_compromised('default', 1)")
    with connect(db) as other:
        with other.transaction():
            assert tick(other) is None
            tick(listening)  # does not wait
            assert told(listening) == []
        tick(listening)
    assert [event for event, _ in told(listening)] == ["key.compromised"]


def test_one_added_while_the_last_one_is_removed_is_told(listening: Connection, db: str) -> None:
    with connect(db) as other, connect(db) as third:
        remove = threading.Thread(target=third.execute, args=["select rekey.remove_endpoint('here')"])
        with other.transaction():
            other.execute("select rekey.add_endpoint('next', 'notify:rekey_test')")
            remove.start()
            waits: LiteralString = "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s"
            eventually(lambda: not remove.is_alive() or value(listening, waits, third.info.backend_pid))
        remove.join()
    listening.execute("select rekey.rotate_keys()")
    listening.execute("select rekey.mark_key_compromised('default', 1)")
    tick(listening)
    assert [event for event, _ in told(listening)] == ["key.compromised"]


def test_a_copy_does_not_tell_what_the_original_tells(
    cli_ready: Cli,
    ready: Connection,
    hook: Receiver,
    db: str,
    make_database: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add(ready, "web", hook.url, allow_private=True)
    ready.execute("select rekey.test_endpoint('web')")
    ready.execute("select rekey.rotate_keys()")
    ready.execute("select rekey.mark_key_compromised('default', 1)")
    ready.close()
    copied = make_database(conninfo_to_dict(db)["dbname"])
    monkeypatch.setenv("PG_REKEY_DSN", copied)
    cli_ready("notify", "test", "web")
    cli_ready("work", "--log", "json")
    # What happens in the copy, the copy tells: its worker ended the rotation.
    assert hook.events() == ["test", "rotation.completed"]
    with connect(copied) as copy:
        rows = copy.execute(
            "select event, state, last_error from rekey.message_status order by id"
        ).fetchall()
    assert rows == [
        ("test", "dead", "it is of the database that this one was copied from"),
        ("test", "delivered", None),
        ("rotation.completed", "delivered", None),
    ]
    hook.received.clear()
    monkeypatch.setenv("PG_REKEY_DSN", db)
    cli_ready("work", "--log", "json")
    assert {"test", "key.compromised"} <= {*hook.events()}


# What it costs


EVENTS: LiteralString = """
    select rekey._audit_all(jsonb_agg(jsonb_build_object(
      'event', 'rotation.completed', 'keyring', 'k' || n, 'version', 2, 'rotation_id', n,
      'details', '{"rows": 1, "failures": 0}'::jsonb)))
    from generate_series(1, 10000) n"""


def test_events_cost_nothing_where_nobody_is_to_be_told(ready: Connection) -> None:
    ready.execute(EVENTS)
    begun = time.monotonic()
    for _ in range(20):
        assert tick(ready) is None
    assert (time.monotonic() - begun) / 20 < 0.05
    for table in ("_notifications", "_told", "_notifier"):
        assert value(ready, f"select count(*) from rekey.{table}") == 0
    add(ready, "here", CHANNEL)
    tick(ready)
    assert told(ready) == []
    ready.execute(EVENTS)
    tick(ready)
    [(_, text)] = told(ready)
    assert text == "Rotation 1 of keyring k1 completed (rows: 1); and 9999 more like this"


def test_what_waits_does_not_grow_without_limit(ready: Connection) -> None:
    add(ready, "web", "https://hooks.example.com/x")
    ready.execute("select rekey.test_endpoint('web') from generate_series(1, 1000) n")
    ready.execute("select rekey._enqueue('kek.lost', 1, '[]') from generate_series(1, 1200) n")
    ready.execute("select rekey._prune_notifications()")
    assert ready.execute("select waiting, dead from rekey.endpoint_status").fetchone() == (1000, 1000)
    [(error,)] = ready.execute(
        "select distinct last_error from rekey.message_status where state = 'dead'"
    ).fetchall()
    assert error == "too many were waiting"
    ready.execute("select rekey.remove_endpoint('web')")
    assert value(ready, "select count(*) from rekey._notifications") == 0
    assert value(ready, "select count(*) from rekey._notifier") == 0


def test_a_message_whose_sender_dies_each_time_is_given_up(ready: Connection) -> None:
    add(ready, "web", "https://hooks.example.com/x")
    ready.execute("select rekey.test_endpoint('web') from generate_series(1, 2) n")
    ready.execute("update rekey._notifications set attempts = 12, next_attempt_at = now() - interval '1 min'")
    # The last attempt of one of them is under way.
    last: LiteralString = (
        "update rekey._notifications set next_attempt_at = now() + interval '6 h' where id = %s"
    )
    ready.execute(last, [value(ready, "select max(id) from rekey._notifications")])
    tick(ready)
    rows = ready.execute("select state, last_error from rekey._notifications order by id").fetchall()
    assert rows == [("dead", "whoever sent it came to an end each time"), ("waiting", None)]


# Endpoints


@pytest.mark.parametrize(
    ("address", "options"),
    [
        ("http://hooks.example.com/", {}),
        ("https://user:canary@hooks.example.com/", {}),
        ("https://", {}),
        ("ftp://hooks.example.com/", {}),
        ("hooks.example.com/canary", {}),
        ("", {}),
        (None, {}),
        ("https://hooks.example.com/canary\n", {}),
        ("https://hooks.example.com/" + "x" * 2048, {}),
        ("notify:Canary;", {}),
        ("notify:" + "x" * 64, {}),
        ("smtp://canary@mail.example.com?from=a@example.com", {}),
        ("smtp://mail.example.com?to=", {}),
        (CHANNEL, {"slack": True}),
        (CHANNEL, {"by_pg_net": True}),
        ("https://hooks.example.com/", {"events": ["rotation.canary"]}),
        ("https://hooks.example.com/", {"events": []}),
        ("https://127.0.0.1/", {"by_pg_net": True}),
        ("https://localhost/", {"by_pg_net": True}),
        ("https://[::1]/", {"by_pg_net": True}),
        ("https://hooks.example.com/", {"by_pg_net": True, "allow_private": True}),
    ],
)
def test_endpoints_that_cannot_be(ready: Connection, address: str, options: dict[str, Any]) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue) as caught:
        add(ready, "web", address, **options)
    if "events" not in options:
        assert "canary" not in str(caught.value).lower()
    assert value(ready, "select count(*) from rekey._endpoints") == 0


def test_endpoints_are_added_once_and_audited(ready: Connection) -> None:
    secret = add(ready, "web", "https://hooks.example.com/canary", events=["key.compromised"])
    assert secret is not None
    assert secret.startswith("whsec_")
    with pytest.raises(psycopg.errors.UniqueViolation):
        add(ready, "web", CHANNEL)
    for name in ("", "a b", "x" * 64, None):
        with pytest.raises(psycopg.errors.InvalidParameterValue):
            add(ready, name, CHANNEL)  # type: ignore[arg-type]
    ready.execute("select rekey.remove_endpoint('web')")
    for statement in ("select rekey.remove_endpoint('web')", "select rekey.test_endpoint('web')"):
        with pytest.raises(psycopg.Error) as caught:
            ready.execute(statement)
        assert caught.value.sqlstate == "RK007"
    entries = ready.execute(
        "select event, details from rekey.audit_log where event like 'endpoint.%' order by id"
    ).fetchall()
    assert entries == [
        ("endpoint.added", {"name": "web", "kind": "webhook", "events": ["key.compromised"]}),
        ("endpoint.removed", {"name": "web"}),
    ]


def opened(connection: Connection) -> list[tuple[str, str]]:
    return connection.execute(
        "select name, split_part(opened, ' ', 2) from rekey._open_endpoints()"
    ).fetchall()


def test_addresses_are_sealed_under_the_kek_and_follow_it(ready: Connection, kek: bytes) -> None:
    add(ready, "web", "https://hooks.example.com/canary")
    add(ready, "mail", "smtps://r:canary@mail.example.com?from=a@example.com&to=b@example.com")
    add(ready, "here", CHANNEL)
    stored = str(ready.execute("select * from rekey._endpoints").fetchall())
    assert "canary" not in stored
    addresses = opened(ready)
    assert [name for name, _ in addresses] == ["web", "mail"]
    # Each is bound to its row.
    ready.execute(
        "update rekey._endpoints e set sealed = o.sealed from rekey._endpoints o"
        " where e.name = 'mail' and o.name = 'web'"
    )
    assert opened(ready) == addresses[:1]
    following = os.urandom(32)
    unlock(ready, kek, following)
    ready.execute("select rekey.rotate_kek()")
    unlock(ready, following)
    assert opened(ready) == addresses[:1]
    states = dict(ready.execute("select name, problem from rekey.endpoint_status").fetchall())
    assert states["mail"] == "its address is under a KEK that is not active any more"
    assert (states["web"], states["here"]) == (None, None)


def test_addresses_go_with_a_lost_kek(ready: Connection) -> None:
    add(ready, "web", "https://hooks.example.com/canary")
    with ready.transaction():
        unlock(ready, os.urandom(32), scope="replacement")
        ready.execute("select rekey.register_kek(true)")
        assert opened(ready) == []
    tick(ready)
    assert [event for event, _ in told(ready)] == ["kek.lost"]
    assert value(ready, "select problem from rekey.endpoint_status") is not None


def test_only_who_may_gets_at_them(ready: Connection, db: str) -> None:
    add(ready, "web", "https://hooks.example.com/canary")
    tries: tuple[tuple[LiteralString, tuple[str, ...]], ...] = (
        ("select rekey.add_endpoint('x', 'notify:x')", ("rekey_admin",)),
        ("select rekey.test_endpoint('web')", ("rekey_admin",)),
        ("select name from rekey._open_endpoints()", ("rekey_admin", "rekey_operator")),
        ("select * from rekey._claim_message('{}')", ("rekey_admin", "rekey_operator")),
        ("select * from rekey.endpoint_status", ("rekey_admin", "rekey_operator", "rekey_auditor")),
        ("select sealed from rekey._endpoints", ()),
        ("select body from rekey._notifications", ()),
    )
    for statement, roles in tries:
        for role in ("rekey_admin", "rekey_operator", "rekey_auditor", "rekey_app"):
            with ready.transaction(force_rollback=True):
                ready.execute("select set_config('role', %s, true)", [role])
                if role in roles:
                    ready.execute(statement)
                else:
                    with pytest.raises(psycopg.errors.InsufficientPrivilege):
                        ready.execute(statement)


# Delivery


def claim(connection: Connection) -> Any:
    return connection.execute(
        "select * from rekey._claim_message(array(select id from rekey._endpoints))"
    ).fetchone()


def test_a_claim_is_a_lease_and_attempts_end(ready: Connection, db: str) -> None:
    add(ready, "web", "https://hooks.example.com/x")
    ready.execute("select rekey.test_endpoint('web')")
    first = claim(ready)
    with connect(db) as other:
        assert claim(other) is None
    ready.execute("update rekey._notifications set next_attempt_at = now()")
    again = claim(ready)
    assert (again[0], again[1], again[5]) == (first[0], first[1], 2)
    # A clock that was ahead holds nothing up.
    ready.execute("update rekey._notifications set next_attempt_at = now() + interval '3 days'")
    assert claim(ready)[5] == 3
    pauses = []
    for _ in range(9):
        ready.execute("select rekey._note_delivery(%s, 'HTTP status 500')", [first[0]])
        ready.execute("update rekey._notifications set next_attempt_at = now()")
        assert claim(ready) is not None
        pauses.append(
            value(
                ready,
                "select round(extract(epoch from next_attempt_at - now()))::int from rekey._notifications",
            )
        )
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(6 * 3600, abs=2)
    ready.execute("select rekey._note_delivery(%s, 'HTTP status 500')", [first[0]])
    assert claim(ready) is None
    [row] = ready.execute("select state, attempts, last_error from rekey.message_status").fetchall()
    assert row == ("dead", 12, "HTTP status 500")


def test_one_that_fails_holds_up_its_endpoint_only(ready: Connection) -> None:
    add(ready, "broken", "https://hooks.example.com/x")
    add(ready, "fine", "https://hooks.example.com/y")
    for name in ("broken", "broken", "broken", "fine"):
        ready.execute("select rekey.test_endpoint(%s)", [name])
    ready.execute("select rekey._note_delivery(%s, 'connection refused')", [claim(ready)[0]])
    found = ready.execute(
        "select endpoint from rekey.message_status where next_attempt_at <= clock_timestamp()"
    ).fetchall()
    assert found == [("fine",)]


def test_two_that_fail_at_once_do_not_wait_for_each_other(ready: Connection, db: str) -> None:
    add(ready, "web", "https://hooks.example.com/x")
    ready.execute("select rekey.test_endpoint('web') from generate_series(1, 4) n")
    one, two = claim(ready)[0], claim(ready)[0]
    with connect(db) as other, other.transaction():
        # As far as another one is that notes its failure.
        other.execute("update rekey._notifications set last_error = 'HTTP status 500' where id = %s", [two])
        ready.execute("set lock_timeout = '2 s'")
        ready.execute("select rekey._note_delivery(%s, 'HTTP status 500')", [one])


def test_a_worker_delivers_signed_webhooks(cli_ready: Cli, ready: Connection, hook: Receiver) -> None:
    secret = cli_ready.json("notify", "add", "web", "--allow-private", stdin=hook.url + "\n")["secret"]
    ready.execute("select rekey.rotate_keys()")
    cli_ready("work", "--log", "json")
    [got] = hook.received
    document = got.verified(secret)
    assert document["type"] == "rotation.completed"
    assert got.path == "/hook?key=canary-in-address"
    lines = [json.loads(line) for line in cli_ready.out.splitlines()]
    assert {"endpoint": "web", "message": "rotation.completed", "attempt": 1}.items() <= next(
        line for line in lines if line["event"] == "delivered"
    ).items()
    assert "canary" not in cli_ready.out + cli_ready.err
    cli_ready("work", "--log", "json")
    assert len(hook.received) == 1


def test_an_address_that_is_none_holds_up_nobody(cli_ready: Cli, ready: Connection, hook: Receiver) -> None:
    add(ready, "port", "https://hooks.example.com:99999/canary")
    add(ready, "host", "https://[canary/")
    add(ready, "mail", "smtps://mail.example.com:99999?from=a@example.com&to=canary@example.com")
    add(ready, "sender", "smtps://mail.example.com?to=canary@example.com")
    add(ready, "web", hook.url, allow_private=True)
    ready.execute("select rekey.test_endpoint(name) from rekey.endpoint_status")
    cli_ready("work", "--log", "json")
    assert hook.events() == ["test"]
    found = dict(ready.execute("select endpoint, last_error from rekey.message_status").fetchall())
    assert [name for name, error in found.items() if error is None] == ["web"]
    assert "canary" not in str(found) + cli_ready.out


def test_slack_gets_its_own_body(cli_ready: Cli, ready: Connection, hook: Receiver) -> None:
    cli_ready("notify", "add", "chat", "--slack", "--allow-private", stdin=hook.url)
    ready.execute("select rekey.create_keyring('<!channel> & co')")
    ready.execute("select rekey.rotate_keys('<!channel> & co')")
    cli_ready("work", "--log", "json")
    [got] = hook.received
    database = ready.info.dbname
    assert got.document == {
        "text": f"pg_rekey, database {database}: Rotation 1 of keyring &lt;!channel&gt; &amp; co completed"
        " (rows: 0)."
    }


def test_what_fails_is_tried_again_with_the_same_id(
    cli_ready: Cli, ready: Connection, hook: Receiver
) -> None:
    cli_ready("notify", "add", "web", "--allow-private", stdin=hook.url)
    hook.answer = lambda _: 503 if len(hook.received) < 3 else 200
    cli_ready("notify", "test", "web", code=1)
    assert "endpoint web did not get it: HTTP status 503" in cli_ready.err
    for _ in range(2):
        ready.execute("update rekey._notifications set next_attempt_at = now()")
        cli_ready("work", "--log", "json")
    assert len({one.id for one in hook.received}) == 1
    assert len(hook.received) == 3
    assert value(ready, "select state from rekey.message_status") == "delivered"


def test_a_worker_killed_between_sending_and_noting_sends_again(
    cli_ready: Cli, ready: Connection, hook: Receiver
) -> None:
    cli_ready("notify", "add", "web", "--allow-private", stdin=hook.url)
    ready.execute("select rekey.rotate_keys()")
    with process("work", "--log", "json") as worker:

        def kill(_: object) -> int:
            os.kill(worker.pid, signal.SIGKILL)
            return 200

        hook.answer = kill
        eventually(lambda: hook.received)
        worker.wait()
    assert value(ready, "select state from rekey.message_status") == "waiting"
    hook.answer = lambda _: 200
    cli_ready("work", "--log", "json")
    assert len(hook.received) == 1  # its lease is not over
    ready.execute("update rekey._notifications set next_attempt_at = now()")
    cli_ready("work", "--log", "json")
    first, second = hook.received
    assert (first.id, first.body) == (second.id, second.body)
    assert value(ready, "select state from rekey.message_status") == "delivered"


def test_two_workers_send_each_message_once(cli_ready: Cli, ready: Connection, hook: Receiver) -> None:
    cli_ready("notify", "add", "web", "--allow-private", stdin=hook.url)
    ready.execute("select rekey.test_endpoint('web') from generate_series(1, 40) n")
    with (
        process("work", "--forever", "--log", "json") as one,
        process("work", "--forever", "--log", "json") as two,
    ):
        waiting: LiteralString = "select count(*) from rekey.message_status where state = 'waiting'"
        eventually(lambda: value(ready, waiting) == 0)
        one.terminate()
        two.terminate()
        logs = one.communicate()[0], two.communicate()[0]
    assert len(hook.received) == len({one.id for one in hook.received}) == 40
    assert sum(log.count('"delivered"') for log in logs) == 40


def test_who_is_slow_does_not_hold_up_the_worker(
    cli_ready: Cli, ready: Connection, hook: Receiver, db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "TICK_SECONDS", 0.1)
    add(ready, "web", hook.url, allow_private=True)
    ready.execute("select rekey.test_endpoint('web')")
    worker = workers.Worker(forever=True, report=workers.Report())
    completed: list[bool] = []

    def answer(_: object) -> int:
        if completed:
            return 200  # the message that it completed
        with connect(db) as other:
            state: LiteralString = "select state = 'completed' from rekey.rotations where id = 1"
            ready.execute("select rekey.rotate_keys()")
            until = time.monotonic() + 5
            while not value(other, state) and time.monotonic() < until:
                time.sleep(0.02)
            completed.append(value(other, state))
        worker.stop()
        return 200

    hook.answer = answer
    worker.run()
    assert completed == [True]
    assert value(ready, "select state from rekey.message_status where event = 'test'") == "delivered"


@contextmanager
def own(connection: Connection) -> Iterator[Any]:
    """What a courier begins on a connection of a test."""
    with connection.transaction():
        connection.row_factory = psycopg.rows.dict_row
        try:
            yield connection
        finally:
            connection.row_factory = psycopg.rows.tuple_row


def test_who_has_much_to_deliver_looks_for_new_endpoints(
    ready: Connection, hook: Receiver, db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliver, "ROUND", 0.1)
    add(ready, "web", hook.url, allow_private=True)
    ready.execute("select rekey.test_endpoint('web') from generate_series(1, 10)")

    def answer(_: object) -> int:
        time.sleep(0.05)
        return 200

    hook.answer = answer
    courier = Courier(lambda *_, **__: None)
    courier.deliver(lambda _: own(ready), threading.Event())
    assert 0 < len(hook.received) < 10


def test_a_worker_that_ends_leaves_no_message_half_sent(
    cli_ready: Cli, ready: Connection, hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "LAST_DELIVERY", 0.5)
    add(ready, "web", hook.url, allow_private=True)
    ready.execute("select rekey.test_endpoint('web') from generate_series(1, 10)")

    def answer(_: object) -> int:
        time.sleep(0.2)
        return 200

    hook.answer = answer
    cli_ready("work", "--log", "json")
    sent = len(hook.received)
    assert 0 < sent < 10
    time.sleep(0.5)
    assert len(hook.received) == sent
    assert value(ready, "select count(*) from rekey.message_status where attempts > 0") == sent
    assert value(ready, "select count(*) from rekey.message_status where state = 'delivered'") == sent


def test_that_the_kek_is_missing_is_told_by_who_had_it(ready: Connection, hook: Receiver) -> None:
    add(ready, "web", hook.url, allow_private=True)
    courier = Courier(lambda *_, **__: None)
    courier.deliver(lambda _: own(ready), threading.Event())
    ready.execute("select rekey.lock()")
    ready.execute("update rekey._worker set locked_since = now() - interval '6 minutes'")
    assert tick(ready) == "deliver"
    courier.deliver(lambda _: own(ready), threading.Event())
    assert hook.events() == ["kek.missing"]


# pg_net, by a stand-in: the extension is not on this machine

PG_NET = """
create schema net;
create table net.http_request_queue (
  id bigserial, url text, headers jsonb, body bytea, timeout_milliseconds int);
create table net._http_response (id bigint, status_code integer, error_msg text);
create function net.http_post(url text, body jsonb = '{}', params jsonb = '{}', headers jsonb = '{}',
  timeout_milliseconds int = 1000) returns bigint language sql as
$$ insert into net.http_request_queue (url, headers, body, timeout_milliseconds)
   values (url, headers, convert_to(body::text, 'UTF8'), timeout_milliseconds) returning id $$;
grant usage on schema net to public;
grant all on all tables in schema net to public;
grant all on all sequences in schema net to public;
"""


def test_pg_net_sends_what_it_may(ready: Connection, kek: bytes) -> None:
    ready.execute(PG_NET)
    secret = add(ready, "web", "https://hooks.example.com/x", by_pg_net=True)
    assert secret is not None
    add(ready, "other", "https://hooks.example.com/y")
    for name in ("web", "other"):
        ready.execute("select rekey.test_endpoint(%s)", [name])
    ready.execute("call rekey.tick()")
    # What is in schema net is not an extension's: nothing gets into it.
    assert value(ready, "select count(*) from net.http_request_queue") == 0
    belong(ready, "pg_net", "net")
    ready.execute("call rekey.tick()")
    [(number, url, headers, body)] = ready.execute(
        "select id, url, headers, body from net.http_request_queue"
    ).fetchall()
    assert url == "https://hooks.example.com/x"
    assert Webhook(secret).verify(body, headers)["type"] == "test"
    ready.execute("call rekey.tick()")
    assert value(ready, "select count(*) from net.http_request_queue") == 1
    ready.execute("insert into net._http_response values (%s, 500, null)", [number])
    ready.execute("call rekey.tick()")
    state = "select state, last_error from rekey.message_status where endpoint = 'web'"
    assert ready.execute(state).fetchone() == ("waiting", "HTTP status 500")
    ready.execute("update rekey._notifications set next_attempt_at = now()")
    ready.execute("call rekey.tick()")
    [(number, again)] = ready.execute(
        "select id, headers from net.http_request_queue order by id desc limit 1"
    ).fetchall()
    assert again["webhook-id"] == headers["webhook-id"]
    ready.execute("insert into net._http_response values (%s, 204, null)", [number])
    ready.execute("call rekey.tick()")
    assert ready.execute(state).fetchone() == ("delivered", None)
    assert value(ready, "select state from rekey.message_status where endpoint = 'other'") == "waiting"
    # Without the KEK the tick goes on.
    ready.execute("select rekey.test_endpoint('web')")
    ready.execute("select rekey.lock()")
    ready.execute("call rekey.tick()")
    assert value(ready, "select count(*) from net.http_request_queue") == 2


# The command line


def test_the_command_line_adds_lists_tests_and_removes(
    cli_ready: Cli, ready: Connection, hook: Receiver
) -> None:
    cli_ready("notify", "list")
    assert "no endpoints" in cli_ready.out
    cli_ready("notify", "add", "web", stdin=hook.url, code=2)
    assert "its address is a private one" in cli_ready.err
    assert "--allow-private" in cli_ready.err
    cli_ready("notify", "add", "web", "--allow-private", "--event", "kek.missing", stdin=hook.url)
    assert "whsec_" in cli_ready.out
    cli_ready("notify", "add", "here", stdin=CHANNEL)
    for name in ("web", "here"):
        cli_ready("notify", "test", name)
        assert f"endpoint {name} got it" in cli_ready.out
    assert hook.events() == ["test"]
    rows = {row["name"]: row for row in cli_ready.json("notify", "list")}
    assert rows["web"]["events"] == ["kek.missing"]
    assert rows["web"]["waiting"] == rows["here"]["waiting"] == 0
    assert "canary" not in json.dumps([*rows.values()])
    messages = cli_ready.json("notify", "messages", "--endpoint", "web")
    assert [one["state"] for one in messages] == ["delivered"]
    cli_ready("notify", "test", "wed", code=6)
    assert "Did you mean 'web'?" in cli_ready.err
    cli_ready("notify", "remove", "web", "--yes")
    assert [row["name"] for row in cli_ready.json("notify", "list")] == ["here"]


def test_a_test_says_what_became_of_it_and_not_of_others(
    cli_ready: Cli, ready: Connection, hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(ready, "web", hook.url, allow_private=True)
    ready.execute("select rekey._enqueue('kek.lost', 1, '[]') from generate_series(1, 3)")
    hook.answer = lambda _: 503
    cli_ready("notify", "test", "web", code=1)
    assert "endpoint web did not get it: HTTP status 503" in cli_ready.err
    # A worker has it in hand.
    claims = """
        create function public.claim() returns trigger language plpgsql as $$
        begin new.attempts := 1; new.next_attempt_at := now() + interval '1 min'; return new; end $$;
        create trigger claim before insert on rekey._notifications
          for each row execute function public.claim()"""
    ready.execute(claims)
    cli_ready("notify", "test", "web", code=1)
    assert "endpoint web did not get it: another process is sending to it" in cli_ready.err
    ready.execute("drop function public.claim() cascade")
    monkeypatch.delenv("PG_REKEY_KEK")
    keks.forget()
    cli_ready("notify", "test", "web", code=1)
    assert "endpoint web did not get it: its address cannot be opened here" in cli_ready.err


@pytest.mark.parametrize(
    "address",
    [
        "https://hooks.example.com:99999/canary",
        "https://hooks.example.com:canary/",
        "smtps://mail.example.com:99999?from=a@example.com&to=canary@example.com",
        "smtps://:465?from=a@example.com&to=canary@example.com",
        "smtp://mail.example.com?to=a@example.com",
        "smtps://mail.example.com?from=a@example.com&to=b@example.com&canary=1",
        "https://[canary/",
        "",
    ],
)
def test_the_command_line_refuses_addresses_without_showing_them(cli_ready: Cli, address: str) -> None:
    with pytest.raises(AssertionError):
        cli_ready("notify", "add", "x", stdin=address)
    assert "canary" not in cli_ready.out + cli_ready.err


def test_the_doctor_tells_what_does_not_get_there(cli_ready: Cli, ready: Connection) -> None:
    add(ready, "web", "https://hooks.example.com/x")
    ready.execute("select rekey.test_endpoint('web') from generate_series(1, 3)")
    ready.execute("update rekey._notifications set created_at = now() - interval '20 minutes'")

    def findings() -> str:
        return json.dumps(cli_ready.json("doctor", code=5))

    assert "nobody tries to deliver them" in findings()
    for message in (claim(ready), claim(ready)):
        ready.execute("select rekey._note_delivery(%s, 'connection refused')", [message[0]])
        ready.execute("update rekey._notifications set next_attempt_at = now() where attempts = 0")
    claim(ready)
    assert "3 messages have waited for endpoint web since" in findings()
    ready.execute(
        "update rekey._notifications set state = 'dead', ended_at = now() where id = (select max(id) from"
        " rekey._notifications)"
    )
    assert "1 messages to endpoint web were given up" in findings()


def test_the_help_names_every_event(cli_ready: Cli, ready: Connection) -> None:
    said = " ".join(cli_ready("notify", "add", "--help").split())
    for event in value(ready, "select rekey._told_events()"):
        assert event == "test" or f"{event}," in said or f"{event}." in said, event

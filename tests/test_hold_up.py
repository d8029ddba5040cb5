"""One row, one table, one client: none holds up the rest."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, LiteralString

import pytest
from psycopg.rows import dict_row

from cli_fixtures import eventually
from column_fixtures import protect
from driving import check, events, fill, on_versions, refused, rotate, rotation, run, step, step_until
from helpers import Connection, connect, unlock, value
from pg_rekey import worker
from pg_rekey.cli.words import blockers
from pg_rekey.vacuum import Vacuum

pytest_plugins = ["column_fixtures"]

FAILURES: LiteralString = (
    "select target, row_key, sqlstate, reason from rekey.failure_status where resolved_at is null order by id"
)
DOCS: LiteralString = "create table docs (id text primary key, v text)"
REFUSING: LiteralString = """
    create function refuse() returns trigger language plpgsql as $$
    begin
      if new.id in ('7', '1234') then
        raise exception 'row % is closed', new.id using errcode = '23514';
      end if;
      return new;
    end $$;
    create trigger refuse before update on docs for each row execute function refuse()
"""


@pytest.fixture
def other(ready: Connection) -> dict[str, str]:
    """Some secrets of another keyring, which has no row in any table; returns what they are."""
    ready.execute("select rekey.create_keyring('other')")
    return fill(ready, 20, keyring="other", prefix="o")


def docs(app: Connection, rows: int) -> dict[str, str]:
    """Protect a table of so many rows; return what it holds."""
    app.execute(DOCS)
    protect(app, "docs", encrypt_on_write=True)
    app.execute("insert into docs select g, 'x' || g from generate_series(1, %s) g", [rows])
    return {str(n): f"x{n}" for n in range(1, rows + 1)}


def copies(app: Connection, statement: LiteralString, *parameters: Any) -> None:
    """Write into docs what no trigger of ours sees, as a writer without any role of ours can, with a copy."""
    app.execute("alter table docs disable trigger user")
    app.execute(statement, parameters)
    names: LiteralString = (
        "select tgname from pg_trigger where tgrelid = 'docs'::regclass and tgname like 'zz_pg_rekey%'"
    )
    for (name,) in app.execute(names).fetchall():
        app.execute(f"alter table docs enable always trigger {name}".encode())


def both(ready: Connection) -> tuple[int, int]:
    """Rotate the keyring of the table and the other one."""
    return rotate(ready), rotate(ready, "other")


def test_a_row_key_longer_than_an_index_row(
    ready: Connection, app: Connection, other: dict[str, str]
) -> None:
    model = docs(app, 10)
    copies(
        app,
        "insert into docs select (select string_agg(chr(33 + (random() * 90)::int), '')"
        " from generate_series(1, 2690)), v from docs where id = '1'",
    )
    ours, others = both(ready)
    run(ready)
    assert rotation(ready, ours, "state", "rows_failed", "rows_done") == ("completed_with_failures", 1, 10)
    assert rotation(ready, others, "state") == "completed"
    [(target, key, code, reason)] = ready.execute(FAILURES).fetchall()
    assert (target, len(key), code, reason) == (
        "app.docs.v", 2690, None, "does not open: damaged, or of another row",
    )  # fmt: skip
    # It is the same one in the next rotation, and gone when its row is.
    again = rotate(ready)
    run(ready)
    assert rotation(ready, again, "state", "rows_failed") == ("completed_with_failures", 1)
    assert value(ready, "select count(*) from rekey.failure_status") == 1
    app.execute("delete from docs where length(id) > 2000")
    ready.execute("select rekey.retry_rotation(%s)", [again])
    run(ready)
    assert rotation(ready, again, "state", "rows_failed") == ("completed", 0)
    check(ready, other, columns={"app.docs": model})


def test_rows_that_their_table_refuses(ready: Connection, app: Connection, other: dict[str, str]) -> None:
    """Two of 3000 rows: they are found, named with the error, and kept; everything else is swept."""
    model = docs(app, 3000)
    app.execute(REFUSING)
    ours, others = both(ready)
    run(ready)
    assert rotation(ready, ours, "state", "rows_done", "rows_failed", "attempts") == (
        "completed_with_failures", 2998, 2, 0,
    )  # fmt: skip
    assert rotation(ready, others, "state", "rows_failed") == ("completed", 0)
    found = ready.execute(FAILURES).fetchall()
    why = "app.docs: row {} is closed (trigger refuse), in app.refuse()"
    assert sorted(found) == [("app.docs.v", key, "23514", why.format(key)) for key in sorted(["7", "1234"])]
    assert value(ready, "select count(*) from rekey.key_usage('default') where version = 1 and rows = 2") == 1
    assert "rotation.row_failed" in events(ready, ours)
    # They do open.
    assert value(ready, "select sum(failed) from rekey.verify_ciphertexts()") == 0
    # The daily count knows them, and begins nothing for them.
    ready.execute("select rekey._census()")
    assert value(ready, "select count(*) from rekey.rotations") == 2
    app.execute("drop trigger refuse on docs")
    ready.execute("select rekey.retry_rotation(%s)", [ours])
    run(ready)
    assert rotation(ready, ours, "state", "rows_done", "rows_failed") == ("completed", 3000, 0)
    check(ready, other, columns={"app.docs": model})


def test_a_refused_row_that_was_changed_since_is_not_taken_for_refused(
    ready: Connection, app: Connection
) -> None:
    docs(app, 100)
    app.execute("create table held as select * from docs where id = '7'")
    app.execute(REFUSING)
    first = rotate(ready)
    run(ready)
    assert rotation(ready, first, "state", "rows_failed") == ("completed_with_failures", 1)
    app.execute("drop trigger refuse on docs")
    second = rotate(ready)
    run(ready)
    assert rotation(ready, second, "state", "rows_failed") == ("completed", 0)
    assert value(ready, "select resolution from rekey.failure_status") == "cleared"


def test_what_was_refused_stands_where_a_rollback_goes(ready: Connection, app: Connection) -> None:
    model = docs(app, 100)
    app.execute(REFUSING)
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state", "rows_failed") == ("completed_with_failures", 1)
    back = value(ready, "select id from rekey.rollback_rotation(%s)", number)
    run(ready)
    assert rotation(ready, back, "state", "rows_done", "rows_failed") == ("completed", 99, 0)
    assert value(ready, "select resolution from rekey.failure_status") == "cleared"
    check(ready, {}, columns={"app.docs": model})


def test_a_batch_in_which_many_rows_are_refused(ready: Connection, app: Connection) -> None:
    """Within 64 subtransactions a step, and each row once."""
    docs(app, 400)
    app.execute(REFUSING.replace("new.id in ('7', '1234')", "new.id::int % 3 = 0"))
    number = rotate(ready)
    run(ready, "60 s")
    assert rotation(ready, number, "state", "rows_done", "rows_failed") == (
        "completed_with_failures", 267, 133,
    )  # fmt: skip
    entries: LiteralString = (
        "select sum((details ->> 'rows')::int) from rekey.audit_log where event = 'rotation.row_failed'"
    )
    assert value(ready, entries) == 133


def test_a_table_that_fails_fails_its_own_keyrings_alone(
    ready: Connection, app: Connection, other: dict[str, str]
) -> None:
    """The other keyring, which shares the pass, waits for nothing."""
    docs(app, 50)
    app.execute("""
        create function break() returns trigger language plpgsql as
          $$ begin raise exception 'not now' using errcode = '40001'; end $$;
        create trigger break before update on docs for each row execute function break()""")
    fill(ready, 10)
    ready.execute("select rekey.set_setting('max_attempts', '3')")
    ours, others = both(ready)
    seen = step_until(ready, "error")
    # What is left of the pass is in trouble: that is no reason for the other one to wait.
    while "completed" not in seen:
        seen.append(step(ready)[0])
    assert rotation(ready, others, "state", "attempts", "last_error") == ("completed", 0, None)
    assert rotation(ready, ours, "state", "attempts", "rows_done") == ("running", 1, 10)
    error = "app.docs: not now (trigger break), in app.break()"
    assert rotation(ready, ours, "last_error") == error
    assert rotation(ready, ours, "blocked_by") == [
        {"target": "app.docs.v", "relation": "app.docs", "error": error, "sqlstate": "40001"}
    ]
    blocked: LiteralString = (
        "select value > 0 from rekey.metrics() where name = 'pg_rekey_rotation_blocked_seconds'"
    )
    assert value(ready, blocked)
    for _ in range(2):
        ready.execute("update rekey._chunks set next_attempt_at = null")
        assert step_until(ready, "error", "idle")[-1] == "error"
    assert rotation(ready, ours, "state", "attempts", "rows_done") == ("failed", 3, 10)
    assert step_until(ready, "idle")
    assert on_versions(ready) == {2: 10}
    app.execute("drop trigger break on docs")
    ready.execute("select rekey.retry_rotation(%s)", [ours])
    run(ready)
    assert rotation(ready, ours, "state", "rows_done", "attempts", "blocked_by") == ("completed", 60, 0, None)


def test_a_table_that_refuses_everything_fails(
    ready: Connection, app: Connection, other: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are not put into quarantine by the million."""
    docs(app, 300)
    app.execute(REFUSING.replace("new.id in ('7', '1234')", "true"))
    ready.execute("select rekey.set_setting('max_attempts', '1')")
    ours, others = both(ready)
    step_until(ready, "batch")
    ready.execute("update rekey._due set refused = 10000")  # as if that many had been before
    step_until(ready, "idle")
    assert rotation(ready, others, "state") == "completed"
    state, error = rotation(ready, ours, "state", "last_error")
    assert state == "failed"
    assert "app.docs refuses every row" in error


def test_a_table_that_cannot_be_verified_holds_its_own_keyrings_alone(
    ready: Connection, app: Connection, db: str, kek: bytes, other: dict[str, str]
) -> None:
    docs(app, 50)
    with connect(db) as holder, connect(db) as worker:
        unlock(worker, kek)
        worker.execute("set lock_timeout = '50 ms'")
        ours, others = both(ready)
        while rotation(ready, ours, "state") != "verifying":
            step(ready)
        with holder.transaction():
            holder.execute("lock table app.docs")
            step_until(worker, "completed")
            assert rotation(ready, others, "state") == "completed"
            assert rotation(ready, ours, "state") == "verifying"
            [blocker] = rotation(ready, ours, "blocked_by")
            assert (blocker["target"], blocker["sqlstate"]) == ("app.docs.v", "55P03")
        # Who locks a table is waited for, however long.
        ready.execute("update rekey.rotations set next_attempt_at = null")
        run(ready)
        assert rotation(ready, ours, "state", "attempts") == ("completed", 1)


LARGE: LiteralString = (
    "insert into docs select 'large', substr(v, 1, 11) || convert_to(repeat('a', %s), 'UTF8')"
    " from docs where id = '1'"
)


def test_a_value_of_a_gigabyte(ready: Connection, app: Connection, other: dict[str, str]) -> None:
    """TOAST compresses it to 12 MB; it has no room in an array of bytea."""
    app.execute("create table docs (id text primary key, v bytea)")
    protect(app, "docs", encrypt_on_write=True)
    app.execute("insert into docs select g, convert_to('x' || g, 'UTF8') from generate_series(1, 10) g")
    copies(app, LARGE, 1073741664)
    ours, others = both(ready)
    run(ready)
    assert rotation(ready, others, "state") == "completed"
    assert rotation(ready, ours, "state", "rows_done", "rows_failed") == ("completed_with_failures", 10, 1)
    assert ready.execute(FAILURES).fetchall() == [
        ("app.docs.v", "large", None, "has more than 64 MiB, and was not read")
    ]
    # It is counted, and keeps its key.
    assert value(ready, "select rows from rekey.key_usage('default') where version = 1") == 1
    with refused("RK005"):
        ready.execute("select rekey.schedule_key_destruction('default', 1, '0 s')")
    check(ready, other)


def test_values_and_contexts_that_are_too_large(ready: Connection, app: Connection) -> None:
    """As text, by its context, and as plaintext of an adoption: none is read."""
    app.execute("create table docs (id text primary key, v text, note text)")
    protect(app, "docs", context_columns="{id,note}")
    app.execute("insert into docs values ('plain', repeat('a', 70000000), 'x'), ('small', 'y', 'x')")
    app.execute("insert into docs values ('noted', 'z', repeat('b', 70000000))")
    number = value(ready, "select id from rekey.adopt_column('app.docs', 'v')")
    run(ready)
    found = ready.execute(FAILURES).fetchall()
    why = "has more than 64 MiB, and was not read"
    assert sorted(found) == [("app.docs.v", "noted", None, why), ("app.docs.v", "plain", None, why)]
    assert rotation(ready, number, "state", "rows_done") == ("completed_with_failures", 1)
    copies(
        app,
        "update docs set v = (select v from docs where id = 'small') || repeat('A', 70000000)"
        " where id = 'plain'",
    )
    again = rotate(ready)
    run(ready)
    assert rotation(ready, again, "state", "rows_done") == ("completed_with_failures", 1)
    assert ("app.docs.v", "plain", None, why) in ready.execute(FAILURES).fetchall()


def test_more_names_of_unreadable_rows_than_one_value_has_room_for(
    ready: Connection, app: Connection, other: dict[str, str]
) -> None:
    """270 MB of them: a jsonb has no more than 256."""
    docs(app, 1)
    copies(
        app,
        "insert into docs select repeat('k', 100000) || g, v from docs, generate_series(1, 2700) g",
    )
    ours, others = both(ready)
    ready.execute("call rekey.run_rotations('10 min')")
    assert rotation(ready, others, "state") == "completed"
    assert rotation(ready, ours, "state", "rows_failed") == ("completed_with_failures", 2700)
    # Few entries of a bounded size, whatever the rows are called.
    audited: LiteralString = (
        "select sum((details ->> 'rows')::int), max(octet_length(details::text)) < 4096"
        " from rekey.audit_log where event = 'rotation.row_failed'"
    )
    assert ready.execute(audited).fetchall() == [(2700, True)]


def test_what_is_quarantined_is_looked_up_by_an_index(ready: Connection, app: Connection) -> None:
    """However many rows are in quarantine already."""
    docs(app, 1)
    copies(app, "insert into docs select 'k' || g, v from docs, generate_series(1, 4000) g")
    number = rotate(ready)
    step_until(ready, "batch")
    read_rows: LiteralString = (
        "select seq_tup_read from pg_stat_xact_user_tables where relid = 'rekey.rotation_failures'::regclass"
    )
    with ready.transaction():
        assert step(ready)[0] == "batch"
        assert value(ready, read_rows) in (0, None)
    run(ready)
    assert rotation(ready, number, "rows_failed") == 4000


def test_a_table_that_is_renamed_or_dropped_between_vacuums(
    ready: Connection, app: Connection, db: str
) -> None:
    docs(app, 20_000)
    app.execute("vacuum analyze docs")
    relation = value(ready, "select 'app.docs'::regclass::oid::bigint")
    with connect(db) as session:
        session.row_factory = dict_row
        vacuum = Vacuum(session)
        vacuum.swept(relation, 1)
        app.execute("alter table docs rename to papers")
        ready.execute("create schema moved")
        ready.execute("alter table app.papers set schema moved")
        vacuum.swept(relation, 20_000)
        ready.execute("select pg_stat_force_next_flush()")
        vacuumed: LiteralString = "select vacuum_count from pg_stat_user_tables where relid = %s"
        assert value(ready, vacuumed, relation) == 2
        ready.execute("drop table moved.papers cascade")
        vacuum.swept(relation, 20_000)
        vacuum.swept(relation, 20_000)


AUDITING: LiteralString = """
    create table audited (entry jsonb);
    create function aud() returns trigger language plpgsql as
      $$ begin insert into audited values (to_jsonb(new)); return new; end $$;
    create trigger a_log after update on docs for each row execute function aud()
"""


def test_a_trigger_that_relies_on_another_search_path(ready: Connection, app: Connection) -> None:
    """Whoever asks is told which trigger and function, and what to do."""
    model = docs(app, 3)
    protect(app, "docs", encrypt_on_write=True, search_path="pg_catalog, pg_temp")
    app.execute(AUDITING)
    app.execute("update docs set v = 'x1' where id = '1'")  # as the application it works
    number = rotate(ready)
    run(ready)
    reasons: LiteralString = "select distinct reason from rekey.failure_status where sqlstate = '42P01'"
    assert value(ready, reasons) == (
        'app.docs: relation "audited" does not exist (trigger a_log), in app.aud(). A sweep runs it with'
        " search_path = pg_catalog, pg_temp: name it with its schema, ALTER FUNCTION app.aud() SET"
        " search_path = ..., or give rekey.protect_column() or pg-rekey columns protect the path that it"
        " needs"
    )
    app.execute("alter function app.aud() set search_path = app, pg_temp")
    ready.execute("select rekey.retry_rotation(%s)", [number])
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed", 3)
    check(ready, {}, columns={"app.docs": model})


def test_what_a_table_says_of_plain_values_is_not_kept(ready: Connection, app: Connection) -> None:
    app.execute("create table docs (id text primary key, v text)")
    protect(app, "docs")
    app.execute("insert into docs values ('1', 'my secret'), ('2', 'another')")
    app.execute("""
        create function tell() returns trigger language plpgsql as
          $$ begin if old.id = '1' then raise exception 'cannot change %', old.v; end if; return new; end $$;
        create trigger tell before update on docs for each row execute function tell()""")
    number = value(ready, "select id from rekey.adopt_column('app.docs', 'v')")
    run(ready)
    assert rotation(ready, number, "state", "rows_done", "rows_failed") == ("completed_with_failures", 1, 1)
    assert ready.execute(FAILURES).fetchall() == [
        ("app.docs.v", "1", "P0001", "app.docs: an error of its own code (trigger tell), in app.tell()")
    ]
    said: LiteralString = "select count(*) from rekey.audit_log where details::text like '%%secret%%'"
    assert value(ready, said) == 0


SLEEPING: LiteralString = """
    create function sleep() returns trigger language plpgsql as
      $$ begin perform pg_sleep(1000); return new; end $$;
    create trigger sleeps before update on docs for each row execute function sleep()
"""
HANGS: LiteralString = "select pid, relation::regclass::text from rekey._steps_in_hand() where hangs"


@contextmanager
def stepping(db: str, kek: bytes, steps: int) -> Iterator[Connection]:
    """Take steps in another session meanwhile."""
    with connect(db) as session, ThreadPoolExecutor(1) as pool:
        unlock(session, kek)
        done = pool.submit(lambda: [step(session) for _ in range(steps)])
        try:
            yield session
        finally:
            while not done.done():
                session.cancel()
                time.sleep(0.1)
            done.result()


def test_a_trigger_that_sleeps_is_named_and_cancelled(
    ready: Connection, app: Connection, db: str, kek: bytes, other: dict[str, str]
) -> None:
    """As under pg_cron, where a second job watches the first."""
    docs(app, 5)
    app.execute(SLEEPING)
    ready.execute("select rekey.set_setting('step_limit', '2 s')")
    ours, others = both(ready)
    step_until(ready, "planned")
    with stepping(db, kek, 2) as session:  # whichever of the two chunks comes first
        pid = session.info.backend_pid
        eventually(lambda: ready.execute(HANGS).fetchall() == [(pid, "app.docs")])
        [blocker] = rotation(ready, ours, "blocked_by")
        assert (blocker["pid"], blocker["target"], blocker["relation"]) == (pid, "app.docs.v", "app.docs")
        assert rotation(ready, others, "blocked_by") is None
        blocked: LiteralString = (
            "select value from rekey.metrics() where name = 'pg_rekey_rotation_blocked_seconds'"
        )
        assert value(ready, blocked) > 0
        assert blockers([blocker]).startswith(f"a batch in app.docs (pid {pid}), at work for ")
        eventually(lambda: value(ready, "select rekey.watch()"))
        eventually(lambda: rotation(ready, ours, "attempts") == 1)
    error = rotation(ready, ours, "last_error")
    assert error == "app.docs: canceling statement due to user request (trigger sleeps), in app.sleep()"
    assert value(ready, "select rekey.watch()") == 0
    # The other one does not wait for the next attempt.
    ready.execute("update rekey._chunks set next_attempt_at = now() + '5 min' where target = 'app.docs.v'")
    step_until(ready, "completed")
    assert rotation(ready, others, "state") == "completed"
    app.execute("drop trigger sleeps on docs")
    ready.execute("update rekey._chunks set next_attempt_at = null")
    run(ready)
    assert rotation(ready, ours, "state", "attempts", "blocked_by") == ("completed", 0, None)


def test_the_watch_leaves_sessions_of_other_roles_alone(
    ready: Connection, app: Connection, db: str, kek: bytes
) -> None:
    docs(app, 5)
    app.execute(SLEEPING)
    ready.execute("select rekey.set_setting('step_limit', '100 ms')")
    rotate(ready)
    step_until(ready, "planned")
    with stepping(db, kek, 1), connect(db, user="rekey_worker") as worker:
        eventually(lambda: ready.execute(HANGS).fetchall())
        assert value(worker, "select rekey.watch()") == 0


def test_a_worker_has_a_limit_for_its_batches(
    ready: Connection, app: Connection, db: str, kek: bytes, other: dict[str, str]
) -> None:
    """And none for what reads whole tables."""
    model = docs(app, 5)
    app.execute(SLEEPING)
    ready.execute("select rekey.set_setting('step_limit', '300 ms')")
    ready.execute("select rekey.set_setting('max_attempts', '1')")
    ours, others = both(ready)
    with connect(db) as session:
        unlock(session, kek)
        session.row_factory = dict_row
        steps = worker.Steps(session)
        seen: list[str] = []
        while not seen or seen[-1] != "idle":
            seen.append(steps.take()["event"])
        [row] = worker.held_up(session)
    assert "whole" not in seen
    assert seen.count("canceled") == 1
    assert rotation(ready, others, "state") == "completed"
    assert rotation(ready, ours, "state", "last_error") == (
        "failed",
        "app.docs: canceling statement due to statement timeout (trigger sleeps), in app.sleep()",
    )
    assert (row["id"], row["last_error"]) == (ours, rotation(ready, ours, "last_error"))
    app.execute("drop trigger sleeps on docs")
    ready.execute("select rekey.retry_rotation(%s)", [ours])
    run(ready)
    check(ready, other, columns={"app.docs": model})

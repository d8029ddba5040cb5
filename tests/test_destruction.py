"""Destroying key versions: what is looked at first, who is waited for, and who is not kept waiting."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel, sql

from cli_fixtures import Cli
from column_fixtures import protect
from helpers import Connection, connect, unlock, value

pytest_plugins = ["column_fixtures", "cli_fixtures"]

Session = Callable[[], Connection]


def state(connection: Connection, version: int = 1, keyring: str = "default") -> str:
    query = "select state from rekey.key_status where keyring = %s and version = %s"
    return str(value(connection, query, keyring, version))


def rotated(connection: Connection, keyring: str = "default") -> None:
    connection.execute("select rekey.rotate_keys(%s)", [keyring])
    connection.execute("call rekey.run_rotations()")


def scheduled(connection: Connection, keyring: str = "default", version: int = 1) -> list[str]:
    """Schedule a destruction for now, after a tick that knows the clock; return the warnings."""
    said: list[str] = []

    def note(diagnostic: psycopg.errors.Diagnostic) -> None:
        said.append(f"{diagnostic.severity}: {diagnostic.message_primary}")

    connection.execute("call rekey.tick()")
    connection.add_notice_handler(note)
    connection.execute("select rekey.schedule_key_destruction(%s, %s, '0 s')", [keyring, version])
    connection.remove_notice_handler(note)
    return said


def due(connection: Connection) -> None:
    connection.execute(
        "update rekey.encryption_keys set destroy_after = now() where state = 'destroy_scheduled'"
    )


def tick(connection: Connection) -> str | None:
    """Tick with what is scheduled due; return what went wrong."""
    due(connection)
    connection.execute("call rekey.tick()")
    return value(connection, "select last_error from rekey.worker_status")  # type: ignore[no-any-return]


def steps_until(connection: Connection, *events: str) -> list[str]:
    """Take steps of the search until one of these comes; return what came."""
    done = []
    for _ in range(500):
        [(event, _, _)] = connection.execute("select * from rekey.search_step()").fetchall()
        done.append(event)
        if event in events:
            return done
    raise AssertionError(done)


@contextmanager
def refused(sqlstate: str) -> Iterator[None]:
    with pytest.raises(psycopg.Error) as caught:
        yield
    assert caught.value.sqlstate == sqlstate, caught.value


@pytest.fixture
def old(ready: Connection) -> str:
    """An envelope of version 1, in text form; version 2 is active."""
    sealed = str(value(ready, "select rekey.encrypt_text('precious', 'default', array['app.t.v', '1'])"))
    rotated(ready)
    return sealed


def large(connection: Connection, name: str, rows: int = 20000) -> None:
    """Make a table that is read by turns."""
    connection.execute(
        sql.SQL(
            "create table {} as select g as id, repeat('x', 150) as note from generate_series(1, %s) g"
        ).format(sql.Identifier(name)),
        [rows],
    )


def test_a_detached_partition_keeps_the_key(ready: Connection) -> None:
    ready.execute("create schema app")
    ready.execute(
        "create table app.ev (id int, region text, v text, primary key (id, region))"
        " partition by list (region)"
    )
    for region in ("eu", "us"):
        ready.execute(f"create table app.ev_{region} partition of app.ev for values in ('{region}')".encode())
    protect(ready, "app.ev", encrypt_on_write=True)
    ready.execute(
        "insert into app.ev select g, (array['eu', 'us'])[g % 2 + 1], 'v' || g from generate_series(1, 100) g"
    )
    ready.execute("select rekey.rotate_keys()")
    ready.execute("alter table app.ev detach partition app.ev_us")
    # As if it had been settled: what counts here is that destruction looks for itself.
    ready.execute("delete from rekey._column_relations")
    ready.execute("call rekey.run_rotations()")
    assert value(ready, "select state from rekey.rotation_status") == "completed"
    assert any("app.ev_us" in said for said in scheduled(ready))
    assert "app.ev_us.v holds envelopes" in (tick(ready) or "")
    assert state(ready) == "destroy_scheduled"
    assert value(ready, "select rows from rekey.search_findings where version = 1") == 50
    ready.execute("drop table app.ev_us")
    assert tick(ready) is None
    assert state(ready) == "destroyed"


COPIES = {
    "a table": "COPY %s::text as v",
    "bytes": "COPY decode(right(%s, -4), 'base64') as v",
    "bytes within": r"COPY '\x524b01'::bytea || decode(right(%s, -4), 'base64') as v",
    "the text form in bytes": "COPY convert_to('{\"v\": \"' || %s || '\"}', 'UTF8') as v",
    "a materialized view": "create materialized view app.copy as select %s::text as v",
    "text": "COPY 'token=' || %s || ';' as v",
    "varchar": "COPY (%s)::varchar(500) as v",
    "char": "COPY (%s)::char(500) as v",
    "jsonb": "COPY jsonb_build_object('a', jsonb_build_array(%s::text)) as v",
    "json": "COPY json_build_object('a', %s::text) as v",
    "escaped json": "COPY '\"' || replace(%s, '/', '\\/') || '\"' as v",
    "hex in json": "COPY jsonb_build_array(decode(right(%s, -4), 'base64')) as v",
    "an array": "COPY array['a', %s] as v",
    "an array of bytes": "COPY array[decode(right(%s, -4), 'base64')] as v",
    "xml": "COPY xmlelement(name a, %s::text) as v",
    "a domain": "create domain app.d as text check (value <> ''); COPY (%s)::app.d as v",
    "a row": "create type app.c as (a int, b text); COPY row(1, %s)::app.c as v",
    "unlogged": "create unlogged table app.copy as select %s::text as v",
    "a large value": "COPY repeat('x ', 500000) || %s as v",
    "a default": "create table app.copy (id int); insert into app.copy values (1); "
    "alter table app.copy add v text default %s",
    "a name": 'create schema "A b"; create table "A b"."c d" as select %s::text as "e f"',
    "schema vault": "create schema vault; create table vault.secrets as select %s::text as v",
    "schema cron": "create schema cron; create table cron.job as select %s::text as command",
    "schema rekey_targets": "create table rekey_targets.mine as select %s::text as v",
}


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_keeps_the_key(ready: Connection, old: str, copy: str) -> None:
    ready.execute("create schema app")
    for statement in COPIES[copy].split("; "):
        statement = statement.replace("COPY", "create table app.copy as select")
        ready.execute(statement.replace("%s", sql.Literal(old).as_string(ready)).encode())
    assert any("holds envelopes" in said for said in scheduled(ready))
    assert "holds envelopes of the version" in (tick(ready) or "")
    assert state(ready) == "destroy_scheduled"


def test_a_table_of_another_access_method_is_read(ready: Connection, old: str) -> None:
    ready.execute("create access method other_heap type table handler heap_tableam_handler")
    ready.execute("create table copy using other_heap as select %s::text as v", [old])
    scheduled(ready)
    assert "copy.v holds" in (tick(ready) or "")


def test_rows_on_other_nodes_keep_the_key(ready: Connection, old: str) -> None:
    ready.execute("create table shell (v text)")
    ready.execute("set allow_system_table_mods = on")
    ready.execute("create table pg_catalog.pg_dist_partition (logicalrelid regclass)")
    ready.execute("insert into pg_catalog.pg_dist_partition values ('shell')")
    assert any("shell (its rows are on other nodes" in said for said in scheduled(ready))
    assert "other nodes of Citus" in (tick(ready) or "")
    assert state(ready) == "destroy_scheduled"


def test_code_that_reading_runs_has_no_rights_of_ours(ready: Connection) -> None:
    """Who may only read a table cannot keep its owner from giving it code between the look and the read."""
    # As if it ran in a look.
    ready.execute(
        "create function rekey._look(x int) returns text language plpgsql as"
        " $$ begin return rekey._caller(); end $$"
    )
    assert value(ready, "select rekey._look(1)") == "rekey_sweeper"


def test_other_versions_and_text_about_them_do_not(ready: Connection, old: str) -> None:
    ready.execute("create table other as select rekey.encrypt_text('x', 'default', '{a}') as v")
    ready.execute("insert into other values ('rk1:UksB is how they begin'), (%s)", [old[:60]])
    assert scheduled(ready) == []
    assert tick(ready) is None
    assert state(ready) == "destroyed"


@pytest.fixture
def operator(ready: Connection, db: str, kek: bytes) -> Iterator[Connection]:
    """A session of somebody who may run the worker, and nothing else."""
    name = f"operator_{os.getpid()}"
    ready.execute(f"create role {name} login in role rekey_operator".encode())
    with connect(db, user=name) as connection:
        unlock(connection, kek)
        yield connection
    ready.execute(f"drop owned by {name} cascade".encode())
    ready.execute(f"drop role {name}".encode())


def test_what_the_worker_may_not_read_keeps_the_key(
    ready: Connection, old: str, operator: Connection
) -> None:
    ready.execute("create schema app; create table app.hidden as select 'x' as v")
    scheduled(ready)
    operator.execute("call rekey.tick()")
    assert state(ready) == "destroy_scheduled"
    role = operator.info.user
    error = value(ready, "select last_error from rekey.worker_status")
    assert f"GRANT USAGE ON SCHEMA app TO {role}; GRANT SELECT ON app.hidden TO {role}" in error
    assert value(ready, "select state from rekey.search_status") == "incomplete"
    [row] = ready.execute("select relation, role, advice from rekey.search_findings").fetchall()
    assert row[:2] == ("app.hidden", role)
    assert "GRANT USAGE" in row[2]
    details = value(ready, "select details ->> 'postponed' from rekey.audit_log order by id desc limit 1")
    assert "app.hidden" in details
    # The day after, with what it took.
    ready.execute(f"grant usage on schema app to {role}; grant select on app.hidden to {role}".encode())
    due(ready)
    operator.execute("call rekey.tick()")
    assert state(ready) == "destroyed"


def test_what_row_security_hides_keeps_the_key(ready: Connection, old: str, operator: Connection) -> None:
    ready.execute("create table hidden (v text); alter table hidden enable row level security")
    ready.execute("insert into hidden values (%s)", [old])
    ready.execute("grant select on hidden to public")
    scheduled(ready)
    operator.execute("call rekey.tick()")
    assert state(ready) == "destroy_scheduled"
    assert "BYPASSRLS" in value(ready, "select last_error from rekey.worker_status")


def test_several_roles_share_a_search(ready: Connection, old: str, operator: Connection) -> None:
    """The worker looks at what it may, an administrator at the rest; the worker destroys."""
    ready.execute("create table hidden as select 'x' as v")
    large(ready, "open_to_all")
    ready.execute("grant select on open_to_all to public")
    scheduled(ready)
    operator.execute("call rekey.tick()")
    assert value(ready, "select state from rekey.search_status") == "incomplete"
    ready.execute("select rekey.begin_search()")
    assert "complete" in steps_until(ready, "complete")
    due(ready)
    operator.execute("call rekey.tick()")
    assert state(ready) == "destroyed"


def test_a_table_made_during_the_search_is_looked_at(ready: Connection, old: str, session: Session) -> None:
    large(ready, "much")
    scheduled(ready)
    ready.execute("select rekey.begin_search()")
    steps_until(ready, "read")
    session().execute("create table late as select %s::text as v", [old])
    assert "late.v holds" in (tick(ready) or "")
    assert state(ready) == "destroy_scheduled"


@pytest.mark.parametrize(
    "how", ["insert", "update", "rewrite", "vacuum full", "attach", "exchange", "default", "large"]
)
def test_what_changes_during_the_search_is_looked_at_again(
    ready: Connection, old: str, session: Session, how: str
) -> None:
    large(ready, "much")
    scheduled(ready)
    ready.execute("select rekey.begin_search()")
    while value(ready, "select next_block from rekey._search_relations") == 0:
        steps_until(ready, "read")
    if how != "vacuum full":
        # Once in the middle, and here once all of it is read.
        ready.execute("update rekey._search_relations set next_block = blocks, state = 'read'")
    writer = session()
    literal = sql.Literal(old).as_string(writer)
    for statement in {
        "insert": f"insert into much values (0, {literal})",
        "update": f"update much set note = {literal} where id = 1",
        "rewrite": f"alter table much alter note type text using case id when 1 then {literal} else note end",
        "vacuum full": f"update much set note = {literal} where id = 1; vacuum full much",
        "attach": f"create table whole (id int, note text) partition by list (id); "
        f"create table part partition of whole for values in (1); insert into whole values (1, {literal})",
        "exchange": f"create table next as select id, {literal}::text as note from much; "
        "alter table much rename to before; alter table next rename to much",
        "default": f"alter table much add more text default {literal}",
        "large": f"create table next as select g, repeat('x', 150) || {literal} as note"
        " from generate_series(1, 40000) g",
    }[how].split("; "):
        writer.execute(statement.encode())
    assert "holds envelopes" in (tick(ready) or "")
    assert state(ready) == "destroy_scheduled"


def test_a_row_that_moves_is_found(ready: Connection, old: str, session: Session) -> None:
    """From a table that is still to be read into one that was."""
    large(ready, "first")
    large(ready, "second", 40000)
    ready.execute("insert into second values (0, %s)", [old])
    scheduled(ready)
    ready.execute("select rekey.begin_search()")
    while value(ready, "select state from rekey._search_relations where name = 'public.first'") == "pending":
        steps_until(ready, "read")
    mover = session()
    mover.execute(
        "with gone as (delete from second where id = 0 returning *) insert into first select * from gone"
    )
    assert "first.note holds" in (tick(ready) or "")


def test_nobody_forges_what_was_found(ready: Connection, old: str, operator: Connection) -> None:
    ready.execute(
        "create schema app; create table app.hidden as select %s::text as v", [old]
    ) if False else None
    ready.execute("create schema app")
    ready.execute("create table app.hidden (v text)")
    ready.execute("insert into app.hidden values (%s)", [old])
    scheduled(ready)
    number = value(ready, "select rekey.begin_search()")
    call = (
        f"rekey._note_look({number}, 'postgres', array['app.hidden'::regclass::oid], array['x'],"
        " array[null::text], array[false], array[null::text])"
    )
    faked = "/*\nPL/pgSQL function rekey.search_step() line 1 at assignment\n*/"
    body = f"declare v text; begin v := {call}; return v; end"
    name = operator.info.user
    ready.execute(f"create schema mine authorization {name}".encode())
    ready.execute("grant usage on schema app to public")
    attempts = [
        f"select {call}",
        f"do $$ declare v text; begin v := {call}; end $$",
        f"do $$ begin perform {call} {faked}; end $$",
        f"do $$ begin execute 'select {call.replace(chr(39), chr(39) * 2)} {faked}'; end $$",
        f'create function mine."rekey.search_step()"() returns text language plpgsql as $$ {body} $$;'
        'select mine."rekey.search_step()"()',
        "set search_path = mine;"
        f"create function search_step() returns text language plpgsql as $$ {body} $$;"
        "select search_step()",
    ]
    for attempt in attempts:
        with refused("42501"):
            operator.execute(attempt.encode())
    operator.execute("reset search_path")
    with refused("42501"):
        operator.execute(
            "select rekey._note_read(%s, 'app.hidden'::regclass, 'me', 1000000, 1, null, 1, null, now())",
            [number],
        )
    # Nor by settings under which a step would read otherwise.
    ready.execute("grant select on app.hidden to public")
    operator.execute("set standard_conforming_strings = off")
    operator.execute("select rekey._hits(1, 'x', '{}'), rekey._hits(1, 'x'::bytea, '{}')")
    operator.execute("set constraint_exclusion = on; set bytea_output = escape")
    steps_until(operator, "complete")
    assert value(ready, "select rows from rekey.search_findings where version = 1") == 1


@pytest.mark.parametrize("filling", [b"R", b"RK", b"RK\x01", b"x"])
def test_an_envelope_at_every_place_of_a_value(ready: Connection, filling: bytes) -> None:
    """Values are looked through in windows; beginnings without an envelope behind them are many."""
    envelope: bytes = value(ready, "select rekey.encrypt('x'::bytea)")
    header, query = envelope[:11], "select rekey._hits(7, %s::bytea, array[%s::bytea])"
    for length in (0, 1, 2, *range(8170, 8200), *range(16370, 16390)):
        before = (filling * length)[:length]
        for value_, found in (
            (before + envelope + filling, f"7:{header.hex()}"),
            (before + envelope[:-1], None if len(envelope) == 75 else f"7:{header.hex()}"),
            (before + envelope[:74], None),
            (before + header[:10] + b"\0" + envelope[11:], None),
            (before, None),
        ):
            assert value(ready, query, value_, header) == found, (length, found)


@pytest.mark.parametrize("kind", ["bytea", "text"])
def test_a_value_that_is_full_of_beginnings(ready: Connection, kind: str) -> None:
    """Whoever owns a table keeps no search busy with it: each beginning cost a copy of the value."""
    full = {
        "bytea": "select decode(repeat('524b01', 1000000), 'hex')",
        "text": "select repeat('rk1:UksB', 1000000)",
    }[kind]
    ready.execute("set statement_timeout = '60 s'")
    assert value(ready, f"select rekey._hits(1, ({full}), '{{}}')") is None


def test_a_search_that_is_killed_goes_on(ready: Connection, old: str, session: Session) -> None:
    large(ready, "much")
    scheduled(ready)
    ready.execute("select rekey.begin_search()")
    ready.execute("update rekey._search_relations set batch_blocks = 16")
    steps_until(ready, "read")
    steps_until(ready, "read")
    at: Any = "select next_block from rekey._search_relations"
    before = value(ready, at)
    victim = session()
    victim.execute("begin")
    victim.execute("select * from rekey.search_step()")
    ready.execute("select pg_terminate_backend(%s, 10000)", [victim.info.backend_pid])
    assert value(ready, at) == before
    assert value(ready, "select bytes_read > 0 and bytes_read < bytes from rekey.search_status")
    steps_until(ready, "read")
    assert value(ready, at) > before
    assert tick(ready) is None
    assert state(ready) == "destroyed"


def test_a_throttled_search_waits_between_its_steps(ready: Connection, old: str) -> None:
    large(ready, "much")
    scheduled(ready)
    ready.execute("select rekey.set_setting('max_rows_per_second', '100')")
    ready.execute("select rekey.begin_search()")
    done = steps_until(ready, "waiting")
    assert "read" in done
    assert value(ready, "select rows < 2000 from rekey._search_relations")


@pytest.mark.parametrize("level", [IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE], ids=str)
def test_an_old_snapshot_is_waited_for(ready: Connection, session: Session, level: IsolationLevel) -> None:
    ready.execute("create table t (tenant int, id int primary key, tok text)")
    ready.execute(
        "select rekey.protect_column('t', 'tok', context_columns => '{tenant}', encrypt_on_write => true)"
    )
    ready.execute("insert into t values (1, 1, 'a'), (1, 2, 'b')")
    reader = session()
    reader.isolation_level = level
    with reader.transaction():
        reader.execute("select count(*) from t")
        rotated(ready)
        scheduled(ready)
        tick(ready)
        assert state(ready) == "destroy_scheduled"
        [blocker] = value(ready, "select blocked_by from rekey.search_status")
        assert blocker["pid"] == reader.info.backend_pid
        assert blocker["role"] == reader.info.user
        assert blocker["age_seconds"] >= 0
    tick(ready)
    assert state(ready) == "destroyed"


def test_a_prepared_transaction_is_waited_for(ready: Connection, old: str, session: Session) -> None:
    if value(ready, "show max_prepared_transactions") == "0":
        pytest.skip("max_prepared_transactions is 0")
    ready.execute("create table t (v text)")
    writer = session()
    writer.execute("begin")
    writer.execute("insert into t values (%s)", [old])
    writer.execute("prepare transaction 'held'")
    scheduled(ready)
    tick(ready)
    assert state(ready) == "destroy_scheduled"
    assert value(ready, "select blocked_by -> 0 ->> 'prepared' from rekey.search_status") == "held"
    ready.execute("commit prepared 'held'")
    assert "t.v holds" in (tick(ready) or "")


def test_who_cannot_write_is_not_waited_for(ready: Connection, old: str, db: str, server: str) -> None:
    with connect(server) as other:
        other.isolation_level = IsolationLevel.REPEATABLE_READ
        with other.transaction():
            other.execute("select count(*) from pg_class")
            scheduled(ready)
            assert tick(ready) is None
    assert state(ready) == "destroyed"


def test_a_writer_that_was_held_back_is_counted(ready: Connection, session: Session) -> None:
    """It was under way when the destruction was scheduled, and commits during the tick."""
    ready.execute("create table t (id int primary key, v text)")
    protect(ready, "t")
    held = value(ready, "select rekey.encrypt_text('held', 'default', '{public.t.v,1}')")
    rotated(ready)
    writer = session()
    scheduler = session()
    scheduler.execute("call rekey.tick()")
    with scheduler.transaction():
        scheduler.execute("select rekey.schedule_key_destruction('default', 1, '0 s')")
        writer.execute("begin")
        writer.execute("insert into t values (1, %s)", [held])  # it does not see it yet
    ready.execute("call rekey.tick()")
    assert state(ready) == "destroy_scheduled"
    writer.execute("commit")
    assert "1 rows" in (tick(ready) or "")
    assert state(ready) == "destroy_scheduled"
    ready.execute("select rekey.cancel_key_destruction('default', 1)")
    assert value(ready, "select rekey.decrypt_text(v, '{public.t.v,1}') from t") == "held"


@pytest.fixture
def held(ready: Connection) -> str:
    """An envelope of version 1 that no row has; version 2 is active, and there is a protected column."""
    ready.execute("create table t (id int primary key, v text)")
    protect(ready, "t")
    sealed = str(value(ready, "select rekey.encrypt_text('held', 'default', '{public.t.v,1}')"))
    rotated(ready)
    return sealed


def refuses(connection: Connection, held: str) -> bool:
    """Whether what was held back can not be stored any more."""
    connection.execute("begin")
    try:
        connection.execute("insert into public.t values (1, %s)", [held])
    except psycopg.Error as error:
        return error.sqlstate == "RK006"
    finally:
        connection.execute("rollback")
    return False


def looks(connection: Connection) -> bool:
    """Whether the triggers ask for the state of the versions that are written."""
    return bool(value(connection, "select pg_sequence_last_value('rekey._doomed') is distinct from 0"))


def test_triggers_look_only_while_a_version_may_be_scheduled(ready: Connection, held: str) -> None:
    assert (looks(ready), refuses(ready, held)) == (False, False)  # there was a pass
    with ready.transaction(force_rollback=True):
        ready.execute("select rekey.schedule_key_destruction('default', 1)")
    assert (looks(ready), refuses(ready, held)) == (True, False)
    ready.execute("call rekey.tick()")
    assert not looks(ready)
    ready.execute("select rekey.schedule_key_destruction('default', 1)")
    assert (looks(ready), refuses(ready, held)) == (True, True)
    ready.execute("call rekey.tick()")
    rotated(ready)
    assert (looks(ready), refuses(ready, held)) == (True, True)
    ready.execute("select rekey.cancel_key_destruction('default', 1)")
    ready.execute("call rekey.tick()")
    assert (looks(ready), refuses(ready, held)) == (False, False)


def test_they_look_while_one_is_being_scheduled(ready: Connection, held: str, session: Session) -> None:
    """What is not committed yet is seen by nobody, and counts."""
    scheduler = session()
    with scheduler.transaction():
        scheduler.execute("select rekey.schedule_key_destruction('default', 1)")
        ready.execute("select rekey._expect_none_doomed()")
        assert looks(ready)
    assert refuses(ready, held)


def test_they_look_where_a_restore_left_something(ready: Connection, held: str, app: Connection) -> None:
    """The privilege, or the value."""
    ready.execute("grant insert on t to public")
    scheduled(ready)
    ready.execute("revoke select on sequence rekey._doomed from public")
    assert refuses(app, held)
    ready.execute("grant select on sequence rekey._doomed to public")
    assert refuses(app, held)
    ready.execute("select setval('rekey._doomed', 0)")
    assert not refuses(app, held)
    due(ready)
    ready.execute("select rekey.begin_search()")
    assert refuses(app, held)


def test_a_copy_that_is_not_committed_is_waited_for(ready: Connection, old: str, session: Session) -> None:
    ready.execute("create table copy (v text)")
    writer = session()
    writer.execute("begin")
    writer.execute("insert into copy values (%s)", [old])
    scheduled(ready)
    tick(ready)
    assert state(ready) == "destroy_scheduled"
    writer.execute("commit")
    assert "copy.v holds" in (tick(ready) or "")


def test_nothing_is_destroyed_in_the_transaction_that_schedules_it(ready: Connection, old: str) -> None:
    ready.execute("call rekey.tick()")
    with ready.transaction():
        ready.execute("select rekey.schedule_key_destruction('default', 1, '0 s')")
        for _ in range(5):
            ready.execute("select rekey._tick_duty('destructions', now())")
            ready.execute("select rekey.search_step()")
        assert state(ready) == "destroy_scheduled"
    assert tick(ready) is None
    assert state(ready) == "destroyed"


def test_scheduled_again_it_is_looked_for_again(ready: Connection, old: str) -> None:
    scheduled(ready)
    ready.execute("select rekey.begin_search()")
    steps_until(ready, "complete")
    ready.execute("select rekey.cancel_key_destruction('default', 1)")
    ready.execute("create table copy as select %s::text as v", [old])
    scheduled(ready)
    assert "copy.v holds" in (tick(ready) or "")


def test_many_keys_are_counted_once_and_destroyed_one_by_one(ready: Connection, session: Session) -> None:
    ready.execute("create table t (id int primary key, v text)")
    protect(ready, "t")
    for number in range(61):
        ready.execute("select rekey.create_keyring(%s)", [f"k{number}"])
    ready.execute("select rekey.rotate_keys()")
    ready.execute("call rekey.run_rotations()")
    ready.execute("call rekey.tick()")
    for number in range(61):
        ready.execute("select rekey.schedule_key_destruction(%s, 1, '0 s')", [f"k{number}"])
    counts: Any = "select calls from pg_stat_user_functions where funcname = 'column_1_count'"
    before = value(ready, "select pg_stat_force_next_flush()") or value(ready, counts)
    other = session()
    seen = set()
    # Between any two steps, everybody else goes on.
    while (duty := value(ready, "select rekey._tick_duty('destructions', now())")) is not None:
        if duty == "search":
            steps_until(ready, "complete", "waiting")
        gone = value(ready, "select count(*) from rekey.key_status where state = 'destroyed'")
        seen.add(gone)
        if gone == 30:
            with other.transaction():
                other.execute("set local lock_timeout = '1 s'")
                other.execute("select rekey.mark_key_compromised('k4', 2)")
    assert seen == set(range(62))
    value(ready, "select pg_stat_force_next_flush()")
    assert value(ready, counts) == before + 1
    assert state(ready, 2, "k4") == "compromised"


def test_a_compromise_does_not_wait_for_a_count(ready: Connection, old: str, session: Session) -> None:
    """Nor for a search: neither holds a keyring."""
    ready.execute("create table t (id int primary key, v text)")
    protect(ready, "t")
    scheduled(ready)
    while value(ready, "select rekey._tick_duty('destructions', now())") == "search":
        steps_until(ready, "complete", "waiting")
        other = session()
        other.execute("set lock_timeout = '1 s'")
        with ready.transaction(force_rollback=True):
            assert value(ready, "select rekey._tick_duty('destructions', now())") == "more"  # the count
            other.execute("select rekey.mark_key_compromised('default', 2)")
        break
    else:
        raise AssertionError("there was no search")


@pytest.mark.parametrize("kind", ["index", "predicate", "statistics"])
def test_the_code_of_strangers_does_not_run(ready: Connection, old: str, app: Connection, kind: str) -> None:
    """Planning computes the constant parts of expressions of indexes and statistics."""
    app.execute("create table app.bait (id int, v text)")
    app.execute("grant usage, create on schema app to public; create table app.seen (who text)")
    app.execute(
        "create function app.spy(what int) returns int language plpgsql immutable as"
        " $$ begin raise warning 'ran as %', current_user; return what; end $$"
    )
    app.execute(
        {
            "index": b"create index on app.bait ((app.spy(1) + id))",
            "predicate": b"create index on app.bait (id) where id > app.spy(1)",
            "statistics": b"create statistics app.s on (app.spy(1) + id), id from app.bait",
        }[kind]
    )
    heard: list[str] = []
    ready.add_notice_handler(lambda diagnostic: heard.append(str(diagnostic.message_primary)))
    assert ready.execute("select 1 from app.bait").fetchall() == []
    assert any(said.startswith("ran as") for said in heard), "the bait is none"
    heard.clear()
    found = ready.execute(
        "select column_name from rekey.find_envelopes() where relation = 'app.bait'::regclass"
    ).fetchall()
    assert found == [(None,)]
    assert any("app.spy" in said for said in scheduled(ready))
    assert "app.spy" in (tick(ready) or "")
    assert not any(said.startswith("ran as") for said in heard)
    assert state(ready) == "destroy_scheduled"
    # Its owner runs nothing but his own code.
    ready.execute("select rekey.begin_search()")
    app.execute("set role none")
    while steps_until(app, "complete", "incomplete")[-1] == "incomplete":
        steps_until(ready, "complete", "incomplete")
        if value(ready, "select state from rekey.search_status") == "complete":
            break
        assert value(ready, "select not_read from rekey.search_status") == 0
    assert tick(ready) is None
    assert state(ready) == "destroyed"


def test_nobody_makes_an_index_while_a_superuser_reads(ready: Connection, app: Connection) -> None:
    app.execute("create table app.bait (id int, v text)")
    app.execute("set lock_timeout = '100 ms'")
    with ready.transaction():
        assert value(ready, "select rekey._hold('app.bait'::regclass, 'app.bait')") is None
        with refused("55P03"):
            app.execute("create index on app.bait ((id + 1))")
        with refused("55P03"):
            app.execute("create statistics app.s on (id + 1), id from app.bait")
        app.execute("insert into app.bait values (1, 'x')")  # writers go on
    # The name by which it is read must still be its own.
    with refused("42P01"):
        ready.execute("select rekey._hold('app.bait'::regclass, 'pg_catalog.pg_class')")


def test_a_setting_narrows_it(ready: Connection, old: str) -> None:
    ready.execute("create table copy as select %s::text as v", [old])
    ready.execute("select rekey.set_setting('destroy_search', 'columns')")
    assert scheduled(ready) == []
    assert tick(ready) is None
    assert state(ready) == "destroyed"
    assert (
        value(
            ready,
            "select count(*) from rekey.audit_log"
            " where event = 'setting.changed' and details ->> 'to' = 'columns'",
        )
        == 1
    )


def test_a_search_of_another_database_says_nothing(ready: Connection, old: str) -> None:
    """As a dump restores it."""
    scheduled(ready)
    ready.execute("select rekey.begin_search()")
    steps_until(ready, "complete")
    ready.execute("create table copy as select %s::text as v", [old])
    ready.execute("update rekey._searches set home = '0/0'")
    assert "copy.v holds" in (tick(ready) or "")


def test_there_is_nothing_to_search_for(ready: Connection) -> None:
    with refused("RK006"):
        ready.execute("select rekey.begin_search()")
    assert steps_until(ready, "idle") == ["idle"]


def test_the_command_line_searches(ready: Connection, old: str, cli_ready: Cli) -> None:
    ready.execute("create table copy as select %s::text as v", [old])
    scheduled(ready)
    said = cli_ready.json("keys", "search", code=5)
    assert said["state"] == "complete"
    assert [one["relation"] for one in said["findings"]] == ["public.copy"]
    ready.execute("drop table copy")
    assert cli_ready.json("status")["search"]["versions_found"] == 1
    ready.execute("select rekey.begin_search()")
    assert "to be destroyed" in cli_ready("status")
    assert "nothing was found" in cli_ready("keys", "search")
    assert tick(ready) is None
    assert state(ready) == "destroyed"

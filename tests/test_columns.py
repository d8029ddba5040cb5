"""Columns of the user's own tables: registered, adopted, rotated, verified and let go."""

import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import errors

from column_fixtures import protect
from driving import fill, in_background, refused, rotate, rotation, run, step, step_until, waits
from helpers import Connection, connect, create_database, initialize, install, unlock, value
from pg_rekey import local, release

pytest_plugins = ["column_fixtures"]


# name: definition, column, context, rows, how a row is told, and its plain value
SHAPES: dict[str, tuple[LiteralString, str, str, LiteralString]] = {
    "app.composite": (
        "create table composite (a int, b text, v bytea, n int default 0, primary key (a, b))",
        "array['app.composite.v', a::text, b]",
        "v",
        "insert into composite"
        " select g, 'b' || g, convert_to('c' || g, 'UTF8') from generate_series(1, 300) g",
    ),
    "app.texts": (
        "create table texts (id text primary key, v text, n int default 0)",
        "array['app.texts.v', id]",
        "v",
        "insert into texts select 'k' || g, 't' || g from generate_series(1, 300) g",
    ),
    "app.parts": (
        "create table parts (id int, v text, n int default 0, primary key (id)) partition by range (id);"
        "create table parts_1 partition of parts for values from (0) to (150);"
        "create table parts_2 partition of parts default",
        "array['app.parts.v', id::text]",
        "v",
        "insert into parts select g, 'p' || g from generate_series(1, 300) g",
    ),
    "app.big": (
        "create table big (id bigint primary key, v bytea, n int default 0)",
        "array['app.big.v', id::text]",
        "v",
        "insert into big"
        " select g, convert_to(repeat(g::text || '.', 200000), 'UTF8') from generate_series(1, 40) g",
    ),
    "app.touched": (
        "create table touched (id uuid primary key default gen_random_uuid(), v text, n int default 0,"
        "  updated_at timestamptz default '2020-01-01');"
        "create function touch() returns trigger language plpgsql as"
        "  'begin new.updated_at := now(); return new; end';"
        "create trigger touch before update on touched for each row"
        "  when (current_setting('rekey.sweeping', true) is distinct from 'on') execute function touch()",
        "array['app.touched.v', id::text]",
        "v",
        "insert into touched (v) select 'u' || g from generate_series(1, 300) g",
    ),
    'app."Odd %s $1"': (
        'create table "Odd %s $1" ("a""b" int primary key, "v\'%I" text, n int default 0)',
        """array['app."Odd %s $1"."v''%I"', "a""b"::text]""",
        '"v\'%I"',
        """insert into "Odd %s $1" select g, 'o' || g from generate_series(1, 300) g""",
    ),
}


def adopt(app: Connection, ready: Connection, table: str, column: str = "v") -> int:
    number = int(value(app, "select id from rekey.adopt_column(%s::regclass, %s)", table, column))
    run(ready)
    return number


def unquoted(column: str) -> str:
    return column.strip('"')


def plain(connection: Connection, table: str) -> list[Any]:
    """Return what a protected table holds, opened."""
    _, context, column, _ = SHAPES[table]
    query = f"select convert_from(rekey.decrypt({column}, {context}), 'UTF8') from {table} order by 1"
    return [text for (text,) in connection.execute(query.encode())]


def counted(connection: Connection) -> dict[int, int]:
    """Count the rows of all shapes by version, by their headers: nothing of pg_rekey is asked."""
    found: dict[int, int] = {}
    for table, (_, _, column, _) in SHAPES.items():
        query = f"""
            select get_byte(e, 9) * 256 + get_byte(e, 10), count(*)
            from (select case pg_typeof({column})::text when 'bytea' then substr({column}::text::bytea, 1, 11)
                  else decode(substr({column}::text, 5, 16), 'base64') end as e from {table}) t group by 1"""
        for version, rows in connection.execute(query.encode()):
            found[version] = found.get(version, 0) + rows
    return found


@pytest.fixture
def shapes(app: Connection, ready: Connection) -> dict[str, list[Any]]:
    """Six protected and adopted columns; returns what they hold."""
    model = {}
    for table, (definition, _, column, rows) in SHAPES.items():
        app.execute(definition)
        app.execute(rows)
        model[table] = [
            text
            for (text,) in app.execute(
                f"select case pg_typeof({column})::text when 'bytea'"
                f" then convert_from({column}::text::bytea, 'UTF8')"
                f" else {column}::text end from {table} order by 1".encode()
            )
        ]
        protect(app, table, unquoted(column))
        number = adopt(app, ready, table, unquoted(column))
        rows_done = rotation(ready, number, "state", "rows_done", "rows_failed")
        assert rows_done == ("completed", len(model[table]), 0)
    return model


def test_one_rotation_over_secrets_and_six_shapes_under_writers(
    ready: Connection, app: Connection, session: Callable[[], Connection], shapes: dict[str, list[Any]]
) -> None:
    secrets = fill(ready, 500)
    assert counted(ready) == {1: sum(map(len, shapes.values()))}
    assert {table: plain(app, table) for table in SHAPES} == shapes

    def disturb(seed: int) -> Callable[[threading.Event], None]:
        """Moves rows, and writes values with the key that is active."""
        connection = session()
        choice = random.Random(seed)

        def task(stop: threading.Event) -> None:
            while not stop.wait(0.002):
                table = choice.choice(list(SHAPES))
                _, context, column, _ = SHAPES[table]
                seal = "encrypt" if table in ("app.composite", "app.big") else "encrypt_text"
                opened = f"rekey.decrypt_text({column}, {context})"
                connection.execute(
                    choice.choice(
                        [
                            f"update {table} set n = n + 1 where ctid in (select ctid from {table} limit 5)",
                            f"update {table} t set {column} = rekey.{seal}({opened}, 'default', {context})"
                            f" where t.ctid in (select ctid from {table} order by random() limit 1)",
                        ]
                    ).encode()
                )

        return task

    def work() -> Callable[[threading.Event], None]:
        connection = session()
        return lambda _: run(connection, "60 s")

    with in_background(disturb(1), disturb(2)):
        number = rotate(ready)
        with in_background(work(), work()):
            pass
    assert rotation(ready, number, "state", "rows_failed", "last_error") == ("completed", 0, None)
    assert counted(ready) == {2: sum(map(len, shapes.values()))}
    assert {table: plain(app, table) for table in SHAPES} == shapes
    usage = ready.execute("select version, rows from rekey.key_usage() order by version").fetchall()
    assert usage == [(1, 0), (2, sum(map(len, shapes.values())) + len(secrets))]
    verified = ready.execute("select sum(rows), sum(failed) from rekey.verify_ciphertexts()").fetchone()
    assert verified == (usage[1][1], 0)
    assert len(value(ready, "select relations from rekey.key_usage() where version = 2")) == 8
    touched = "select count(*) from app.touched where updated_at > '2020-01-01' and n = 0"
    assert value(ready, "select count(*) from rekey.rotation_failures") == 0
    assert int(value(ready, touched)) <= 300


@pytest.mark.parametrize("table", list(SHAPES))
def test_a_key_is_kept_for_one_row_anywhere(
    ready: Connection, app: Connection, shapes: dict[str, list[Any]], table: str
) -> None:
    _, _, column, _ = SHAPES[table]
    assert shapes
    app.execute(f"create table kept as select {column} as v from {table} limit 1".encode())
    rotate(ready)
    run(ready)
    stale = (
        f"update {table} set {column} = (select v from kept) where ctid = (select ctid from {table} limit 1)"
    )
    app.execute(stale.encode())
    with refused("RK005"):
        ready.execute("select rekey.schedule_key_destruction('default', 1)")
    app.execute(f"delete from {table} where {column} = (select v from kept)".encode())
    ready.execute("select rekey.schedule_key_destruction('default', 1)")


def simple(app: Connection, ready: Connection, rows: int = 20) -> str:
    """Make a protected table with envelopes; return its label."""
    app.execute("create table t (id int primary key, v text, n int default 0)")
    label = protect(app, "t")
    app.execute(
        "insert into t select g, rekey.encrypt_text('v' || g, context => array['app.t.v', g::text])"
        " from generate_series(1, %s) g",
        [rows],
    )
    assert value(ready, "select rows from rekey.key_usage() where version = 1") == rows
    return label


BLOCKS: dict[str, tuple[LiteralString, LiteralString]] = {
    "a forced policy": (
        "alter table app.t enable row level security; alter table app.t force row level security",
        "alter table app.t no force row level security",
    ),
    "another owner": (
        "grant create on schema app to rekey_admin; alter table app.t owner to rekey_admin",
        "alter table app.t owner to {owner}",
    ),
    "a changed function": (
        "alter function rekey_targets.column_1_count(regclass, integer[]) security invoker",
        "select rekey.protect_column('app.t', 'v')",
    ),
    "a lost function": (
        "drop function rekey_targets.column_1_write(regclass, tid[], bytea[], bytea[], bytea[])",
        "select rekey.protect_column('app.t', 'v')",
    ),
}


@pytest.mark.parametrize("block", list(BLOCKS))
def test_nothing_completes_and_no_key_is_destroyed_while_a_column_is_blocked(
    ready: Connection, app: Connection, owner: str, block: str
) -> None:
    spoil, mend = BLOCKS[block]
    simple(app, ready)
    number = rotate(ready)
    ready.execute(spoil)
    assert value(ready, "select problem from rekey.column_status") is not None
    assert "blocked" in step_until(ready, "blocked")
    [blocked] = rotation(ready, number, "blocked_by")
    assert blocked["target"] == "app.t.v"
    assert blocked["why"]
    for statement in ("select rekey.key_usage()", "select rekey.verify_ciphertexts()"):
        with refused("RK005"):
            ready.execute(statement)
    ready.execute(mend.replace("{owner}", owner).encode())
    ready.execute("update rekey.rotations set next_attempt_at = null")
    run(ready)
    assert rotation(ready, number, "state", "rows_done", "rows_failed") == ("completed", 20, 0)
    ready.execute(spoil)
    with refused("RK005"):
        ready.execute("select rekey.schedule_key_destruction('default', 1)")


def test_names_change_and_nothing_else(ready: Connection, app: Connection) -> None:
    label = simple(app, ready)
    app.execute(
        'alter table t rename to "T 2"; alter table "T 2" rename v to w;'
        'alter table "T 2" rename id to "the id"'
    )
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed", 20)
    shown = ready.execute(
        "select label, relation::text, column_name, problem from rekey.column_status"
    ).fetchone()
    assert shown == (label, 'app."T 2"', "w", None)
    opened = (
        """select rekey.decrypt_text(w, array['app.t.v', "the id"::text]) from "T 2" where "the id" = 3"""
    )
    assert value(app, opened) == "v3"
    assert protect(app, '"T 2"', "w") == label


def test_a_protected_column_is_not_dropped_unnoticed(ready: Connection, app: Connection) -> None:
    label = simple(app, ready)
    for statement in ("alter table t drop column v", "alter table t drop column id", "drop table t"):
        with pytest.raises(errors.DependentObjectsStillExist):
            app.execute(statement)
    with pytest.raises(errors.FeatureNotSupported):
        app.execute("alter table t alter column v type bytea using v::bytea")
    with refused("RK006"):
        app.execute("select rekey.unprotect_column(%s)", [label])
    app.execute("drop table t cascade")
    number = rotate(ready)
    step_until(ready, "blocked")
    assert "was dropped" in rotation(ready, number, "blocked_by")[0]["why"]
    app.execute("select rekey.unprotect_column(%s)", [label])
    ready.execute("update rekey.rotations set next_attempt_at = null")
    run(ready)
    assert rotation(ready, number, "state") == "completed"


@pytest.mark.parametrize(
    ("definition", "options", "code"),
    [
        ("create table t (v text)", {}, "22023"),
        ("create table t (id int primary key)", {}, "42703"),
        ("create table t (id int primary key, v varchar(50))", {}, "22023"),
        ("create table t (id int primary key, v int)", {}, "22023"),
        ("create table t (id int primary key, v text generated always as ('x') stored)", {}, "22023"),
        ("create table t (id int, v text primary key)", {"context_columns": ["id"]}, "22023"),
        (
            "create table o (v text primary key); create table t (id int primary key, v text references o)",
            {},
            "22023",
        ),
        ("create table t (id int primary key, v text)", {"context_columns": ["none"]}, "22023"),
        ("create table t (id int primary key, v text)", {"context_columns": ["v"]}, "22023"),
        ("create table t (id int primary key, v text)", {"context_columns": []}, "22023"),
        ("create table t (id int primary key, v text)", {"context_columns": ["id", "id"]}, "22023"),
        ("create table t (id int primary key, v text, at timestamptz)", {"context_columns": ["at"]}, "22023"),
        ("create table t (id int primary key, v text)", {"keyring": "none"}, "RK007"),
        ("create view t as select 1 as id, 'x'::text as v", {"context_columns": ["id"]}, "22023"),
        ("create temporary table t (id int primary key, v text)", {}, "22023"),
        ("create table t (id int primary key, v text); create table c () inherits (t)", {}, "22023"),
        (
            "create table r (id int primary key, v text) partition by range (id);"
            "create table t partition of r default",
            {},
            "22023",
        ),
        (
            "create table t (id int primary key generated always as identity, k text unique, v text)",
            {"encrypt_on_write": True},
            "22023",
        ),
    ],
)
def test_what_cannot_be_protected(
    ready: Connection, app: Connection, definition: LiteralString, options: dict[str, Any], code: str
) -> None:
    app.execute(definition)
    with refused(code):
        protect(app, "t", **options)
    assert value(ready, "select count(*) from rekey.protected_columns") == 0
    assert value(ready, "select count(*) from pg_proc where proname like 'column\\_%%'") == 0
    assert not value(ready, "select has_schema_privilege(current_user, 'rekey_targets', 'create') and false")


def test_only_the_owner_protects(
    ready: Connection, app: Connection, session: Callable[[], Connection]
) -> None:
    app.execute("create table t (id int primary key, v text)")
    stranger = session()
    stranger.execute("set role rekey_admin")
    for call in (
        "select rekey.protect_column('app.t', 'v')",
        "select rekey._register_column('app.t', 'v', 'default', null, false, true, '')",
    ):
        with refused("42501"):
            stranger.execute(call)
    protect(app, "t")
    for call in (
        "select rekey.adopt_column('app.t', 'v')",
        "select rekey.unprotect_column('app.t', 'v')",
        "select rekey._forget_column(1)",
    ):
        with refused("42501"):
            stranger.execute(call)
    grants = """
        select count(*) from pg_namespace, aclexplode(nspacl) a
        where nspname = 'rekey_targets' and privilege_type = 'CREATE'"""
    assert value(ready, grants) == 1


def test_protection_says_what_envelopes_break(app: Connection) -> None:
    said: list[str] = []
    app.add_notice_handler(lambda notice: said.append(str(notice.message_primary)))
    app.execute("""
        create table t (
          id int primary key, v text unique check (v <> ''), u text generated always as (upper(v)) stored);
        create unique index on t (v);
        create function f() returns trigger language plpgsql as 'begin return new; end';
        create trigger noted before update on t for each row execute function f();
        """)
    protect(app, "t")
    assert len(said) == 5
    for word in ("CHECK", "index app.t_v_key", "index app.t_v_idx", "generated column u", "trigger noted"):
        assert any(word in text for text in said)


def test_protecting_again_changes_nothing_else(ready: Connection, app: Connection) -> None:
    label = simple(app, ready)
    assert protect(app, "t") == label
    ready.execute("select rekey.create_keyring('other')")
    with refused("RK006"):
        protect(app, "t", keyring="other")
    app.execute("alter table t rename to old; create table t (id int primary key, v text)")
    with refused("23505"):
        protect(app, "t")
    entries = "select count(*) from rekey.audit_log where event = 'column.protected'"
    assert value(ready, entries) == 1


def test_adoption_can_be_paused_and_goes_on_after_a_kill(
    ready: Connection, app: Connection, session: Callable[[], Connection]
) -> None:
    app.execute("create table t (id int primary key, v text)")
    app.execute("insert into t select g, repeat('plain ' || g || ' ', 20) from generate_series(1, 20000) g")
    before = app.execute("select id, v from t order by id").fetchall()
    protect(app, "t")
    number = int(value(app, "select id from rekey.adopt_column('t', 'v', reason => 'begin')"))
    assert rotation(ready, number, "trigger", "reason", "from_versions") == ("adoption", "begin", [])
    while rotation(ready, number, "rows_done") == 0:
        step(ready)
    ready.execute("select rekey.pause_rotation(%s)", [number])
    assert step(ready)[0] == "idle"
    mixed = app.execute(
        "select count(*) filter (where v like 'rk1:%%'), count(*) filter (where v like 'plain%%') from t"
    ).fetchone()
    assert mixed is not None
    assert min(mixed) > 0
    ready.execute("select rekey.resume_rotation(%s)", [number])
    worker = session()
    pid = worker.info.backend_pid

    def die_in_a_batch() -> None:
        while True:
            with worker.transaction():
                if step(worker)[0] == "batch":
                    ready.execute("select pg_terminate_backend(%s)", [pid])

    with pytest.raises(psycopg.OperationalError):
        die_in_a_batch()
    run(ready)
    assert rotation(ready, number, "state", "rows_done", "rows_failed") == ("completed", 20000, 0)
    opened = (
        "select id, rekey.decrypt_text(v, array['app.t.v', id::text]) from t where id % 100 = 0 order by id"
    )
    assert app.execute(opened).fetchall() == [row for row in before if row[0] % 100 == 0]
    assert value(ready, "select sum(failed) from rekey.verify_ciphertexts()") == 0
    with refused("RK006"):
        ready.execute("select rekey.rollback_rotation(%s)", [number])


def test_a_rotation_is_paused_while_its_batch_waits(
    ready: Connection, app: Connection, session: Callable[[], Connection]
) -> None:
    app.execute("create table t (id int primary key, v text)")
    app.execute("insert into t select g, 'sealed' from generate_series(1, 10) g")
    protect(app, "t")
    adopt(app, ready, "t")
    app.execute("insert into t select g, 'plain' from generate_series(11, 20) g")
    number = rotate(ready)
    assert step(ready)[0] == "planned"
    ready.execute("select rekey.set_setting('max_rows_per_second', '1000')")
    holder, worker = session(), session()
    with ThreadPoolExecutor(1) as pool:
        with holder.transaction():
            holder.execute("select from rekey._worker for update")
            stepped = pool.submit(step, worker)
            waits(ready, worker.info.backend_pid)
            ready.execute("select rekey.pause_rotation(%s)", [number])
        assert stepped.result(60)[0] == "waiting"
    assert rotation(ready, number, "state", "rows_done", "rows_failed") == ("paused", 0, 0)
    assert value(app, "select count(*) from t where v = 'plain'") == 10
    ready.execute("select rekey.resume_rotation(%s)", [number])
    run(ready)
    assert rotation(ready, number, "state", "rows_done", "rows_failed") == ("completed", 10, 0)
    assert value(app, "select count(*) from t where v = 'plain'") == 10


def test_what_looks_encrypted_is_not_taken_for_plaintext(ready: Connection, app: Connection) -> None:
    app.execute("create table t (id int primary key, v text)")
    app.execute(
        "insert into t values (1, 'plain'), (2, null), (3, ''), (4, 'gAAAAA' || repeat('x', 120)),"
        " (5, 'rk1:damaged'), (6, 'v1:AAAAAAAAAAAAAAAA:BBBB:CCCC'),"
        " (7, '-----BEGIN PGP MESSAGE-----'), (8, '\\xc30d0407')"
    )
    protect(app, "t")
    number = adopt(app, ready, "t")
    assert rotation(ready, number, "state", "rows_done", "rows_failed") == ("completed_with_failures", 3, 4)
    failures = ready.execute("select row_key, reason from rekey.failure_status order by row_key").fetchall()
    assert [key for key, _ in failures] == ["4", "5", "6", "7"]
    assert "fernet" in failures[0][1]
    assert value(app, "select v from t where id = 4") == "gAAAAA" + "x" * 120
    app.execute("delete from t where id = 5")
    forced = int(value(app, "select id from rekey.adopt_column('t', 'v', force => true)"))
    run(ready)
    assert rotation(ready, forced, "state", "rows_done") == ("completed", 3)
    assert value(ready, "select count(*) from rekey.failure_status where resolved_at is null") == 0
    assert value(app, "select rekey.decrypt_text(v, array['app.t.v', '6']) from t where id = 6").startswith(
        "v1:"
    )


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("select rekey.adopt_column('app.t', 'v', '{}')", "22023"),
        ("select rekey.adopt_column('app.t', 'v', null)", "22023"),
        ("select rekey.adopt_column('app.t', 'v', '{rot13}')", "22023"),
        ("select rekey.adopt_column('app.t', 'n')", "RK007"),
        ("select rekey.adoption_batch(99)", "RK007"),
        ("select rekey.adoption_preview('app.t', 'n')", "RK007"),
        ("select rekey.unprotect_column('app.t', 'n')", "RK007"),
        ("select rekey.unprotect_column('none')", "RK007"),
        ("select rekey.unprotect_column('app.t', 'v')", "RK005"),
        ("select rekey.create_decrypted_view('app.o')", "RK007"),
    ],
)
def test_bad_calls(ready: Connection, app: Connection, call: LiteralString, code: str) -> None:
    simple(app, ready)
    app.execute("create table o (id int)")
    with refused(code):
        app.execute(call)


def test_a_column_is_let_go(ready: Connection, app: Connection) -> None:
    simple(app, ready, 6000)
    app.execute("select rekey.adopt_column('t', 'v')")
    with refused("RK004"):
        app.execute("select rekey.unprotect_column('t', 'v', decrypt => true)")
    run(ready)
    done = [value(app, "select rekey.unprotect_column('t', 'v', decrypt => true)") for _ in range(3)]
    assert done == [5000, 1000, 0]
    assert value(app, "select count(*) from t where v = 'v' || id") == 6000
    assert value(ready, "select count(*) from rekey.protected_columns") == 0
    assert value(ready, "select count(*) from pg_proc where proname like 'column\\_%%'") == 0
    app.execute("drop table t")
    run_again = rotate(ready)
    run(ready)
    assert rotation(ready, run_again, "state") == "completed"


@pytest.mark.parametrize("type_", ["text", "bytea"])
def test_a_column_that_is_empty_is_let_go_with_its_trigger(
    app: Connection, ready: Connection, type_: str
) -> None:
    app.execute(f"create table t (id int primary key, v {type_})".encode())
    protect(app, "t", encrypt_on_write=True)
    app.execute("insert into t values (1, null)")
    with app.transaction(force_rollback=True):
        app.execute("insert into t values (2, 'x')")
        with refused("RK005"), app.transaction():
            app.execute("select rekey.unprotect_column('t', 'v')")
        assert value(app, "select encrypt_on_write from rekey.column_status")
    assert value(app, "select rekey.unprotect_column('t', 'v')") == 0
    app.execute("insert into t values (2, 'x')")
    assert value(app, "select v in ('x') from t where id = 2")
    assert value(ready, "select count(*) from rekey.protected_columns") == 0


def test_an_older_snapshot_lets_go_of_nothing(ready: Connection, app: Connection) -> None:
    app.execute("create table t (id int primary key, v text)")
    protect(app, "t", encrypt_on_write=True)
    with app.transaction():
        app.execute("set transaction isolation level repeatable read")
        assert value(app, "select count(*) from t") == 0
        sealed = "insert into app.t select 1, rekey.encrypt_text('x', context => '{app.t.v,1}')"
        ready.execute(sealed)
        with refused("25001"), app.transaction():
            app.execute("select rekey.unprotect_column('t', 'v')")
    assert value(ready, "select sum(rows) from rekey.key_usage()") == 1


def test_what_is_forgotten_must_be_there_and_counted(ready: Connection, app: Connection) -> None:
    simple(app, ready)
    with refused("RK007"):
        app.execute("select rekey._forget_column(2)")
    app.execute("alter table t force row level security")
    with refused("RK005"):
        app.execute("select rekey._forget_column(1)")
    assert value(ready, "select count(*) from rekey.audit_log where event = 'column.unprotected'") == 0


def test_rows_that_a_trigger_keeps_from_being_changed(ready: Connection, app: Connection) -> None:
    simple(app, ready)
    app.execute("create function keep() returns trigger language plpgsql as 'begin return null; end'")
    app.execute("create trigger keep before update on t for each row execute function keep()")
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state") == "completed_with_failures"
    reasons = ready.execute("select distinct reason, sqlstate from rekey.failure_status").fetchall()
    [(reason, code)] = reasons
    assert code == "RK005"
    assert "a trigger of the table" in reason
    app.execute("drop trigger keep on t")
    app.execute(
        "create trigger keep before update on t for each row"
        " when (current_setting('rekey.sweeping', true) is distinct from 'on') execute function keep()"
    )
    ready.execute("select rekey.retry_rotation(%s)", [number])
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed", 20)


def test_a_damaged_row_is_quarantined(ready: Connection, app: Connection) -> None:
    simple(app, ready)
    app.execute("update t set v = overlay(v placing 'AAAA' from 60) where id = 4")
    app.execute("update t set v = (select v from t where id = 6) where id = 5")
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state", "rows_done", "rows_failed") == ("completed_with_failures", 18, 2)
    keys = "select array_agg(row_key order by row_key) from rekey.failure_status where target = 'app.t.v'"
    assert value(ready, keys) == ["4", "5"]
    with refused("RK005"):
        ready.execute("select rekey.schedule_key_destruction('default', 1)")
    app.execute("delete from t where id in (4, 5)")
    ready.execute("select rekey.retry_rotation(%s)", [number])
    run(ready)
    assert rotation(ready, number, "state", "rows_failed") == ("completed", 0)


def test_an_envelope_that_is_damaged_as_a_text_is_quarantined(ready: Connection, app: Connection) -> None:
    """With bits set that base64 leaves over (only who holds the key makes a text that opens), or cut off."""
    app.execute("create table t (id int primary key, v text)")
    protect(app, "t")
    seal: LiteralString = "select rekey.encrypt_text(repeat('x', %s), context => array['app.t.v', %s::text])"
    for number, length, padding in ((1, 20, "=="), (2, 40, "="), (3, 40, "="), (4, 40, "=")):
        text = value(app, seal, length, number)
        bare = text.rstrip("=")
        assert text == bare + padding
        if number < 3:
            text = bare[:-1] + chr(ord(bare[-1]) + 1) + padding
            assert value(app, "select decode(substr(%s, 5), 'base64') is not null", text)
        elif number == 3:
            text = bare
        app.execute("insert into t values (%s, %s)", [number, text])
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state", "rows_done", "rows_failed") == ("completed_with_failures", 1, 3)
    rows = (
        "select array_agg(row_key order by row_key) from rekey.failure_status where reason = 'is no envelope'"
    )
    assert value(ready, rows) == ["1", "2", "3"]


@pytest.mark.parametrize(
    "change", ["left(v, -1)", "v || '='", "left(v, 60)", "left(v, 60) || e'\\n' || substr(v, 61)"]
)
def test_verification_finds_an_envelope_that_is_damaged_as_a_text(
    ready: Connection, app: Connection, change: LiteralString
) -> None:
    simple(app, ready)
    number = rotate(ready)
    while rotation(ready, number, "rows_done") < 20:
        step(ready)
    app.execute("update t set v = " + change + " where id = 7")
    run(ready)
    assert rotation(ready, number, "state", "rows_failed") == ("completed_with_failures", 1)


def test_partitions_come_and_go(ready: Connection, app: Connection) -> None:
    app.execute("create table t (id int primary key, v text) partition by range (id)")
    protect(app, "t")
    app.execute("create table t_1 partition of t for values from (0) to (10)")
    app.execute("create table t_2 (id int primary key, v text)")
    seal = "insert into {} values (%s, rekey.encrypt_text('x', context => array['app.t.v', %s::text]))"
    for table, key in (("t", 1), ("t_2", 11)):
        app.execute(seal.format(table).encode(), [key, key])
    app.execute("alter table t attach partition t_2 for values from (10) to (20)")
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed", 2)
    app.execute("alter table t detach partition t_2")
    with refused("RK005"):  # its rows are not gone
        ready.execute("select rekey.key_usage()")
    app.execute("drop table t_2")
    assert value(ready, "select sum(rows) from rekey.key_usage()") == 1


def test_a_ciphertext_held_back_keeps_its_key_without_a_trigger(
    ready: Connection, app: Connection, session: Callable[[], Connection]
) -> None:
    """A row that is not committed stands on a version that is to be destroyed."""
    app.execute("create table t (id int primary key, v bytea)")
    protect(app, "t")
    held = value(app, "select rekey.encrypt('held'::text, 'default', array['app.t.v', '1'])")
    writer = session()
    with writer.transaction():
        writer.execute("insert into app.t values (1, %s)", (held,))
        rotate(ready)
        run(ready, "2 s")
        with refused("RK005"):
            ready.execute("select rekey.schedule_key_destruction('default', 1, '0 s')")
    with refused("RK005"):
        ready.execute("select rekey.schedule_key_destruction('default', 1, '0 s')")
    app.execute("delete from t")
    ready.execute("select rekey.schedule_key_destruction('default', 1, '0 s')")
    with refused("RK006"):  # from now on, nothing comes to stand on it
        writer.execute("insert into app.t values (1, %s)", (held,))


def test_a_key_is_compromised_during_an_adoption(ready: Connection, app: Connection) -> None:
    """The adoption is superseded: what it left is plain, and not taken for adopted."""
    rotate(ready)
    run(ready)
    app.execute("create table t (id int primary key, v text)")
    app.execute("insert into t select g, 'plain' || g from generate_series(1, 20) g")
    protect(app, "t")
    adoption = int(value(app, "select id from rekey.adopt_column('t', 'v')"))
    sweep = int(value(ready, "select id from rekey.mark_key_compromised('default', 1)"))
    run(ready)
    assert rotation(ready, adoption, "state", "trigger") == ("superseded", "adoption")
    assert rotation(ready, sweep, "state", "trigger", "from_versions") == ("completed", "compromise", [1])
    again = int(value(app, "select id from rekey.adopt_column('t', 'v')"))
    run(ready)
    assert rotation(ready, again, "state", "rows_done") == ("completed", 20)


def test_adoption_goes_on_after_the_server_was_killed(kek: bytes) -> None:
    with local.Server() as server:
        dsn = create_database(server.dsn(), "killed")
        install(dsn, release.assemble("plain"))
        with connect(dsn) as connection:
            initialize(connection, kek)
            connection.execute("create table t (id int primary key, v text)")
            connection.execute("insert into t select g, 'plain ' || g from generate_series(1, 20000) g")
            protect(connection, "t")
            number = int(value(connection, "select id from rekey.adopt_column('t', 'v')"))
            while rotation(connection, number, "rows_done") == 0:
                step(connection)
            connection.execute("begin")
            step(connection)
            server.kill()
            with pytest.raises(psycopg.OperationalError):
                connection.execute("commit")
        server.restart()
        with connect(dsn) as connection:
            unlock(connection, kek)
            done = rotation(connection, number, "rows_done")
            sealed = value(connection, "select count(*) from t where v like 'rk1:%%'")
            assert 0 < done == sealed < 20000
            run(connection)
            assert rotation(connection, number, "state", "rows_done") == ("completed", 20000)
            opened = """
                select count(*) from t
                where id %% 50 = 0
                  and rekey.decrypt_text(v, array['public.t.v', id::text]) = 'plain ' || id"""
            assert value(connection, opened) == 400
            assert (
                value(connection, "select sum(rows) - sum(failed) from rekey.verify_ciphertexts()") == 20000
            )


@pytest.mark.parametrize(
    "rewrite",
    [
        "vacuum full t",
        "cluster t using t_pkey",
        "alter table t add column m text default random()::text",
        "truncate t",
    ],
)
def test_the_table_is_rewritten_in_the_middle(ready: Connection, app: Connection, rewrite: str) -> None:
    simple(app, ready, 3000)
    number = rotate(ready)
    while rotation(ready, number, "rows_done") == 0:
        step(ready)
    app.execute(rewrite.encode())
    for _ in range(3):
        step(ready)
    if rewrite != "truncate t":
        app.execute("update t set n = 1")
    run(ready)
    assert rotation(ready, number, "state", "rows_failed", "last_error") == ("completed", 0, None)
    left = value(app, "select count(*) from t")
    assert left in (3000, 0)
    usage = ready.execute("select version, rows from rekey.key_usage() order by version").fetchall()
    assert usage == [(1, 0), (2, left)]


def test_two_owners_protect_at_once(
    ready: Connection, app: Connection, owner: str, session: Callable[[], Connection]
) -> None:
    app.execute("create table t (id int primary key, v text); create table u (id int primary key, v text)")
    other = session()
    other.execute(f"set role {owner}".encode())
    begun = threading.Event()

    def late(_: threading.Event) -> None:
        begun.set()
        protect(other, "app.u")

    app.execute("begin")
    protect(app, "t")
    with in_background(late):
        assert begun.wait(60)
        time.sleep(0.3)  # it waits, or has failed
        app.execute("commit")
    assert value(ready, "select count(*) from rekey.column_status where problem is null") == 2


def test_rows_that_cannot_be_decrypted_now_are_not_let_go(
    ready: Connection, app: Connection, session: Callable[[], Connection]
) -> None:
    simple(app, ready, 3)
    other = session()
    with other.transaction():
        other.execute("update app.t set n = 1 where id = 2")
        assert value(app, "select rekey.unprotect_column('t', 'v', decrypt => true)") == 2
        app.execute("set lock_timeout = '200ms'")
        with refused("55P03"):
            app.execute("select rekey.unprotect_column('t', 'v', decrypt => true)")
    app.execute("create function keep() returns trigger language plpgsql as 'begin return null; end'")
    app.execute("create trigger keep before update on t for each row execute function keep()")
    with refused("RK005"):
        app.execute("select rekey.unprotect_column('t', 'v', decrypt => true)")
    app.execute("drop trigger keep on t")
    assert value(app, "select rekey.unprotect_column('t', 'v', decrypt => true)") == 1
    assert value(app, "select rekey.unprotect_column('t', 'v', decrypt => true)") == 0


def test_an_adoption_that_takes_keys_keeps_to_the_throttle(ready: Connection, app: Connection) -> None:
    app.execute("create table t (id int primary key, v text)")
    app.execute("insert into t select g, 'gAAAAA' || repeat('x', 120) from generate_series(1, 20) g")
    protect(app, "t")
    ready.execute("select rekey.set_setting('max_rows_per_second', '1')")
    number = value(app, "select id from rekey.adopt_column('t', 'v', '{fernet}')")
    step_until(ready, "planned")
    batch: LiteralString = "select cardinality(rows) from rekey.adoption_batch(%s)"
    assert value(app, batch, number) == 1
    assert value(app, batch, number) is None
    ready.execute("update rekey._worker set next_batch_at = null")
    assert value(app, batch, number) == 1


def test_an_owner_whose_name_needs_quotes(ready: Connection) -> None:
    name = f'"An owner\'s {os.getpid()}"'
    ready.execute(
        f"create role {name} in role rekey_admin, rekey_app; grant create on schema public to {name}".encode()
    )
    try:
        ready.execute(f"set role {name}".encode())
        ready.execute("create table odd (id int primary key, v text); insert into odd values (1, 'one')")
        protect(ready, "odd", encrypt_on_write=True)
        ready.execute("select rekey.adopt_column('odd', 'v')")
        ready.execute("reset role")
        run(ready)
        assert value(ready, "select rekey.decrypt_text(v, array['public.odd.v', '1']) from odd") == "one"
    finally:
        ready.execute("reset role")
        ready.execute(f"drop owned by {name} cascade; drop role {name}".encode())


def test_a_column_costs_no_more_beside_many_others(ready: Connection) -> None:
    blocks: list[int] = []
    for columns in (range(5), range(5, 80)):
        for n in columns:
            ready.execute(f"create table public.t{n} (id int primary key, v bytea)".encode())
            protect(ready, f"public.t{n}")
        targets: LiteralString = "select problem from rekey._targets('public.t1.v')"
        for _ in range(10):  # with plans that the session keeps
            assert value(ready, targets) is None
        row = ready.execute("explain (analyze, buffers, format json) " + targets).fetchone()
        assert row
        blocks.append(row[0][0]["Plan"]["Shared Hit Blocks"])
    assert blocks[1] < 2 * blocks[0], blocks

"""Searchable columns: their blind index, on write, filled, rotated and checked, and what a search finds."""

import hmac
import random
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import LiteralString

import pytest

import reference
from column_fixtures import protect
from driving import events, in_background, refused, rotate, rotation, run, step, step_until
from helpers import Connection, connect, unlock, value
from test_dump import tools_for

pytest_plugins = ["column_fixtures"]

FOUND: LiteralString = (
    "select array_agg(id order by id) from app.t where v_bidx = any (rekey.search('app.t.v', %s))"
)
RIGHT: LiteralString = """
    select count(*) from app.t
    where v is not null and (v_bidx is null or v_bidx <> all (rekey.search('app.t.v',
      convert_from(rekey.decrypt(v, array['app.t.v', id::text]), 'UTF8'))))"""
VERSIONS: LiteralString = "select versions from rekey._blind_indexes"


@pytest.fixture(params=["text", "bytea"])
def table(request: pytest.FixtureRequest, app: Connection) -> str:
    """The type of the protected column of app.t, which a trigger encrypts."""
    app.execute(f"create table t (id int primary key, v {request.param}, n int default 0)".encode())
    protect(app, "t", encrypt_on_write=True)
    return str(request.param)


@pytest.fixture
def texts(app: Connection) -> None:
    """app.t with a protected column v of type text, which a trigger encrypts."""
    app.execute("create table t (id int primary key, v text, n int default 0)")
    protect(app, "t", encrypt_on_write=True)


def fill(
    app: Connection, ready: Connection, rows: int = 50, *, unique: bool = False, normalization: str = "exact"
) -> int:
    """Store v1, v2 ... and make the column searchable; return the number of the rotation that filled it."""
    app.execute(
        "insert into t (id, v) select g, ('v' || g)::bytea from generate_series(1, %s) g"
        if is_bytea(app)
        else "insert into t (id, v) select g, 'v' || g from generate_series(1, %s) g",
        [rows],
    )
    statement: str = value(app, "select rekey.make_searchable('t', 'v', normalization => %s)", normalization)
    run(ready)
    app.execute(
        statement.replace("create index", "create unique index" if unique else "create index").encode()
    )
    return int(value(ready, "select max(id) from rekey.rotations"))


def is_bytea(app: Connection) -> bool:
    """Say whether the column of app.t is of that type."""
    kind: LiteralString = (
        "select atttypid::regtype::text from pg_attribute where attrelid = 'app.t'::regclass"
    )
    return bool(value(app, kind + " and attname = 'v'") == "bytea")


def found(app: Connection, text: str | None) -> list[int] | None:
    result: list[int] | None = value(app, FOUND, text)
    return result


def wrong(ready: Connection) -> int:
    """Count the rows that a search for their value would miss."""
    return int(value(ready, RIGHT))


def test_rows_are_found(app: Connection, ready: Connection, table: str) -> None:
    number = fill(app, ready)
    assert rotation(ready, number, "trigger", "state", "rows_done") == ("search", "completed", 50)
    assert found(app, "v7") == [7]
    assert found(app, "v0") is None
    assert found(app, None) is None
    app.execute("insert into t values (51, 'v7'), (52, null)")
    app.execute("update t set v = 'v8' where id = 1")
    app.execute("update t set n = 1 where id = 2")
    assert (found(app, "v7"), found(app, "v8"), found(app, "v1")) == ([7, 51], [1, 8], None)
    app.execute("update t set id = 60 where id = 8")
    assert (found(app, "v8"), wrong(ready)) == ([1, 60], 0)
    app.execute("update t set v = null where id = 7")
    assert found(app, "v7") == [51]
    assert value(app, "select v_bidx is null from t where id = 7")
    many: LiteralString = (
        "select count(*) from t where v_bidx = any (rekey.search_many('app.t.v', array['v8', 'v9', null]))"
    )
    assert value(app, many) == 3
    assert events(ready).count("column.searchable") == 1


def test_nobody_writes_into_the_index(app: Connection, ready: Connection, texts: None) -> None:
    fill(app, ready)
    app.execute("update t set v_bidx = 'x' where id < 10")
    app.execute("update t set v_bidx = null where id = 10")
    app.execute("update t set v_bidx = int4send(77) where id = 11")
    app.execute("insert into t (id, v, v_bidx) values (90, 'w', 'x')")
    assert wrong(ready) == 0


def test_values_are_those_of_the_format(app: Connection, ready: Connection, kek: bytes, texts: None) -> None:
    """docs/format.md, implemented once more."""
    fill(app, ready, normalization="lower")
    app.execute("insert into t values (90, %s)", ["E\u0301A"])
    text = value(app, "select normalize(lower(%s), NFC)", "\u00c9A")
    for version in (1, 2):
        (keyring, wrapped) = ready.execute(
            "select keyring_id, wrapped_key from rekey.encryption_keys where version = %s", [version]
        ).fetchall()[0]
        dek = reference.unwrap(kek, 1, keyring, version, wrapped)
        assert dek is not None
        key = hmac.digest(dek, b"pg_rekey/v1/index" + reference.context("app.t.v", "lower"), "sha256")
        expected = version.to_bytes(4, "big") + hmac.digest(key, text.encode(), "sha256")[:16]
        assert value(app, "select v_bidx from t where id = 90") == expected
        assert value(app, "select rekey.search('app.t.v', %s)", "\u00c9a") == [expected]
        rotate(ready)
        run(ready)


@pytest.mark.parametrize(
    ("normalization", "stored", "found_by", "not_by"),
    [
        ("exact", "e\u0301 A", ["e\u0301 A", "\u00e9 A"], ["\u00e9 a", " \u00e9 A"]),
        ("lower", "E\u0301B c", ["\u00c9b C", "\u00c9B c"], [" \u00c9B c"]),
        (
            "trim_lower",
            " \t\r\n\v\fAda@Example.org ",
            ["ada@example.ORG", "ADA@example.org\n"],
            ["\u00a0ada@example.org"],
        ),
        (
            "digits",
            "+49 (170) 123-45",
            ["4917012345", "49 170 12345"],
            ["017012345", "\uff14\uff19\uff11\uff17\uff10\uff11\uff12\uff13\uff14\uff15"],
        ),
        ("digits", "none", ["", "n/a"], ["0"]),
    ],
)
def test_what_is_taken_for_equal(
    app: Connection,
    ready: Connection,
    texts: None,
    normalization: str,
    stored: str,
    found_by: list[str],
    not_by: list[str],
) -> None:
    fill(app, ready, 3, normalization=normalization)
    app.execute("insert into t values (90, %s)", [stored])
    assert [found(app, text) for text in found_by] == [[90]] * len(found_by)
    assert all(found(app, text) in (None, [1]) for text in not_by)
    assert value(app, "select rekey.decrypt_text(v, array['app.t.v', '90']) from t where id = 90") == stored


def test_bytes_that_are_no_text_stand_for_themselves(app: Connection, ready: Connection) -> None:
    app.execute("create table t (id int primary key, v bytea)")
    protect(app, "t", encrypt_on_write=True)
    app.execute("insert into t values (1, '\\xff00'), (2, '\\xff00'), (3, '\\xff01')")
    app.execute("select rekey.make_searchable('t', 'v', 'found_by', 'lower')")
    run(ready)
    assert value(
        app, "select array_agg(n order by n) from (select count(*) as n from t group by found_by) g"
    ) == [1, 2]


def test_rotation(app: Connection, ready: Connection, table: str) -> None:
    fill(app, ready, 300)
    for version in (2, 3):
        number = rotate(ready)
        assert value(ready, VERSIONS) == [version - 1, version]
        assert found(app, "v7") == [7]
        run(ready)
        assert rotation(ready, number, "state", "rows_done") == ("completed", 300)
        assert value(ready, VERSIONS) == [version]
        assert value(app, "select count(*) from t where substr(v_bidx, 1, 4) = int4send(%s)", version) == 300
        assert (found(app, "v7"), wrong(ready)) == ([7], 0)
    ready.execute("select from rekey.rollback_rotation(%s)", [number])
    assert found(app, "v7") == [7]
    run(ready)
    assert (value(ready, VERSIONS), found(app, "v7"), wrong(ready)) == ([2], [7], 0)


def test_the_search_uses_the_index(app: Connection, ready: Connection, texts: None) -> None:
    fill(app, ready, 2000)
    app.execute("analyze t")
    for mode in ("force_custom_plan", "force_generic_plan"):
        app.execute(f"set plan_cache_mode = {mode}".encode())
        app.execute("prepare q as select id from t where v_bidx = any (rekey.search('app.t.v', $1))")
        plan = "\n".join(line for (line,) in app.execute("explain (costs off) execute q('v7')"))
        assert "Index Cond: (v_bidx = ANY (rekey.search(" in plan or "Index Cond: (v_bidx = ANY ('{" in plan
        assert app.execute("execute q('v7')").fetchall() == [(7,)]
        app.execute("deallocate q")


def test_who_may_search(
    app: Connection, ready: Connection, db: str, kek: bytes, owner: str, texts: None
) -> None:
    fill(app, ready)
    other = owner + "_reader"
    ready.execute(
        f"create role {other} login in role rekey_app; grant usage on schema app to {other}".encode()
    )
    try:
        with connect(db, user=other) as reader:
            unlock(reader, kek)
            for call in ("rekey.search('app.t.v', 'v7')", "rekey.search_many('app.t.v', array['v7'])"):
                with refused("42501"):
                    reader.execute(f"select {call}".encode())
            ready.execute(f"grant select (id, v_bidx) on app.t to {other}".encode())
            with refused("42501"):
                reader.execute("select rekey.search('app.t.v', 'v7')")
            ready.execute(f"grant select on app.t to {other}".encode())
            assert found(reader, "v7") == [7]
            reader.execute("select rekey.lock()")
            with refused("RK001"):
                found(reader, "v7")
        with refused("RK007"):
            app.execute("select rekey.search('app.t.w', 'v7')")
    finally:
        ready.execute(f"drop owned by {other}; drop role {other}".encode())


def test_a_search_finds_all_or_raises(app: Connection, ready: Connection, texts: None) -> None:
    app.execute("insert into t select g, 'v' || g from generate_series(1, 50) g")
    app.execute("select rekey.make_searchable('t', 'v')")
    with refused("RK006", "not filled"):
        found(app, "v7")
    run(ready)
    rotate(ready)
    with ready.transaction():
        # (As a rotation would leave it that fails: rows on a version that may not be used.)
        ready.execute("alter table rekey.encryption_keys disable trigger encryption_keys_state")
        ready.execute("update rekey.encryption_keys set state = 'disabled' where version = 1")
    with refused("RK006", "version 1 is disabled"):
        found(app, "v7")


def test_it_is_refused_where_it_cannot_be(app: Connection, ready: Connection, texts: None) -> None:
    app.execute("create table plain (id int primary key, v text, w bytea not null)")
    with refused("RK007"):
        app.execute("select rekey.make_searchable('plain', 'v')")
    protect(app, "plain")
    with refused("RK006", "no trigger"):
        app.execute("select rekey.make_searchable('plain', 'v')")
    with refused("22023"):
        app.execute("select rekey.make_searchable('t', 'v', normalization => 'upper')")
    with refused("22023"):
        app.execute("select rekey.make_searchable('t', 'v', 'n')")
    with refused("22023"):
        app.execute("select rekey.make_searchable('t', 'v', 'v')")
    app.execute("alter table t add column u bytea unique deferrable")
    with refused("22023", "deferrable"):
        app.execute("select rekey.make_searchable('t', 'v', 'u')")
    fill(app, ready, 3)
    with refused("RK006", "in another way"):
        app.execute("select rekey.make_searchable('t', 'v', normalization => 'lower')")
    with refused("RK006", "searchable"):
        protect(app, "t")
    with app.transaction(), refused("25001"):
        app.execute("set transaction isolation level repeatable read")
        app.execute("select rekey.make_searchable('t', 'v')")


def test_one_keyring(app: Connection, ready: Connection, texts: None) -> None:
    ready.execute("select rekey.create_keyring('other')")
    foreign = value(app, "select rekey.encrypt_text('v1', 'other', array['app.t.v', '1'])")
    app.execute("insert into t values (1, %s)", [foreign])
    with refused("RK005", "other keyrings"):
        app.execute("select rekey.make_searchable('t', 'v')")
    app.execute("update t set v = 'v1'")
    old = value(app, "select rekey.encrypt_text('v2', 'default', array['app.t.v', '2'])")
    app.execute("select rekey.make_searchable('t', 'v')")
    run(ready)
    with refused("RK006", "another keyring"):
        app.execute(
            "insert into t values (2, %s)",
            [value(app, "select rekey.encrypt_text('v2', 'other', array['app.t.v', '2'])")],
        )
    rotate(ready)
    run(ready)
    app.execute("insert into t values (2, %s)", [old])
    assert value(app, "select v from t where id = 2") != old
    assert (found(app, "v2"), wrong(ready)) == ([2], 0)
    new = value(app, "select rekey.encrypt_text('v3', 'default', array['app.t.v', '3'])")
    app.execute("insert into t values (3, %s)", [new])
    assert value(app, "select v from t where id = 3") == new


def test_the_sweep_waits_for_older_snapshots(
    app: Connection, ready: Connection, session: Callable[[], Connection], texts: None
) -> None:
    """Whoever locks a row as it is now would not find it under a version that his search did not know."""
    fill(app, ready)
    app.execute("create table other (id int primary key, v text)")
    protect(app, "other", encrypt_on_write=True)
    app.execute("insert into other select g, 'v' from generate_series(1, 50) g")
    reader = session()
    with reader.transaction():
        reader.execute("set transaction isolation level repeatable read")
        assert found(reader, "v7") == [7]
        number = rotate(ready)
        for _ in range(30):
            step(ready)
        assert value(ready, "select count(*) from app.t where substr(v_bidx, 1, 4) = int4send(2)") == 0
        assert (
            value(
                ready, "select count(*) from app.other where substr(rekey._from_text(v), 8, 4) = int4send(2)"
            )
            == 50
        )
        [blocker] = rotation(ready, number, "blocked_by")
        assert (blocker["pid"], blocker["snapshot"]) == (reader.info.backend_pid, True)
        assert found(reader, "v7") == [7]
    run(ready)
    assert rotation(ready, number, "state", "blocked_by") == ("completed", None)
    assert wrong(ready) == 0


def test_a_wrong_value_is_quarantined_and_mended(app: Connection, ready: Connection, table: str) -> None:
    fill(app, ready)
    app.execute("alter table t disable trigger user")
    app.execute("update t set v_bidx = set_byte(v_bidx, 9, get_byte(v_bidx, 9) # 1) where id = 7")
    app.execute("update t set v_bidx = null where id = 8")
    app.execute("alter table t enable always trigger zz_pg_rekey_1")
    for suffix in ("insert", "update", "look", "carry"):
        app.execute(f"alter table t enable always trigger zz_pg_rekey_1_{suffix}".encode())
    ready.execute("select rekey._census()")
    assert ready.execute("select row_key, reason from rekey.failure_status").fetchall() == [
        ("7", "its index value is not that of its value")
    ]
    # The row without one is behind: the census has had a sweep queued.
    run(ready)
    number = value(ready, "select max(id) from rekey.rotations")
    assert rotation(ready, number, "trigger", "state") == ("schedule", "completed_with_failures")
    assert (found(app, "v8"), found(app, "v7")) == ([8], None)
    ready.execute(
        "select rekey.resolve_failure(id, 'retry') from rekey.failure_status where resolved_at is null"
    )
    run(ready)
    assert rotation(ready, number, "state") == "completed"
    assert (found(app, "v7"), wrong(ready)) == ([7], 0)


def test_what_was_normalized_by_other_tables_is_made_anew(
    app: Connection, ready: Connection, texts: None
) -> None:
    fill(app, ready)
    stale: LiteralString = (
        "select count(*) from rekey.findings() where finding like '%%collation%%' and severity = 'critical'"
    )
    assert value(ready, stale) == 0
    ready.execute("update rekey._blind_indexes set text_version = 'older'")
    app.execute("alter table t disable trigger user")
    app.execute("update t set v_bidx = substr(v_bidx, 1, 4) || substr(sha256(v_bidx), 1, 16)")
    for suffix in ("", "_insert", "_update", "_look", "_carry"):
        app.execute(f"alter table t enable always trigger zz_pg_rekey_1{suffix}".encode())
    assert (value(ready, stale), wrong(ready)) == (1, 50)
    app.execute("select rekey.make_searchable('t', 'v')")
    run(ready)
    assert (value(ready, stale), wrong(ready)) == (0, 0)
    assert events(ready).count("column.refilled") == 1
    # A rotation under way takes it along, and does not complete before.
    number = rotate(ready)
    step_until(ready, "swept")
    ready.execute("update rekey._blind_indexes set text_version = 'older'")
    run(ready)
    assert rotation(ready, number, "state") == "completed"
    assert (value(ready, stale), wrong(ready)) == (0, 0)


def test_findings(app: Connection, ready: Connection, texts: None) -> None:
    app.execute("insert into t values (1, 'v1')")
    app.execute("select rekey.make_searchable('t', 'v')")
    run(ready)
    listed: LiteralString = "select finding from rekey.protection_findings() where kind = 'index' order by 1"
    assert [row for (row,) in ready.execute(listed)] == [
        "no index begins with v_bidx: a search reads the whole table"
    ]
    app.execute("create index on t (v_bidx)")
    assert ready.execute(listed).fetchall() == []
    app.execute("alter table t add constraint once unique (v_bidx) deferrable")
    [(said,)] = ready.execute(listed).fetchall()
    assert "deferrable" in said
    app.execute("alter table t drop constraint once")
    app.execute("drop trigger zz_pg_rekey_1_carry on t")
    assert "zz_pg_rekey_1_carry" in value(ready, "select problem from rekey.column_status")
    assert app.execute("select relation, column_name, finding from rekey.find_unprotected()").fetchall() == []


def test_adoption_fills_the_index(app: Connection, ready: Connection) -> None:
    app.execute("create table t (id int primary key, v text)")
    app.execute("insert into t select g, 'v' || g % 10 from generate_series(1, 3000) g")
    app.execute("analyze t")
    protect(app, "t", encrypt_on_write=True)
    notices: list[str] = []
    app.add_notice_handler(lambda notice: notices.append(f"{notice.severity} {notice.message_primary}"))
    app.execute("select rekey.make_searchable('t', 'v')")
    assert "WARNING app.t.v has about 10 different values" in [
        n.replace("WARNING t.v", "WARNING app.t.v") for n in notices
    ]
    app.execute("select from rekey.adopt_column('t', 'v')")
    run(ready)
    assert len(found(app, "v7") or []) == 300
    assert wrong(ready) == 0


def test_unprotect(app: Connection, ready: Connection, table: str) -> None:
    fill(app, ready)
    while value(app, "select rekey.unprotect_column('t', 'v', decrypt => true)"):
        pass
    assert app.execute("select count(*), count(v_bidx) from t").fetchone() == (50, 0)
    app.execute("insert into t (id, v) values (90, 'w')")
    assert value(app, "select count(*) from pg_trigger where tgrelid = 't'::regclass") == 0
    left: LiteralString = "select count(*) from pg_proc where pronamespace = 'rekey_targets'::regnamespace"
    assert value(app, left + " and proname like 'column%%'") == 0
    assert value(ready, "select count(*) from rekey._blind_indexes") == 0


def test_names_change(app: Connection, ready: Connection, texts: None) -> None:
    fill(app, ready)
    app.execute('alter table t rename column v_bidx to "a %s ""b"')
    with refused("RK005"):
        app.execute("insert into t values (60, 'w')")
    protect(app, "t", encrypt_on_write=True)
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state") == "completed"
    app.execute("insert into t values (60, 'v7')")
    found_by: LiteralString = (
        "select count(*) from t where \"a %%s \"\"b\" = any (rekey.search('app.t.v', 'v7'))"
    )
    assert value(app, found_by) == 2
    assert value(ready, "select index_column from rekey.column_status") == 'a %s "b'
    with refused("2BP01"):
        app.execute('alter table t drop column "a %s ""b"')


def test_rebuilt(app: Connection, ready: Connection, texts: None) -> None:
    fill(app, ready)
    app.execute("create table rebuilt (like t including all)")
    app.execute("insert into rebuilt select * from t")
    app.execute("alter table t rename to gone; alter table rebuilt rename to t; drop table gone cascade")
    app.execute("select rekey.rebind_column('t', 'v')")
    assert (found(app, "v7"), wrong(ready)) == ([7], 0)
    app.execute("insert into t values (60, 'v7')")
    rotate(ready)
    run(ready)
    assert (found(app, "v7"), wrong(ready)) == ([7, 60], 0)


def test_partitions(app: Connection, ready: Connection) -> None:
    app.execute("create table t (id int, v text, primary key (id)) partition by range (id)")
    app.execute("create table t_1 partition of t for values from (0) to (100)")
    app.execute("create table t_2 (x int, v text, id int not null)")
    app.execute(
        "alter table t_2 drop column x; alter table t attach partition t_2 for values from (100) to (200)"
    )
    protect(app, "t", encrypt_on_write=True)
    app.execute("insert into t select g, 'v' || g from generate_series(1, 199) g")
    app.execute("select rekey.make_searchable('t', 'v')")
    run(ready)
    app.execute("create unique index on t_1 (v_bidx); create unique index on t_2 (v_bidx)")
    number = rotate(ready)
    app.execute("delete from t where id in (5, 150)")
    app.execute("insert into t values (5, 'w'), (150, 'w')")
    with refused("23505"):
        app.execute("update t set id = 6 where id = 150 and exists (select from t where id = 150)")
    app.execute("delete from t where id = 6")
    with refused("23505"):
        app.execute("update t set id = 6 where id = 150")
    run(ready)
    assert rotation(ready, number, "state") == "completed"
    assert (found(app, "v120"), found(app, "w"), wrong(ready)) == ([120], [5, 150], 0)


def test_dumped_and_restored(
    app: Connection,
    ready: Connection,
    db: str,
    make_database: Callable[..., str],
    kek: bytes,
    tmp_path: Path,
    owner: str,
    texts: None,
) -> None:
    fill(app, ready, unique=True)
    rotate(ready)
    step_until(ready, "batch")
    tools = tools_for(db)
    tools.dump(db, tmp_path / "dump", "--format=custom")
    other = make_database()
    tools.restore(other, tmp_path / "dump")
    with connect(other) as restored:
        unlock(restored, kek)
        assert (found(restored, "v7"), wrong(restored)) == ([7], 0)
        with refused("23505"):
            restored.execute("insert into app.t values (100, 'v7')")
        run(restored)
        assert value(restored, "select count(*) from rekey.rotation_status where state <> 'completed'") == 0
        assert (found(restored, "v7"), wrong(restored)) == ([7], 0)
        assert value(restored, VERSIONS) == [2]
        restored.execute(f"drop owned by {owner} cascade".encode())


def test_kills_in_mid_rotation(
    app: Connection, ready: Connection, session: Callable[[], Connection], texts: None
) -> None:
    """Of a filling and of a rotation: what was not committed is done again, and no row is missed."""
    app.execute("insert into t select g, 'v' || g from generate_series(1, 3000) g")
    app.execute("select rekey.make_searchable('t', 'v')")
    app.execute("create unique index on t (v_bidx)")
    for _ in range(2):
        for _ in range(4):
            worker = session()
            with worker.transaction(force_rollback=True):
                step_until(worker, "batch", "completed", "idle")
            step_until(worker, "batch", "completed", "idle")
            ready.execute("select pg_terminate_backend(%s, 5000)", [worker.info.backend_pid])
        if value(ready, "select filled from rekey._blind_indexes"):
            assert (found(app, "v7"), wrong(ready)) == ([7], 0)
        run(ready)
        assert wrong(ready) == 0
        rotate(ready)
    run(ready)
    assert value(ready, VERSIONS) == [3]


def test_many_rows_in_one_transaction_of_a_rotation(app: Connection, ready: Connection, texts: None) -> None:
    """No lock for each of them; each is asked for under both versions."""
    fill(app, ready, 20, unique=True)
    rotate(ready)
    with app.transaction():
        app.execute("insert into t select g, 'w' || g from generate_series(100, 20099) g")
        locks: LiteralString = "select count(*) from pg_locks where pid = pg_backend_pid()"
        assert value(app, locks) < 60
        with refused("23505"), app.transaction():
            app.execute("insert into t values (99, 'v7')")
        with refused("23505"), app.transaction():
            app.execute("insert into t values (99, 'w20000')")
    run(ready)
    assert value(app, "select count(*) from t where substr(v_bidx, 1, 4) = int4send(2)") == 20020
    assert (found(app, "w20000"), wrong(ready)) == ([20000], 0)


def test_triggers_and_the_rows_that_they_change(app: Connection, ready: Connection, texts: None) -> None:
    """A row that an AFTER trigger of the table has updated is carried on all the same."""
    fill(app, ready, 20, unique=True)
    app.execute("""
        create function again() returns trigger language plpgsql as $$
        begin
          update app.t set n = n + 1 where id = new.id;
          return null;
        end $$;
        create trigger again after insert on t for each row execute function again();
        create table log (who name, path text, v_bidx bytea);
        create function log() returns trigger language plpgsql as $$
        begin
          insert into app.log values (current_user, current_setting('search_path'), new.v_bidx);
          return null;
        end $$;
        create trigger log after update on t for each row execute function log()""")
    rotate(ready)
    app.execute("insert into t values (100, 'w')")
    assert value(app, "select n from t where id = 100") == 1
    assert value(app, "select substr(v_bidx, 1, 4) from t where id = 100") == b"\0\0\0\2"
    assert value(app, "select count(*) from log where octet_length(v_bidx) <> 20") == 0
    with refused("23505"):
        app.execute("insert into t values (101, 'w')")
    with refused("23505"):
        app.execute("insert into t values (101, 'v7')")
    assert wrong(ready) == 0


def test_readers_miss_no_row(
    app: Connection, ready: Connection, session: Callable[[], Connection], texts: None
) -> None:
    """SELECT, UPDATE and SELECT FOR UPDATE by search, in a loop, while rotations run."""
    fill(app, ready, 2000, unique=True)
    missed: list[str] = []
    done: Counter[str] = Counter()
    statements: list[LiteralString] = [
        "select id from app.t where v_bidx = any (rekey.search('app.t.v', %s))",
        "update app.t set n = n + 1 where v_bidx = any (rekey.search('app.t.v', %s)) returning id",
        "select id from app.t where v_bidx = any (rekey.search('app.t.v', %s)) for update",
    ]

    def read(connection: Connection, statement: LiteralString, stop: threading.Event) -> None:
        while not stop.is_set():
            number = random.randrange(1, 2001)
            rows = connection.execute(statement, [f"v{number}"]).fetchall()
            done[statement] += 1
            if rows != [(number,)]:
                missed.append(f"{statement}: {rows}")

    tasks = [partial(read, session(), statement) for statement in statements]
    with in_background(*tasks):
        for _ in range(4):
            rotate(ready)
            run(ready)
    assert missed == []
    assert min(done[statement] for statement in statements) > 50
    assert wrong(ready) == 0


def test_the_function_that_it_prints(app: Connection, ready: Connection, texts: None) -> None:
    """One call that searches and uses what it found, as PostgREST makes it."""
    printed: list[str] = []
    app.add_notice_handler(lambda notice: printed.append(notice.message_detail or ""))
    fill(app, ready)
    [made] = [text for text in printed if "PostgREST" in text]
    app.execute(made.split(": ", 1)[1].encode())
    assert app.execute("select id from app.t_by_v(value => 'v7')").fetchall() == [(7,)]
    rotate(ready)
    assert app.execute("select id from app.t_by_v(value => 'v7')").fetchall() == [(7,)]

"""Encryption on write, the decrypted view, and who may open a value of a protected column."""

from collections.abc import Callable, Iterator
from typing import LiteralString

import pytest

from column_fixtures import protect
from driving import refused, rotate, rotation, run, step_until
from helpers import Connection, connect, unlock, value

pytest_plugins = ["column_fixtures"]

OPENED: LiteralString = "select rekey.decrypt(v, array['app.t.v', id::text]) from t where id = %s"


@pytest.fixture(params=["text", "bytea"])
def table(request: pytest.FixtureRequest, app: Connection) -> str:
    """The type of the protected column of app.t, which a trigger encrypts."""
    app.execute(f"create table t (id int primary key, v {request.param}, n int default 0)".encode())
    protect(app, "t", encrypt_on_write=True)
    return str(request.param)


def given(table: str, text: str) -> str | bytes:
    return text if table == "text" else text.encode()


def stored(app: Connection, key: int) -> bytes:
    """Return the envelope in a row."""
    found = app.execute("select v from t where id = %s", [key]).fetchone()
    assert found is not None
    raw = found[0]
    if isinstance(raw, str):
        assert raw.startswith("rk1:")
        raw = value(app, "select decode(substr(%s, 5), 'base64')", raw)
    assert bytes(raw).startswith(b"RK\x01")
    return bytes(raw)


@pytest.mark.parametrize("text", ["", "plain", "äöü", "x" * 1_000_000, "rk2:like", "RK"])
def test_what_is_written_is_encrypted(app: Connection, table: str, text: str) -> None:
    app.execute("insert into t values (1, %s), (2, null)", [given(table, text)])
    assert value(app, OPENED, 1) == text.encode()
    assert value(app, "select v is null from t where id = 2")
    first = stored(app, 1)
    app.execute("update t set n = n + 1, v = v where id = 1")
    assert stored(app, 1) == first
    app.execute("update t set v = %s where id = 1", [given(table, text + "!")])
    assert value(app, OPENED, 1) == f"{text}!".encode()


def test_context_and_envelopes(app: Connection, table: str) -> None:
    app.execute("insert into t values (1, %s), (2, %s)", [given(table, "one"), given(table, "two")])
    with refused("RK003"):
        app.execute("update t set v = (select v from t where id = 2) where id = 1")
    with refused("RK003"):
        app.execute("insert into t select 3, v from t where id = 1")
    app.execute("update t set id = 9 where id = 1")
    assert value(app, OPENED, 9) == b"one"
    app.execute("insert into t select 9, v from t where id = 9 on conflict (id) do update set v = excluded.v")
    assert value(app, OPENED, 9) == b"one"
    app.execute("update t set id = 10, v = %s where id = 9", [given(table, "other")])
    assert value(app, OPENED, 10) == b"other"


def test_a_rotation_goes_through_the_trigger(app: Connection, ready: Connection, table: str) -> None:
    app.execute("insert into t select g, %s from generate_series(1, 50) g", [given(table, "v")])
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed", 50)
    assert value(app, OPENED, 5) == b"v"


def test_a_ciphertext_held_back_keeps_its_key_while_uncommitted(
    app: Connection, ready: Connection, session: Callable[[], Connection], table: str
) -> None:
    """A client encrypted before the rotation, and stores without having committed when the key is to go."""
    writer, late = session(), session()
    encrypt: LiteralString = "select rekey.encrypt('held'::text, 'default', array['app.t.v', '1'])"
    held = value(app, encrypt.replace("encrypt", "encrypt_text", 1) if table == "text" else encrypt)
    with late.transaction():
        late.execute("set transaction isolation level repeatable read")
        late.execute("select from rekey.settings")
        with writer.transaction():
            writer.execute("insert into app.t values (1, %s)", [held])
            number = rotate(ready)
            step_until(ready, "blocked")
            with refused("RK005"):
                ready.execute("select rekey.schedule_key_destruction('default', 1, '0 s')")
        run(ready)
        assert rotation(ready, number, "state", "rows_done") == ("completed", 1)
        ready.execute("select rekey.schedule_key_destruction('default', 1, '0 s')")
        # A snapshot that shows the key as it was does not let it pass either.
        with refused("40001"), late.transaction():
            late.execute("insert into app.t values (1, %s) on conflict do nothing", [held])
    assert value(app, OPENED, 1) == b"held"


def test_values_not_adopted_yet_wait_for_adoption(app: Connection) -> None:
    app.execute("set search_path = app, public")
    app.execute("create table t (id int primary key, v bytea, n int default 0)")
    app.execute("insert into t select g, pgp_sym_encrypt('v', 'passphrase') from generate_series(1, 2) g")
    protect(app, "t", encrypt_on_write=True)
    app.execute("update t set n = 1, v = v where id = 1")
    app.execute("update t set id = 3 where id = 2")
    found = app.execute("select id, pgp_sym_decrypt(v, 'passphrase') from t order by id").fetchall()
    assert found == [(1, "v"), (3, "v")]


def test_a_copy_is_encrypted(app: Connection) -> None:
    app.execute("create table t (id int primary key, v text) partition by range (id)")
    app.execute("create table t_1 partition of t default")
    protect(app, "t", encrypt_on_write=True)
    with app.cursor() as cursor, cursor.copy("copy t from stdin") as copy:
        for number in range(20):
            copy.write_row((number, f"v{number}"))
    assert value(app, OPENED, 7) == b"v7"
    assert value(app, "select count(*) from t_1 where v like 'rk1:%%'") == 20


def test_without_the_kek_nothing_is_stored(app: Connection, table: str) -> None:
    app.execute("insert into t values (1, %s)", [given(table, "one")])
    app.execute("select rekey.lock()")
    for statement in ("insert into t values (2, %s)", "update t set v = %s where id = 1"):
        with refused("RK001"):
            app.execute(statement, [given(table, "never")])
    assert value(app, "select count(*) from t") == 1


def test_another_key_of_the_table(app: Connection) -> None:
    """The upsert that would store a value sealed for an id that never was."""
    app.execute("create table t (id int primary key generated always as identity, k text unique, v text)")
    with refused("22023"):
        protect(app, "t", encrypt_on_write=True)
    protect(app, "t", context_columns=["k"], encrypt_on_write=True)
    upsert = "insert into t (k, v) values ('a', %s) on conflict (k) do update set v = excluded.v"
    for text in ("one", "two"):
        app.execute(upsert, [text])
        assert value(app, "select rekey.decrypt_text(v, array['app.t.v', k]) from t") == text


def test_a_renamed_column_says_what_to_do(app: Connection, table: str) -> None:
    app.execute("alter table t rename v to w")
    with refused("RK005"):
        app.execute("insert into t values (1, %s)", [given(table, "x")])
    app.execute("alter table t add column v text")  # another column takes the name
    with refused("RK005"):
        app.execute("insert into t values (1, %s)", [given(table, "x")])
    with refused("RK005"):
        protect(app, "t", "w", encrypt_on_write=True)
    app.execute("select rekey.rebind_column('app.t', 'w')")  # it stays with the one that was renamed
    protect(app, "t", "w", encrypt_on_write=True)
    app.execute("insert into t values (1, %s)", [given(table, "x")])
    assert value(app, OPENED.replace("(v", "(w"), 1) == b"x"


def test_a_column_that_is_blocked_says_how_it_keeps_its_trigger(app: Connection, table: str) -> None:
    app.execute("drop function rekey_targets.column_1_count(regclass, integer[])")
    problem = value(app, "select problem from rekey.column_status")
    assert "repeat rekey.protect_column(..., encrypt_on_write => true)" in problem


def test_the_trigger_can_be_taken_away(app: Connection, table: str) -> None:
    said: list[str] = []
    app.add_notice_handler(lambda notice: said.append(str(notice.message_primary)))
    protect(app, "t")
    assert said == ["from now on, what is written into app.t.v is not encrypted"]
    app.execute("insert into t values (1, %s)", [given(table, "plain")])
    assert app.execute("select tgname from pg_trigger where tgname like 'zz%' order by 1").fetchall() == [
        ("zz_pg_rekey_1_insert",),
        ("zz_pg_rekey_1_update",),
    ]


@pytest.fixture
def reader(app: Connection, owner: str, db: str, kek: bytes, ready: Connection) -> Iterator[Connection]:
    """A role that uses secrets, owns nothing, and by a policy sees the even rows of app.t."""
    name = f"{owner}_reader"
    ready.execute(f"create role {name} login in role rekey_app".encode())
    app.execute("create table t (id int primary key, v text); alter table t enable row level security")
    app.execute(f"create policy even on t to {name} using (id % 2 = 0)".encode())
    app.execute(f"grant usage on schema app to {name}".encode())
    with connect(db, user=name) as connection:
        unlock(connection, kek)
        yield connection
    with connect(db) as connection:
        connection.execute(f"drop owned by {name}".encode())
        connection.execute(f"drop role {name}".encode())


def test_the_view_shows_a_reader_his_rows(app: Connection, reader: Connection, owner: str) -> None:
    app.execute("insert into t select g, 'plain ' || g from generate_series(1, 4) g")
    protect(app, "t")
    app.execute("update t set v = rekey.encrypt_text(v, context => array['app.t.v', id::text]) where id < 3")
    assert value(app, "select rekey.create_decrypted_view('t')") == "app.t_decrypted"
    shown = "select id, v from app.t_decrypted order by id"
    assert app.execute(shown.encode()).fetchall() == [(g, f"plain {g}") for g in range(1, 5)]
    with refused("42501"):
        reader.execute(shown.encode())
    app.execute(f"grant select on t, t_decrypted to {owner}_reader".encode())
    assert reader.execute(shown.encode()).fetchall() == [(2, "plain 2"), (4, "plain 4")]


def test_a_value_opens_for_who_may_read_its_column(app: Connection, reader: Connection, owner: str) -> None:
    app.execute("insert into t values (2, 'plain')")
    protect(app, "t")
    app.execute("update t set v = rekey.encrypt_text(v, context => array['app.t.v', '2'])")
    sealed = value(app, "select v from t")
    opening: LiteralString = "select rekey.decrypt_text(%s::text, array['app.t.v', '2'])"
    with refused("42501"):
        reader.execute(opening, [sealed])
    with refused("42501"):
        reader.execute("select rekey.encrypt('x'::text, context => array['app.t.v', '2'])")
    app.execute(f"grant select (id) on t to {owner}_reader".encode())
    with refused("42501"):
        reader.execute(opening, [sealed])
    app.execute(f"grant select (v) on t to {owner}_reader".encode())
    assert value(reader, opening, sealed) == "plain"
    with refused("RK003"):
        reader.execute("select rekey.decrypt_text(%s::text, array['app.t.v', '3'])", [sealed])


@pytest.mark.usefixtures("icu")
def test_a_collation_that_takes_other_letters_for_equal(app: Connection, ready: Connection) -> None:
    app.execute("create collation blind (provider = icu, locale = 'und-u-ks-level1', deterministic = false)")
    app.execute('create table t (id int primary key, v text collate blind, "a%s" int default 1)')
    protect(app, "t", context_columns=["id", "a%s"], encrypt_on_write=True)
    app.execute("insert into t values (1, 'Straße'), (2, 'STRASSE')")
    app.execute("update t set v = 'strasse' where id = 1")
    opened = """select rekey.decrypt_text(v, array['app.t.v', id::text, "a%s"::text]) from t order by id"""
    assert app.execute(opened.encode()).fetchall() == [("strasse",), ("STRASSE",)]
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed", 2)
    assert app.execute(opened.encode()).fetchall() == [("strasse",), ("STRASSE",)]
    with refused("RK006"):
        protect(app, "t", context_columns=["a%s", "id"], encrypt_on_write=True)
    assert value(app, "select rekey.unprotect_column('t', 'v', decrypt => true)") == 2

"""What came with PostgreSQL 18, in tables that are protected and rotated; on 15 to 17 there is none of it."""

from typing import Any, LiteralString

import pytest

from column_fixtures import protect
from driving import refused, rotate, rotation, run
from helpers import Connection, connect, value

pytest_plugins = ["column_fixtures"]

OPENED: LiteralString = "select rekey.decrypt_text(v, array['app.t.v', id::text]) from t order by id"


@pytest.fixture(autouse=True, scope="module")
def _since_18(server: str) -> None:
    with connect(server) as connection:
        if connection.info.server_version < 180000:
            pytest.skip("needs PostgreSQL 18")


@pytest.fixture
def said(app: Connection) -> list[tuple[str, str]]:
    """The warnings of the session, with their hints."""
    notices: list[tuple[str, str]] = []
    app.add_notice_handler(lambda it: notices.append((it.message_primary or "", it.message_hint or "")))
    return notices


def rotated(ready: Connection) -> Any:
    """Rotate to the end; return how it ended and how many rows it wrote."""
    number = rotate(ready)
    run(ready)
    return rotation(ready, number, "state", "rows_done", "rows_failed")


def test_a_virtual_column_beside_a_protected_one(app: Connection, ready: Connection) -> None:
    app.execute("create table t (id int primary key, v text, n int, twice int generated always as (n * 2))")
    protect(app, "t", encrypt_on_write=True)
    app.execute("insert into t (id, v, n) select g, 'v' || g, g from generate_series(1, 30) g")
    assert rotated(ready) == ("completed", 30, 0)
    assert app.execute(OPENED).fetchall() == [(f"v{n}",) for n in range(1, 31)]
    assert value(app, "select sum(twice) from t") == 930
    app.execute("select rekey.create_decrypted_view('t')")
    assert app.execute("select v, twice from t_decrypted where id = 3").fetchone() == ("v3", 6)
    app.execute("update t_decrypted set n = 4 where id = 3")
    assert app.execute("select v, twice from t_decrypted where id = 3").fetchone() == ("v3", 8)
    ready.execute("select rekey.schedule_key_destruction('default', 1, '0 s')")


def test_a_virtual_column_of_a_protected_one(
    app: Connection, ready: Connection, said: list[tuple[str, str]]
) -> None:
    """It is computed whenever it is read: from the envelope, as one that is stored."""
    app.execute("create table t (id int primary key, v text, size int generated always as (length(v)))")
    protect(app, "t", encrypt_on_write=True)
    assert (
        "generated column size is computed from envelopes",
        "Drop it, or compute it from the decrypted view.",
    ) in said
    app.execute("insert into t values (1, 'abc')")
    assert rotated(ready) == ("completed", 1, 0)
    assert value(app, "select size = length(v) from t")


@pytest.mark.parametrize("context", [None, ["v"]])
def test_no_virtual_column_is_protected_or_context(app: Connection, context: list[str] | None) -> None:
    app.execute("create table t (id int primary key, v text generated always as ('v' || id), w text)")
    with refused("22023"):
        protect(
            app,
            "t",
            "v" if context is None else "w",
            **({} if context is None else {"context_columns": context}),
        )


def test_a_check_that_is_not_enforced(
    app: Connection, ready: Connection, said: list[tuple[str, str]]
) -> None:
    app.execute(
        "create table t (id int primary key, v text, constraint short check (length(v) < 10) not enforced)"
    )
    protect(app, "t", encrypt_on_write=True)
    assert "CHECK short, which is not enforced, is not about envelopes" in [message for message, _ in said]
    app.execute("insert into t values (1, 'abc')")
    assert rotated(ready) == ("completed", 1, 0)


def test_an_enforced_check_still_stops_rows(app: Connection, said: list[tuple[str, str]]) -> None:
    app.execute("create table t (id int primary key, v text, constraint short check (length(v) < 10))")
    protect(app, "t", encrypt_on_write=True)
    assert "CHECK short is applied to envelopes" in [message for message, _ in said]
    with refused("23514"):
        app.execute("insert into t values (1, 'abc')")


def test_a_foreign_key_that_is_not_enforced(app: Connection) -> None:
    """What joins by it finds nothing among envelopes, enforced or not."""
    app.execute("create table other (name text primary key)")
    app.execute("create table t (id int primary key, v text, foreign key (v) references other not enforced)")
    with refused("22023"):
        protect(app, "t")


@pytest.fixture
def temporal(ready: Connection, app: Connection) -> None:
    """A table whose primary key is a name and a time that does not overlap."""
    ready.execute("create extension btree_gist with schema public")
    app.execute("set search_path = app, public")
    app.execute(
        """create table t (id int, during daterange, v text, tag text,
             primary key (id, during without overlaps),
             constraint tagged unique (tag, during without overlaps))"""
    )


@pytest.mark.usefixtures("temporal")
def test_a_temporal_key(app: Connection, ready: Connection, said: list[tuple[str, str]]) -> None:
    """A range is no context: the key's other columns are. A failure names all of the key."""
    with refused("22023"):
        protect(app, "t")
    protect(app, "t", context_columns=["id"], encrypt_on_write=True)
    app.execute(
        """insert into t (id, during, v) values
             (1, '[2025-01-01,2026-01-01)', 'old'), (1, '[2026-01-01,)', 'new'),
             (2, '[2025-01-01,)', 'two')"""
    )
    assert rotated(ready) == ("completed", 3, 0)
    assert value(
        app, "select array_agg(rekey.decrypt_text(v, array['app.t.v', id::text]) order by id, during) from t"
    ) == ["old", "new", "two"]
    app.execute("alter table t disable trigger user")
    app.execute(
        "update t set v = overlay(v placing 'AAAA' from 60) where during @> date '2025-06-01' and id = 1"
    )
    app.execute("alter table t enable trigger user")
    assert rotated(ready) == ("completed_with_failures", 2, 1)
    assert "2025-01-01" in value(
        ready, "select row_key::text from rekey.failure_status where resolved_at is null"
    )


@pytest.mark.usefixtures("temporal")
def test_a_column_in_a_temporal_key(app: Connection, said: list[tuple[str, str]]) -> None:
    protect(app, "t", "tag", context_columns=["id"])
    assert "index app.tagged holds envelopes: no equality, no order, no uniqueness of the plain values" in [
        message for message, _ in said
    ]
    app.execute("create table k (name text, during daterange, primary key (name, during without overlaps))")
    with refused("22023"):
        protect(app, "k", "name", context_columns=["name"])


def test_returning_old_and_new(app: Connection) -> None:
    """A statement returns what is stored; what a view returns, it opens, the old and the new."""
    app.execute("create table t (id int primary key, v text)")
    protect(app, "t", encrypt_on_write=True)
    app.execute("insert into t values (1, 'one')")
    app.execute("select rekey.create_decrypted_view('t')")
    [(old, new)] = app.execute("update t set v = 'two' where id = 1 returning old.v, new.v").fetchall()
    assert old != new
    assert [
        value(app, "select rekey.decrypt_text(%s, array['app.t.v', '1'])", one) for one in (old, new)
    ] == ["one", "two"]
    [both] = app.execute("update t_decrypted set id = 1 where id = 1 returning old.v, new.v").fetchall()
    assert both == ("two", "two")
    [gone] = app.execute("delete from t_decrypted where id = 1 returning old.v, new.v").fetchall()
    assert gone == ("two", None)


@pytest.mark.parametrize("setting", ["off", "fips"])
def test_pgcrypto_without_ciphers_of_its_own(app: Connection, ready: Connection, setting: str) -> None:
    """pg_rekey uses none of them: gen_salt() and crypt() alone are pgcrypto's own."""
    app.execute("create table t (id int primary key, v text)")
    ready.execute(
        f"alter database {ready.info.dbname} set pgcrypto.builtin_crypto_enabled = {setting}".encode()
    )
    ready.execute(f"set pgcrypto.builtin_crypto_enabled = {setting}".encode())
    assert value(ready, "show pgcrypto.builtin_crypto_enabled") == setting
    if setting == "off":
        with refused("XX000"):
            ready.execute("select public.gen_salt('bf')")
    ready.execute("select rekey.set_secret('s', 'secret')")
    ready.execute("select rekey.protect_column('app.t', 'v', encrypt_on_write => true)")
    ready.execute("insert into app.t values (1, 'one')")
    assert rotated(ready) == ("completed", 2, 0)
    assert value(ready, "select rekey.get_secret('s')") == "secret"
    assert value(ready, "select rekey.decrypt_text(v, array['app.t.v', '1']) from app.t") == "one"

"""The search path that the triggers of a protected table run with while a rotation writes."""

import re
from typing import LiteralString

import pytest

from column_fixtures import protect
from driving import refused, rotate, rotation, run
from helpers import Connection, value

pytest_plugins = ["column_fixtures"]

PATH: LiteralString = "select current_setting('search_path')"
STATUS: LiteralString = "select search_path from rekey.column_status"
FILL: LiteralString = """
    insert into app.t select g, rekey.encrypt_text('v' || g, context => array['app.t.v', g::text])
    from generate_series(1, 5) g"""


@pytest.mark.parametrize("kind", ["after update", "before update", "deferred"])
def test_what_triggers_find_is_what_any_update_finds(
    ready: Connection, app: Connection, owner: str, kind: str
) -> None:
    """Tables, functions, operators and types without their schema, also of an extension, or a user's."""
    ready.execute(f"create schema tools authorization {owner}".encode())
    ready.execute(
        "create schema more; create extension citext schema more; grant usage on schema more to public"
    )
    app.execute("""
        create function tools.stamp() returns text language sql return 'stamped';
        create operator tools.<+> (function = textcat, leftarg = text, rightarg = text);
        create type tools.entry as (what text);
        create table trail (what tools.entry, plain text, who more.citext);
        create table t (id int primary key, v text)""")
    path = "app, tools, more"
    app.execute(f"set search_path = {path}".encode())
    app.execute("""
        create function note() returns trigger language plpgsql as $$
        declare
          v_entry entry;
        begin
          v_entry.what := stamp() <+> '!';
          insert into trail values (v_entry, current_setting('search_path'), 'X'::citext);
          return new;
        end $$""")
    app.execute(
        (
            "create constraint trigger n after update on t deferrable initially deferred for each row"
            " execute function note()"
            if kind == "deferred"
            else f"create trigger n {kind} on t for each row execute function note()"
        ).encode()
    )
    protect(app, "t")
    assert value(ready, STATUS) == path
    app.execute(FILL)
    before = value(ready, PATH)
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed", 5)
    trail: LiteralString = "select distinct (what).what, plain, who = 'x' from app.trail"
    ready.execute("set search_path = more, pg_catalog")
    assert ready.execute(trail).fetchall() == [("stamped!", path, True)]
    ready.execute("reset search_path")
    assert value(ready, PATH) == before


def test_the_user_s_schema_is_the_owner_s(ready: Connection, app: Connection, owner: str) -> None:
    ready.execute(f"create schema {owner} authorization {owner}".encode())
    app.execute("create table t (id int primary key, v text)")
    app.execute(
        f"""
        create table {owner}.trail (who text);
        create function note() returns trigger language plpgsql as
          $$ begin insert into trail values (current_user); return null; end $$;
        create trigger n after update on t for each row execute function note()""".encode()
    )
    protect(app, "t", search_path='"$user", app')
    app.execute(FILL)
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state") == "completed"
    assert ready.execute(f"select distinct who from {owner}.trail".encode()).fetchall() == [(owner,)]


# What fits better than what is in pg_catalog, and comes first in the path.
FUNCTIONS: dict[str, str] = {
    "unnest": "(anyarray) returns setof anyelement",
    "unnest(tid)": "(tid[]) returns setof tid",
    "unnest(bytea)": "(bytea[]) returns setof bytea",
    "encode": "(bytea, text) returns text",
    "replace": "(text, text, text) returns text",
    "set_config": "(text, text, boolean) returns text",
    "current_setting": "(text) returns text",
    "octet_length": "(bytea) returns integer",
    "octet_length(text)": "(text) returns integer",
    "substr": "(bytea, integer, integer) returns bytea",
    "convert_to": "(text, name) returns bytea",
    "int8pl": "(bigint, integer) returns bigint",
    "textcat": "(text, text) returns text",
    "eq": "(text, text) returns boolean",
    "eq(bytea)": "(bytea, bytea) returns boolean",
    "eq(tid)": "(tid, tid) returns boolean",
}
OPERATORS: dict[str, tuple[str, str, str]] = {
    "+": ("int8pl", "bigint", "integer"),
    "||": ("textcat", "text", "text"),
    "=": ("eq", "text", "text"),
    "= (bytea)": ("eq", "bytea", "bytea"),
    "= (tid)": ("eq", "tid", "tid"),
}


def plant(app: Connection, schema: str) -> None:
    """Put functions, operators, types and a collation into a schema, each of which tells who ran it."""
    app.execute(
        f"""
        create table {schema}.ran (who text, what text);
        grant usage on schema {schema} to public; grant all on {schema}.ran to public;
        create collation {schema}."C" (provider = icu, locale = 'und', deterministic = false);
        create domain {schema}.text as pg_catalog.text check (value <> value);
        create domain {schema}.int4 as pg_catalog.int4 check (value <> value);
        create domain {schema}.int8 as pg_catalog.int8 check (value <> value);
        create domain {schema}.bool as pg_catalog.bool check (value and not value)""".encode()
    )
    for name, signature in FUNCTIONS.items():
        signature = re.sub(r"\b(text|boolean|integer|bigint)\b", r"pg_catalog.\1", signature)
        signature = signature.replace("pg_catalog.boolean", "pg_catalog.bool")
        signature = signature.replace("pg_catalog.integer", "pg_catalog.int4")
        signature = signature.replace("pg_catalog.bigint", "pg_catalog.int8")
        app.execute(
            f"""
            create function {schema}.{name.split("(")[0]}{signature} language plpgsql as
              $$ begin insert into {schema}.ran values (current_user, '{name}'); raise 'planted'; end $$
            """.encode()
        )
    for name, (function, left, right) in OPERATORS.items():
        app.execute(
            f"create operator {schema}.{name.split()[0]} (function = {schema}.{function},"
            f" leftarg = {left}, rightarg = {right})".encode()
        )


@pytest.mark.usefixtures("icu")
@pytest.mark.parametrize("encrypt_on_write", [False, True])
@pytest.mark.parametrize("type_", ["text", "varchar", "bytea"])
def test_objects_of_the_path_are_not_taken(
    ready: Connection, app: Connection, owner: str, type_: str, encrypt_on_write: bool
) -> None:
    """Nothing of ours looks there: neither the UPDATE itself, nor what comes before and after it."""
    app.execute(f"create table t (id int primary key, v {type_})".encode())
    ready.execute(f"create schema planted authorization {owner}".encode())
    plant(app, "planted")
    app.execute("""
        create function seen() returns trigger language plpgsql set search_path = pg_catalog as
          $$ begin return new; end $$;
        create trigger seen before update on app.t for each row execute function seen()""")
    app.execute("set search_path = planted, app, pg_catalog")
    with refused("P0001", match="planted"):  # here they are taken
        app.execute("select 'a'::pg_catalog.text || 'b'::pg_catalog.text")
    app.execute("set search_path = app")
    protect(app, "t", encrypt_on_write=encrypt_on_write, search_path="planted, app, pg_catalog")
    function = "encrypt" if type_ == "bytea" else "encrypt_text"
    app.execute(
        f"""
        insert into app.t select g, rekey.{function}('v' || g, context => array['app.t.v', g::text])
        from generate_series(1, 5) g""".encode()
    )
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed", 5)
    assert value(ready, "select sum(failed) from rekey.verify_ciphertexts()") == 0
    assert ready.execute("select * from planted.ran").fetchall() == []


def test_no_rights_are_gained(ready: Connection, app: Connection, owner: str) -> None:
    """What a trigger finds in the path runs as the owner of the table, and never as a role of ours."""
    ready.execute("create role other login; create schema theirs authorization other")
    ready.execute("grant usage on schema theirs to public")
    ready.execute("""
        set role other;
        create table theirs.ran (who text);
        grant insert on theirs.ran to public;
        create function theirs.lower(varchar) returns text language plpgsql as $$
        begin
          insert into theirs.ran values (current_user);
          begin
            insert into theirs.ran select 'read' from rekey.encryption_keys;
          exception when insufficient_privilege then
            null;
          end;
          return pg_catalog.lower($1::text);
        end $$;
        reset role""")
    app.execute("""
        create table t (id int primary key, v text, n varchar default 'X');
        create function low() returns trigger language plpgsql as
          $$ begin new.n := lower(new.n); return new; end $$;
        create trigger low before update on t for each row execute function low()""")
    said: list[str] = []
    app.add_notice_handler(lambda notice: said.append(notice.message_primary or ""))
    protect(app, "t", search_path="theirs, app")
    # Others' schemas are named: what the owner's triggers call there runs as he.
    assert said[-1] == "others may create in schema theirs, in which what a rotation fires looks for names"
    app.execute(FILL.replace("app.t select", "app.t (id, v) select"))
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state") == "completed"
    assert ready.execute("select distinct who from theirs.ran").fetchall() == [(owner,)]
    ready.execute("drop owned by other cascade; drop role other")


def test_a_schema_in_which_nobody_else_may_create_is_not_named(ready: Connection, app: Connection) -> None:
    app.execute("""
        create table t (id int primary key, v text);
        create function tr() returns trigger language plpgsql as 'begin return new; end';
        create trigger tr before update on t for each row execute function tr()""")
    protect(app, "t", search_path='"$user", app, public, none, "a ""b"', keyring="default")
    named: LiteralString = "select finding from rekey.protection_findings() where kind = 'search path'"
    assert ready.execute(named).fetchall() == []
    ready.execute("grant create on schema public to public")
    assert "schema public" in value(ready, named)
    ready.execute("revoke create on schema public from public")
    ready.execute("""create schema "a ""b" authorization rekey_worker""")
    assert 'schema "a ""b"' in value(ready, named)
    protect(app, "t", search_path="app")
    assert ready.execute(named).fetchall() == []


def test_the_path_is_recorded_kept_and_refused(ready: Connection, app: Connection) -> None:
    app.execute("create table t (id int primary key, v text)")
    for bad in ('"', "a,,b", None):
        with refused("22023"):
            protect(app, "t", search_path=bad)
    protect(app, "t")
    assert value(ready, STATUS) == "app"
    app.execute("""
        create table u (like t including all); alter table t rename to gone; alter table u rename to t;
        set search_path = public, app;
        select rekey.rebind_column('app.t', 'v')""")
    assert value(ready, STATUS) == "app"
    said: list[str] = []
    app.add_notice_handler(lambda notice: said.append(notice.message_primary or ""))
    protect(app, "app.t")
    assert said == [
        "from now on, what rotations of app.t.v fire runs with search_path = public, app,"
        " and no longer with app"
    ]
    assert value(ready, STATUS) == "public, app"
    assert value(app, PATH) == "public, app"


def test_an_error_names_trigger_function_and_table(ready: Connection, app: Connection) -> None:
    """Wherever PostgreSQL found the function: its words leave out a schema that is in the path."""
    app.execute("""
        create table t (id int primary key, v text);
        create function fails() returns trigger language plpgsql as
          $$ begin perform 1 from nowhere; return new; end $$;
        create trigger fails before update on t for each row execute function fails()""")
    protect(app, "t")
    app.execute(FILL)
    rotate(ready)
    run(ready)
    reason = value(ready, "select distinct reason from rekey.failure_status")
    assert reason.startswith(
        'app.t: relation "nowhere" does not exist (trigger fails), in app.fails().'
        " A sweep runs it with search_path = app: "
    )

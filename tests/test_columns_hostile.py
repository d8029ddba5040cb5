"""An owner of a protected table who is after keys, other people's rows, or an untrue `completed`."""

import threading
import time
from collections.abc import Callable
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

from column_fixtures import protect
from driving import refused, rotate, rotation, run, step, step_until, waits
from helpers import Connection, connect, unlock, value

pytest_plugins = ["column_fixtures"]

# Notes who it runs as, and what that role can read and call of ours.
SPY: LiteralString = """
    create table spied (who text, "where" text, got text);
    create function spy("where" text) returns boolean language plpgsql as $$
    declare
      v_try text;
      v_got text;
    begin
      foreach v_try in array array[
        'select count(*) from rekey.encryption_keys', 'select key from rekey._session_key',
        'select * from rekey._kek()', 'select rekey._session_keks()',
        'select rekey._reencrypt(''{}'', ''{}'', '''', ''{}'')', 'set role rekey_owner',
        'set role rekey_sweeper',
        'select rekey._adopt(''{}'', ''{}'', null, ''{}'', true)',
        'set session authorization postgres', 'create role rekey_mine superuser'] loop
        begin
          execute v_try into v_got;
          insert into app.spied values (current_user, "where", v_try || ': ' || coalesce(v_got, 'done'));
        exception when others then
          insert into app.spied values (current_user, "where", null);
        end;
      end loop;
      return true;
    end
    $$;
    create function spy_trigger() returns trigger language plpgsql as $$
    begin perform app.spy(tg_name); return new; end $$;
"""
TABLE: LiteralString = "create table t (id int primary key, v text, n int default 0)"
FILL: LiteralString = """
    insert into t select g, rekey.encrypt_text('v' || g, context => array['app.t.v', g::text])
    from generate_series(1, 5) g"""


@pytest.fixture
def table(app: Connection) -> None:
    app.execute(TABLE)
    protect(app, "t")
    app.execute(FILL)


@pytest.mark.parametrize("worker", ["superuser", "rekey_operator"])
def test_what_a_sweep_fires_runs_as_the_owner_and_gets_nothing(
    ready: Connection, app: Connection, owner: str, session: Callable[[], Connection], worker: str
) -> None:
    app.execute(SPY)
    app.execute(TABLE)
    protect(app, "t")
    app.execute(FILL)
    app.execute("""
        alter table t add constraint spied check (app.spy('check'));
        create trigger before_row before update on t for each row execute function spy_trigger();
        create trigger after_row after update on t for each row execute function spy_trigger();
        create trigger statement after update on t for each statement execute function spy_trigger();
        create constraint trigger deferred after update on t deferrable initially deferred
          for each row execute function spy_trigger();
        alter table t enable row level security;
        create policy spied on t using (app.spy('policy')) with check (app.spy('policy'));
        truncate spied""")
    worker_session = session()
    if worker == "rekey_operator":
        worker_session.execute("set role rekey_operator")
    number = rotate(ready)
    run(worker_session)
    assert rotation(ready, number, "state", "rows_done") == ("completed", 5)
    assert ready.execute("select distinct who, got from app.spied").fetchall() == [(owner, None)]
    places = value(ready, 'select array_agg(distinct "where" order by "where") from app.spied')
    assert places == ["after_row", "before_row", "check", "deferred", "statement"]
    assert value(worker_session, "select current_setting('rekey.sweeping', true)") in ("", None)


LYING = """
    create or replace function rekey_targets.column_1_count(relation regclass, keyrings integer[])
    returns table (keyring_id integer, version integer, rows bigint) language plpgsql stable security definer
    set search_path = pg_catalog, pg_temp as $$ begin perform pg_sleep({}); return; end $$"""


@pytest.mark.parametrize(
    "altered",
    [
        "alter function rekey_targets.column_1_read security invoker",
        "alter function rekey_targets.column_1_write set search_path = app",
        "alter function rekey_targets.column_1_sql volatile",
        "drop function rekey_targets.column_1_sql",
        "revoke execute on function rekey_targets.column_1_scan from rekey_sweeper",
    ],
)
def test_an_altered_function_is_not_called(
    ready: Connection, app: Connection, table: None, altered: str
) -> None:
    app.execute(altered.encode())
    for call in ("select rekey.key_usage()", "select rekey.verify_ciphertexts()"):
        with refused("RK005"):
            ready.execute(call.encode())
    protect(app, "t")
    assert value(ready, "select sum(rows) from rekey.key_usage()") == 5


def test_the_owner_cannot_replace_a_function(ready: Connection, app: Connection, table: None) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        app.execute(LYING.format(0).encode())
    ready.execute(LYING.format(0).encode())
    with refused("RK005"):
        ready.execute("select rekey.key_usage()")


def test_a_function_that_is_altered_while_it_runs_has_no_effect(
    ready: Connection, app: Connection, table: None, session: Callable[[], Connection]
) -> None:
    """Replaced by one that lies, and put back before the engine looks again."""
    original = value(app, "select pg_get_functiondef('rekey_targets.column_1_count'::regproc)")
    # The engine looks at the bodies, then is held up before it calls: by a lock on the first target.
    blocker = session()
    blocker.execute("begin; lock table rekey.secrets in access exclusive mode")
    errors: list[str | None] = []
    counter = session()

    def count() -> None:
        try:
            counter.execute("select rekey.key_usage()")
            errors.append(None)
        except psycopg.Error as error:
            errors.append(error.sqlstate)

    counting = threading.Thread(target=count)
    counting.start()
    waits(ready, counter.info.backend_pid)
    ready.execute(LYING.format(1.5).encode())
    blocker.execute("commit")
    time.sleep(0.5)
    ready.execute(original.encode())
    counting.join(60)
    assert errors == ["RK005"]
    assert value(ready, "select sum(rows) from rekey.key_usage()") == 5


@pytest.mark.parametrize(
    "change",
    [
        """perform set_config('request.jwt.claims', '{"sub": "somebody else"}', false)""",
        "perform set_config('rekey.unlocked', '', false)",
        "perform set_config('request.method', 'POST', true)",
    ],
)
def test_a_trigger_that_changes_who_acts_changes_no_row(
    ready: Connection, app: Connection, table: None, change: str
) -> None:
    app.execute(
        f"create function f() returns trigger language plpgsql as"
        f" $$ begin {change}; return new; end $$".encode()
    )
    app.execute("create trigger f before update on t for each row execute function f()")
    number = rotate(ready)
    before = ready.execute("select current_setting('rekey.unlocked', true)").fetchone()
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed_with_failures", 0)
    assert value(ready, "select count(*) from rekey.failure_status where reason ~ 'who acts'") == 5
    assert value(ready, "select coalesce(current_setting('request.jwt.claims', true), '')") == ""
    assert ready.execute("select current_setting('rekey.unlocked', true)").fetchone() == before
    assert value(ready, "select count(*) from rekey.audit_log where jwt_subject is not null") == 0


@pytest.mark.parametrize(
    "rule",
    [
        "create rule keep as on update to t do instead nothing",
        "create rule more as on update to t do also delete from t where id = 1",
    ],
)
def test_rules_keep_no_row_unnoticed(ready: Connection, app: Connection, table: None, rule: str) -> None:
    app.execute(rule.encode())
    number = rotate(ready)
    run(ready)
    state, done = rotation(ready, number, "state", "rows_done")
    left = value(ready, "select count(*) from app.t")
    assert (state, done, left) == ("completed_with_failures", 0, 5) or (state, left) == ("completed", 4)


def test_the_lent_right_is_taken_back(ready: Connection, app: Connection, owner: str) -> None:
    app.execute(TABLE)
    may = "select has_schema_privilege(%s, 'rekey_targets', 'create')"
    app.execute("select rekey._register_column('t', 'v', 'default', null, false, true, 'app')")
    assert value(ready, may, owner)  # who calls it by hand keeps it, for the moment
    app.execute("create table u (id int primary key, v text)")
    protect(app, "u")
    assert not value(ready, may, owner)
    with refused("RK005"):
        ready.execute("select rekey.key_usage()")
    protect(app, "t")
    ready.execute("select rekey.key_usage()")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        app.execute("create function rekey_targets.column_9_count() returns int return 1")


def test_a_stranger_adopts_nothing(
    ready: Connection, app: Connection, table: None, session: Callable[[], Connection]
) -> None:
    app.execute("insert into t values (9, 'gAAAAA' || repeat('x', 120))")
    number = value(app, "select id from rekey.adopt_column('t', 'v', '{fernet}')")
    step_until(ready, "planned")
    stranger = session()
    stranger.execute("set role rekey_admin")
    for call in (
        f"select rekey._adoption_batch({number})",
        f"select rekey._adoption_store({number}, 'app.t', array['(0,9)'::tid], array['x'::bytea], null)",
        "select rekey._adoption_preview('app.t', 'v', null, '(0,0)', '{plaintext}', true)",
        f"select rekey.adoption_batch({number})",
    ):
        with refused("42501"):
            stranger.execute(call.encode())
    assert value(app, "select count(*) from t where v like 'gAAAAA%%'") == 1


def test_rows_that_are_no_part_of_a_batch_are_left(ready: Connection, app: Connection, table: None) -> None:
    """What is an envelope already is not written, whatever the client says."""
    app.execute("insert into t values (9, 'gAAAAA' || repeat('x', 120))")
    number = value(app, "select id from rekey.adopt_column('t', 'v', '{fernet}')")
    step_until(ready, "planned")
    before = app.execute("select * from t where id < 9 order by id").fetchall()
    with app.transaction():
        app.execute("select rekey.adoption_batch(%s)", [number])
        store = """
            select rekey._adoption_store(%s, 'app.t', array_agg(ctid), array_agg('forged'::bytea), null)
            from t"""
        assert value(app, store, number) == 1
    assert app.execute("select * from t where id < 9 order by id").fetchall() == before
    assert value(app, "select rekey.decrypt_text(v, array['app.t.v', '9']) from t where id = 9") == "forged"


def test_objects_of_the_owner_are_not_found_by_name(ready: Connection, app: Connection, table: None) -> None:
    app.execute(SPY)
    for name, arguments in (
        ("substr", "bytea, integer, integer"),
        ("octet_length", "bytea"),
        ("encode", "bytea, text"),
    ):
        app.execute(
            f"create function app.{name}({arguments}) returns text language plpgsql as"
            f" $$ begin perform app.spy('{name}'); return null; end $$".encode()
        )
    app.execute("create operator app.= (function = texteq, leftarg = text, rightarg = text)")
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed", 5)
    assert value(ready, "select count(*) from app.spied") == 0


def test_a_table_of_the_same_name_is_another_table(ready: Connection, app: Connection, table: None) -> None:
    number = rotate(ready)
    step_until(ready, "planned")
    app.execute("alter table t rename to old")
    app.execute("create table t (id int primary key, v text); insert into t values (1, 'not protected')")
    run(ready, "2 s")
    assert rotation(ready, number, "state") == "verifying"
    assert "rebind_column" in rotation(ready, number, "blocked_by")[0]["why"]
    app.execute("select rekey.rebind_column('app.old', 'v')")  # it stays with the table that was renamed
    ready.execute("update rekey.rotations set next_attempt_at = null")
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed", 5)
    assert value(app, "select v from t") == "not protected"
    assert value(ready, "select relations from rekey.key_usage() where version = 2") == ["app.old"]


def test_the_partitions_of_another_owner_block(ready: Connection, app: Connection, owner: str) -> None:
    app.execute("create table t (id int primary key, v text) partition by range (id)")
    app.execute("create table t_1 partition of t default")
    protect(app, "t")
    ready.execute("grant create on schema app to rekey_app; alter table app.t_1 owner to rekey_app")
    number = rotate(ready)
    step_until(ready, "blocked")
    assert "another owner" in rotation(ready, number, "blocked_by")[0]["why"]
    ready.execute(f"alter table app.t_1 owner to {owner}".encode())


def test_worker_of_a_login_role(
    ready: Connection, app: Connection, table: None, db: str, kek: bytes, owner: str
) -> None:
    """The owner himself may work: he is an administrator of keys, and no more than that."""
    number = rotate(ready)
    with connect(db, user=owner) as connection:
        unlock(connection, kek)
        run(connection)
    assert rotation(ready, number, "state") == "completed"


@pytest.mark.parametrize("quoted", ["off", "on"])
def test_a_trigger_is_not_taken_for_the_worker(
    ready: Connection, app: Connection, table: None, session: Callable[[], Connection], quoted: str
) -> None:
    """It runs in the session of somebody who reaches every tenant: no function of ours may believe that.

    The call stack tells; where quote_all_identifiers is on, it has quotes around names.
    """
    tenant = "11111111-1111-1111-1111-111111111111"
    ready.execute("select rekey.set_secret('theirs', 'not yours', %s)", [tenant])
    app.execute("create table stolen (what text)")
    app.execute(
        f"""
        create function f() returns trigger language plpgsql as $$
        begin
          begin
            insert into app.stolen select rekey.get_secret('theirs', '{tenant}');
          exception when insufficient_privilege then
            insert into app.stolen values (sqlstate);
          end;
          begin
            perform rekey.set_setting('max_attempts', '999');
            insert into app.stolen values ('set');
          exception when insufficient_privilege then
            insert into app.stolen values (sqlstate);
          end;
          return new;
        end $$;
        create trigger f before update on t for each row execute function f()""".encode()
    )
    number = rotate(ready)
    worker = session()
    worker.execute(f"set quote_all_identifiers = {quoted}".encode())
    run(worker)
    assert rotation(ready, number, "state") == "completed"
    assert app.execute("select distinct what from stolen").fetchall() == [("42501",)]
    assert value(ready, "select max_attempts from rekey.settings") != 999


@pytest.mark.parametrize("recorded", ["app", "app, pg_catalog"])
@pytest.mark.parametrize("deferred", ["", "constraint"])
def test_a_search_path_that_a_trigger_sets_reaches_nobody(
    ready: Connection, app: Connection, table: None, deferred: str, recorded: str
) -> None:
    """It would be in force in the functions that called it, too: their operators would be the owner's."""
    app.execute("""
        create table ran_as (who text);
        create function cardinality(anyarray) returns integer language plpgsql as
          $$ begin insert into app.ran_as values (current_user); return pg_catalog.cardinality($1); end $$;
        create function ne(text, text) returns boolean language plpgsql as
          $$ begin insert into app.ran_as values (current_user); return false; end $$;
        create operator <> (function = ne, leftarg = text, rightarg = text);
        grant insert on ran_as to public; grant usage on schema app to public;
        create function f() returns trigger language plpgsql as
          $$ begin perform set_config('search_path', 'app, pg_catalog', false); return null; end $$""")
    when = "deferrable initially deferred" if deferred else ""
    app.execute(
        f"create {deferred} trigger f after update on t {when} for each row execute function f()".encode()
    )
    protect(app, "t", search_path=recorded)
    number = rotate(ready)
    path = value(ready, "select current_setting('search_path')")
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed_with_failures", 0)
    left = "select count(*) from rekey.failure_status where reason ~ 'left a setting behind'"
    assert value(ready, left) == 5
    assert value(ready, "select current_setting('search_path')") == path
    assert value(ready, "select count(*) from app.ran_as") == 0


@pytest.mark.parametrize("setting", ["work_mem = '1MB'", "session_replication_role = replica"])
def test_a_setting_that_a_trigger_leaves_behind(
    ready: Connection, app: Connection, owner: str, table: None, setting: str
) -> None:
    ready.execute(f"grant set on parameter session_replication_role to {owner}".encode())
    set_trigger(app, f"set {setting}")
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed_with_failures", 0)
    left = "select count(*) from rekey.failure_status where reason ~ 'left a setting behind'"
    assert value(ready, left) == 5
    assert value(ready, "select current_setting('session_replication_role')") == "origin"


# The planner calls it as the owner, whenever it plans: where rows are counted, too.
LEAVES: LiteralString = """
    create function leave(int) returns int language plpgsql immutable as
      $$ begin perform pg_catalog.set_config('{}', '{}', false); return 1; end $$;
    create statistics leaving on (leave(1) + id) from {}"""


def test_what_one_owner_leaves_behind_is_gone_before_anothers_code_runs(
    db: str, ready: Connection, app: Connection, owner: str, table: None, session: Callable[[], Connection]
) -> None:
    """Whoever counts calls many tables in a row."""
    ready.execute("select rekey.create_keyring('other'); set client_min_messages = error")
    ready.execute(
        b"""
        create schema other; create table other.t (id int primary key, v text);
        create function other.look(int) returns int language plpgsql immutable as
          $$ begin raise warning 'work_mem is %', current_setting('work_mem'); return 1; end $$;
        grant usage on schema app, other to public"""
    )
    protect(ready, "other.t", keyring="other", context_columns=["id"])
    ready.execute("""
        insert into other.t values (1, rekey.encrypt_text('1', 'other', array['other.t.v', '1']));
        create statistics other.looking on (other.look(1) + id) from other.t;
        select rekey.rotate_keys()""")
    number = value(ready, "select id from rekey.rotation_status where keyring = 'default'")
    other = value(ready, "select id from rekey.rotation_status where keyring = 'other'")
    app.execute(LEAVES.format("work_mem", "1MB", "t").encode())
    worker = session()
    mine = value(worker, "select current_setting('work_mem')")
    said: list[str | None] = []
    worker.add_notice_handler(lambda diagnostic: said.append(diagnostic.message_primary))
    run(worker, "2 s")
    assert rotation(ready, other, "state", "rows_done") == ("completed", 1)
    assert rotation(ready, number, "state") != "completed"
    assert set(said) == {f"work_mem is {mine}"}
    assert value(worker, "select current_setting('work_mem')") == mine


def test_a_setting_that_a_count_leaves_behind_holds_up_its_own_table(
    ready: Connection, app: Connection, table: None, session: Callable[[], Connection]
) -> None:
    """Tables of one owner are counted together, and each by itself where one leaves something behind."""
    ready.execute("select rekey.create_keyring('other')")
    app.execute("create table u (id int primary key, v text)")
    protect(app, "u", keyring="other")
    app.execute("insert into u values (1, rekey.encrypt_text('1', 'other', array['app.u.v', '1']))")
    number, other = rotate(ready), rotate(ready, "other")
    app.execute(LEAVES.format("work_mem", "1MB", "t").encode())
    run(session(), "2 s")
    assert rotation(ready, other, "state", "rows_done") == ("completed", 1)
    assert rotation(ready, number, "state") != "completed"
    with refused("RK005"):
        session().execute("select rekey.key_usage()")
    app.execute("drop statistics leaving")
    ready.execute("update rekey.rotations set next_attempt_at = null")
    run(session())
    assert rotation(ready, number, "state", "rows_done") == ("completed", 5)


def test_a_search_path_that_a_count_leaves_behind_reaches_nobody(
    ready: Connection, app: Connection, table: None, session: Callable[[], Connection]
) -> None:
    """Between one table and the next of an owner, only what is in pg_catalog is called."""
    app.execute("""
        create table u (id int primary key, v text);
        grant usage on schema app to public;
        create function plus(int, int) returns int language plpgsql immutable as
          $$ begin raise warning 'as %', current_user; return $1 operator(pg_catalog.+) $2; end $$;
        create operator + (function = plus, leftarg = int, rightarg = int);
        create function more(bigint, int) returns bool language plpgsql immutable as
          $$ begin raise warning 'as %', current_user; return true; end $$;
        create operator > (function = more, leftarg = bigint, rightarg = int);
        create function pg_relation_size(regclass) returns bigint language plpgsql immutable as
          $$ begin raise warning 'as %', current_user; return 8192; end $$""")
    protect(app, "u")
    app.execute("insert into u values (1, rekey.encrypt_text('1', context => array['app.u.v', '1']))")
    app.execute(LEAVES.format("search_path", "app, pg_catalog", "t").encode())
    app.execute("create statistics leaving_too on (leave(1) + id) from u")
    counter = session()
    said: list[str | None] = []
    counter.add_notice_handler(lambda diagnostic: said.append(diagnostic.message_primary))
    with refused("RK005", "left a setting behind"):
        counter.execute("select rekey.key_usage()")
    number = rotate(ready)
    assert step(counter)[0] == "planned"
    assert rotation(ready, number, "rows_total") == 0  # neither can be counted
    assert said == []


CAST: LiteralString = """
    create type k as (i int);
    create function spell(k) returns text language plpgsql as $$
    begin
      insert into app.loot select current_user, count(*)::text from rekey.encryption_keys;
      return 'x';
    end $$;
    create cast (k as text) with function spell(k)"""


@pytest.fixture
def loot(ready: Connection, app: Connection, table: None) -> None:
    """A place where everybody may leave what was got; evil() notes who runs it."""
    app.execute("""
        create table loot (who text, what text);
        create function evil() returns int language plpgsql as $$
        begin insert into app.loot values (current_user, 'evil'); return 1; end $$;
        grant usage on schema app to public;
        grant all on loot to public""")


@pytest.mark.parametrize("way", ["another table", "another column of that name"])
def test_the_write_trigger_casts_nothing_of_the_owners(
    ready: Connection, app: Connection, loot: None, way: str
) -> None:
    """It runs as rekey_owner, who can read the keys."""
    app.execute(CAST)
    app.execute("create table w (id int primary key, v text)")
    protect(app, "w", encrypt_on_write=True)
    if way == "another table":
        app.execute("drop table loot cascade; create table loot (who text, what text)")
        app.execute("create table x (id k, v text)")
        trigger = value(
            app, "select tgfoid::regproc::text from pg_trigger where tgname ~ '^zz_pg_rekey_[0-9]+$'"
        )
        app.execute(f"create trigger x before insert on x for each row execute function {trigger}()".encode())
        name = "x"
    else:
        app.execute(
            "alter table w rename id to old; alter table w alter old set default 1; alter table w add id k"
        )
        name = "w"
    with refused("RK005"):
        app.execute(f"insert into {name} (id, v) values (row(1)::k, 'x')".encode())
    assert value(ready, "select count(*) from app.loot") == 0


def test_the_write_trigger_believes_no_guard_of_the_owners(
    ready: Connection, app: Connection, loot: None
) -> None:
    """While he registers a column he may make functions: a guard too, over a table with types of his own."""
    app.execute(CAST)
    app.execute("create table w (id int primary key, v text); create table x (id k, v text)")
    with app.transaction():
        registered = "select id from rekey._register_column('app.w', 'v', 'default', null, true, true, 'app')"
        number = value(app, registered)
        app.execute(
            f"""
            create function rekey_targets.column_{number}_guard() returns setof record language sql stable
              begin atomic select t.v, t.id from only app.x t; end;
            create trigger x before insert on x
              for each row execute function rekey_targets.column_{number}_trigger()""".encode()
        )
    with refused("RK005"):
        app.execute("insert into x values (row(1)::k, 'plain')")
    assert value(ready, "select count(*) from app.loot") == 0


@pytest.mark.parametrize("call", ["select rekey.key_usage()", "select rekey.verify_ciphertexts()"])
def test_what_inherits_from_a_protected_table_blocks_it(
    ready: Connection, app: Connection, table: None, call: str
) -> None:
    app.execute("create table child () inherits (t)")
    with refused("RK005"):
        ready.execute(call.encode())
    app.execute("alter table child no inherit t")
    ready.execute(call.encode())


def test_a_column_without_its_guard_is_not_forgotten(ready: Connection, app: Connection, table: None) -> None:
    app.execute("drop function rekey_targets.column_1_guard()")
    with refused("RK005"):
        ready.execute("select rekey.key_usage()")
    with refused("RK006"):
        ready.execute("select rekey.unprotect_column('app.t.v')")
    protect(app, "t")
    assert value(ready, "select sum(rows) from rekey.key_usage()") == 5


def test_quoted_names_are_the_same_names(ready: Connection, app: Connection) -> None:
    """A column whose table is there is not forgotten, and has one label, whatever the setting."""
    app.execute("set quote_all_identifiers = on")
    app.execute(TABLE)
    assert protect(app, "t") == "app.t.v"
    app.execute(FILL)
    run(ready)
    app.execute("drop function rekey_targets.column_1_guard()")
    with refused("RK006"):
        app.execute("select rekey.unprotect_column('app.t.v')")


def set_trigger(app: Connection, body: str, when: str = "before") -> None:
    app.execute(
        f"create function tr() returns trigger language plpgsql as $t$ begin {body}; return new; end $t$;"
        f" create trigger tr {when} update on t for each row execute function tr()".encode()
    )


def failing_rotation(ready: Connection) -> int:
    """Begin a rotation that may fail once, and step until it did or nothing is left to do."""
    ready.execute("select rekey.set_setting('max_attempts', '1')")
    number = rotate(ready)
    for _ in range(30):
        if step(ready)[0] in ("error", "idle", "completed"):
            break
    return number


def test_a_trigger_that_puts_the_old_value_back_is_found_out(
    ready: Connection, app: Connection, table: None
) -> None:
    set_trigger(app, "new.v := old.v")
    number = failing_rotation(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed_with_failures", 0)
    assert "not changed" in value(ready, "select min(reason) from rekey.failure_status")


@pytest.mark.parametrize("setting", ["standard_conforming_strings = off", "quote_all_identifiers = on"])
def test_no_setting_hides_rows(
    ready: Connection, app: Connection, table: None, session: Callable[[], Connection], setting: str
) -> None:
    """Without standard strings, the statements of the column's functions would look for another header."""
    worker = session()
    worker.execute(f"set {setting}".encode())
    number = rotate(ready)
    if setting.startswith("quote"):
        assert value(worker, "select sum(rows) from rekey.key_usage()") == 5
        run(worker)
    else:
        for call in ("key_usage", "verify_ciphertexts", "rotation_step"):
            with refused("RK005"):
                worker.execute(f"select rekey.{call}()".encode())
        run(ready)
    assert rotation(ready, number, "state", "rows_done", "rows_failed") == ("completed", 5, 0)


@pytest.mark.parametrize("code", ["RK001", "RK002", "P0004", "57014", "40P01"])
def test_no_error_code_stops_the_engine_without_a_trace(
    ready: Connection, app: Connection, table: None, code: str
) -> None:
    """Not a missing KEK either, which would stop every rotation and count as no attempt."""
    set_trigger(app, f"raise exception 'stop' using errcode = '{code}'")
    number = failing_rotation(ready)
    state, last_error = rotation(ready, number, "state", "last_error")
    if state == "failed":  # tried again, and again
        assert last_error == "app.t: stop (trigger tr), in app.tr()"
    else:
        assert state == "completed_with_failures"
        found = ready.execute("select distinct sqlstate, reason from rekey.failure_status").fetchall()
        assert [sqlstate for sqlstate, _ in found] == [code]
        assert "stop" in found[0][1]


@pytest.mark.usefixtures("icu")
def test_a_nondeterministic_collation_hides_nothing(ready: Connection, app: Connection) -> None:
    app.execute("create collation ci (provider = icu, locale = 'und-u-ks-level2', deterministic = false)")
    app.execute("create table t (id int primary key, v text collate ci)")
    protect(app, "t")
    app.execute(FILL)
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed", 5)


@pytest.mark.parametrize("name", ["%s", "$1", 'a"b', "'", "x" * 63, "%1$I", "\\"])
def test_odd_names_of_column_and_context(ready: Connection, app: Connection, name: str) -> None:
    """With encryption on write, whose trigger has the names in its body."""
    column, key = (sql.Identifier(part) for part in (name, "k" + name[:62]))
    app.execute(sql.SQL("create table odd ({} int primary key, {} text)").format(key, column))
    label = protect(app, "odd", name, encrypt_on_write=True)
    app.execute(sql.SQL("insert into odd values (7, 'plain')").format())
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed", 1)
    opened = sql.SQL("select rekey.decrypt_text({}, array[{}, '7']) from odd").format(
        column, sql.Literal(label)
    )
    assert app.execute(opened).fetchone() == ("plain",)


def test_a_row_is_named_without_its_owners_code(ready: Connection, app: Connection, loot: None) -> None:
    app.execute(CAST)
    app.execute("create table u (id int, kk k, v text, primary key (id, kk))")
    protect(app, "u", context_columns=["id"])
    app.execute("""
        insert into u select g, row(g)::k, rekey.encrypt_text('v', context => array['app.u.v', g::text])
        from generate_series(1, 3) g""")
    app.execute("insert into u values (9, row(9)::k, rekey.encrypt_text('v', context => '{elsewhere}'))")
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed_with_failures", 8)
    assert value(ready, "select row_key from rekey.rotation_failures") == "9/(9)"
    assert value(ready, "select count(*) from app.loot") == 0


def test_a_label_opens_nothing_for_who_may_not_read_its_column(
    ready: Connection, app: Connection, table: None, session: Callable[[], Connection]
) -> None:
    stolen = value(ready, "select v from app.t where id = 1")
    stranger = session()
    stranger.execute("set role rekey_app")
    for call in (
        f"select rekey.decrypt_text('{stolen}'::text, array['app.t.v', '1'])",
        "select rekey.encrypt_text('forged', context => array['app.t.v', '1'])",
    ):
        with refused("42501"):
            stranger.execute(call.encode())


@pytest.mark.parametrize("role", ["postgres", "the owner"])
def test_no_code_of_the_owner_runs_in_a_session_of_a_superuser_who_decrypts(
    ready: Connection, app: Connection, owner: str, loot: None, role: str
) -> None:
    set_trigger(app, "reset role; insert into app.loot values (current_user, 'trigger')")
    if role == "the owner":
        ready.execute(f"set role {owner}".encode())  # the trigger would reset it
    with refused("42501"):
        ready.execute("select rekey.unprotect_column('app.t', 'v', decrypt => true)")
    ready.execute("reset role")
    assert value(ready, "select count(*) from app.loot") == 0
    assert value(app, "select rekey.unprotect_column('t', 'v', decrypt => true)") == 5
    assert app.execute("select distinct who from loot").fetchall() == [(owner,)]

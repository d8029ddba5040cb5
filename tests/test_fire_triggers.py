"""Rotations that the triggers of a table do not see: `protect_column(..., fire_triggers => false)`."""

import re
from typing import LiteralString

import pytest

from cli_fixtures import Cli
from column_fixtures import protect
from driving import refused, rotate, rotation, run, step_until
from helpers import Connection, value

pytest_plugins = ["cli_fixtures", "column_fixtures"]

GRANT = "grant set on parameter session_replication_role to {}"
ROLE: LiteralString = "select current_setting('session_replication_role')"
# What people have: updated_at, audit, a hash and the last characters, an outbox, a foreign key, a rule.
TABLE: LiteralString = """
    create table customer (id int primary key);
    insert into customer values (1);
    create table trail (entry text);
    create function note() returns trigger language plpgsql as
      $$ begin insert into app.trail values (tg_name || ' ' || current_setting('session_replication_role'));
         return null; end $$;
    create function derive() returns trigger language plpgsql as
      $$ begin new.hash := md5(new.v); new.last4 := right(new.v, 4); new.updated_at := clock_timestamp();
         return new; end $$;
    create table t (id int primary key, v text, hash text, last4 text, updated_at timestamptz,
      customer int default 1 references customer, constraint v_is_set check (v <> ''));
    create trigger a_derive before insert or update on t for each row execute function derive();
    create trigger b_audit after update on t for each row when (old.* is distinct from new.*)
      execute function note();
    create trigger c_outbox after update of v on t for each row execute function note();
    create trigger d_statement after update on t for each statement execute function note();
    create constraint trigger e_deferred after update on t deferrable initially deferred
      for each row execute function note();
    create rule f_rule as on update to t do also insert into app.trail values ('rule');
"""
FILL: LiteralString = "insert into t (id, v) select g, 'secret ' || g from generate_series(1, 30) g"


@pytest.fixture
def granted(ready: Connection, owner: str) -> str:
    ready.execute(GRANT.format(owner).encode())
    return owner


def opened(app: Connection) -> list[str]:
    query: LiteralString = """
        select rekey.decrypt_text(v, array['app.t.v', id::text]) from app.t
        where v like 'rk1:%%' order by id"""
    return [row[0] for row in app.execute(query).fetchall()]


@pytest.mark.parametrize("encrypt_on_write", [False, True])
def test_triggers_do_not_see_an_adoption_and_a_rotation(
    ready: Connection, app: Connection, granted: str, encrypt_on_write: bool
) -> None:
    app.execute(TABLE)
    app.execute(FILL)
    others: LiteralString = "select id, hash, last4, updated_at, customer from app.t order by id"
    before = app.execute(others).fetchall()
    # Our own trigger is the last one, and not before those that derive.
    protect(app, "t", fire_triggers=False, encrypt_on_write=encrypt_on_write)
    number = value(ready, "select id from rekey.adopt_column('app.t', 'v')")
    run(ready)
    assert rotation(ready, number, "state", "rows_done", "rows_failed") == ("completed", 30, 0)
    assert opened(app) == [f"secret {n}" for n in range(1, 31)]
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state", "rows_done", "rows_failed") == ("completed", 30, 0)
    assert opened(app) == [f"secret {n}" for n in range(1, 31)]
    assert app.execute(others).fetchall() == before
    assert value(app, "select count(*) from trail") == 0
    # The session is as it was, and whoever else writes fires them.
    assert value(ready, ROLE) == "origin"
    app.execute("update t set v = 'another' where id = 1")
    fired: LiteralString = "select distinct entry from trail order by 1"
    assert [row[0] for row in app.execute(fired).fetchall()] == [
        "b_audit origin", "c_outbox origin", "d_statement origin", "e_deferred origin", "rule",
    ]  # fmt: skip


def test_our_own_triggers_stay_on(ready: Connection, app: Connection, granted: str) -> None:
    app.execute("create table t (id int primary key, v text)")
    protect(app, "t", fire_triggers=False, encrypt_on_write=True)
    app.execute(FILL)
    calls: LiteralString = """
        select coalesce(sum(calls), 0) from pg_stat_user_functions
        where schemaname = 'rekey_targets' and funcname ~ '_trigger$'"""
    ready.execute("select pg_stat_force_next_flush()")
    app.execute("select pg_stat_force_next_flush()")
    before = value(ready, calls)
    rotate(ready)
    run(ready)
    ready.execute("select pg_stat_force_next_flush()")
    assert value(ready, calls) - before == 30


def test_without_the_right_the_column_is_blocked(
    ready: Connection, app: Connection, owner: str, cli_ready: Cli
) -> None:
    """Whoever works, a superuser too: what counts is who owns the table."""
    app.execute("create table t (id int primary key, v text)")
    with refused("RK005", match="GRANT SET ON PARAMETER session_replication_role TO"):
        protect(app, "t", fire_triggers=False)
    assert value(ready, "select count(*) from rekey.column_status") == 0
    ready.execute(GRANT.format(owner).encode())
    protect(app, "t", fire_triggers=False, encrypt_on_write=True)
    app.execute(FILL)
    ready.execute(f"revoke set on parameter session_replication_role from {owner}".encode())
    number = rotate(ready)
    step_until(ready, "blocked")
    assert rotation(ready, number, "rows_done") == 0
    [blocker] = rotation(ready, number, "blocked_by")
    assert blocker["why"] == value(ready, "select problem from rekey.column_status")
    cli_ready("doctor", code=5)
    assert "session_replication_role" in cli_ready.out
    found = re.search(r"GRANT SET ON PARAMETER \w+ TO \w+", blocker["why"])
    assert found
    ready.execute(found[0].encode())
    ready.execute("update rekey.rotations set next_attempt_at = null")
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed", 30)


FUNCTIONS: LiteralString = """
    create function f(text) returns text language plpgsql immutable as
      $$ begin perform app.ran(); return $1; end $$;
    create function ran() returns boolean language plpgsql immutable as $$ begin return true; end $$;
    create function tr() returns trigger language plpgsql as 'begin return new; end';
    create operator === (function = texteq, leftarg = text, rightarg = text);
    create function same(text, text) returns boolean language sql immutable return $1 = $2;
    create operator ==== (function = same, leftarg = text, rightarg = text);
    create domain short as text check (app.f(value) <> 'x');
    create type mood as enum ('sad', 'ok');
    create table t (id int, v text, n text, m mood default 'ok', primary key (id));
"""
REFUSED: dict[str, tuple[LiteralString, str]] = {
    "always": (
        "create trigger x before update on t for each row execute function tr();"
        " alter table t enable always trigger x",
        "trigger x of app.t",
    ),
    "replica": (
        "create trigger x after update of v on t for each statement execute function tr();"
        " alter table t enable replica trigger x",
        "trigger x of app.t",
    ),
    "named as ours": (
        "create trigger zz_pg_rekey_99 before update on t for each row execute function tr();"
        " alter table t enable always trigger zz_pg_rekey_99",
        "trigger zz_pg_rekey_99 of app.t",
    ),
    "rule": (
        "create rule x as on update to t do also notify n; alter table t enable always rule x",
        "rule x of app.t",
    ),
    "check": ("alter table t add constraint x check (f(n) <> 'x')", "app.f(text)"),
    "check without column": ("alter table t add constraint x check (ran())", "app.ran()"),
    "operator": ("alter table t add constraint x check (n operator(app.====) n)", "app.===="),
    "domain": ("alter table t add constraint x check (n::short <> 'x')", "type app.short"),
    "index": ("create index x on t (f(n))", "app.f(text)"),
    "predicate": ("create index x on t (n) where ran()", "app.ran()"),
    "exclusion": ("alter table t add constraint x exclude using btree (f(n) with =)", "app.f(text)"),
    "generated": ("alter table t add g text generated always as (f(v)) stored", "app.f(text)"),
    "statistics": ("create statistics x on f(n), id from t", "app.f(text)"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_would_run_with_all_triggers_off(
    ready: Connection, app: Connection, granted: str, case: str
) -> None:
    """At `protect`, and where it comes later: it is looked at before each call."""
    statement, named = REFUSED[case]
    app.execute(FUNCTIONS)
    protect(app, "t", fire_triggers=False, encrypt_on_write=True)
    app.execute("insert into t (id, v) values (1, 'x')")
    number = rotate(ready)
    step_until(ready, "planned")
    app.execute(statement)
    step_until(ready, "blocked")
    assert rotation(ready, number, "rows_done") == 0
    assert named in value(ready, "select problem from rekey.column_status")
    with refused("RK005", match=re.escape(named)):
        protect(app, "t", fire_triggers=False, encrypt_on_write=True)
    protect(app, "t", encrypt_on_write=True)  # where triggers fire, it is nothing unusual
    assert value(ready, "select problem from rekey.column_status") is None


def test_a_condition_of_ours_that_was_exchanged(ready: Connection, app: Connection, granted: str) -> None:
    """It would be evaluated, too."""
    app.execute(FUNCTIONS)
    protect(app, "t", fire_triggers=False)
    name = value(app, "select tgname from pg_trigger where tgname ~ '^zz_pg_rekey_.*_update$'")
    app.execute(
        f"""
        create or replace trigger {name} before update on t for each row when (app.ran())
          execute function rekey._refuse_doomed();
        alter table t enable always trigger {name}""".encode()
    )
    assert "app.ran()" in value(ready, "select problem from rekey.column_status")


def test_a_partition_key_with_a_function(ready: Connection, app: Connection, granted: str) -> None:
    app.execute(FUNCTIONS)
    app.execute("""
        create table p (id int, v text, n text) partition by range (f(n));
        create table p1 partition of p default;
        create table q (id int, v text, n text) partition by range (n);
        create table q1 partition of q default;
        create trigger x after update on q for each row execute function tr();
        alter table q1 enable always trigger x""")
    for table, named in (("p", "app.f"), ("q", "trigger x of app.q1")):
        with refused("RK005", match=named):
            protect(app, table, context_columns="{id}", fire_triggers=False)


def test_what_is_not_in_the_way(ready: Connection, app: Connection, granted: str) -> None:
    """PostgreSQL's own functions, enumerations, and triggers that no sweep fires."""
    app.execute(FUNCTIONS)
    app.execute("""
        alter table t add constraint c check (length(n) > 0 and m <> 'sad'::mood and n operator(app.===) n);
        create index i on t (lower(n)) where m = 'ok';
        alter table t add l int generated always as (length(n)) stored;
        create trigger other before update of n on t for each row execute function tr();
        alter table t enable always trigger other;
        create trigger fresh before insert on t for each row execute function tr();
        alter table t enable always trigger fresh;
        create trigger off before update on t for each row execute function tr();
        alter table t disable trigger off;
        create trigger usual before update on t for each row execute function tr()""")
    protect(app, "t", fire_triggers=False)
    assert value(ready, "select problem from rekey.column_status") is None
    # None of them is said to fire.
    told: LiteralString = "select count(*) from rekey.protection_findings() where kind = 'trigger'"
    assert value(ready, told) == 0


def test_no_code_of_anybody_runs_with_triggers_off(ready: Connection, app: Connection, granted: str) -> None:
    """What was deferred before fires when the switch is back; sweeps of other tables do not have it."""
    app.execute(TABLE)
    protect(app, "t", fire_triggers=False)
    app.execute("""
        insert into t (id, v) select 1, rekey.encrypt_text('x', context => array['app.t.v', '1']);
        create table seen (id int primary key, v text);
        create constraint trigger later after insert or update on seen deferrable initially deferred
          for each row execute function note();
        create trigger now after update on seen for each row execute function note()""")
    protect(app, "seen")
    app.execute("insert into seen select 1, rekey.encrypt_text('x', context => array['app.seen.v', '1'])")
    app.execute("truncate trail")
    rotate(ready)
    step_until(ready, "planned")
    with ready.transaction():
        ready.execute("insert into app.seen values (2, null)")
        seen = [value(ready, "select event from rekey.rotation_step()") for _ in range(2)]
        assert seen == ["batch", "batch"]
    run(ready)
    assert value(ready, "select count(*) from rekey.key_usage() where version = 2 and rows = 2") == 1
    assert app.execute("select entry, count(*) from trail group by 1 order by 1").fetchall() == [
        ("later origin", 2), ("now origin", 1),
    ]  # fmt: skip
    assert value(ready, ROLE) == "origin"


def test_nobody_gains_the_right(ready: Connection, app: Connection, owner: str) -> None:
    """The functions of a column have the rights of the table's owner, and so has what they set."""
    app.execute("create table t (id int primary key, v text)")
    protect(app, "t")
    app.execute("insert into t values (1, 'x')")
    number = value(ready, "select id from rekey.protected_columns")
    ready.execute("update rekey.protected_columns set fire_triggers = false")
    body: LiteralString = """
        select body from rekey.protected_columns c, rekey._column_bodies(c) b where b.name ~ '_write$'"""
    statement = (
        f"create or replace function rekey_targets.column_{number}_write"
        f"(relation regclass, rows tid[], starts bytea[], ciphertexts bytea[], indexes bytea[],"
        f" out locked tid[], out written bigint)"
        f" language plpgsql security definer set search_path = pg_catalog, pg_temp"
        f" as $body${value(ready, body)}$body$"
    )
    ready.execute(statement.encode())
    ready.execute(f"grant execute on function rekey_targets.column_{number}_write to {owner}".encode())
    write = f"select rekey_targets.column_{number}_write('app.t', array[tid '(0,1)'], null, '{{x}}', null)"
    with refused("42501"):
        app.execute(write.encode())
    # For whoever may call it as a superuser, too.
    with refused("42501"):
        ready.execute(write.encode())


def test_it_is_kept(ready: Connection, app: Connection, granted: str) -> None:
    """Through a rebuild of the table; protect without it says so."""
    app.execute("create table t (id int primary key, v text)")
    protect(app, "t", fire_triggers=False)
    app.execute("""
        create table u (like t including all); alter table t rename to gone; alter table u rename to t;
        select rekey.rebind_column('t', 'v')""")
    status: LiteralString = "select fire_triggers, problem from rekey.column_status"
    assert ready.execute(status).fetchall() == [(False, None)]
    said: list[str] = []
    app.add_notice_handler(lambda notice: said.append(notice.message_primary or ""))
    protect(app, "t")
    assert said == ["from now on, rotations fire the triggers of app.t"]
    assert value(ready, "select fire_triggers from rekey.column_status") is True


def test_on_the_command_line(ready: Connection, app: Connection, granted: str, cli_ready: Cli) -> None:
    app.execute("create table t (id int primary key, v text)")
    path = 'app, "A b"'
    cli_ready("columns", "protect", "app.t", "v", "--no-fire-triggers", "--search-path", path)
    [row] = cli_ready.json("columns", "list")
    assert (row["fire_triggers"], row["search_path"]) == (False, path)
    cli_ready("columns", "protect", "app.t", "v")
    assert "rotations fire the triggers of app.t" in cli_ready.err
    assert value(ready, "select fire_triggers from rekey.column_status") is True
    login_path = value(ready, "select current_setting('search_path')")
    assert value(ready, "select search_path from rekey.column_status") == login_path

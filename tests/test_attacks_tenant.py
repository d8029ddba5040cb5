"""A tenant with a login of his own and plain SQL, who is after other tenants, DEKs and the KEK."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import LiteralString

import pytest
from psycopg import errors, sql

from driving import refused
from helpers import Connection, connect, create_database, initialize, install, unlock, value
from pg_rekey import local, release

OTHER = "11111111-1111-1111-1111-111111111111"


@pytest.fixture
def tenant(ready: Connection, db: str, kek: bytes) -> Iterator[Connection]:
    """An unlocked session of a member of rekey_app with a schema; he has a secret, another tenant has one."""
    name = f"tenant_{os.getpid()}"
    ready.execute(
        "select rekey.set_secret('mine', 'value'), rekey.set_secret('theirs', 'other', %s)", [OTHER]
    )
    ready.execute(
        f"create role {name} login in role rekey_app; create schema evil authorization {name}".encode()
    )
    ready.execute("grant usage on schema evil to public")
    with connect(db, user=name) as connection:
        unlock(connection, kek)
        yield connection
    with connect(db) as connection:
        connection.execute(f"drop owned by {name} cascade; drop role {name}".encode())


# Takes what it can, and notes as whom; an index may use it by way of a function that says it is immutable.
TAKE: LiteralString = """
    create table loot (who name default current_user, session name default session_user, got text);
    create table bait (i int);
    insert into bait select generate_series(1, 100);
    create function take() returns int language plpgsql volatile as $$
    begin
      begin
        insert into evil.loot (got)
        values (rekey.get_secret('theirs', '11111111-1111-1111-1111-111111111111'));
      exception when others then
        insert into evil.loot (got) values (sqlstate);
      end;
      return 1;
    end $$;
    create function immutable_take(i int) returns int language plpgsql immutable as
      $$ begin perform evil.take(); return i; end $$;"""
MAINTENANCE: dict[LiteralString, LiteralString] = {
    "analyze bait": "create index on bait (immutable_take(i))",
    "reindex table bait": "create index on bait (immutable_take(i))",
    "vacuum full bait": "create index on bait (immutable_take(i))",
    "vacuum bait": """
        create index on bait using brin (immutable_take(i)) with (pages_per_range = 1);
        insert into bait select generate_series(1, 1000)""",
    "refresh materialized view v": "create materialized view v as select evil.take()",
}


@pytest.mark.parametrize("command", MAINTENANCE)
def test_maintenance_lends_nobody_its_session(
    tenant: Connection, ready: Connection, command: LiteralString
) -> None:
    """PostgreSQL runs such functions as the owner of the table, in the session of whoever maintains it."""
    tenant.execute("set search_path = evil")
    tenant.execute(TAKE)
    tenant.execute(MAINTENANCE[command])
    tenant.execute("truncate loot")
    assert value(ready, "select rekey.get_secret('theirs', %s)", OTHER) == "other"
    ready.execute("set search_path = evil")
    ready.execute(command)
    assert tenant.execute("select distinct who::text, session::text, got from loot").fetchall() == [
        (tenant.info.user, ready.info.user, "42501")
    ]
    ready.execute("select rekey.set_setting('max_attempts', '5')")  # and nothing of it stays
    assert value(ready, "select rekey.get_secret('theirs', %s)", OTHER) == "other"


def test_statistics_hold_no_secret_of_another(tenant: Connection, ready: Connection) -> None:
    """An expression of extended statistics may be any function; the owner may read its values."""
    tenant.execute("create table evil.bait (i int); insert into evil.bait select generate_series(1, 100)")
    tenant.execute("""
        create statistics evil.s on (rekey.get_secret('theirs', ('1111111' || (1 + 0 * i)
          || '-1111-1111-1111-111111111111')::uuid)) from evil.bait""")
    with refused("42501"):
        ready.execute("analyze evil.bait")
    query: LiteralString = "select count(*) from pg_stats_ext_exprs where most_common_vals::text ~ 'other'"
    assert value(tenant, query) == 0


def test_autovacuum_lends_nobody_its_session(tmp_path: Path, kek: bytes) -> None:
    """It has no KEK, but where the file or the Vault has, and counts as a superuser."""
    settings = {"autovacuum_naptime": "1s", "autovacuum": "on", "autovacuum_analyze_threshold": "1"}
    with local.Server(settings=settings) as server:
        dsn = create_database(server.dsn(), "rekey_autovacuum")
        install(dsn, release.assemble("plain"))
        with connect(dsn) as ready:
            initialize(ready, kek)
            ready.execute("select rekey.set_secret('theirs', 'other', %s)", [OTHER])
            path = Path(value(ready, "show data_directory")) / "pg_rekey.kek"
            path.write_text(kek.hex())
            path.chmod(0o644)
            ready.execute("select rekey.set_setting('kek_provider', 'file')")
            ready.execute(
                "create role tenant login in role rekey_app; create schema evil authorization tenant"
            )
            with connect(dsn, user="tenant") as tenant:
                tenant.execute("set search_path = evil")
                with refused("42501"):  # the KEK is there, and he is not to have this
                    tenant.execute("select rekey.get_secret('theirs', %s)", [OTHER])
                tenant.execute(TAKE)
                tenant.execute("create index on bait (immutable_take(i)); truncate loot")
                tenant.execute("insert into bait select generate_series(1, 10000)")
                tenant.execute("truncate loot")
                until = time.monotonic() + 60
                looted: LiteralString = (
                    "select distinct who::text, session::text, got from loot where session <> who"
                )
                while not (found := tenant.execute(looted).fetchall()):
                    assert time.monotonic() < until, "autovacuum does not come"
                    time.sleep(0.1)
                assert found == [("tenant", ready.info.user, "42501")]


NEVER: tuple[LiteralString, ...] = (
    "lock table rekey.secrets in share mode",
    "truncate rekey.secrets",
    "copy rekey.secrets from stdin",
    "select * from rekey.secrets for key share",
    "create table evil.t () inherits (rekey.secrets)",
    "create table evil.t (tenant_id uuid, id uuid, foreign key (tenant_id, id) references rekey.secrets)",
    "create trigger t before update on rekey.secrets for each row"
    " execute function suppress_redundant_updates_trigger()",
    "create rule r as on insert to rekey.secrets do instead nothing",
    "create policy p on rekey.secrets using (true)",
    "alter table rekey.secrets disable row level security",
    "create index on rekey.secrets (name)",
    "create statistics evil.s on name, id from rekey.secrets",
    "create publication p for table rekey.secrets",
    "alter view rekey.decrypted_secrets reset (security_invoker)",
    "create or replace function rekey.get_secret(name text, tenant_id uuid) returns text return 'x'",
    "alter function rekey.can_access_tenant(uuid) security invoker",
    "alter function rekey._kek() owner to current_user",
    "create function rekey_targets.secrets_count(oid, integer[]) returns int return 1",
    "create schema mine authorization rekey_owner",
    "create schema rekey_more authorization current_user",
    "reassign owned by rekey_owner to current_user",
    "drop owned by rekey_owner",
    "grant rekey_owner to current_user",
    "alter default privileges for role rekey_owner grant all on tables to public",
    "alter role current_user set role = rekey_owner; select rekey.register_kek()",
    "set role rekey_sweeper",
    "set session authorization rekey_owner",
    "set session_replication_role = replica",
    "select set_config('role', 'rekey_admin', false)",
    "create event trigger e on ddl_command_end execute function suppress_redundant_updates_trigger()",
    "create cast (bytea as text) without function",
    "create operator class evil.c default for type text using btree as function 1 bttextcmp(text, text)",
    "select pg_read_binary_file('pg_rekey.kek')",
    "select * from pg_statistic",
    "select lo_import('pg_rekey.kek')",
    "copy evil.t from program 'id'",
)


def test_what_a_tenant_may_never_do(tenant: Connection) -> None:
    tenant.execute("create table evil.t0 ()")
    denied = (errors.InsufficientPrivilege, errors.InvalidParameterValue)
    for statement in NEVER:
        print(statement)
        with tenant.transaction(force_rollback=True), pytest.raises(denied):
            tenant.execute(statement)


def test_a_function_with_a_role_of_its_own(tenant: Connection) -> None:
    """The SET clause of a function is checked as SET ROLE is."""
    with pytest.raises(errors.InsufficientPrivilege):
        tenant.execute("""
            create function evil.f() returns text language sql security definer set role = rekey_admin
              return rekey.get_secret('theirs', '11111111-1111-1111-1111-111111111111');
            select evil.f()""")


def test_a_role_that_is_called_service_role(tenant: Connection, ready: Connection, kek: bytes) -> None:
    """Who may create roles can have one of that name; his own function has the right to call ours."""
    user = sql.Identifier(tenant.info.user)
    tenant.execute("""
        create function evil.take() returns text language sql security definer
          return rekey.get_secret('theirs', '11111111-1111-1111-1111-111111111111');
        grant execute on function evil.take() to public""")
    with ready.transaction(force_rollback=True):  # roles are those of the whole server
        if not value(ready, "select to_regrole('service_role') is not null"):
            ready.execute("create role service_role nologin")
        ready.execute("alter role service_role nobypassrls")
        ready.execute(sql.SQL("grant service_role to {}").format(user))
        ready.execute(sql.SQL("set local session authorization {}").format(user))
        ready.execute("set local role service_role")
        with refused("42501"):
            ready.execute("select evil.take()")


# Code of the caller, in a type or behind a cast: it runs before our functions do, as him.
CALLERS_TYPES: dict[str, LiteralString] = {
    "domain": "select rekey.get_secret('mine'::evil.d)",
    "array of a domain": "select rekey.read_secrets('{mine}'::evil.d[]::text[])",
    "domain over an array": "select rekey.encrypt('x'::text, context => '{a}'::evil.a)",
    "cast to text": "select rekey.encrypt_text(row(1)::evil.k, context => '{a}')",
    "cast to uuid": "select rekey.get_secret('mine', row(1)::evil.k)",
    "cast to jsonb": "select rekey.can_access_tenant((row(1)::evil.k)::uuid)",
    "default": "select rekey.set_secret('mine', evil.note()::text)",
}


@pytest.mark.parametrize("way", CALLERS_TYPES)
def test_types_of_the_caller_run_as_the_caller(tenant: Connection, way: str) -> None:
    tenant.execute("""
        create table evil.ran (who name, stack text);
        create function evil.note() returns boolean language plpgsql as $$
        declare v_stack text;
        begin
          get diagnostics v_stack = pg_context;
          insert into evil.ran values (current_user, v_stack);
          return true;
        end $$;
        create domain evil.d as text check (evil.note());
        create domain evil.a as text[] check (evil.note());
        create type evil.k as (i int);
        create function evil.as_text(evil.k) returns text language plpgsql as
          $$ begin perform evil.note(); return 'mine'; end $$;
        create function evil.as_uuid(evil.k) returns uuid language plpgsql as
          $$ begin perform evil.note(); return '00000000-0000-0000-0000-000000000000'; end $$;
        create cast (evil.k as text) with function evil.as_text(evil.k) as implicit;
        create cast (evil.k as uuid) with function evil.as_uuid(evil.k) as implicit;""")
    tenant.execute(CALLERS_TYPES[way])
    who = "select distinct who::text, stack ~ 'rekey' from evil.ran"
    assert tenant.execute(who).fetchall() == [(tenant.info.user, False)]


CALLS: tuple[LiteralString, ...] = (
    "select rekey.get_secret(%s, %s)",
    "select rekey.delete_secret(%s, %s)",
    "select rekey.set_secret(%s, 'x', %s)",
    "select * from rekey.read_secrets(array[%s], %s)",
)


def test_a_refusal_does_not_depend_on_what_is_there(tenant: Connection) -> None:
    """Same words, and no look at the table: so no time to be measured either."""
    scans: LiteralString = """
        select seq_scan + idx_scan from pg_stat_xact_all_tables where relid = 'rekey.secrets'::regclass"""
    for call in CALLS:
        for name in ("theirs", "nobody's"):
            with tenant.transaction(force_rollback=True):
                before = value(tenant, scans)
                with pytest.raises(errors.InsufficientPrivilege) as raised, tenant.transaction():
                    tenant.execute(call, (name, OTHER))
                assert value(tenant, scans) == before, call
            diagnosis = raised.value.diag
            said = (diagnosis.message_primary, diagnosis.message_detail, diagnosis.message_hint)
            assert said == ("no access to this tenant", None, None), call


def test_a_name_of_another_tenant_is_free(tenant: Connection, ready: Connection) -> None:
    tenant.execute("select rekey.set_secret('theirs', 'mine now')")
    assert value(tenant, "select rekey.get_secret('theirs')") == "mine now"
    assert value(ready, "select rekey.get_secret('theirs', %s)", OTHER) == "other"


def test_statistics_of_our_tables_are_hidden(tenant: Connection, ready: Connection) -> None:
    ready.execute("analyze rekey.secrets; analyze rekey.encryption_keys; analyze rekey.keyrings")
    assert value(ready, "select count(*) from pg_stats where schemaname = 'rekey'") > 0
    assert value(tenant, "select count(*) from pg_stats where schemaname = 'rekey'") == 0


def test_a_plan_tells_how_many_rows_it_hid_and_no_more(tenant: Connection) -> None:
    """So a client that can run SQL learns whether others have a secret of a name: see docs/security.md."""
    explain = sql.SQL(
        "explain (analyze, buffers off, costs off, timing off, summary off)"
        " select from rekey.secrets where name = {}"
    )
    told: list[list[str]] = []
    for name in ("theirs", "nothing"):
        plan = [
            str(line).replace(name, "NAME") for (line,) in tenant.execute(explain.format(sql.Literal(name)))
        ]
        counts = ("Rows Removed by Filter", "Heap Blocks", "Heap Fetches")
        told.append([line.split(" (actual")[0] for line in plan if not line.strip().startswith(counts)])
    assert told[0] == told[1]
    assert "`explain analyze`" in (release.ROOT / "docs/security.md").read_text()


@pytest.mark.parametrize("ending", ["commit", "rollback"])
def test_cursors_and_prepared_statements_hold_no_other_rows(
    tenant: Connection, ending: LiteralString
) -> None:
    tenant.execute("begin")
    tenant.execute("prepare p as select name from rekey.secrets")
    tenant.execute("declare c cursor with hold for select name from rekey.secrets")
    tenant.execute("savepoint s; select set_config('rekey.unlocked', '', false); rollback to s")
    assert tenant.execute("execute p").fetchall() == [("mine",)]
    tenant.execute(ending)
    assert tenant.execute("execute p").fetchall() == [("mine",)]
    if ending == "commit":
        assert tenant.execute("fetch all from c").fetchall() == [("mine",)]


# Settings that any role may change, and that would give SQL or messages another meaning.
SETTINGS: dict[str, str | None] = {
    "standard_conforming_strings = off": "RK005",
    "quote_all_identifiers = on": None,
    "transform_null_equals = on": None,
    "array_nulls = off": None,
    "bytea_output = escape": None,
    "plpgsql.extra_errors = 'all'": None,
    "search_path = ''": None,
    "row_security = off": None,
}


def test_settings_of_the_session_open_nothing(tenant: Connection, db: str, kek: bytes) -> None:
    for setting, code in SETTINGS.items():
        with connect(db, user=tenant.info.user) as session:  # nothing is compiled yet
            session.execute(f"set {setting}".encode())
            unlock(session, kek)
            if code:
                with refused(code):
                    session.execute("select rekey.get_secret('mine')")
            else:
                assert value(session, "select rekey.get_secret('mine')") == "value", setting
            with refused(code or "42501"):
                session.execute("select rekey.get_secret('theirs', %s)", [OTHER])
            if setting == "row_security = off":
                with refused("42501"):
                    session.execute("select * from rekey.secrets")


def test_plans_that_the_session_prints_hold_no_key(tenant: Connection, ready: Connection, kek: bytes) -> None:
    """Whoever likes may have the parsed and planned statements of our functions sent to him."""
    printed: list[str] = []
    tenant.add_notice_handler(
        lambda notice: printed.append(f"{notice.message_primary} {notice.message_detail}")
    )
    for setting in (
        "debug_print_parse",
        "debug_print_rewritten",
        "debug_print_plan",
        "plpgsql.print_strict_params",
    ):
        tenant.execute(f"set {setting} = on".encode())
    tenant.execute("set client_min_messages = log")
    unlock(tenant, kek)
    tenant.execute("select rekey.set_secret('mine', 'changed')")
    tenant.execute("select rekey.get_secret('mine')")
    tenant.execute("select * from rekey.read_secrets()")
    text = "\n".join(printed)
    assert "PLANNEDSTMT" in text
    dek = value(
        ready,
        """
        select d.key from rekey.keyrings k cross join lateral rekey._deks(array[k.id], array[1]) d""",
    )
    for key in (kek, dek, dek[32:]):
        for form in (key.hex(), " ".join(str(b - 256 if b > 127 else b) for b in key[:8])):
            assert form not in text


@pytest.mark.parametrize(
    "call", ["rekey._deks('{1}', '{1}')", "rekey._reencrypt('{}', '{}', '', '{}')", "rekey.read_secrets()"]
)
def test_a_tenant_check_opens_nothing(tenant: Connection, ready: Connection, call: str) -> None:
    """It runs as rekey_sweeper: it sees the ciphertexts that a sweep reads, and no key."""
    ready.execute(
        f"""
        create function evil.check(uuid) returns boolean language plpgsql as $$
        begin
          perform from rekey_targets.secrets_scan('rekey.secrets', '(0,0)', '(9,0)', null, null, 9, 99999);
          perform from {call};
          return true;
        end $$""".encode()
    )
    ready.execute("select rekey.set_setting('tenant_check', 'evil.check')")
    with refused("42501"):
        tenant.execute("select rekey.can_access_tenant(gen_random_uuid())")

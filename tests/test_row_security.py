"""What hides rows of pg_rekey's own tables is an error, and never taken for no rows."""

from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

from cli_fixtures import Cli
from driving import refused, step_until
from helpers import Connection, connect, value

pytest_plugins = ["cli_fixtures"]

DESTROY: LiteralString = "select rekey.schedule_key_destruction('default', 1, '0 s')"
ROTATED: LiteralString = "select state from rekey.rotations order by id desc limit 1"


def force(connection: Connection, table: str, how: LiteralString = "force") -> None:
    statement = sql.SQL("alter table rekey.{} " + how + " row level security")
    connection.execute(statement.format(sql.Identifier(table)))


def test_secrets_are_not_swept_as_none(ready: Connection) -> None:
    ready.execute("select rekey.set_secret('s1', 'v1')")
    force(ready, "secrets")
    with refused("RK005"):
        ready.execute("select rekey.rotate_keys()")
    force(ready, "secrets", "no force")
    ready.execute("select rekey.rotate_keys()")
    force(ready, "secrets")
    step_until(ready, "blocked", "waiting")
    assert value(ready, ROTATED) == "verifying"
    blocked = value(ready, "select blocked_by -> 0 ->> 'why' from rekey.rotations")
    assert "FORCE ROW LEVEL SECURITY hides rows of rekey.secrets" in blocked
    with refused("RK005"):
        ready.execute(DESTROY)
    queries: list[LiteralString] = [
        "select * from rekey.key_usage()",
        "select * from rekey.verify_ciphertexts()",
        "call rekey.tick()",
    ]
    for query in queries:
        with refused("RK005"):
            ready.execute(query)
    force(ready, "secrets", "no force")
    ready.execute("update rekey.rotations set next_attempt_at = null")
    ready.execute("call rekey.run_rotations()")
    assert value(ready, ROTATED) == "completed"
    ready.execute(DESTROY)
    ready.execute("call rekey.tick()")
    assert value(ready, "select rekey.get_secret('s1')") == "v1"


@pytest.mark.parametrize(
    "query",
    [
        "select rekey.get_secret('s1')",
        "select rekey.get_secret('nope')",
        "select * from rekey.read_secrets()",
        "select rekey.set_secret('s1', 'v2')",
        "select rekey.delete_secret('s1')",
        "select * from rekey_targets.secrets_count('rekey.secrets', null)",
    ],
)
def test_secrets_are_not_taken_for_none(ready: Connection, query: LiteralString) -> None:
    ready.execute("select rekey.set_secret('s1', 'v1')")
    force(ready, "secrets")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
        ready.execute(query)
    force(ready, "secrets", "no force")
    assert value(ready, "select rekey.get_secret('s1')") == "v1"


def test_no_definer_function_reads_past_what_is_hidden(ready: Connection) -> None:
    """Every function that runs as an owner of ours says which way it wants it; footer.sql makes it so."""
    wrong = ready.execute(
        "select p.oid::regprocedure::text from pg_proc p"
        " where p.prosecdef and pg_get_userbyid(p.proowner) in ('rekey_owner', 'rekey_sweeper')"
        " and p.pronamespace in ('rekey'::regnamespace, 'rekey_targets'::regnamespace)"
        " and not coalesce(p.proconfig, '{}') @> array['row_security=' ||"
        "   case when p.proowner = 'rekey_sweeper'::regrole then 'on' else 'off' end]"
    ).fetchall()
    assert wrong == []


def test_every_table_of_ours(ready: Connection) -> None:
    ready.execute("select rekey.set_secret('s1', 'v1')")
    tables = [
        row[0]
        for row in ready.execute(
            "select relname from pg_class where relnamespace = 'rekey'::regnamespace and relkind = 'r'"
        )
    ]
    assert "keyrings" in tables
    for table in tables:
        ready.execute(sql.SQL("alter table rekey.{} enable row level security").format(sql.Identifier(table)))
        force(ready, table)
        with refused("RK005"):
            ready.execute("select * from rekey.rotate_keys()")
        with refused("RK005"):
            ready.execute("call rekey.tick()")
        force(ready, table, "no force")
        assert value(ready, "select rekey._own_problem()") is None, table


@pytest.mark.parametrize(
    ("change", "back", "said"),
    [
        (
            "create policy mine on rekey.secrets as restrictive using (false)",
            "drop policy mine on rekey.secrets",
            "policy mine of rekey.secrets is not pg_rekey's",
        ),
        (
            "create policy mine on rekey.keyrings for select to rekey_app using (true)",
            "drop policy mine on rekey.keyrings",
            "policy mine of rekey.keyrings",
        ),
        (
            "create rule mine as on update to rekey.encryption_keys do instead nothing",
            "drop rule mine on rekey.encryption_keys",
            "rule mine of rekey.encryption_keys",
        ),
        (
            "create table mine () inherits (rekey.secrets)",
            "drop table mine",
            "tables inherit from rekey.secrets",
        ),
        (
            "alter table rekey.secrets owner to current_user",
            "alter table rekey.secrets owner to rekey_owner",
            "rekey.secrets belongs to ",
        ),
    ],
)
def test_what_else_hides_or_changes_rows(
    ready: Connection, cli_ready: Cli, change: LiteralString, back: LiteralString, said: str
) -> None:
    ready.execute("select rekey.set_secret('s1', 'v1')")
    ready.execute(change)
    with pytest.raises(psycopg.Error, match=said) as caught:
        ready.execute("select rekey.rotate_keys()")
    assert caught.value.diag.sqlstate == "RK005"
    cli_ready("doctor", code=5)
    assert said in cli_ready.out
    ready.execute(back)
    assert value(ready, "select rekey.get_secret('s1')") == "v1"
    ready.execute("select rekey.rotate_keys()")


def test_policies_on_tables_of_users_are_theirs(ready: Connection, db: str) -> None:
    """What others' functions read, which we call, is as their policies have it."""
    ready.execute(
        "create table members (tenant uuid); alter table members enable row level security;"
        "create policy all_of_it on members using (true); grant select on members to public;"
        "create function may(tenant uuid) returns boolean language sql stable as"
        " 'select exists (select from public.members m where m.tenant = $1)';"
        "insert into members values ('00000000-0000-0000-0000-000000000001')"
    )
    ready.execute("select rekey.set_setting('tenant_check', 'public.may')")
    ready.execute("grant rekey_app to rekey_worker")
    try:
        with connect(db, user="rekey_worker") as app:
            assert value(app, "select rekey.can_access_tenant('00000000-0000-0000-0000-000000000001')")
            assert not value(app, "select rekey.can_access_tenant('00000000-0000-0000-0000-000000000002')")
    finally:
        ready.execute("revoke rekey_app from rekey_worker")


def test_secrets_that_are_all_gone_ask_to_be_confirmed(ready: Connection, cli_ready: Cli) -> None:
    ready.execute("select rekey.set_secret('s' || n, 'v') from generate_series(1, 1000) n")
    ready.execute("select rekey.create_keyring('other'), rekey.set_secret('o', 'v', keyring => 'other')")
    rotate: LiteralString = "select rekey.rotate_keys()"
    states: LiteralString = (
        "select string_agg(state, ' ' order by keyring) from (select distinct on (keyring) keyring, state"
        " from rekey.rotation_status order by keyring, id desc) s"
    )
    ready.execute(rotate)
    ready.execute("call rekey.run_rotations()")
    ready.execute("delete from rekey.secrets where name <> 'o'")
    ready.execute(rotate)
    step_until(ready, "blocked", "waiting")
    assert value(ready, states) == "verifying completed"
    blocked = value(
        ready, "select blocked_by -> 0 ->> 'why' from rekey.rotations where blocked_by is not null"
    )
    assert "it held 1000 rows of the keyring at the last complete count" in blocked
    cli_ready("keyrings", "confirm-emptied", "default", "--yes")
    assert "held 1,000 secrets" in cli_ready.out
    ready.execute("update rekey.rotations set next_attempt_at = null where state = 'verifying'")
    ready.execute("call rekey.run_rotations()")
    assert value(ready, states) == "completed completed"
    assert (
        value(ready, "select details ->> 'seen' from rekey.audit_log where event = 'keyring.emptied'")
        == "1000"
    )
    assert value(ready, "select rekey.confirm_emptied('default')") == 0
    with refused("RK007"):
        ready.execute("select rekey.confirm_emptied('nope')")

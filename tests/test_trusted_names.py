"""What only has the name of something that is trusted: nobody's code runs with an administrator's rights.

Mallory may CREATE in the database, and nothing else. What she plants tells her table who ran it.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from cli_fixtures import Cli
from driving import refused
from helpers import Connection, belong, connect, value
from pg_rekey import release

pytest_plugins = ["cli_fixtures"]

CRON: LiteralString = """
create schema cron;
create table cron.job_run_details (command text, end_time timestamptz);
create trigger tell before delete on cron.job_run_details for each statement execute function mallory.told();
create view cron.job as
select mallory.tell() as jobid, 'call rekey.tick()' as command, current_database() as database,
  true as active, 'postgres' as username;
create function cron.schedule(text, text, text) returns bigint language sql as 'select mallory.tell()';
create function cron.unschedule(bigint) returns boolean language sql as 'select mallory.tell() > 0';
create function cron.alter_job(bigint, text, text, text, text, boolean) returns void
language sql as 'select mallory.tell()';
grant usage on schema cron to public;
grant all on all tables in schema cron to public;
"""
VAULT: LiteralString = """
create schema vault;
create view vault.secrets as select mallory.tell() as id, 'pg_rekey_kek' as name, '' as description;
create view vault.decrypted_secrets as
select *, repeat('0', 64) as decrypted_secret, mallory.tell() from vault.secrets;
create function vault.create_secret(text, text, text, uuid) returns uuid
language sql as 'select mallory.tell(); select null::uuid';
create function vault._crypto_aead_det_decrypt(bytea, bytea, bigint, bytea, bytea) returns bytea
language sql as 'select mallory.tell(); select null::bytea';
grant usage on schema vault to public;
grant all on all tables in schema vault to public;
"""
# The tables and functions of pg_cron that we touch, to belong to a stand-in of the extension.
REAL_CRON: LiteralString = """
create schema cron;
create table cron.job (
  jobid bigint, schedule text, command text, database text, username text, active boolean);
create table cron.job_run_details (command text, end_time timestamptz);
create function cron.schedule(text, text, text) returns bigint language sql as
'insert into cron.job values (1, $2, $3, current_database(), current_user, true) returning jobid';
create function cron.unschedule(bigint) returns boolean language sql as
'delete from cron.job where jobid = $1 returning true';
create function cron.alter_job(
  job_id bigint, schedule text = null, command text = null, database text = null, username text = null,
  active boolean = null) returns void language sql as
'update cron.job j set schedule = coalesce($2, j.schedule), username = coalesce($5, j.username)
where jobid = $1';
"""


class Mallory:
    """Her login, and who ran what she planted."""

    def __init__(self, connection: Connection, dsn: str, name: str) -> None:
        self.admin, self.dsn, self.name = connection, dsn, name

    def plants(self, script: LiteralString) -> None:
        with connect(self.dsn, user=self.name) as hers:
            hers.execute(script)

    def saw(self) -> list[str]:
        return [row[0] for row in self.admin.execute("select who from mallory.seen")]


@pytest.fixture
def mallory(conn: Connection, db: str) -> Iterator[Mallory]:
    name = f"mallory_{os.getpid()}"
    conn.execute(f"create role {name} login".encode())
    conn.execute(f"grant create on database {conn.info.dbname} to {name}".encode())
    made = Mallory(conn, db, name)
    made.plants("""
        create schema mallory;
        create table mallory.seen (who name);
        create function mallory.tell() returns bigint language plpgsql as
        'begin insert into mallory.seen values (current_user); return 1; end';
        create function mallory.told() returns trigger language plpgsql as
        'begin insert into mallory.seen values (current_user); return null; end';
        grant usage on schema mallory to public;
        grant insert on mallory.seen to public;
    """)
    yield made
    conn.execute(f"drop owned by {name} cascade; drop role {name}".encode())


def test_a_schema_cron_that_is_not_pg_crons(
    tmp_path: Path, mallory: Mallory, ready: Connection, cli_ready: Cli, db: str
) -> None:
    mallory.plants(CRON)
    ready.execute("call rekey.tick()")
    assert value(ready, "select rekey.unschedule_worker()") is False
    with refused("42704"):
        ready.execute("select rekey.schedule_worker()")
    with connect(db, user="rekey_worker") as worker:
        worker.execute("call rekey.tick()")
    cli_ready("doctor", code=5)
    assert f"schema cron belongs to {mallory.name}, and not to the extension pg_cron" in cli_ready.out
    cli_ready("uninstall", "--dry-run", "--audit-log", tmp_path / "log")
    assert mallory.saw() == []


def test_a_schema_vault_that_is_not_the_vaults(
    mallory: Mallory, ready: Connection, cli_ready: Cli, db: str, monkeypatch: pytest.MonkeyPatch, kek: bytes
) -> None:
    mallory.plants(VAULT)
    with refused("42P01"):
        ready.execute("select rekey.adopt_vault()")
    ready.execute("select rekey.set_setting('kek_provider', 'vault')")
    assert not value(ready, "select has_schema_privilege('rekey_owner', 'mallory', 'create')")
    with connect(db) as locked, refused("RK001"):
        locked.execute("select rekey.set_secret('a', 'b')")
    cli_ready("secrets", "import", "--vault", code=1)
    monkeypatch.setenv("PG_REKEY_KEK", kek.hex())
    cli_ready("kek", "store", "--provider", "vault", code=1)
    assert "no Supabase Vault" in cli_ready.err
    cli_ready("doctor", code=5)
    assert f"schema vault belongs to {mallory.name}" in cli_ready.out
    assert mallory.saw() == []


def test_what_is_put_beside_the_objects_of_an_extension(
    mallory: Mallory, ready: Connection, cli_ready: Cli
) -> None:
    """An overload that fits the call better, and a trigger of whoever has that privilege."""
    ready.execute(REAL_CRON)
    belong(ready, "pg_cron", "cron")
    ready.execute(f"grant usage, create on schema cron to {mallory.name}".encode())
    ready.execute(f"grant trigger on all tables in schema cron to {mallory.name}".encode())
    mallory.plants("""
        create function cron.alter_job(job_id bigint, schedule text, active boolean) returns void
        language sql as 'select mallory.tell()';
        create function cron.alter_job(job_id bigint, username text) returns void
        language sql as 'select mallory.tell()';
        create function cron.unschedule(integer) returns boolean language sql as 'select mallory.tell() > 0';
    """)
    for _ in range(2):
        assert value(ready, "select rekey.schedule_worker('* * * * *')") == 1
    assert value(ready, "select distinct username from cron.job") == "rekey_worker"
    cli_ready("doctor", code=5)
    assert "cron.unschedule(integer) of" in cli_ready.out
    assert value(ready, "select rekey.unschedule_worker()") is True

    ready.execute("select rekey.schedule_worker('* * * * *')")
    mallory.plants("""
        create trigger tell before delete on cron.job_run_details for each statement
        execute function mallory.told();
        create trigger tell before delete or update on cron.job for each statement
        execute function mallory.told();
    """)
    ready.execute("call rekey.tick()")
    assert value(ready, "select rekey.unschedule_worker()") is False
    with refused("42704"):
        ready.execute("select rekey.schedule_worker()")
    assert mallory.saw() == []


def test_a_trigger_of_a_superusers_stays_what_it_is(ready: Connection) -> None:
    ready.execute(REAL_CRON)
    belong(ready, "pg_cron", "cron")
    ready.execute("create function note() returns trigger language plpgsql as 'begin return null; end'")
    ready.execute("create trigger note after delete on cron.job_run_details execute function note()")
    ready.execute("insert into cron.job_run_details values ('call rekey.tick()', now() - interval '8 days')")
    ready.execute("call rekey.tick()")
    assert value(ready, "select count(*) from cron.job_run_details") == 0


def test_who_made_an_extension_is_trusted_by_his_likes_only(
    mallory: Mallory, ready: Connection, db: str
) -> None:
    """A superuser does not run what another role may replace."""
    ready.execute(REAL_CRON)
    belong(ready, "pg_cron", "cron")
    ready.execute(f"alter function cron.unschedule(bigint) owner to {mallory.name}".encode())
    assert value(ready, "select rekey.unschedule_worker()") is False
    ready.execute(
        "update pg_extension set extowner = to_regrole(%s) where extname = 'pg_cron'", [mallory.name]
    )
    trusted: LiteralString = (
        "select rekey._trusted_function('pg_cron', 'cron.unschedule(bigint)') is not null"
    )
    assert not value(ready, trusted)
    ready.execute("grant usage on schema cron to rekey_worker")
    with connect(db, user="rekey_worker") as worker:
        assert value(worker, trusted)
    ready.execute(
        "delete from pg_depend where refobjid = (select oid from pg_extension where extname = 'pg_cron')"
    )
    ready.execute("delete from pg_extension where extname = 'pg_cron'")


def test_the_lock_keeps_the_extension(ready: Connection, db: str) -> None:
    ready.execute(REAL_CRON)
    belong(ready, "pg_cron", "cron")
    with connect(db) as other, other.transaction():
        other.execute("select rekey._trusted_relation('pg_cron', 'cron', 'job')")
        ready.execute("set lock_timeout = '100ms'")
        with refused("55P03"):
            ready.execute("drop extension pg_cron")
    ready.execute("drop extension pg_cron")
    assert value(ready, "select rekey._trusted_relation('pg_cron', 'cron', 'job')") is None


@pytest.mark.parametrize(
    "relation",
    [
        "create view supabase_migrations.schema_migrations as"
        " select mallory.tell()::text as version, 'pg_rekey' as name",
        "create table supabase_migrations.schema_migrations (version text, name text);"
        "create view supabase_migrations.v as select 1;"
        "alter table supabase_migrations.schema_migrations enable row level security;"
        "create policy tell on supabase_migrations.schema_migrations using (mallory.tell() > 0)",
    ],
)
def test_migrations_that_are_not_the_supabase_clis(
    mallory: Mallory, ready: Connection, cli_ready: Cli, relation: LiteralString, tmp_path: Path
) -> None:
    mallory.plants(
        "create schema supabase_migrations; "
        + relation
        + "; grant usage on schema supabase_migrations to public;"
        " grant select on supabase_migrations.schema_migrations to public"
    )
    cli_ready("upgrade", code=0)
    cli_ready("uninstall", "--dry-run", "--audit-log", tmp_path / "log")
    assert mallory.saw() == []


def test_a_schema_rekey_that_is_not_ours(mallory: Mallory, empty: str, cli: Cli) -> None:
    with connect(empty) as admin:
        admin.execute(f"create schema rekey authorization {mallory.name}".encode())
        admin.execute("create table rekey.settings ()")
        cli("status", code=1)
        assert f"it belongs to {mallory.name}" in cli.err
        admin.execute(f"drop owned by {mallory.name} cascade".encode())


def test_functions_beside_pgcryptos(mallory: Mallory, empty: str) -> None:
    """Whoever may create in its schema gets nothing bound into ours."""
    with connect(empty) as admin:
        admin.execute("create extension pgcrypto")
        admin.execute(f"grant create on schema public to {mallory.name}".encode())
        with connect(empty, user=mallory.name) as hers:
            hers.execute(
                "create function public.format(text, integer) returns text language sql return 'hers'"
            )
        with psycopg.connect(empty) as installer:
            installer.execute(release.assemble("plain").encode())
        bound: LiteralString = (
            "select from pg_depend where refobjid = 'public.format(text,integer)'::regprocedure"
        )
        assert admin.execute(bound).fetchall() == []
        admin.execute(f"drop owned by {mallory.name}".encode())


def test_the_installation_refuses_what_is_not_pgcryptos(empty: str) -> None:
    with connect(empty) as admin:
        admin.execute("create extension pgcrypto")
        admin.execute("alter extension pgcrypto drop function gen_random_bytes(integer)")
    with psycopg.connect(empty) as installer, refused("42725"):
        installer.execute(release.assemble("plain").encode())


def test_functions_in_a_schema_of_the_search_path(
    mallory: Mallory, ready: Connection, cli_ready: Cli, monkeypatch: pytest.MonkeyPatch, db: str
) -> None:
    """What fits a call of ours better than PostgreSQL's own; the tables of the user are still found."""
    ready.execute(f"create schema app; grant usage, create on schema app to {mallory.name}".encode())
    mallory.plants("""
        create function app.format(text, text) returns text language sql as 'select mallory.tell()::text';
        create function app.format(text, text, timestamptz) returns text
        language sql as 'select mallory.tell()::text';
    """)
    ready.execute("create table app.t (id int primary key, v text)")
    monkeypatch.setenv("PG_REKEY_DSN", make_conninfo(db, options="-c search_path=app,public"))
    cli_ready("doctor", code=5)
    assert "keyring default has no schedule" in cli_ready.out
    cli_ready("columns", "protect", "t", "v")
    assert "app.t.v is protected" in cli_ready.out
    cli_ready("columns", "view", "t")
    cli_ready("columns", "adopt", "t", "v", "--from", "plaintext")
    cli_ready("columns", "unprotect", "t", "v", "--yes")
    cli_ready("columns", "protect", "nowhere", "v", code=1)
    assert "42P01" in cli_ready.err
    assert mallory.saw() == []

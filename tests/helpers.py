"""What several test modules need and no fixture is for."""

import time
from typing import Any, LiteralString

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

Connection = psycopg.Connection[Any]
# What pg_rekey has in schema public.
RPC = """in ('rotate_keys', 'key_rotation_status', 'pause_rotation', 'retry_rotation', 'rollback_rotation',
  'mark_key_compromised')"""


def connect(dsn: str, **parameters: Any) -> Connection:
    """Open an autocommit connection; parameters such as user or options override those of the DSN."""
    return psycopg.connect(make_conninfo(dsn, **parameters), autocommit=True)


def unlock(connection: Connection, *keks: bytes, scope: str = "session") -> str:
    """Let this session or transaction use the KEK, or the current and the next one."""
    with connection.transaction(), connection.cursor() as cursor:
        cursor.execute("create temporary table pg_rekey_kek (kek bytea) on commit drop")
        with cursor.copy("copy pg_temp.pg_rekey_kek from stdin (format binary)") as copy:
            copy.set_types(["bytea"])
            for kek in keks:
                copy.write_row([kek])
        return str(value(connection, "select rekey.unlock_copied(%s)", scope))


def value(connection: Connection, query: LiteralString, *parameters: Any) -> Any:
    """Return the only column of the only row of a query."""
    (row,) = connection.execute(query, parameters).fetchall()
    (only,) = row
    return only


def destroy_due(connection: Connection) -> None:
    """Do what a tick does about destructions that are due, each step in a transaction of its own."""
    until = time.monotonic() + 1
    while (duty := value(connection, "select rekey._tick_duty('destructions', now())")) is not None:
        event = None
        while duty == "search" and event not in ("complete", "incomplete", "idle"):
            [(event, _, detail)] = connection.execute("select * from rekey.search_step()").fetchall()
            if event == "waiting" and detail and time.monotonic() > until:
                return


def initialize(connection: Connection, kek: bytes) -> None:
    """Do what init does after the installation: unlock the session, register the KEK, make a keyring."""
    unlock(connection, kek)
    connection.execute("select rekey.register_kek()")
    connection.execute("select rekey.create_keyring('default')")
    # Other tests have sessions on the same server, which workers would give way to.
    connection.execute("update rekey.settings set min_pace = 1 where singleton")


def install(dsn: str, script: str) -> None:
    """Run an installation script in one transaction, with pgcrypto in the database."""
    with psycopg.connect(dsn) as connection:
        connection.execute("create extension if not exists pgcrypto")
        connection.execute(script.encode())


def belong(connection: Connection, extension: str, schema: str) -> None:
    """Make everything in a schema belong to an extension that is not on this machine: a stand-in for it."""
    connection.execute(BELONG.format(extension=extension, schema=schema).encode())


# (A superuser may write into pg_extension; it takes no files.)
BELONG = """
do $$
declare
  v_member text;
begin
  insert into pg_extension (oid, extname, extowner, extnamespace, extrelocatable, extversion)
  values (pg_nextoid('pg_extension', 'oid', 'pg_extension_oid_index'), '{extension}', current_user::regrole,
    'pg_catalog'::regnamespace, false, '1.6');
  for v_member in
    select 'schema {schema}'
    union all
    select format('%s {schema}.%I', case c.relkind when 'v' then 'view' else 'table' end, c.relname)
    from pg_class c where c.relnamespace = '{schema}'::regnamespace and c.relkind in ('r', 'v')
    union all
    select format('function %s', p.oid::regprocedure)
    from pg_proc p where p.pronamespace = '{schema}'::regnamespace
  loop
    execute 'alter extension {extension} add ' || v_member;
  end loop;
end
$$;
"""


def create_database(server: str, name: str, template: str | None = None, owner: str | None = None) -> str:
    """Create a database on the server of a DSN, and return the new one's DSN."""
    statement = sql.SQL("create database {}").format(sql.Identifier(name))
    if template:
        # Files are copied three times as fast as they are logged; the checkpoints cost nothing without fsync.
        statement += sql.SQL(" template {} strategy file_copy").format(sql.Identifier(template))
    if owner:
        statement += sql.SQL(" owner {}").format(sql.Identifier(owner))
    with connect(server) as connection:
        connection.execute(statement)
        tracking = sql.SQL("alter database {} set track_functions = 'all'")
        connection.execute(tracking.format(sql.Identifier(name)))
    return make_conninfo(server, dbname=name)


def drop_database(server: str, name: str) -> None:
    """Drop a database, whoever is connected to it."""
    with connect(server) as connection:
        connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))


def disconnect_others(connection: Connection) -> None:
    """End all other sessions of this database and wait until they are gone; they leave their statistics."""
    connection.execute(
        "select pg_terminate_backend(pid, 10000) from pg_stat_activity"
        " where datname = current_database() and pid <> pg_backend_pid()"
    )


def called_functions(connection: Connection) -> set[str]:
    """Return the functions of schema rekey that this database has called so far, by signature."""
    return _names(connection, "join pg_stat_user_functions s on s.funcid = p.oid")


def all_functions(connection: Connection) -> set[str]:
    """Return the functions of schema rekey by signature."""
    return _names(connection, "")


def _names(connection: Connection, join: LiteralString) -> set[str]:
    query: LiteralString = (
        "select format('%s(%s)', p.proname, pg_get_function_identity_arguments(p.oid)) from pg_proc p "
        + join
        + " where p.pronamespace = to_regnamespace('rekey')"
    )
    return {name for (name,) in connection.execute(query)}

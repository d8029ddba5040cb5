"""What people who do this job have reported of other tools: each as it is here."""

from contextlib import suppress
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest

from cli_fixtures import Cli
from column_fixtures import protect
from driving import check, fill, rotate, rotation, run
from helpers import Connection, connect, create_database, drop_database, initialize, install, unlock, value
from pg_rekey import release
from test_dump import Tools, tools_for

pytest_plugins = ["cli_fixtures", "column_fixtures"]

ACCOUNTS: LiteralString = "create table app.acc (id int primary key, api_key text)"
OPENS: LiteralString = "select rekey.decrypt_text(api_key, array['app.acc.api_key', id::text]) from app.acc"
AUDITED: LiteralString = """
    create table app.audit (entry jsonb);
    create function app.note() returns trigger language plpgsql as
      $$ begin insert into app.audit values (to_jsonb(new)); return new; end $$;
    create trigger note after insert or update on app.acc for each row
      when (not rekey.is_sweeping('app.acc')) execute function app.note()"""


@pytest.fixture
def accounts(app: Connection) -> None:
    """A column that a trigger encrypts, with ten rows."""
    app.execute(ACCOUNTS)
    protect(app, "app.acc", "api_key", encrypt_on_write=True)
    app.execute("insert into app.acc select g, 'sk ' || g from generate_series(1, 10) g")


def test_an_audit_table_that_keeps_envelopes(
    ready: Connection, app: Connection, accounts: None, db: str
) -> None:
    """They are found; the condition that lets a sweep pass lets nobody else pass the audit."""
    app.execute(AUDITED)
    app.execute("update app.acc set api_key = 'new' where id = 1")
    app.execute("set rekey.sweeping = 'on'")
    app.execute("update app.acc set api_key = 'newer' where id = 1")
    assert value(app, "select count(*) from app.audit") == 2
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state") == "completed"
    assert value(app, "select count(*) from app.audit") == 2
    found: LiteralString = "select rows from rekey.find_unprotected() where finding ~ 'within other values'"
    assert value(ready, found) == 2


def test_what_an_application_gets_back_is_the_envelope(app: Connection, accounts: None) -> None:
    given = value(app, "insert into app.acc values (11, 'plain') returning api_key")
    assert given.startswith("rk1:")


def test_a_sweep_changes_xmin_and_an_object_that_is_saved_whole_still_opens(
    ready: Connection, app: Connection, accounts: None
) -> None:
    """As EF Core's concurrency token, and as Django or JPA save what they had read before the rotation."""
    before, stale = app.execute("select xmin::text, api_key from app.acc where id = 1").fetchall()[0]
    rotate(ready)
    run(ready)
    assert app.execute("update app.acc set id = 1 where id = 1 and xmin = %s::xid", [before]).rowcount == 0
    app.execute("update app.acc set api_key = %s where id = 1", [stale])
    assert ("sk 1",) in app.execute(OPENS).fetchall()
    assert value(ready, "select rows from rekey.key_usage('default') where version = 1") == 1
    rotate(ready)
    run(ready)
    assert value(ready, "select sum(rows) from rekey.key_usage('default') where version = 3") == 10


def test_rows_are_restored_without_their_schema(
    ready: Connection, app: Connection, accounts: None, db: str, tmp_path: Path, cli_ready: Cli
) -> None:
    """Without a KEK the trigger stops them; with --disable-triggers they come as they were, sealed once."""
    tools: Tools = tools_for(db)
    kept = app.execute(OPENS + " order by id").fetchall()
    for name, options in (("plain", ()), ("without", ("--disable-triggers",))):
        tools.dump(db, tmp_path / name, "--data-only", "--table", "app.acc", *options)
    app.execute("truncate app.acc")
    script = ("psql", "--no-psqlrc", "-v", "ON_ERROR_STOP=1", "-q", "-f")
    refusal = tools.run(*script, str(tmp_path / "plain"), db, check=False)
    assert "the KEK is not available" in refusal.stderr
    assert value(app, "select count(*) from app.acc") == 0
    tools.run(*script, str(tmp_path / "without"), db)
    assert app.execute(OPENS + " order by id").fetchall() == kept
    # What enables them again does not know that they fired in the replica role too.
    assert "do not fire in the replica role" in str(cli_ready.json("doctor", code=5))
    protect(app, "app.acc", "api_key", encrypt_on_write=True)
    assert "replica role" not in str(cli_ready.json("doctor", code=5))
    ready.execute("select rekey.rebind_column('app.acc', 'api_key')")
    number = rotate(ready)
    run(ready)
    assert rotation(ready, number, "state", "rows_done") == ("completed", 10)


def test_a_publication_for_all_tables(ready: Connection) -> None:
    """Which makes UPDATEs fail where a table has no key."""
    ready.execute("create publication everything for all tables")
    model = fill(ready, 20)
    ready.execute("select rekey.set_secret('one', 'more')")
    number = rotate(ready)
    run(ready)
    ready.execute("call rekey.tick()")
    assert rotation(ready, number, "state") == "completed"
    check(ready, {**model, "one": "more"})


def test_a_tick_under_a_statement_timeout_keeps_its_progress(ready: Connection) -> None:
    model = fill(ready, 2_000)
    ready.execute("select rekey.set_setting('max_rows_per_second', '500')")  # longer than a tick may be
    number = rotate(ready)
    done: list[int] = []
    while rotation(ready, number, "state") != "completed":
        assert len(done) < 200
        ready.execute("set statement_timeout = '1500 ms'")
        with suppress(psycopg.errors.QueryCanceled):
            ready.execute("call rekey.tick()")
        ready.execute("set statement_timeout = 0; update rekey.rotations set next_attempt_at = null")
        done.append(rotation(ready, number, "rows_done"))
        assert rotation(ready, number, "state", "attempts")[0] != "failed"
    assert done == sorted(done)
    assert len(done) > 1
    check(ready, model)


def test_a_latin1_database_is_restored_into_utf8(kek: bytes, server: str, tmp_path: Path) -> None:
    """Names, keys and values with accents open before and after."""
    names = ("rekey_latin", "rekey_utf")
    try:
        with connect(server) as connection:
            connection.execute(
                "create database rekey_latin encoding 'LATIN1' lc_collate 'C' lc_ctype 'C' template template0"
            )
        old = create_database(server, "rekey_utf")
        latin = psycopg.conninfo.make_conninfo(old, dbname="rekey_latin")
        install(latin, release.assemble("plain"))
        with connect(latin) as connection:
            initialize(connection, kek)
            connection.execute('create table "café" (id text primary key, "clé" text)')
            connection.execute("""select rekey.protect_column('"café"', 'clé', encrypt_on_write => true)""")
            connection.execute("""insert into "café" values ('é', 'motdépasse')""")
            connection.execute("select rekey.set_secret('nöm', 'sécret')")
        tools = tools_for(latin)
        tools.dump(latin, tmp_path / "dump")
        tools.run("psql", "--no-psqlrc", "-v", "ON_ERROR_STOP=1", "-q", "-f", str(tmp_path / "dump"), old)
        with connect(old) as connection:
            unlock(connection, kek)
            opens: LiteralString = """
                select rekey.decrypt_text("clé", array['public."café"."clé"', id]) from "café" """
            for _ in range(2):
                assert value(connection, opens) == "motdépasse"
                assert value(connection, "select rekey.get_secret('nöm')") == "sécret"
                rotate(connection)
                run(connection)
            assert value(connection, "select sum(failed) from rekey.verify_ciphertexts()") == 0
    finally:
        for name in names:
            drop_database(server, name)

"""Run pgspot over the assembled script and plpgsql_check over every function that it installs.

What they find must stand in exceptions.toml with a reason, and nothing else may stand there.
"""

import contextlib
import io
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from pglast import ast, parse_sql, split
from pglast.parser import ParseError
from pgspot.state import Counter, State
from pgspot.visitors import SQLVisitor, visit_sql

import container
from helpers import BELONG, Connection, connect, create_database, drop_database, install
from pg_rekey import release

EXCEPTIONS = Path(__file__).with_name("exceptions.toml")
FUNCTIONS = """
select distinct p.oid::regprocedure::text, c.sqlstate, c.message
from pg_proc p
join pg_language l on l.oid = p.prolang and l.lanname = 'plpgsql'
left join pg_trigger t on t.tgfoid = p.oid and not t.tgisinternal
cross join lateral plpgsql_check_function_tb(p.oid, coalesce(t.tgrelid, 0), security_warnings => true) c
where p.pronamespace in ('rekey'::regnamespace, 'rekey_targets'::regnamespace, 'public'::regnamespace)
  and (p.prorettype <> 'trigger'::regtype or t.oid is not null)
order by 1, 2, 3
"""
# The functions that are made for a column of the user's.
PROTECTED = """
create temporary table pg_rekey_kek (kek bytea);
insert into pg_rekey_kek values (sha256('lint'));
select rekey.unlock_copied('session'), rekey.register_kek(), rekey.create_keyring('default');
drop table pg_rekey_kek;
create table public.lint (id int primary key, b bytea, t text, searchable_b bytea, searchable_t text);
select rekey.protect_column('lint', 'b', encrypt_on_write => true),
  rekey.protect_column('lint', 't', encrypt_on_write => true),
  rekey.protect_column('lint', 'searchable_b', encrypt_on_write => true),
  rekey.protect_column('lint', 'searchable_t', encrypt_on_write => true);
select rekey.make_searchable('lint', 'searchable_b');
select rekey.make_searchable('lint', 'searchable_t');
"""
# What functions refer to, and is not there when they are checked: the Vault, pg_cron.
STAND_INS = """
create schema vault;
create view vault.decrypted_secrets as select null::text as name, null::text as decrypted_secret;
create schema cron;
create table cron.job (jobid bigint, schedule text, command text, database text, username text, jobname text);
create table cron.job_run_details (
  jobid bigint, runid bigint, command text, status text, end_time timestamptz);
create function cron.schedule(text, text, text) returns bigint return 1;
create function cron.alter_job(
  job_id bigint, schedule text = null, command text = null, database text = null, username text = null,
  active boolean = null) returns void begin atomic; end;
create function cron.unschedule(bigint) returns boolean return true;
"""
STAND_INS += BELONG.format(extension="supabase_vault", schema="vault") + BELONG.format(
    extension="pg_cron", schema="cron"
)


def pgspot() -> list[str]:
    """Return what pgspot finds, without line numbers.

    It is called statement by statement for what it does not know: the search path that finds pgcrypto, after
    which sql/code/10_aead.sql looks at what was bound by it; function bodies that are bound when the function
    is created; and PL/pgSQL variables of a table's row type (there it sees the function's head only;
    plpgsql_check sees its body).
    """
    script, pinned = re.subn(
        r"^select pg_catalog\.set_config\('search_path'.*?;$",
        "set search_path = pg_catalog, pg_temp;",
        release.assemble("plain"),
        flags=re.MULTILINE | re.DOTALL,
    )
    assert pinned == 1, "the statement that finds pgcrypto"
    options = SimpleNamespace(
        plpgsql=True, summary_only=False, proc_without_search_path=[], ignore=[], ignore_lang=[], sql_fn=[]
    )
    state = State(Counter(options))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for statement in split(script):
            (raw,) = parse_sql(str(statement))
            if isinstance(raw.stmt, ast.CreateFunctionStmt) and raw.stmt.sql_body:
                SQLVisitor(state)(raw.stmt.sql_body)
                continue
            try:
                visit_sql(state, statement, toplevel=True)
            except ParseError:
                options.plpgsql = False
                visit_sql(state, statement, toplevel=True)
                options.plpgsql = True
    return [re.sub(r" at line \d+$", "", line) for line in printed.getvalue().splitlines() if line]


def plpgsql_check() -> list[str] | None:
    """Return what plpgsql_check finds, or None where the server does not have it."""
    with installed() as connection:
        offered = "select from pg_available_extensions where name = 'plpgsql_check'"
        if not connection.execute(offered).fetchall():
            return None
        connection.execute("create extension plpgsql_check")
        connection.execute(STAND_INS)
        connection.execute(PROTECTED)
        # In a session of its own: plpgsql_check 2.3.0 spoils expressions of functions that ran in it before
        # ("unrecognized node type"), and the planner runs those that are stable.
        with connect(connection.info.dsn) as fresh:
            return [f"{name}: {state}: {message}" for name, state, message in fresh.execute(FUNCTIONS)]


@contextlib.contextmanager
def installed() -> Iterator[Connection]:
    """A connection to a database with pg_rekey installed."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(container.server())
        name = f"rekey_lint_{os.getpid()}"
        dsn = create_database(server, name)
        stack.callback(drop_database, server, name)
        install(dsn, release.assemble("plain"))
        yield stack.enter_context(connect(dsn))


def report(tool: str, findings: list[str] | None, justified: dict[str, str]) -> bool:
    """Print findings without an exception and exceptions without a finding; tell whether there are any."""
    if findings is None:
        print(f"{tool}: skipped, the server does not have it", file=sys.stderr)
        return False
    surprises = [finding for finding in dict.fromkeys(findings) if finding not in justified]
    needless = [exception for exception in justified if exception not in findings]
    for finding in surprises:
        print(f"{tool}: {finding}", file=sys.stderr)
    for exception in needless:
        print(f"{EXCEPTIONS.name}: no longer needed for {tool}: {exception}", file=sys.stderr)
    return bool(surprises or needless)


def main() -> None:
    """Check everything; fail if there is anything to say."""
    exceptions = tomllib.loads(EXCEPTIONS.read_text())
    bad = report("pgspot", pgspot(), exceptions["pgspot"])
    bad |= report("plpgsql_check", plpgsql_check(), exceptions["plpgsql_check"])
    sys.exit(bad)


if __name__ == "__main__":
    main()

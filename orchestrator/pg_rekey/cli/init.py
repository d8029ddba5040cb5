"""`pg-rekey init`: from an empty database to one that can rotate."""

from typing import Any

import click
import psycopg

from pg_rekey import db, release
from pg_rekey.cli.base import Output, fetch, fetch_one, output, scalar
from pg_rekey.cli.commands import Command
from pg_rekey.errors import LOCKED, Problem, from_database


@click.command(cls=Command, example="pg-rekey init --rotate-every '90 days'")
@click.option(
    "--provider",
    type=click.Choice(["session", "vault", "file"]),
    help="Where the server finds the KEK by itself; session: nowhere.",
)
@click.option("--rotate-every", metavar="INTERVAL", help="Schedule of keyring `default`, such as '90 days'.")
@click.option("--extension", is_flag=True, help="Install with CREATE EXTENSION; the server has the files.")
@output
def init(out: Output, provider: str | None, rotate_every: str | None, extension: bool) -> None:
    """Install pg_rekey in this database and make it ready, in one transaction. Safe to repeat.

    It needs a KEK: from the environment, or, with --provider, from where the server finds it.
    """
    with db.connect(any_version=True) as connection:
        steps: list[str] = []

        def step(text: str) -> None:
            steps.append(text)
            out.say(f"  {text}")

        out.say(db.where(connection), style="bold")
        here = fetch_one(connection, db.query("init"))
        server_side = (provider or _provider(connection, here)) != "session"
        if not server_side and not db.in_environment():
            raise Problem(
                "no KEK: nothing was changed",
                "Make one with `pg-rekey kek generate --out FILE`, and set PG_REKEY_KEK_FILE to that file.",
                LOCKED,
            )
        try:
            if rotate_every:
                connection.execute("select %s::interval", [rotate_every])
            _install(connection, here, extension, step)
            number = _configure(connection, provider, rotate_every, step)
            cron = _schedule_worker(connection, here, server_side, step)
            connection.commit()
        except psycopg.Error as error:
            problem = from_database(error)
            message = f"{problem.message}: nothing was changed"
            raise Problem(message, problem.hint, problem.exit_code, problem.code, problem.action) from None
        out.done("ready", database=db.where(connection), steps=steps, kek=number, cron=cron)


def _provider(connection: db.Connection, here: Any) -> Any:
    """Return the KEK provider of an installation that is there already."""
    if not here["installed"]:
        return "session"
    rows = fetch(connection, db.query("kek provider"))
    return rows[0]["value"] if rows else "session"


def _install(connection: db.Connection, here: Any, extension: bool, step: Any) -> None:
    if here["installed"]:
        version = scalar(connection, "select rekey.version()")
        older = (
            "" if version == release.version() else f", this is {release.version()}: see `pg-rekey upgrade`"
        )
        step(f"pg_rekey {version} is installed{older}")
        return
    if not here["pgcrypto"]:
        schema = "extensions" if here["extensions_schema"] else "public"
        connection.execute(f"create extension pgcrypto schema {schema}")
        step(f"extension pgcrypto created in schema {schema}")
    if extension:
        connection.execute("create extension pg_rekey")
        step(f"extension pg_rekey {release.version()} created")
    else:
        connection.execute(release.sql_script("plain").encode())
        step(f"pg_rekey {release.version()} installed in schema rekey")


def _configure(connection: db.Connection, provider: str | None, rotate_every: str | None, step: Any) -> int:
    if provider:
        connection.execute("select rekey.set_setting('kek_provider', %s)", [provider])
        step(f"the server takes the KEK from: {provider}")
    by_server = provider in ("vault", "file")
    if db.in_environment() and not by_server:
        db.unlock(connection)
    number = int(scalar(connection, "select rekey.register_kek()"))
    if db.in_environment() and by_server:
        db.unlock(connection)  # refuses another KEK than the one that the server found
    step(f"KEK {number} is registered and right")
    keyrings = fetch(connection, "select rotate_every from rekey.keyrings where name = 'default'")
    if not keyrings:
        connection.execute("select rekey.create_keyring('default')")
        step("keyring default created, with its first key")
    if rotate_every:
        connection.execute(db.query("set schedule if changed"), ["default", rotate_every])
        step(f"keyring default rotates every {rotate_every}")
    return number


def _schedule_worker(connection: db.Connection, here: Any, server_side: bool, step: Any) -> str:
    """Have pg_cron run the worker, or say how; return what became of it."""
    if here["pg_cron"]:
        step(f"pg_cron runs the worker, as job {scalar(connection, 'select rekey.schedule_worker()')}")
        return "scheduled"
    found = "absent"
    if here["cron_database"]:
        found = "not created" if here["cron_database"] == here["database"] else "elsewhere"
    if not server_side:
        step("the server has no KEK of its own: let `pg-rekey work --forever` run as a service")
    elif found == "not created":
        step("pg_cron is loaded for this database: CREATE EXTENSION pg_cron, and run init again")
    elif found == "elsewhere":
        call = scalar(connection, db.query("cron elsewhere"))
        step(f"pg_cron lives in database {here['cron_database']}: run there\n    {call}")
    else:
        step("there is no pg_cron: let `pg-rekey work --forever` run as a service")
    return found

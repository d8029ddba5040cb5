"""`pg-rekey keys`: key versions and their states."""

import time

import click

from pg_rekey import db, worker
from pg_rekey.cli.base import (
    Output,
    confirm,
    database,
    fetch,
    fetch_of,
    fetch_one,
    keyring_option,
    output,
    reason_option,
    yes_option,
)
from pg_rekey.cli.commands import Group
from pg_rekey.cli.follow import Line
from pg_rekey.cli.parameters import KEYRING, VERSION
from pg_rekey.cli.words import blockers
from pg_rekey.errors import FINDINGS


@click.group(cls=Group)
def keys() -> None:
    """Key versions: list, disable, mark as compromised, search for, destroy."""


@keys.command("list", example="pg-rekey keys list --keyring default")
@keyring_option
@database()
def list_(connection: db.Connection, out: Output, keyring: str | None) -> None:
    """List the key versions with their states."""
    rows = fetch_of(connection, keyring, db.query("keys"))
    columns = ("keyring", "version", "state", "kek_id", "activated_at", "deactivated_at", "destroy_after")
    out.table(rows, columns, empty="no keys")


@keys.command(example="pg-rekey keys usage")
@keyring_option
@database(unlocked=True)
def usage(connection: db.Connection, out: Output, keyring: str | None) -> None:
    """Count the rows that stand on each version."""
    out.table(fetch(connection, "select * from rekey.key_usage(%s)", keyring), empty="no keys")


@keys.command(example="pg-rekey keys disable default 1 --reason 'under suspicion'")
@click.argument("keyring", type=KEYRING)
@click.argument("version", type=VERSION)
@reason_option
@database()
def disable(connection: db.Connection, out: Output, keyring: str, version: int, reason: str | None) -> None:
    """Suspend a version: nothing opens with it until it is enabled again."""
    connection.execute("select rekey.disable_key(%s, %s, %s)", [keyring, version, reason])
    _show(connection, out, keyring, version)


@keys.command(example="pg-rekey keys enable default 1")
@click.argument("keyring", type=KEYRING)
@click.argument("version", type=VERSION)
@reason_option
@database()
def enable(connection: db.Connection, out: Output, keyring: str, version: int, reason: str | None) -> None:
    """Let a suspended version open again."""
    connection.execute("select rekey.enable_key(%s, %s, %s)", [keyring, version, reason])
    _show(connection, out, keyring, version)


@keys.command(example="pg-rekey keys compromise default 1 --reason 'laptop stolen'")
@click.argument("keyring", type=KEYRING)
@click.argument("version", type=VERSION)
@reason_option
@yes_option
@database(unlocked=True)
def compromise(
    connection: db.Connection, out: Output, keyring: str, version: int, reason: str | None, yes: bool
) -> None:
    """Mark a version as compromised: at once it encrypts nothing any more, and its rows are re-encrypted.

    It stays compromised for good, and so it asks.
    """
    confirm(connection, f"Mark version {version} of keyring {keyring} as compromised, for good?", yes)
    connection.execute("select rekey.mark_key_compromised(%s, %s, %s)", [keyring, version, reason])
    _show(connection, out, keyring, version)


@keys.command(example="pg-rekey keys schedule-destruction default 1")
@click.argument("keyring", type=KEYRING)
@click.argument("version", type=VERSION)
@click.option("--wait", metavar="INTERVAL", help="Time until then; by default the setting destroy_wait.")
@yes_option
@database(unlocked=True)
def schedule_destruction(
    connection: db.Connection, out: Output, keyring: str, version: int, wait: str | None, yes: bool
) -> None:
    """Have a version destroyed for good once the wait is over; refused while a row needs it.

    Until then `pg-rekey keys cancel-destruction` takes it back. With a --wait of its own it asks.
    """
    question = f"Destroy version {version} of keyring {keyring} in {wait}?"
    confirm(connection, question, yes or wait is None)
    connection.execute(
        "select rekey.schedule_key_destruction(%s, %s, %s::interval)", [keyring, version, wait]
    )
    _show(connection, out, keyring, version)


@keys.command(example="pg-rekey keys search")
@output
def search(out: Output) -> None:
    """Look for versions that are to be destroyed, in every table, with the rights of the role that connects.

    The worker does the same once a destruction is due, with its own rights. What neither may read keeps the
    versions; what one of them has read, the other need not.
    """
    with worker.connect() as connection, Line() as progress:
        with worker.transaction(connection):
            connection.execute("select rekey.begin_search()")
        shown = progress.add_task("searching", total=None, done=0, rows=None, things="bytes")
        while (step := worker.search(connection))["event"] not in ("complete", "incomplete", "idle"):
            status = fetch_one(connection, "select * from rekey.search_status")
            progress.line = blockers(status["blocked_by"])
            progress.update(shown, total=status["bytes"], completed=status["bytes_read"])
            if step["wait"]:
                time.sleep(step["wait"].total_seconds())
        progress.line = ""
        progress.update(shown, visible=False)
        status = fetch_one(connection, "select * from rekey.search_status")
        findings = fetch(connection, "select * from rekey.search_findings order by relation, column_name")
    if out.json:
        out.document({**status, "findings": findings})
    else:
        out.record(status)
        out.say()
        out.table(findings, empty="nothing was found, and everything could be read")
    if findings:
        raise click.exceptions.Exit(FINDINGS)


@keys.command(example="pg-rekey keys cancel-destruction default 1")
@click.argument("keyring", type=KEYRING)
@click.argument("version", type=VERSION)
@database()
def cancel_destruction(connection: db.Connection, out: Output, keyring: str, version: int) -> None:
    """Cancel a destruction that has not happened yet."""
    connection.execute("select rekey.cancel_key_destruction(%s, %s)", [keyring, version])
    _show(connection, out, keyring, version)


def _show(connection: db.Connection, out: Output, keyring: str, version: int) -> None:
    statement = "select * from rekey.key_status where keyring = %s and version = %s"
    row = fetch_one(connection, statement, keyring, version)
    after = f", after {row['destroy_after']:%Y-%m-%d %H:%M %Z}" if row["state"] == "destroy_scheduled" else ""
    out.done(f"version {version} of keyring {keyring} is {row['state']}{after}", **row)

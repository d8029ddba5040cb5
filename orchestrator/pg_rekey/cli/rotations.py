"""`pg-rekey rotations`: what is under way, what was, and what went wrong."""

import click

from pg_rekey import db
from pg_rekey.cli import follow
from pg_rekey.cli.base import (
    Output,
    database,
    fetch,
    fetch_of,
    fetch_one,
    keyring_option,
    output,
    reason_option,
)
from pg_rekey.cli.commands import Group
from pg_rekey.cli.parameters import FAILURE, ROTATION
from pg_rekey.cli.tables import Row
from pg_rekey.errors import UNFINISHED, missing

COLUMNS = (
    "id",
    "keyring",
    "state",
    "trigger",
    "to_version",
    "rows_total",
    "rows_done",
    "rows_failed",
    "finished_at",
)


@click.group(cls=Group)
def rotations() -> None:
    """Rotations: list, watch, pause, resume, retry, roll back; rows that did not open."""


@rotations.command("list", example="pg-rekey rotations list --keyring default --limit 5")
@keyring_option
@click.option(
    "--limit", type=click.IntRange(1), default=20, show_default=True, help="How many of the newest."
)
@database()
def list_(connection: db.Connection, out: Output, keyring: str | None, limit: int) -> None:
    """List rotations, newest first."""
    rows = fetch_of(connection, keyring, db.query("rotations"), limit)
    out.table(rows, COLUMNS, empty="no rotations")


@rotations.command(example="pg-rekey rotations show 12")
@click.argument("rotation", type=ROTATION)
@database()
def show(connection: db.Connection, out: Output, rotation: int) -> None:
    """Show all about one rotation."""
    out.record(_status(connection, rotation))


@rotations.command(example="pg-rekey rotations watch")
@click.argument("rotation", type=ROTATION, required=False)
@output
def watch(out: Output, rotation: int | None) -> None:
    """Show how far a rotation is, or all that are under way, until they have ended; others do the work.

    Exit code 4 says that one failed, left rows that do not open, or was paused or replaced by another.
    """
    with db.connect(autocommit=True) as connection:
        if rotation is None:
            ids = fetch_one(connection, db.query("progress"), None, None)["ids"]
        else:
            ids = [_status(connection, rotation)["id"]]
        rows = follow.watch(connection, ids) if ids else []
        out.table(rows, COLUMNS, empty="no rotation is under way")
    if any(row["state"] != "completed" for row in rows):
        raise click.exceptions.Exit(UNFINISHED)


@rotations.command(example="pg-rekey rotations pause 12")
@click.argument("rotation", type=ROTATION)
@database()
def pause(connection: db.Connection, out: Output, rotation: int) -> None:
    """Pause a rotation: reads and writes go on, nothing more is re-encrypted."""
    connection.execute("select rekey.pause_rotation(%s)", [rotation])
    _show(connection, out, rotation)


@rotations.command(example="pg-rekey rotations resume 12")
@click.argument("rotation", type=ROTATION)
@database()
def resume(connection: db.Connection, out: Output, rotation: int) -> None:
    """Go on with a paused rotation."""
    connection.execute("select rekey.resume_rotation(%s)", [rotation])
    _show(connection, out, rotation)


@rotations.command(example="pg-rekey rotations retry 12")
@click.argument("rotation", type=ROTATION)
@database()
def retry(connection: db.Connection, out: Output, rotation: int) -> None:
    """Go on with a failed rotation where it stopped, or try its failed rows again."""
    connection.execute("select rekey.retry_rotation(%s)", [rotation])
    _show(connection, out, rotation)


@rotations.command(example="pg-rekey rotations rollback 12 --reason 'a client cannot read it'")
@click.argument("rotation", type=ROTATION)
@reason_option
@database(unlocked=True)
def rollback(connection: db.Connection, out: Output, rotation: int, reason: str | None) -> None:
    """Make the old version active again and re-encrypt back; nothing is unreadable at any moment."""
    connection.execute("select rekey.rollback_rotation(%s, %s)", [rotation, reason])
    _show(connection, out, rotation)


@rotations.command(example="pg-rekey rotations failures 12")
@click.argument("rotation", type=ROTATION, required=False)
@click.option("--all", "everything", is_flag=True, help="Those that are resolved too.")
@database()
def failures(connection: db.Connection, out: Output, rotation: int | None, everything: bool) -> None:
    """List rows that did not open: they stay as they were, and keep their key from being destroyed."""
    columns = ("id", "rotation_id", "keyring", "target", "row_key", "version", "reason", "resolution")
    rows = fetch(connection, db.query("failures"), rotation, rotation, everything)
    if rotation is not None and not rows:
        _status(connection, rotation)
    out.table(rows, columns, empty="no failures")


@rotations.command(example="pg-rekey rotations resolve 3 retry --reason 'row mended'")
@click.argument("failure", type=FAILURE)
@click.argument("action", type=click.Choice(["retry", "discard"]))
@reason_option
@database(unlocked=True)
def resolve(connection: db.Connection, out: Output, failure: int, action: str, reason: str | None) -> None:
    """Close an entry of `failures`: retry once the row is mended, or discard the hope of it."""
    connection.execute("select rekey.resolve_failure(%s, %s, %s)", [failure, action, reason])
    out.done(f"failure {failure}: {action}", failure=failure, action=action)


def _status(connection: db.Connection, rotation: int) -> Row:
    rows = fetch(connection, "select * from rekey.rotation_status where id = %s", rotation)
    if not rows:
        raise missing("rotations", f"no such rotation: {rotation}")
    return rows[0]


def _show(connection: db.Connection, out: Output, rotation: int) -> None:
    row = _status(connection, rotation)
    out.done(f"rotation {rotation} of keyring {row['keyring']} is {row['state']}", **row)

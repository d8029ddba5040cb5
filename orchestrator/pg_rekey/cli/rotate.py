"""`pg-rekey rotate`: a new key now, and, with --wait, every row re-encrypted before it ends."""

import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import click
import psycopg

from pg_rekey import db, worker
from pg_rekey.cli.base import Output, fast_option, fetch, output, reason_option, scalar, workers_option
from pg_rekey.cli.commands import Command
from pg_rekey.cli.follow import follow, tell_error
from pg_rekey.cli.parameters import KEYRING
from pg_rekey.cli.rotations import COLUMNS
from pg_rekey.cli.tables import Row
from pg_rekey.cli.words import count, interval
from pg_rekey.errors import FINDINGS, LOCKED, UNFINISHED, Problem

# Opening twice, sealing, and writing, in openings: what rotations of 60,000 rows took.
WORK_PER_OPENING = 3.0


@click.command(cls=Command, example="pg-rekey rotate --wait --workers 2 --reason 'a colleague left'")
@click.option(
    "--keyring", type=KEYRING, metavar="NAME", help="Rotate this keyring; not needed where there is only one."
)
@click.option("--all", "everything", is_flag=True, help="Rotate every keyring.")
@click.option("--wait", is_flag=True, help="Re-encrypt here and now, and wait until every row is verified.")
@workers_option
@fast_option
@click.option(
    "--dry-run", is_flag=True, help="Open every row, change nothing, tell what a rotation would be."
)
@click.option("--supersede", is_flag=True, help="Take over the rows of a rotation that is under way.")
@reason_option
@output
def rotate(
    out: Output,
    keyring: str | None,
    everything: bool,
    wait: bool,
    workers: int,
    fast: bool,
    dry_run: bool,
    supersede: bool,
    reason: str | None,
) -> None:
    """Make a new key version, active at once, and queue the re-encryption of all rows.

    Without --wait the worker does it: pg_cron, or `pg-rekey work`. With it, exit code 4 says that a rotation
    failed, left rows that do not open, or was paused or replaced by another. With --all it also says that a
    keyring got no new version, as a rotation was under way: --supersede makes one.

    With --workers, several connections share the work. One that breaks off says so and connects again, while
    the others go on. `pg-rekey doctor` says how many suit the server.
    """
    if keyring and everything:
        raise click.UsageError("--keyring and --all exclude each other")
    if dry_run and (wait or supersede):
        raise click.UsageError("--dry-run changes nothing: neither --wait nor --supersede go with it")
    if (workers > 1 or fast) and not wait:
        raise click.UsageError("--workers and --fast are for --wait: without it, others do the work")
    with worker.connect() if wait else db.connect() as connection:
        if not wait and db.in_environment():
            db.unlock(connection)
        if not everything:
            keyring = _choose(connection, keyring)
        if dry_run:
            _dry_run(connection, out, keyring)
            connection.rollback()
            return
        with worker.transaction(connection) if wait else nullcontext():
            rotations = _begin(connection, keyring, reason, supersede, offer=wait)
        passed_by = {row["id"]: row["passed_by"] for row in rotations}
        if wait:
            steps = worker.Steps(connection, fast=fast)
            with worker.Crew(steps, workers, _tell):
                rotations = follow(connection, list(passed_by), lambda: work(steps))
            rotations = [{**row, "passed_by": passed_by[row["id"]]} for row in rotations]
            for row in worker.held_up(connection, list(passed_by)):
                click.echo(held_up(row), err=True)
        out.table(rotations, COLUMNS, empty="there is no keyring to rotate")
    if any(passed_by.values()) or (wait and any(row["state"] != "completed" for row in rotations)):
        raise click.exceptions.Exit(UNFINISHED)


def _tell(event: str, **fields: Any) -> None:
    """Say what a worker beside this one says, where the bar does not show it."""
    if event == "error":
        tell_error(fields)


def _begin(
    connection: db.Connection, keyring: str | None, reason: str | None, supersede: bool, offer: bool
) -> list[Row]:
    """Begin rotations, or, where one is under way and somebody is there to be asked, go on with that one."""
    # What was under way, and so got no new version, was asked for before this transaction.
    statement = "select r.*, r.created_at <> now() as passed_by from rekey.rotate_keys(%s, %s, %s) r"
    try:
        with connection.transaction():
            return fetch(connection, statement, keyring, reason, supersede)
    except psycopg.Error as error:
        if error.sqlstate != "RK004" or not (offer and sys.stdin.isatty() and sys.stderr.isatty()):
            raise
        rows = fetch(connection, db.query("under way"), keyring)
        for row in rows:
            question = f"Rotation {row['id']} of keyring {keyring} is under way. Go on with that one?"
            if click.confirm(question, default=True, err=True):
                return rows
        raise


def work(steps: worker.Steps) -> None:
    """Work for a moment: the time between two looks at the progress."""
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        step = steps.take()
        if step["event"] == "locked":
            message = f"{step['detail']['error']}: the rotation stays queued"
            raise Problem(message, "`pg-rekey work` goes on with it.", LOCKED)
        if step["wait"] is not None:
            time.sleep(step["wait"].total_seconds())
        if step["event"] in ("idle", "completed"):
            return


def held_up(row: Row) -> str:
    """Say which table held a rotation up."""
    said = f"rotation {row['id']} of keyring {row['keyring']}"
    if row["state"] == "failed":
        return f"{said} failed: {row['last_error']}"
    where = f" of {', '.join(row['relations'])}" if row["relations"] else ""
    left = f"{said} left {count(row['rows_failed'], 'row')}{where}"
    return f"{left}: `pg-rekey rotations failures {row['id']}` says why"


def _choose(connection: db.Connection, keyring: str | None) -> str:
    """Return the keyring that is meant."""
    if keyring is not None:
        return keyring
    statement = "select name from rekey.keyrings where retired_at is null order by name limit 11"
    rows = fetch(connection, statement)
    names = [str(row["name"]) for row in rows]
    if not names:
        raise Problem("there is no keyring", "Run `pg-rekey init`.")
    if len(names) > 1:
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise click.UsageError(f"which keyring? --all, or --keyring with one of: {shown}")
    return names[0]


def _dry_run(connection: db.Connection, out: Output, keyring: str | None) -> None:
    begun = time.monotonic()
    rows = fetch(connection, "select * from rekey.verify_ciphertexts(%s)", keyring)
    seconds = time.monotonic() - begun
    total = sum(row["rows"] for row in rows)
    failed = sum(row["failed"] for row in rows)
    pace = scalar(connection, db.query("pace"))
    estimate = total / pace if pace else seconds * WORK_PER_OPENING
    source = (
        f"at the {pace:,.0f} rows/s of the fastest of the last five"
        if pace
        else "a guess: there was none yet to go by"
    )
    if out.json:
        out.document(
            {"rows": total, "failed": failed, "opened_in": seconds, "estimate": estimate, "relations": rows}
        )
    else:
        out.table(rows, empty="there is nothing encrypted")
        not_open = f"{failed:,} {'does' if failed == 1 else 'do'} not open"
        took = interval(timedelta(seconds=seconds))
        out.say(f"{count(total, 'row')} opened in {took}, {not_open}; nothing was changed")
        out.say(f"a rotation takes about {interval(timedelta(seconds=max(estimate, 1)))} ({source})")
    if failed:
        raise click.exceptions.Exit(FINDINGS)

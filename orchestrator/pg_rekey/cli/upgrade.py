"""`pg-rekey upgrade`: the objects of an older release become those of this one, step by step."""

import time

import click
import psycopg

from pg_rekey import db, release
from pg_rekey.cli.base import Output, fetch, fetch_one, output, scalar
from pg_rekey.cli.commands import Command
from pg_rekey.errors import Problem

# Whoever waits for a table keeps everybody after it waiting. Less than deadlock_timeout: it is the step that
# gives way.
LOCK_TIMEOUT = "500ms"
ATTEMPTS = 20


@click.command(cls=Command, example="pg-rekey upgrade")
@click.option("--dry-run", is_flag=True, help="Show the steps, change nothing.")
@output
def upgrade(out: Output, dry_run: bool) -> None:
    """Bring the objects in this database to this version of pg_rekey. Safe to repeat.

    Each step from one release to the next is a transaction of its own: what was interrupted goes on when it
    is repeated. Rotations under way go on. On Supabase, a migration does it: `pg-rekey sql --road supabase
    --project .`
    """
    with db.connect(any_version=True) as connection:
        out.say(db.where(connection), style="bold")
        since, road = _find(connection)
        connection.commit()
        pending = _steps(since)
        for step in pending:
            out.say(f"  {' to '.join(step)}" + (", not applied" if dry_run else ""))
            if not dry_run:
                _apply(connection, step)
        state = "is up to date" if not pending else "can be upgraded" if dry_run else "is upgraded"
        out.done(
            f"pg_rekey {since if dry_run else release.version()} ({road}) {state}",
            database=db.where(connection),
            road=road,
            since=since,
            version=since if dry_run else release.version(),
            steps=[{"from": old, "to": new} for old, new in pending],
        )


def _find(connection: db.Connection) -> tuple[str, release.Road]:
    """Return the version that is installed, and by which road."""
    rows = fetch(connection, db.query("installed"))
    if not rows:
        raise Problem("pg_rekey is not installed in this database", "`pg-rekey init` installs it.")
    [found] = rows
    if found["version"] is not None:
        return str(found["version"]), "extension"
    migrated = db.migrations(connection)
    return str(scalar(connection, "select rekey.version()")), "supabase" if migrated else "plain"


def _steps(since: str) -> list[release.Step]:
    try:
        return release.steps(since)
    except KeyError:
        raise Problem(
            f"this database has pg_rekey {since}, which this pg-rekey {release.version()} does not know",
            "It is of a newer release, or of none: use the pg-rekey of that version or a newer one.",
        ) from None


def _apply(connection: db.Connection, step: release.Step) -> None:
    """Apply a step, unless somebody else has meanwhile; wait for locks, but not long at a time."""
    for attempt in range(ATTEMPTS):
        try:
            with connection.transaction():
                connection.execute("select set_config('lock_timeout', %s, true)", [LOCK_TIMEOUT])
                connection.execute("select pg_advisory_xact_lock(0, 4)")
                # Its query locks a catalog: without that, a session goes on with functions that it knows.
                version, road = _find(connection)
                if version == step[0]:
                    _run(connection, road, step)
            return
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            time.sleep(min(attempt + 1, 5))
    holders = ", ".join(row["holder"] for row in fetch(connection, db.query("lock holders")))
    raise Problem(
        f"others hold locks on the tables of pg_rekey: it stays at {step[0]}",
        f"Let them end, or end them: {holders or 'they have gone by now'}. Then run this again.",
    )


def _run(connection: db.Connection, road: release.Road, step: release.Step) -> None:
    if road == "plain":
        by = fetch_one(connection, db.query("installer"))
        if not by["allowed"]:
            raise Problem(f"{by['role']} installed pg_rekey", f"Connect as {by['role']}, or as a superuser.")
        connection.execute(release.step_script("plain", step).encode())
    elif road == "supabase":
        raise Problem(
            "migrations of a Supabase project keep this database",
            "`pg-rekey sql --road supabase --project .` writes the next one, `supabase db push` applies it.",
        )
    elif scalar(connection, db.query("pg_tle has it")):
        if not scalar(connection, db.query("pg_tle path"), *step):
            raise Problem(
                f"pg_tle does not know the way from {step[0]} to {step[1]}",
                f"A member of pgtle_admin runs what `pg-rekey sql --road pgtle --since {step[0]}` prints.",
            )
        connection.execute(f"alter extension pg_rekey update to '{step[1]}'")
    elif not scalar(connection, db.query("extension path"), *step):
        raise Problem(
            f"the server has no files that take the extension from {step[0]} to {step[1]}",
            "Run `make install` of the new version on the server first.",
        )
    else:
        connection.execute(f"alter extension pg_rekey update to '{step[1]}'")

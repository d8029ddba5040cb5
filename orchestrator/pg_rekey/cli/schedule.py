"""`pg-rekey schedule`: when keyrings rotate by themselves."""

import click

from pg_rekey import db
from pg_rekey.cli.base import Output, database, fetch, fetch_one
from pg_rekey.cli.commands import Group
from pg_rekey.cli.parameters import KEYRING


@click.group(cls=Group)
def schedule() -> None:
    """Schedules: when keyrings rotate by themselves."""


@schedule.command(example="pg-rekey schedule show")
@database()
def show(connection: db.Connection, out: Output) -> None:
    """Show the schedule of every keyring."""
    out.table(fetch(connection, "select * from rekey.schedule_status order by keyring"), empty="no keyrings")


@schedule.command("set", example="pg-rekey schedule set default '90 days' --first-at '2027-01-01 03:00 UTC'")
@click.argument("keyring", type=KEYRING)
@click.argument("interval")
@click.option("--first-at", metavar="TIMESTAMP", help="First rotation; by default after one interval.")
@database()
def set_(connection: db.Connection, out: Output, keyring: str, interval: str, first_at: str | None) -> None:
    """Rotate a keyring every INTERVAL, such as '90 days'."""
    statement = "set schedule" if first_at is None else "set schedule from"
    given = [keyring, interval] if first_at is None else [keyring, interval, first_at]
    connection.execute(db.query(statement), given)
    row = fetch_one(connection, "select * from rekey.schedule_status where keyring = %s", keyring)
    out.done(f"keyring {keyring} rotates next at {row['next_rotation_at']:%Y-%m-%d %H:%M:%S %Z}", **row)


@schedule.command(example="pg-rekey schedule clear default")
@click.argument("keyring", type=KEYRING)
@database()
def clear(connection: db.Connection, out: Output, keyring: str) -> None:
    """Let a keyring rotate only when somebody says so."""
    connection.execute("select rekey.clear_schedule(%s)", [keyring])
    out.done(f"keyring {keyring} has no schedule", keyring=keyring)

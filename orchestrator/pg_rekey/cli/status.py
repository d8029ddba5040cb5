"""`pg-rekey status`: keys, rotations and the worker at a glance."""

import click

from pg_rekey import db
from pg_rekey.cli.base import Output, database, fetch, fetch_one
from pg_rekey.errors import FINDINGS, UNFINISHED


@click.command()
@click.option(
    "--check", is_flag=True, help="Exit code 4 if a rotation failed, 5 if one is overdue or unscheduled."
)
@database()
def status(connection: db.Connection, out: Output, check: bool) -> None:
    """Show keyrings, rotations under way or gone wrong, and when the worker last ran."""
    keyrings = fetch(connection, db.query("status keyrings"))
    rotations = fetch(connection, db.query("status rotations"))
    worker = fetch_one(connection, db.query("status worker"))
    search = fetch(connection, "select * from rekey.search_status")
    if out.json:
        document = {"keyrings": keyrings, "rotations": rotations, "worker": worker}
        out.document(document | {"search": search[0] if search else None})
    else:
        out.say(db.where(connection), style="bold")
        out.say()
        out.table(keyrings, empty="no keyrings: run `pg-rekey init`")
        out.say()
        out.table(rotations, empty="no rotation is under way")
        out.say()
        out.record(worker)
        if search and search[0]["state"] != "complete":
            out.say()
            out.say("search for versions that are to be destroyed", style="bold")
            out.record(search[0])
    if check and any(row["state"] in ("failed", "completed_with_failures") for row in rotations):
        raise click.exceptions.Exit(UNFINISHED)
    if check and any(row["schedule"] != "on time" for row in keyrings):
        raise click.exceptions.Exit(FINDINGS)

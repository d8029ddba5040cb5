"""`pg-rekey doctor`: what is wrong, and what to do about it."""

import click

from pg_rekey import db
from pg_rekey.cli.base import Output, database
from pg_rekey.cli.commands import Command
from pg_rekey.doctor import examine
from pg_rekey.errors import FINDINGS


@click.command(cls=Command, example="pg-rekey doctor")
@database()
def doctor(connection: db.Connection, out: Output) -> None:
    """Look for what endangers keys or keeps rotations from happening. Exit code 5 if there is anything."""
    findings = examine(connection)
    out.table([finding.row() for finding in findings], empty="nothing to complain about")
    if any(finding.severity != "info" for finding in findings):
        raise click.exceptions.Exit(FINDINGS)

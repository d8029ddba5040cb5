"""`pg-rekey settings`: how the engine of this database works."""

import click

from pg_rekey import db
from pg_rekey.cli.base import Output, database, fetch, fetch_one
from pg_rekey.cli.commands import Group
from pg_rekey.cli.parameters import SETTING
from pg_rekey.cli.words import interval_of


@click.group(cls=Group)
def settings() -> None:
    """Settings of the engine, kept in the database; every change is audited."""


@settings.command(example="pg-rekey settings show")
@database()
def show(connection: db.Connection, out: Output) -> None:
    """Show all settings with their meaning."""
    rows = fetch(connection, "select * from rekey.setting_status order by name")
    if out.json:
        out.document(rows)
    else:
        out.table([{**row, "value": interval_of(row["value"] or "")} for row in rows])


@settings.command("set", example="pg-rekey settings set max_rows_per_second 5000")
@click.argument("name", type=SETTING)
@click.argument("value", required=False)
@click.option("--default", "reset", is_flag=True, help="Back to the default.")
@database()
def set_(connection: db.Connection, out: Output, name: str, value: str | None, reset: bool) -> None:
    """Change a setting."""
    if (value is None) != reset:
        raise click.UsageError("give a VALUE or --default")
    if value == "":
        raise click.UsageError("an empty VALUE is none: --default takes a setting back to its default")
    connection.execute("select rekey.set_setting(%s, %s)", [name, value])
    row = fetch_one(connection, "select name, value from rekey.setting_status where name = %s", name)
    out.done(f"{name} is {'not set' if row['value'] is None else interval_of(row['value'])}", **row)

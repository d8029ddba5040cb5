"""`pg-rekey metrics`: for Prometheus."""

import click

from pg_rekey import db
from pg_rekey.cli.base import Output, database, fetch
from pg_rekey.cli.commands import Command
from pg_rekey.metrics import exposition


@click.command(cls=Command, example="pg-rekey metrics")
@database()
def metrics(connection: db.Connection, out: Output) -> None:
    """Print the metrics in Prometheus' text format, for node_exporter's textfile collector."""
    rows = fetch(connection, "select * from rekey.metrics()")
    if out.json:
        out.document(rows)
    else:
        click.echo(exposition(rows), nl=False)

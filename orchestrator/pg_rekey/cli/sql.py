"""`pg-rekey sql`: the installation script."""

import click

from pg_rekey import release
from pg_rekey.cli.base import Output, output


@click.command()
@click.option(
    "--road",
    type=click.Choice(["plain", "extension", "supabase"]),
    default="plain",
    help="plain: one transaction anywhere; extension: for CREATE EXTENSION; supabase: a migration.",
)
@output
def sql(out: Output, road: release.Road) -> None:
    """Print the installation script, to read it or to run it by other means."""
    script = release.sql_script(road)
    if out.json:
        out.document({"road": road, "version": release.version(), "script": script})
    else:
        click.echo(script, nl=False)

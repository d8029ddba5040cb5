"""`pg-rekey sql`: the installation script."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from pg_rekey import release
from pg_rekey.cli.base import Output, output, write_new
from pg_rekey.errors import USAGE, Problem

STAMP = "%Y%m%d%H%M%S"


@click.command()
@click.option(
    "--road",
    type=click.Choice(["plain", "extension", "supabase"]),
    default="plain",
    help="plain: one transaction anywhere; extension: for CREATE EXTENSION; supabase: a migration.",
)
@click.option(
    "--project",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="With supabase: write it as the next migration of the project in this folder.",
)
@output
def sql(out: Output, road: release.Road, project: Path | None) -> None:
    """Print the installation script, to read it or to run it by other means."""
    script = release.sql_script(road)
    if project is not None:
        if road != "supabase":
            raise click.UsageError("--project goes with --road supabase, and only with it")
        path = _next_migration(project)
        write_new(path, script, 0o644)
        out.done(f"{path} written; `supabase db push` applies it", path=str(path), version=release.version())
    elif out.json:
        out.document({"road": road, "version": release.version(), "script": script})
    else:
        click.echo(script, nl=False)


def _next_migration(project: Path) -> Path:
    """Return the name of a migration that comes after all that the project has."""
    if not (project / "supabase").is_dir():
        raise Problem(f"{project} is no Supabase project", "`supabase init` makes it one.", USAGE)
    folder = project / "supabase" / "migrations"
    folder.mkdir(exist_ok=True)
    if found := sorted(folder.glob("*_pg_rekey.sql")):
        raise Problem(f"the project has it already: {found[0]}", "A database takes it once.")
    stamps = [datetime.now(UTC)]
    # The Supabase CLI refuses a migration that is older than the last one applied.
    for path in folder.glob("[0-9]*_*.sql"):
        try:
            last = datetime.strptime(path.name.partition("_")[0], STAMP).replace(tzinfo=UTC)
        except ValueError:
            continue
        stamps.append(last + timedelta(seconds=1))
    return folder / f"{max(stamps):{STAMP}}_pg_rekey.sql"
